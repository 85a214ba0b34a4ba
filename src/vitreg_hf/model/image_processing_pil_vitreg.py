# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The PIL image processor of ViTReg, and the options and order of work it shares with the torchvision one.

They are shared from here because this module works without torchvision.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature, get_size_dict
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs, Unpack

from .image_inputs import (
    center_crop,
    fit_label_map,
    flatten_images,
    like,
    open_image,
    pad_label_map,
    padded_size,
    read_image,
    read_label_map,
    resize_nearest,
    resize_with_pillow,
    resized_size,
    segmentation_scores,
)
from .patch_budget import PatchBudget, batch_of_sizes, with_budget
from .processor_checks import check_one_shape, check_options, check_statistics, pil_filter


class ViTRegImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    size_divisor (`int`, *optional*, defaults to `self.size_divisor`):
        With `do_pad`, the padded height and width are rounded up to a multiple of it; normally the patch size.
    do_reduce_labels (`bool`, *optional*, defaults to `self.do_reduce_labels`):
        Lower every label of the segmentation maps by one; the background 0 becomes 255, which the loss ignores.
    max_num_patches (`int`, *optional*, defaults to `self.max_num_patches`):
        Keep the aspect ratio of every image, resized to sides that `patch_size` divides and to at most that many
        patches; smaller images are not enlarged. In place of `size` and a crop. Images of several sizes are returned
        as a list, or with `do_pad` padded to one size.
    patch_size (`int`, *optional*, defaults to `self.patch_size`):
        With `max_num_patches`, height and width of a patch in pixels: that of the model's config.
    """

    size_divisor: int | None
    do_reduce_labels: bool | None
    max_num_patches: int | None
    patch_size: int | None


def _with_fitting_crop(kwargs: Any) -> dict[str, Any]:
    """Options whose crop follows a size that was chosen alone: the default crop would frame small images in black.

    A fixed size is not cropped; a shortest edge is cropped to a square of that edge.
    """
    if kwargs.get("size") is None or kwargs.get("crop_size") is not None or "do_center_crop" in kwargs:
        return kwargs
    size = dict(get_size_dict(kwargs["size"], default_to_square=kwargs.get("default_to_square", False)))
    edge = size.get("shortest_edge")
    return {**kwargs, "crop_size": {"height": edge, "width": edge}} if edge else {**kwargs, "do_center_crop": False}


class ViTRegImageProcessorMixin(BaseImageProcessor):
    """Options and order of work of both processors; a backend adds what it does differently.

    By default images are resized to a shortest edge of 256 and cropped to 224 x 224. With a `size` of your own and no
    `crop_size`, a fixed size is not cropped, and a shortest edge is cropped to a square of that edge.
    """

    pad: Callable[..., Any]  # a backend's own

    valid_kwargs = ViTRegImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_mask"]

    do_convert_rgb = True
    do_resize = True
    size = {"shortest_edge": 256}
    default_to_square = False
    resample = PILImageResampling.BICUBIC
    do_center_crop = True
    crop_size = {"height": 224, "width": 224}
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_pad = False
    size_divisor = None
    do_reduce_labels = False
    max_num_patches = None
    patch_size = None

    def __init__(self, **kwargs: Unpack[ViTRegImageProcessorKwargs]) -> None:
        """Take the options; raises ValueError for those of a wrong type or out of range."""
        own = self.valid_kwargs.__annotations__
        for name in kwargs.keys() - own.keys():
            if hasattr(type(self), name):  # from a file: it would hide a method
                raise ValueError(f"expected options of {type(self).__name__}, got {name!r}")
        super().__init__(**_with_fitting_crop(with_budget(kwargs)))
        if self.max_num_patches is not None:
            self.size = None  # not the default one, also in the file
        check_options({name: getattr(self, name, None) for name in own})

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the options of a saved processor, as Transformers does.

        Raises:
            ValueError: if the file is nested too deep to be read, or holds no dictionary.
        """
        try:
            options, unused = super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        except RecursionError as error:
            place = pretrained_model_name_or_path
            raise ValueError(f"expected a processor file of a few levels in {place}, got a deeper one") from error
        if not isinstance(options, dict):
            raise ValueError(f"expected a processor file that holds a dictionary, got {type(options).__name__}")
        return options, unused

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a processor of saved options; a budget among `kwargs` is in place of a saved size and crop."""
        if kwargs.get("max_num_patches") is not None:
            replaced = {"size", "crop_size", "do_center_crop"}
            image_processor_dict = {k: v for k, v in image_processor_dict.items() if k not in replaced}
        return super().from_dict(image_processor_dict, **kwargs)

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[ViTRegImageProcessorKwargs],
    ) -> BatchFeature:
        """Turn images into model inputs.

        Args:
            images: one image or a list: PIL images, arrays or tensors of any channel count, paths, URLs, base64.
            segmentation_maps: one map of class indices per image, of the height and width of the image.
            kwargs: options of `ViTRegImageProcessorKwargs` for this call.

        Returns:
            `pixel_values` (batch, C, H, W) float32; with `do_pad` also `pixel_mask` (batch, H, W) int64, 1 on the
            image and 0 on padding; with `segmentation_maps` also `labels` (batch, H, W) int64, 255 outside the image.
            With `max_num_patches` and without `do_pad`, images that differ in size are a list of `(C, H, W)`, and so
            are their `labels`.

        Raises:
            ValueError: if an image cannot be read, or options, channel counts or sizes do not fit.
        """
        options = with_budget({"max_num_patches": self.max_num_patches, **kwargs})
        return super().preprocess(images, segmentation_maps, **options)

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Sequence[tuple[int, int]] | Tensor | None = None,
        pixel_mask: Tensor | np.ndarray | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[Tensor] | list[SemanticSegmentationPostProcessorOutput]:
        """Turn logits into one map of class indices per image, `(height, width)` int64.

        Args:
            outputs: holds `logits` of shape `(batch, labels, h, w)`, of whole images: a processor for segmentation
                should resize and not crop.
            target_sizes: (height, width) of each map, normally of the original image; `None` keeps the logits' size.
            pixel_mask: the mask of a padded batch; what the logits say about padding is cut off first. Left out, the
                mask of patches in the outputs is taken, which is exact where images are multiples of the patch size.
            return_segmentation_scores: return objects with `segmentation` and its resized `segmentation_scores`.

        Raises:
            ValueError: if there are not as many target sizes or masks as images.
        """
        if pixel_mask is None and (patch_mask := getattr(outputs, "patch_mask", None)) is not None:
            pixel_mask = patch_mask.unflatten(1, outputs.patch_map.shape[-2:])
        scores = segmentation_scores(outputs.logits, target_sizes, pixel_mask)
        # a single label is a binary mask, which has a logit for being part of it
        maps = [one.argmax(dim=0) if len(one) > 1 else (one[0] > 0).long() for one in scores]
        if not return_segmentation_scores:
            return maps
        return [
            SemanticSegmentationPostProcessorOutput({"segmentation": labels, "segmentation_scores": image_scores})
            for labels, image_scores in zip(maps, scores, strict=True)
        ]

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open the paths, URLs and base64 texts in (nested) lists of images; images pass through."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(item) for item in image_url_or_urls]
        return (
            open_image(image_url_or_urls) if isinstance(image_url_or_urls, (str, os.PathLike)) else image_url_or_urls
        )

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        if not (flat := flatten_images(self.fetch_images(images), expected_ndims)):
            raise ValueError("expected at least one image, got none")
        return flat

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # passed on by name
        options = super()._standardize_kwargs(**kwargs)
        if options.get("max_num_patches") is not None:
            options["size"] = PatchBudget(**{name: options[name] for name in ("max_num_patches", "patch_size")})
        return options

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:  # type: ignore[override]  # passed on by name
        super()._validate_preprocess_kwargs(**kwargs)
        check_options(kwargs)
        if kwargs["data_format"] not in (None, ChannelDimension.FIRST):
            raise ValueError(f"expected data_format 'channels_first', got {kwargs['data_format']!r}")

    def _preprocess_image_like_inputs(  # type: ignore[override]  # names what the base class takes as *args, **kwargs
        self,
        images: Any,
        segmentation_maps: Any,
        do_convert_rgb: bool,
        input_data_format: str | ChannelDimension | None,
        device: Any,
        do_pad: bool,
        pad_size: SizeDict | None,
        size_divisor: int | None,
        do_reduce_labels: bool,
        return_tensors: Any,
        **kwargs: Any,
    ) -> BatchFeature:
        pixels = self._prepare_image_like_inputs(
            images, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format, device=device
        )
        if kwargs["do_normalize"]:
            check_statistics(pixels, image_mean=kwargs["image_mean"], image_std=kwargs["image_std"])
        labels = None if segmentation_maps is None else self._read_label_maps(segmentation_maps, pixels)
        data = self._preprocess(pixels, do_pad=False, pad_size=None, return_tensors=None, **kwargs)
        if labels is not None:
            way = {name: kwargs[name] for name in ("do_resize", "size", "do_center_crop", "crop_size")}
            data["labels"] = [fit_label_map(one, do_reduce_labels, **way) for one in labels]
        if do_pad:
            self._pad_batch(data, pad_size, size_divisor, kwargs["disable_grouping"])
        if labels is not None:
            data["labels"] = [like(pixels[0], one) for one in data["labels"]]
        if return_tensors is None:
            data["pixel_values"] = list(data["pixel_values"])
        elif not isinstance(kwargs["size"], PatchBudget):
            check_one_shape(data["pixel_values"])
        return batch_of_sizes(dict(data), return_tensors)

    def _read_label_maps(self, segmentation_maps: Any, images: Sequence[Any]) -> list[Tensor]:
        """One int64 map `(H, W)` per image `(C, H, W)`; raises ValueError where number or size differ."""
        maps = [read_label_map(one) for one in self._prepare_images_structure(segmentation_maps, expected_ndims=2)]
        expected, got = [tuple(image.shape[-2:]) for image in images], [tuple(one.shape) for one in maps]
        if expected != got:
            raise ValueError(f"expected segmentation maps as large as their images, {expected}, got {got}")
        return maps

    def _pad_batch(
        self, data: BatchFeature, pad_size: SizeDict | None, divisor: int | None, ungrouped: bool | None
    ) -> None:
        """Pad `pixel_values` (with zeros) and `labels` in place to one size, and add the `pixel_mask`."""
        height, width = padded_size([image.shape[-2:] for image in data["pixel_values"]], pad_size, divisor)
        data["pixel_values"], data["pixel_mask"] = self.pad(
            data["pixel_values"],
            pad_size=SizeDict(height=height, width=width),
            return_mask=True,
            disable_grouping=ungrouped,
        )
        if "labels" in data:
            data["labels"] = [pad_label_map(one, height, width) for one in data["labels"]]


class ViTRegImageProcessorPil(ViTRegImageProcessorMixin, PilBackend):
    """Prepares images on the CPU with Pillow and numpy; needs no torchvision. See `ViTRegImageProcessorMixin`."""

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Read one image into a channels-first array `(C, H, W)`, uint8 or float32."""
        return read_image(image, bool(do_convert_rgb), input_data_format).cpu().numpy()

    def resize(
        self,
        image: np.ndarray,
        size: SizeDict,
        resample: Any = PILImageResampling.BILINEAR,
        reducing_gap: float | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Resize `(C, H, W)` one channel after the other, so that any channel count works and floats stay floats."""
        height, width = resized_size(image.shape[-2], image.shape[-1], size)
        resample = pil_filter(resample)
        if resample == PILImageResampling.NEAREST:
            return resize_nearest(torch.from_numpy(image), height, width).numpy()
        return resize_with_pillow(image, height, width, resample, reducing_gap)

    def center_crop(  # type: ignore[override]  # narrowed as in Transformers' own backends
        self, image: np.ndarray, size: SizeDict, **kwargs: Any
    ) -> np.ndarray:
        """Crop `(C, H, W)` to the middle `size`, padding short edges with zeros as torchvision's backend does.

        Transformers' own PIL crop shifts the image by a pixel where the padding is odd.
        """
        return center_crop(torch.from_numpy(image), size).numpy()


__all__ = ["ViTRegImageProcessorPil"]
