# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Pixels as they lie in memory, so that a photo is resized from where it is instead of being copied first.

Pillow keeps an RGB image as four bytes a pixel, of which the last means nothing. PyTorch's kernels for resizing bytes
read three or four channels that lie side by side; of planes they would first make such an image, slowly.

Shapes: C channels, H height, W width in pixels. What is returned here shares memory with the image: it must not be
written to, and nothing that a processor returns may share it.
"""

import ctypes
import math
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

LEVELS_16_TO_8_BIT = 257  # 65535 / 255: scales the full 16 bit range onto the full 8 bit range
_BYTES = 4  # of a pixel in Pillow's memory


class _ArrowArray(ctypes.Structure):
    """The struct of that name in Arrow's C data interface, which Pillow 11.2 and later fill in."""


_ArrowArray._fields_ = [
    *((name, ctypes.c_int64) for name in ("length", "null_count", "offset", "n_buffers", "n_children")),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
    *((name, ctypes.c_void_p) for name in ("dictionary", "release", "private_data")),
]


_pointer_in = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class _Memory:
    """Bytes at an address, for numpy, which keeps this object and so the owner of the bytes."""

    def __init__(self, address: int, shape: tuple[int, ...], owner: Any) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": shape, "typestr": "|u1", "version": 3}
        self.owner = owner


def pillow_pixels(image: PIL.Image.Image, do_convert_rgb: bool) -> Tensor:
    """Pixels of any PIL mode as uint8 `(H, W)` or `(H, W, C)`; transparency stays a fourth channel.

    Raises:
        ValueError: if levels of 16 bit or float images are out of range.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return torch.from_numpy(_grey_levels(image))
    colours = "RGBA" if image.has_transparency_data else "RGB"
    # an image that is not to be converted keeps its own channels, but palette indices are no intensities
    own_channels = {"1": "L", "P": colours, "PA": colours}.get(image.mode, image.mode)
    mode = colours if do_convert_rgb else own_channels
    converted = image if image.mode == mode else image.convert(mode)
    in_place = _pillow_memory(converted)
    return torch.from_numpy(np.array(converted)) if in_place is None else in_place[..., :3]


def _grey_levels(image: PIL.Image.Image) -> np.ndarray:
    """8 bit grey levels `(H, W)` of a 16 bit ("I;16", "I") or float ("F") image; Pillow itself would clip them."""
    values = np.array(image)
    step = 1 if image.mode == "F" else LEVELS_16_TO_8_BIT
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 255 * step):
        raise ValueError(f"expected values 0..{255 * step} in a PIL image of mode {image.mode!r}, got {low}..{high}")
    levels = np.rint(values / step).astype(np.uint8)
    if "transparency" in image.info:
        levels[values == image.info["transparency"]] = 255
    return levels


def _pillow_memory(image: PIL.Image.Image) -> Tensor | None:
    """The memory of an RGB image, uint8 `(H, W, 4)` with a fourth channel to be ignored.

    None where it cannot be had: in older Pillow, of images above 16 MB, which Pillow keeps in several blocks, and
    where PILLOW_ALIGNMENT leaves room behind each row.
    """
    if image.mode != "RGB" or not hasattr(image, "__arrow_c_array__") or PIL.Image.core.get_alignment() != 1:
        return None
    try:
        _, capsule = image.__arrow_c_array__()
    except ValueError:  # several blocks
        return None
    pixels = _arrow_array(capsule)
    if pixels.n_children != 1:
        return None
    values = pixels.children[0].contents
    shape = image.height, image.width, _BYTES
    if pixels.offset or values.offset or values.n_buffers != 2 or values.length != math.prod(shape):
        return None
    return torch.from_numpy(np.asarray(_Memory(values.buffers[1], shape, capsule)))


def _arrow_array(capsule: Any) -> _ArrowArray:
    return _ArrowArray.from_address(_pointer_in(capsule, b"arrow_array"))


def array_memory(array: np.ndarray) -> np.ndarray:
    """A contiguous uint8 array as one that torch takes without a copy or a warning, also if it is read-only."""
    return array if array.flags.writeable else np.asarray(_Memory(array.ctypes.data, array.shape, array))


def interleaved(image: Tensor) -> Tensor:
    """An RGB image on the CPU, uint8 `(3, H, W)`, with the channels of a pixel side by side, as fast kernels want it.

    Planes are merged by Pillow, several times as fast as by PyTorch.

    Returns:
        `(3, H, W)`, or `(4, H, W)` with a fourth channel to be ignored; the image itself where that is not possible.
    """
    if (whole := _whole_pixels(image)) is not None:
        return whole
    height, width = image.shape[-2:]
    if image.stride()[1:] != (width, 1):
        return image
    planes = [PIL.Image.frombuffer("L", (width, height), plane, "raw", "L", 0, 1) for plane in image.numpy()]
    merged = _pillow_memory(PIL.Image.merge("RGB", planes))
    return image if merged is None else merged.permute(2, 0, 1)


def moved(image: Tensor, device: torch.device | str) -> Tensor:
    """An image `(C, H, W)` on a device: Pillow's pixels go there whole, as picking them apart is slow on a CPU."""
    whole = _whole_pixels(image)
    return image.to(device) if whole is None else whole.to(device)[:3]


def _whole_pixels(image: Tensor) -> Tensor | None:
    """Pillow's pixels `(4, H, W)`, if the image `(3, H, W)` is a view of such."""
    height, width = image.shape[-2:]
    if image.stride() != (1, _BYTES * width, _BYTES) or image.shape[0] != 3 or image.dtype != torch.uint8:
        return None
    if (
        image.storage_offset() + height * width * _BYTES > image.untyped_storage().nbytes()
    ):  # of another's, which ends with the third channel
        return None
    return image.as_strided((_BYTES, height, width), image.stride())
