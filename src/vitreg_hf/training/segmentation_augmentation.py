# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Random scale, crop and mirroring of an image together with the classes of its pixels.

Size, mean, std and the filter of resizing are read off the image processor, as for classification.

Shapes: B images of H x W pixels as they are decoded, h x w pixels as the model gets them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.image_utils import SizeDict

from vitreg_hf.model.image_inputs import IGNORED_LABEL, resize_nearest
from vitreg_hf.model.image_processing_vitreg import ViTRegImageProcessor
from vitreg_hf.training.augmentation import model_size


class SceneTransform:
    """Random geometry of an image and its mask; `augment` draws from torch's global generator, calling it nothing.

    Args:
        processor: gives size, filter, mean and std.
        scale: range of the size to which an image is brought before h x w pixels are cut out of it, relative to the
            smallest that covers these: 0.5..2.0 is common.
        horizontal_flip: mirror half of the images.

    Raises:
        ValueError: if the range is not within 0 < low <= high, or the size depends on the image.
    """

    def __init__(
        self, processor: ViTRegImageProcessor, scale: tuple[float, float] = (1.0, 1.0), horizontal_flip: bool = False
    ) -> None:
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"Expected a scale with 0 < low <= high, got {scale}")
        self.processor, self.scale, self.horizontal_flip = processor, scale, horizontal_flip
        self.size = model_size(processor)

    def augment(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 `(C, H, W)` and int64 `(H, W)` to `(C, h, w)` and `(h, w)`; 255 where the image does not reach."""
        image, mask = self._scaled(image, mask)
        image, mask = self._cropped(image, mask)
        if self.horizontal_flip and torch.rand(()) < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        return image, mask

    def __call__(self, images: Sequence[Tensor], masks: Sequence[Tensor]) -> dict[str, Tensor]:
        """Augmented pairs to a batch: `pixel_values` `(B, C, h, w)` float32 and `labels` `(B, h, w)` int64."""
        sized = self.processor(list(images), do_resize=False, do_center_crop=False, return_tensors="pt")
        return {"pixel_values": sized["pixel_values"], "labels": torch.stack(list(masks))}

    def _scaled(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        covering = max(wanted / edge for wanted, edge in zip(self.size, mask.shape, strict=True))
        factor = covering * float(torch.empty(()).uniform_(*self.scale))
        height, width = (max(round(edge * factor), 1) for edge in mask.shape)
        resized = self.processor.resize(image, SizeDict(height=height, width=width), resample=self.processor.resample)
        return resized, resize_nearest(mask, height, width)

    def _cropped(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """A random part of h x w pixels; an image that is too small is padded with grey on the right and below."""
        missing = [max(wanted - edge, 0) for wanted, edge in zip(self.size, mask.shape, strict=True)]
        image = F.pad(image, (0, missing[1], 0, missing[0]), value=128)
        mask = F.pad(mask, (0, missing[1], 0, missing[0]), value=IGNORED_LABEL)
        spare = [edge - wanted for wanted, edge in zip(self.size, mask.shape, strict=True)]
        top, left = (int(torch.randint(number + 1, ())) for number in spare)
        part = (..., slice(top, top + self.size[0]), slice(left, left + self.size[1]))
        return image[part], mask[part]


class SceneEvaluation:
    """What the saved image processor does to images and masks, and nothing else."""

    def __init__(self, processor: ViTRegImageProcessor) -> None:
        self.processor = processor

    def __call__(self, images: Sequence[Tensor], masks: Sequence[Tensor]) -> dict[str, Tensor]:
        """Pairs as they are decoded to a batch, as `SceneTransform` makes it."""
        made = self.processor.preprocess(list(images), list(masks), return_tensors="pt")
        return {"pixel_values": made["pixel_values"], "labels": made["labels"]}


class CollateScenes:
    """Makes a batch of pairs; the transform runs in the loader's workers."""

    def __init__(self, transform: SceneTransform | SceneEvaluation) -> None:
        self.transform = transform

    def __call__(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """`pixel_values` and `labels` of examples that start with an image and a mask."""
        images, masks = zip(*(example[:2] for example in examples), strict=True)
        return self.transform(images, masks)
