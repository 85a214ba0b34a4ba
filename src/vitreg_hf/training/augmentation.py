# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Random crops, flips, RandAugment and mixing for training.

Size, mean, std and the filter of resizing are read off the image processor, which is also all that evaluation uses:
what a model was trained for is saved with it, in one place.

Shapes: B images of H x W pixels as they are decoded, h x w pixels as the model gets them, K classes.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from torchvision.transforms import v2
from transformers.image_utils import PILImageResampling, pil_torch_interpolation_mapping

from vitreg_hf.model.image_processing_vitreg import ViTRegImageProcessor


class EvaluationTransform:
    """What the saved image processor does, and nothing else."""

    def __init__(self, processor: ViTRegImageProcessor) -> None:
        self.processor = processor

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        """uint8 images `(3, H, W)` of any sizes to `(B, 3, h, w)` float32."""
        return self.processor(list(images), return_tensors="pt")["pixel_values"]


class TrainingTransform:
    """Random geometry and colours between decoding and normalisation; draws from torch's global generator.

    Args:
        processor: gives size, filter, mean and std.
        crop_scale: range of the area of a random resized crop, as shares of the image; None resizes (and crops) as in
            evaluation.
        horizontal_flip: mirror half of the images.
        rand_augment: RandAugment (Cubuk et al., arXiv 1909.13719) with torchvision's defaults.

    Raises:
        ValueError: if the range is not within 0 < low <= high <= 1.
    """

    def __init__(
        self,
        processor: ViTRegImageProcessor,
        crop_scale: tuple[float, float] | None = None,
        horizontal_flip: bool = False,
        rand_augment: bool = False,
    ) -> None:
        if crop_scale is not None and not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"Expected a crop scale with 0 < low <= high <= 1, got {crop_scale}")
        self.processor = processor
        self.crop = None if crop_scale is None else _random_resized_crop(processor, crop_scale)
        steps = [v2.RandomHorizontalFlip()] if horizontal_flip else []
        self.steps = steps + ([v2.RandAugment(interpolation=v2.InterpolationMode.BILINEAR)] if rand_augment else [])

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        """uint8 images `(3, H, W)` of any sizes to `(B, 3, h, w)` float32."""
        if self.crop is None:
            images = self.processor(list(images), do_rescale=False, do_normalize=False)["pixel_values"]
        else:
            images = [self.crop(image) for image in images]
        for step in self.steps:
            images = [step(image) for image in images]
        sized = self.processor(list(images), do_resize=False, do_center_crop=False, return_tensors="pt")
        return sized["pixel_values"]


def model_size(processor: ViTRegImageProcessor) -> tuple[int, int]:
    """Height and width of what a processor hands to the model.

    Raises:
        ValueError: if they depend on the image.
    """
    size = dict(processor.crop_size if processor.do_center_crop else processor.size)
    if not {"height", "width"} <= size.keys():
        raise ValueError(f"Expected an image processor with a fixed height and width, got size={size} and no crop")
    return size["height"], size["width"]


def _random_resized_crop(processor: ViTRegImageProcessor, scale: tuple[float, float]) -> v2.RandomResizedCrop:
    interpolation = pil_torch_interpolation_mapping[PILImageResampling(processor.resample)]
    return v2.RandomResizedCrop(model_size(processor), scale=scale, interpolation=interpolation, antialias=True)


Mixing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def mixing(num_classes: int, mixup_alpha: float, cutmix_alpha: float) -> Mixing | None:
    """MixUp (arXiv 1710.09412), CutMix (arXiv 1905.04899), or one of both at random for each batch.

    Args:
        num_classes: K.
        mixup_alpha: parameter of MixUp's Beta distribution; 0 turns MixUp off.
        cutmix_alpha: that of CutMix.

    Returns:
        A function of images `(B, 3, h, w)` and class indices `(B,)` that returns mixed images and targets `(B, K)`, or
        None if both are off.

    Raises:
        ValueError: if a parameter is negative.
    """
    if mixup_alpha < 0 or cutmix_alpha < 0:
        raise ValueError(f"Expected mixup_alpha and cutmix_alpha of 0 or more, got {mixup_alpha} and {cutmix_alpha}")
    chosen: list[torch.nn.Module] = []
    if mixup_alpha:
        chosen.append(v2.MixUp(alpha=mixup_alpha, num_classes=num_classes))
    if cutmix_alpha:
        chosen.append(v2.CutMix(alpha=cutmix_alpha, num_classes=num_classes))
    return cast(Mixing, v2.RandomChoice(chosen)) if chosen else None
