# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Scenes of handwritten digits on a textured background, with the class of every pixel.

A real segmentation task that needs no download: the digits are scans, only their arrangement is drawn at random, from
one seed for all runs. Ink may be brighter or darker than the background, so no threshold solves it.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import PIL.Image
from numpy.typing import NDArray

from vitreg_hf.training.labelled_images import LabelledImages
from vitreg_hf.training.seeding import derived_seed

SCENE_CLASSES = ("background", *(str(digit) for digit in range(10)))
_FEWEST, _MOST = 2, 4  # digits of a scene
_SMALLEST, _LARGEST = 16, 32  # height and width of a digit in pixels; the scans have 8
_INK_FROM = 0.35  # share of full ink from which a pixel is one of the digit
_TRIES = 20  # places that are tried for a digit before it is left out


@dataclass(frozen=True)
class _Digit:
    """Share of ink `(h, w)` in 0..1 at a place, and the class of its pixels."""

    ink: NDArray[np.float64]
    top: int
    left: int
    label: int

    @property
    def region(self) -> tuple[slice, slice]:
        height, width = self.ink.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


def digit_scenes(digits: LabelledImages, count: int, size: int = 64, seed: int = 0) -> datasets.Dataset:
    """Scenes of 2 to 4 of these digits each.

    Args:
        digits: scans in grey levels, bright ink on black.
        count: how many scenes.
        size: their height and width in pixels.
        seed: scenes of the same number, digits, size and seed are the same.

    Returns:
        Rows with columns `image` and `mask`, both PNG, and `row`: as `SegmentationImages` takes them.

    Raises:
        ValueError: if a scene would be smaller than its largest digit.
    """
    if size < _LARGEST:
        raise ValueError(f"Expected scenes of {_LARGEST} pixels or more, got {size}")
    scans = [digits[index] for index in range(len(digits))]
    inked = [(image[0].numpy(), label) for image, label in scans]
    scenes = [_scene(inked, size, np.random.default_rng(derived_seed(seed, number))) for number in range(count)]
    images, masks = zip(*scenes, strict=True)
    encoded = {
        "image": [{"bytes": _png(image), "path": None} for image in images],
        "mask": [{"bytes": _png(mask), "path": None} for mask in masks],
        "row": list(range(count)),
    }
    picture = datasets.Image(decode=False)
    features = datasets.Features({"image": picture, "mask": picture, "row": datasets.Value("int64")})
    return datasets.Dataset.from_dict(encoded, features=features)


def _scene(
    scans: Sequence[tuple[NDArray[np.uint8], int]], size: int, generator: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels `(size, size, 3)` and classes `(size, size)`."""
    pixels, mask = _background(size, generator), np.zeros((size, size), np.uint8)
    for _ in range(generator.integers(_FEWEST, _MOST + 1)):
        scan, label = scans[int(generator.integers(len(scans)))]
        digit = _placed(scan, label, mask, generator)
        if digit is None:
            continue
        ink = digit.ink[..., None]
        pixels[digit.region] = (1 - ink) * pixels[digit.region] + ink * _ink_colour(pixels[digit.region], generator)
        mask[digit.region] = np.where(digit.ink >= _INK_FROM, 1 + label, mask[digit.region])
    pixels += generator.normal(0, 6, pixels.shape)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8), mask


def _background(size: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Clouds of a few colours, `(size, size, 3)`: coarse noise, enlarged."""
    cells = generator.uniform(-30, 30, (6, 6, 3)) + generator.uniform(60, 195, (1, 1, 3))
    channels = [_resized(cells[..., channel], size) for channel in range(3)]
    return np.stack(channels, axis=-1)


def _placed(
    scan: NDArray[np.uint8], label: int, mask: NDArray[np.uint8], generator: np.random.Generator
) -> _Digit | None:
    """The digit in a size and at a place where it covers no other; None if there was no room."""
    for _ in range(_TRIES):
        edge = int(generator.integers(_SMALLEST, _LARGEST + 1))
        top, left = generator.integers(0, len(mask) - edge + 1, 2)
        digit = _Digit(np.clip(_resized(scan / 255, edge), 0, 1), int(top), int(left), label)
        if not ((mask[digit.region] > 0) & (digit.ink > 0.05)).any():
            return digit
    return None


def _ink_colour(below: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """A colour `(3,)` well above or below the mean of what it is drawn on, of pixels `(h, w, 3)`."""
    mean = below.mean(axis=(0, 1))
    contrast = generator.uniform(70, 110, 3)
    brighter = mean.mean() < 128 if abs(mean.mean() - 128) > 40 else generator.random() < 0.5
    return mean + contrast if brighter else mean - contrast


def _resized(values: NDArray[np.float64], edge: int) -> NDArray[np.float64]:
    image = PIL.Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize((edge, edge), PIL.Image.Resampling.BICUBIC), dtype=np.float64)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
