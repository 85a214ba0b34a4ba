# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The torchvision image processor of ViTReg: batched, on the CPU or a GPU.

This module imports without torchvision; the class then asks for it when constructed.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict
from transformers.utils import requires_backends

from .image_inputs import read_image, resize_nearest, resize_with_pillow, resized_size
from .image_processing_pil_vitreg import (
    ViTRegImageProcessorKwargs,
    ViTRegImageProcessorMixin,
    ViTRegImageProcessorPil,
)
from .processor_checks import pil_filter


def _needs_two_passes(image: Tensor, resample: PILImageResampling) -> bool:
    """Whether `(..., C, H, W)` has to be resized in width first, then in height, to agree with Pillow.

    Pillow and torch's CPU kernel round and clip to 8 bit between these passes. A GPU does not: bicubic overshoots then
    survive the first pass, and edges differ by up to 30 grey levels. Bilinear does not overshoot.
    """
    return image.dtype == torch.uint8 and image.device.type != "cpu" and resample != PILImageResampling.BILINEAR


class ViTRegImageProcessor(ViTRegImageProcessorMixin, TorchvisionBackend):
    """Prepares images with torchvision, grouped by shape, on any device. Options: `ViTRegImageProcessorMixin`."""

    valid_kwargs = ViTRegImageProcessorKwargs  # also found here by name: Transformers looks in the class's own module

    def __init__(self, **kwargs: Any) -> None:
        requires_backends(self, ["torch", "torchvision"])
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """All options; after `register_for_auto_class`, with the classes of both backends in the map."""
        saved = super().to_dict()
        if self._auto_class is not None and "auto_map" in saved:
            classes = (ViTRegImageProcessorPil, type(self))  # in the order that Transformers expects
            names = [f"{cls.__module__.rsplit('.', 1)[-1]}.{cls.__name__}" for cls in classes]
            saved["auto_map"] = {**saved["auto_map"], self._auto_class: names}
        return saved

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Read one image into a channels-first tensor `(C, H, W)`, uint8 or float32, on `device` if given."""
        pixels = read_image(image, bool(do_convert_rgb), input_data_format)
        return pixels if device is None else pixels.to(device)

    def resize(
        self,
        image: Tensor,
        size: SizeDict,
        resample: Any = PILImageResampling.BILINEAR,
        antialias: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        """Resize `(..., C, H, W)` to what Pillow returns, within a grey level (two where bicubic enlarges).

        Raises:
            ValueError: for filters that torchvision lacks; the PIL processor has them.
        """
        height, width = resized_size(image.shape[-2], image.shape[-1], size)
        resample = pil_filter(resample)
        if resample == PILImageResampling.NEAREST:
            return resize_nearest(image, height, width)
        if resample not in (PILImageResampling.BILINEAR, PILImageResampling.BICUBIC, PILImageResampling.LANCZOS):
            raise ValueError(f"expected resample NEAREST, BILINEAR, BICUBIC or LANCZOS, got {resample.name}")
        if width == 1:  # torch 2.11 to 2.15 return the first row everywhere, or stop at an assertion of their own
            columns = resize_with_pillow(image.flatten(0, -3).cpu().numpy(), height, width, resample)
            return torch.from_numpy(columns).to(image.device).unflatten(0, image.shape[:-2])
        if _needs_two_passes(image, resample):
            image = super().resize(image, SizeDict(height=image.shape[-2], width=width), resample, antialias, **kwargs)
        return super().resize(image, SizeDict(height=height, width=width), resample, antialias, **kwargs)


__all__ = ["ViTRegImageProcessor"]
