# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The torchvision image processor of ViTReg: batched, on the CPU or a GPU.

On the CPU grey levels are resized from where they lie and written straight into the batch; on a GPU, and of floats,
images of one size are stacked as in Transformers. Values are the same.

This module imports without torchvision; the class then asks for it when constructed.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict
from transformers.utils import requires_backends

from .image_inputs import resize_nearest, resize_with_pillow, resized_size, view_image
from .image_processing_pil_vitreg import (
    ViTRegImageProcessorKwargs,
    ViTRegImageProcessorMixin,
    ViTRegImageProcessorPil,
)
from .pixel_memory import interleaved, moved
from .processor_checks import pil_filter


def _needs_two_passes(image: Tensor, resample: PILImageResampling) -> bool:
    """Whether `(..., C, H, W)` has to be resized in width first, then in height, to agree with Pillow.

    Pillow and torch's CPU kernel round and clip to 8 bit between these passes. A GPU does not: bicubic overshoots then
    survive the first pass, and edges differ by up to 30 grey levels. Bilinear does not overshoot.
    """
    return image.dtype == torch.uint8 and image.device.type != "cpu" and resample != PILImageResampling.BILINEAR


def _has_levels(image: Tensor) -> bool:
    """Whether it holds grey levels, on the CPU; not while it is traced, which cannot follow memory."""
    return image.dtype == torch.uint8 and image.device.type == "cpu" and not torch.compiler.is_compiling()


def _is_photo(image: Tensor) -> bool:
    """Whether it is a single RGB image of grey levels on the CPU, `(3, H, W)`."""
    return _has_levels(image) and image.ndim == 3 and image.shape[0] == 3


@cache
def _native_filters() -> dict[PILImageResampling, str]:
    """Filters for which torchvision hands bytes to PyTorch on this CPU, by PyTorch's name; else it makes floats."""
    vectorised = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    bilinear = {PILImageResampling.BILINEAR: "bilinear"} if vectorised else {}
    return {PILImageResampling.BICUBIC: "bicubic", **bilinear}


def _resize_photo(image: Tensor, height: int, width: int, resample: PILImageResampling, antialias: bool) -> Tensor:
    """What torchvision does with bytes, without what it does around that."""
    if image.shape[-2:] == (height, width):
        return image
    pixels = interleaved(image)
    if pixels.stride(0) == 1:  # this stride of the batch keeps PyTorch from taking one image for planes
        pixels = pixels.as_strided((1, *pixels.shape), (pixels.numel(), *pixels.stride()))
    else:
        pixels = pixels[None]
    mode = _native_filters()[resample]
    return F.interpolate(pixels, size=(height, width), mode=mode, antialias=antialias)[0, :3]


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
        """Read one image into a channels-first tensor `(C, H, W)`, uint8 or float32, on `device` if given.

        It has the layout of the image and may share its memory: it must not be written to.
        """
        pixels = view_image(image, bool(do_convert_rgb), input_data_format)
        return pixels if device is None else moved(pixels, device)

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
        if _is_photo(image) and resample in _native_filters():
            return _resize_photo(image, height, width, resample, antialias)
        return super().resize(image, SizeDict(height=height, width=width), resample, antialias, **kwargs)

    def _preprocess(self, images: list[Tensor], **options: Any) -> BatchFeature:  # type: ignore[override]  # by name
        """Resize, crop, rescale and normalise; grey levels on the CPU straight into one batch.

        Returns:
            `pixel_values`: `(batch, C, H, W)`, or a list of `(C, H, W)`; of grey levels on the CPU it shares no memory
            with an image.
        """
        if not all(_has_levels(image) for image in images):
            return super()._preprocess([image.contiguous() for image in images], **options)
        fitted = [self._fitted(image, **options) for image in images]
        if len({image.shape for image in fitted}) == 1:
            return BatchFeature({"pixel_values": self._finished(fitted, **options)})
        return BatchFeature({"pixel_values": [self._finished([image], **options)[0] for image in fitted]})

    def _fitted(
        self,
        image: Tensor,
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_center_crop: bool,
        crop_size: SizeDict,
        **_: Any,
    ) -> Tensor:
        if do_resize:
            image = self.resize(image, size=size, resample=resample)
        return self.center_crop(image, crop_size) if do_center_crop else image

    def _finished(
        self,
        images: list[Tensor],
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
        **_: Any,
    ) -> Tensor:
        """Images of one shape, uint8 `(C, H, W)`, as a batch of its own: what rescaling and normalising give."""
        dtype = torch.float32 if do_rescale or do_normalize else torch.uint8
        batch = torch.empty((len(images), *images[0].shape), dtype=dtype)
        for place, image in zip(batch, images, strict=True):
            place.copy_(image)
        if do_normalize:
            mean, std, _still = self._fuse_mean_std_and_rescale_factor(
                do_normalize, image_mean, image_std, do_rescale, rescale_factor, batch.device
            )
            return self.normalize(batch, mean, std, inplace=True)
        return batch.mul_(rescale_factor) if do_rescale else batch


__all__ = ["ViTRegImageProcessor"]
