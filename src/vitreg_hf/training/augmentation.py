# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Random crops, flips, colours and mixing for training.

Size, mean, std and the filter of resizing are read off the image processor, which is also all that evaluation uses:
what a model was trained for is saved with it, in one place.

Shapes: B images of C channels and H x W pixels as they are decoded, h x w pixels as the model gets them, K classes.
"""

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from torchvision.transforms import v2
from transformers.image_utils import PILImageResampling, pil_torch_interpolation_mapping

from vitreg_hf.model.image_processing_vitreg import ViTRegImageProcessor
from vitreg_hf.training.scaled_jpeg import ScaledImage


class EvaluationTransform:
    """What the saved image processor does, and nothing else."""

    def __init__(self, processor: ViTRegImageProcessor) -> None:
        self.processor = processor

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        """uint8 images `(C, H, W)` of any sizes to `(B, C, h, w)` float32."""
        return self.processor(list(images), return_tensors="pt")["pixel_values"]


class TrainingTransform:
    """Random geometry and colours of single images between decoding and normalisation.

    `augment` draws from torch's global generator, which a data set seeds per sample; a call of the transform makes a
    batch of augmented images and draws nothing.

    Args:
        processor: gives size, filter, mean and std.
        crop_scale: range of the area of a random resized crop, as shares of the image; None resizes (and crops) as in
            evaluation.
        horizontal_flip: mirror half of the images.
        rand_augment: RandAugment (Cubuk et al., arXiv 1909.13719) with torchvision's defaults.
        three_augment: one of grey, solarised and blurred (DeiT III, Touvron et al., arXiv 2204.07118).
        color_jitter: strength of random brightness, contrast and saturation; 0: none.

    Raises:
        ValueError: if the range is not within 0 < low <= high <= 1.
    """

    def __init__(
        self,
        processor: ViTRegImageProcessor,
        crop_scale: tuple[float, float] | None = None,
        horizontal_flip: bool = False,
        rand_augment: bool = False,
        three_augment: bool = False,
        color_jitter: float = 0.0,
    ) -> None:
        if crop_scale is not None and not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"Expected a crop scale with 0 < low <= high <= 1, got {crop_scale}")
        self.processor = processor
        self.crop = None if crop_scale is None else _random_resized_crop(processor, crop_scale)
        self.names = [] if crop_scale is None else ["random crops"]
        self.steps: list[torch.nn.Module] = []
        if horizontal_flip:
            self._add("mirrored", v2.RandomHorizontalFlip())
        if rand_augment:
            self._add("RandAugment", v2.RandAugment(interpolation=v2.InterpolationMode.BILINEAR))
        if three_augment:
            self._add("grey, solarised or blurred", _three_augment())
        if color_jitter:
            self._add("colour jitter", v2.ColorJitter(color_jitter, color_jitter, color_jitter))

    def _add(self, name: str, step: torch.nn.Module) -> None:
        self.names.append(name)
        self.steps.append(step)

    @property
    def least_edge(self) -> int | None:
        """Pixels of the shorter edge of an image that are enough: no crop has to be enlarged because of them.

        Without random crops the shorter edge is twice the size that images are resized to. With them the smallest crop
        that can be drawn, by area and by its narrowest shape, still has the pixels that it is resized to, and the
        shorter edge is at least twice that size. None if images are not resized.
        """
        if self.crop is not None:
            narrowest = math.sqrt(self.crop.scale[0] * self.crop.ratio[0])
            return math.ceil(max(self.crop.size) * max(2.0, 1 / narrowest))
        return 2 * max(dict(self.processor.size).values()) if self.processor.do_resize else None

    @property
    def is_random(self) -> bool:
        """Whether an image is not the same each time."""
        return bool(self.names)

    def augment(self, image: Tensor) -> Tensor:
        """One decoded image, uint8 `(C, H, W)`, sized for the model and augmented; itself if nothing is random."""
        image = self._sized(image)
        for step in self.steps:
            image = step(image)
        return image

    def _sized(self, image: Tensor) -> Tensor:
        if self.crop is not None:
            return self._cropped(image, self.crop)
        if isinstance(image, ScaledImage):
            image = image.as_subclass(Tensor)
        if not self.steps:
            return image
        resized: Tensor = self.processor([image], do_rescale=False, do_normalize=False)["pixel_values"][0]
        return resized

    def _cropped(self, image: Tensor, crop: v2.RandomResizedCrop) -> Tensor:
        if not isinstance(image, ScaledImage):
            cropped: Tensor = crop(image)
            return cropped
        drawn = crop.make_params([torch.empty(image.shape[0], *image.whole_size, device="meta")])
        box = image.part(*(drawn[name] for name in ("top", "left", "height", "width")))
        how = {"interpolation": crop.interpolation, "antialias": crop.antialias}
        return v2.functional.resized_crop(image.as_subclass(Tensor), *box, crop.size, **how)

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        """Augmented images to a normalised batch `(B, C, h, w)` float32."""
        if not self.is_random:
            return self.processor(list(images), return_tensors="pt")["pixel_values"]
        sized = self.processor(list(images), do_resize=False, do_center_crop=False, return_tensors="pt")
        return sized["pixel_values"]


def _three_augment() -> torch.nn.Module:
    grey, solarised = v2.Grayscale(num_output_channels=3), v2.RandomSolarize(threshold=128, p=1.0)
    # A kernel of 6 standard deviations of the widest blur holds nearly all of its weight.
    return v2.RandomChoice([grey, solarised, v2.GaussianBlur(kernel_size=13, sigma=(0.1, 2.0))])


def model_size(processor: ViTRegImageProcessor) -> tuple[int, int]:
    """Height and width of what a processor hands to the model.

    Raises:
        ValueError: if they depend on the image.
    """
    if processor.max_num_patches is not None:
        raise ValueError(
            "Expected an image processor with a fixed height and width, got one that keeps the aspect ratio up to "
            f"max_num_patches={processor.max_num_patches}"
        )
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
