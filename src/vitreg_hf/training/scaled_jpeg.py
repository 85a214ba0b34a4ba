# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""JPEGs decoded to a half, a quarter or an eighth of their size, which takes fewer of their frequencies and less time.

Shapes: H x W pixels of the whole image, h x w pixels that were decoded.
"""

import math

import PIL.ExifTags
import PIL.Image
from torch import Tensor

_TURNED = (5, 6, 7, 8)  # orientations in which height and width change places


class ScaledImage(Tensor):
    """An image that was decoded to fewer pixels, uint8 `(C, h, w)`.

    It knows its size as a whole, of which random crops are drawn: a generator that is asked for a place among fewer
    pixels would say another one.
    """

    whole_size: tuple[int, int]  # H, W

    def part(self, top: int, left: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height and width, in decoded pixels, of a box in those of the whole image; rounded up."""
        rows, columns = (self.shape[-2], self.whole_size[0]), (self.shape[-1], self.whole_size[1])
        (top, height), (left, width) = _scaled(top, height, *rows), _scaled(left, width, *columns)
        return top, left, height, width


def _scaled(start: int, length: int, decoded: int, whole: int) -> tuple[int, int]:
    length = math.ceil(length * decoded / whole)
    return min(round(start * decoded / whole), decoded - length), length


def draft(image: PIL.Image.Image, least_edge: int) -> tuple[int, int]:
    """Have an image that is not loaded yet decoded to fewer pixels, if it is a JPEG and large enough.

    Args:
        image: opened, and not read.
        least_edge: pixels that its shorter edge keeps at least.

    Returns:
        H and W of the image, upright.
    """
    width, height = image.size
    image.draft(None, (least_edge, least_edge))
    turned = image.getexif().get(PIL.ExifTags.Base.Orientation) in _TURNED
    return (width, height) if turned else (height, width)


def scaled_image(pixels: Tensor, whole_size: tuple[int, int]) -> Tensor:
    """Decoded pixels `(C, h, w)`, with the size of the whole image if they are fewer."""
    if tuple(pixels.shape[-2:]) == whole_size:
        return pixels
    scaled = pixels.as_subclass(ScaledImage)
    scaled.whole_size = whole_size
    return scaled
