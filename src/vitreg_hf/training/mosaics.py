# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""A dense task out of labelled images: mosaics of four, in which every pixel has the class of its quarter.

It needs no masks, so it can be asked of any classifier: whether a patch token tells what its part of the image shows,
in an image twice as high and wide, and with three other images around.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from vitreg_hf.training.labelled_images import LabelledImages
from vitreg_hf.training.seeding import derived_seed

_TILES = 4


def mosaics(
    images: LabelledImages,
    transform: Callable[[Sequence[Tensor]], Tensor],
    count: int,
    batch_size: int,
    seed: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Mosaics of four images each, the same for every model that gets images of the same size.

    Args:
        images: where they are drawn from, none twice before all were drawn.
        transform: makes of images a normalised batch `(4, C, h, w)`.
        count: how many mosaics.
        batch_size: mosaics at a time.
        seed: of the draw.

    Yields:
        Pixels `(B, C, 2 h, 2 w)` and the class of each pixel, int64 `(B, 2 h, 2 w)`.

    Raises:
        ValueError: if there are no images, or a count is not positive.
    """
    if len(images) == 0 or count < 1 or batch_size < 1:
        raise ValueError(f"Expected images, mosaics and a batch size, got {len(images)}, {count} and {batch_size}")
    passes = -(-_TILES * count // len(images))
    drawn = [np.random.default_rng(derived_seed(seed, turn)).permutation(len(images)) for turn in range(passes)]
    order = np.concatenate(drawn)[: _TILES * count].reshape(count, _TILES)
    for start in range(0, count, batch_size):
        made = [_mosaic([images[index] for index in four], transform) for four in order[start : start + batch_size]]
        pixels, labels = zip(*made, strict=True)
        yield torch.stack(pixels), torch.stack(labels)


def _mosaic(
    four: Sequence[tuple[Tensor, int]], transform: Callable[[Sequence[Tensor]], Tensor]
) -> tuple[Tensor, Tensor]:
    tiles = transform([image for image, _ in four])
    labels = torch.tensor([label for _, label in four])[:, None, None].expand(-1, *tiles.shape[-2:])
    return _together(tiles), _together(labels)


def _together(tiles: Tensor) -> Tensor:
    """Four tiles `(4, ..., h, w)` as one `(..., 2 h, 2 w)`, in reading order."""
    return torch.cat([torch.cat([tiles[0], tiles[1]], dim=-1), torch.cat([tiles[2], tiles[3]], dim=-1)], dim=-2)
