# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What an image processor refuses: options out of range, images without pixels or with too many, mixed shapes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image
from transformers.image_utils import PILImageResampling, torch_pil_interpolation_mapping

# Of an image after resizing, cropping or padding: 8192 x 8192, a quarter of a million patches of 16 x 16.
MOST_PIXELS = 2**26
# Bounds that leave room for any unit of measurement, and keep every result finite in float32.
MOST_MAGNITUDE = 1e20  # of a float pixel
_MOST, _LEAST = 1e6, 1e-9
_SIZES = ("size", "crop_size", "pad_size")
_EDGES = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options of a processor, in Transformers' standard form, of a wrong type or out of range.

    Raises:
        ValueError: naming the option, what was expected and what came.
    """
    for name, value in options.items():
        if name.startswith("do_") or name == "default_to_square":
            _expect(value is None or isinstance(value, bool), name, "True or False", value)
    for name in _SIZES:
        for edge in _EDGES:
            length = getattr(options.get(name), edge, None)
            whole = isinstance(length, int) and not isinstance(length, bool) and 1 <= length <= MOST_PIXELS
            _expect(length is None or whole, f"{edge} of {name}", f"an integer from 1 to {MOST_PIXELS}", length)
        height, width = (getattr(options.get(name), edge, None) for edge in _EDGES[:2])
        if height and width:
            check_extent(name, height, width)
        elif name == "crop_size" and options.get("do_center_crop"):
            raise ValueError(f"expected crop_size with height and width, got {_shown(options.get(name))}")
    for name in ("size_divisor", "max_num_patches", "patch_size"):
        _check_positive(name, options.get(name))
    if options.get("max_num_patches") is not None and options.get("patch_size") is None:
        raise ValueError("expected patch_size, that of the model's config, with max_num_patches, got None")
    _check_numbers("rescale_factor", options.get("rescale_factor"), _LEAST)
    _check_numbers("image_std", options.get("image_std"), _LEAST)
    _check_numbers("image_mean", options.get("image_mean"), -_MOST)
    if options.get("resample") is not None:
        pil_filter(options["resample"])


def _check_positive(name: str, number: Any) -> None:
    whole = isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= MOST_PIXELS
    if number is not None and not whole:
        raise ValueError(f"expected a positive {name}, got {_shown(number)}")


def _check_numbers(name: str, values: Any, least: float) -> None:
    if values is None:
        return
    for value in values if isinstance(values, (list, tuple)) else [values]:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= _MOST
        _expect(number, name, f"numbers from {least:g} to {_MOST:g}", value)


def pil_filter(resample: Any) -> PILImageResampling:
    """The Pillow name of a resampling filter given as Pillow's enum, its integer, or torchvision's enum.

    Raises:
        ValueError: if there is no such filter.
    """
    try:
        if not isinstance(resample, bool):
            return PILImageResampling(torch_pil_interpolation_mapping.get(resample, resample))
    except (TypeError, ValueError):
        pass
    known = ", ".join(f"{way.value} ({way.name})" for way in PILImageResampling)
    raise ValueError(f"expected resample to be one of {known}, got {_shown(resample)}")


def check_file_size(image: PIL.Image.Image) -> None:
    """Refuse an image of more pixels than Pillow takes for safe, which it only warns of up to twice as many.

    Raises:
        ValueError: with the limit, `PIL.Image.MAX_IMAGE_PIXELS`, that a program may raise for files it trusts.
    """
    most = PIL.Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        raise ValueError(
            f"expected an image of at most {most} pixels (PIL.Image.MAX_IMAGE_PIXELS), "
            f"got {image.width} x {image.height} (width x height)"
        )


def check_extent(what: str, height: int, width: int) -> tuple[int, int]:
    """Height and width, if an image of them can be made; raises ValueError if it has no pixels or too many."""
    if height < 1 or width < 1 or height * width > MOST_PIXELS:
        expected = f"{what} of at least one pixel per side and at most {MOST_PIXELS} in all"
        raise ValueError(f"expected {expected}, got {height} x {width} (height x width)")
    return height, width


def check_statistics(images: Sequence[Any], **statistics: float | Sequence[float]) -> None:
    """Raise ValueError if a mean or std has not one value per channel of the images `(C, H, W)`; numbers fit any."""
    for channels in {image.shape[0] for image in images}:
        for name, values in statistics.items():
            if isinstance(values, Sequence) and len(values) != channels:
                raise ValueError(
                    f"expected {name} of {channels} values, one per image channel, got {len(values)}: {values}"
                )


def check_one_shape(images: Sequence[Any]) -> None:
    """Raise ValueError if images `(C, H, W)` cannot be stacked into one batch."""
    if len(shapes := {tuple(image.shape) for image in images}) != 1:
        raise ValueError(
            f"expected images of one shape to stack, got {sorted(shapes)}; use do_pad=True, a fixed size or a crop"
        )


def _expect(condition: bool, name: str, expected: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"expected {name} to be {expected}, got {_shown(got)}")


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {math.ceil(value.bit_length() * math.log10(2))} digits"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
