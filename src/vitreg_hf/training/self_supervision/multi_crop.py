# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Several random crops of one image, large ones and small ones, each with colours of its own.

Size, filter, mean and std are read off the image processor, as in all training here. Crops are made one image at a
time, under the seed of the image, and normalised a batch at a time.

Shapes: an image of H x W pixels, 2 global crops of h x w, L local crops of l x l, B images.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import v2
from transformers.image_utils import PILImageResampling, pil_torch_interpolation_mapping

from vitreg_hf.model.image_processing_vitreg import ViTRegImageProcessor
from vitreg_hf.training.augmentation import model_size

NUM_GLOBAL_CROPS = 2

_BLUR_KERNEL = 9  # pixels
_BLUR_OF_GLOBAL_CROPS = (1.0, 0.1)  # probability for the first and the second
_BLUR_OF_LOCAL_CROPS = 0.5
_SOLARISE = 0.2  # of the second global crop
_MID_GREY = 128


class CropBatch(NamedTuple):
    """Normalised crops, crop by crop: all images' first crops, then all images' second ones.

    Attributes:
        global_crops: float32 `(2 * B, 3, h, w)`.
        local_crops: float32 `(L * B, 3, l, l)`; None if there are none.
    """

    global_crops: Tensor
    local_crops: Tensor | None


class MultiCrop:
    """Crops of one image, drawn from torch's global generator.

    Args:
        processor: gives the size of global crops and the filter.
        num_local_crops: L.
        local_crop_size: l in pixels.
        global_scale: range of the area of global crops, as shares of the image.
        local_scale: that of local crops.
        horizontal_flip: mirror half of the crops.
        colours: change brightness, contrast, saturation, hue and sharpness; turn some crops grey, solarise some.

    Raises:
        ValueError: if a number is negative, or a range is not within 0 < low <= high <= 1.

    Reference: Caron et al., SwAV (arXiv 2006.09882), section 3.2; the numbers are those of DINOv2.
    """

    def __init__(
        self,
        processor: ViTRegImageProcessor,
        num_local_crops: int = 8,
        local_crop_size: int = 96,
        global_scale: tuple[float, float] = (0.32, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.32),
        horizontal_flip: bool = True,
        colours: bool = True,
    ) -> None:
        if num_local_crops < 0 or local_crop_size < 1:
            raise ValueError(f"Expected local crops of 1 or more pixels, got {num_local_crops} of {local_crop_size}")
        for low, high in (global_scale, local_scale):
            if not 0 < low <= high <= 1:
                raise ValueError(f"Expected a scale with 0 < low <= high <= 1, got {(low, high)}")
        self.num_local_crops = num_local_crops
        interpolation = pil_torch_interpolation_mapping[PILImageResampling(processor.resample)]
        flip = [v2.RandomHorizontalFlip()] if horizontal_flip else []

        def pipeline(size: Sequence[int], scale: tuple[float, float], blur: float, solarise: float = 0) -> v2.Compose:
            crop = v2.RandomResizedCrop(size, scale=scale, interpolation=interpolation, antialias=True)
            return v2.Compose([crop, *flip, *(_colour_steps(blur, solarise) if colours else [])])

        size, (first_blur, second_blur) = model_size(processor), _BLUR_OF_GLOBAL_CROPS
        self.first = pipeline(size, global_scale, first_blur)
        self.second = pipeline(size, global_scale, second_blur, _SOLARISE)
        self.local = pipeline((local_crop_size, local_crop_size), local_scale, _BLUR_OF_LOCAL_CROPS)

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of a uint8 image `(3, H, W)`: global crops `(2, 3, h, w)` and local crops `(L, 3, l, l)`, uint8."""
        global_crops = torch.stack([self.first(image), self.second(image)])
        local_crops = [self.local(image) for _ in range(self.num_local_crops)]
        return global_crops, torch.stack(local_crops) if local_crops else None


class MultiCropCollate:
    """Puts crops of images into a batch and normalises them as the image processor does.

    Args:
        processor: gives mean and std.
    """

    def __init__(self, processor: ViTRegImageProcessor) -> None:
        self.processor = processor

    def __call__(self, examples: Sequence[Any]) -> CropBatch:
        """What `MultiCrop` gives for B images, each as `image` of an `Example`, as one batch."""
        global_crops, local_crops = zip(*(example.image for example in examples), strict=True)
        return CropBatch(
            self._normalised(global_crops), None if local_crops[0] is None else self._normalised(local_crops)
        )

    def _normalised(self, crops: Sequence[Tensor]) -> Tensor:
        """`(n, 3, h, w)` of each image to `(n * B, 3, h, w)`, crop by crop."""
        pixels = list(torch.stack(list(crops), dim=1).flatten(0, 1))
        sized = self.processor(pixels, do_resize=False, do_center_crop=False, return_tensors="pt")
        return sized["pixel_values"]


def _colour_steps(blur: float, solarise: float) -> list[v2.Transform]:
    jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    steps = [
        v2.RandomApply([jitter], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([v2.GaussianBlur(_BLUR_KERNEL, sigma=(0.1, 2.0))], p=blur),
    ]
    return [*steps, v2.RandomSolarize(_MID_GREY, p=solarise)] if solarise else steps
