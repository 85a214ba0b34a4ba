# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Evaluation in several processes that have different numbers of batches.

Sharded models and gathered results need all processes in every batch. Who has run out takes part with images that
count for nothing.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from vitreg_hf.training.labelled_images import Example

# Label of what counts for nothing, also to `torch.nn.functional.cross_entropy`.
NOT_COUNTED = -100

Batch = dict[str, Any]


def in_step(
    batches: Iterable[Batch],
    collate: Callable[[list[Example]], Batch],
    batch_size: int,
    any_left: Callable[[bool], bool] = bool,
    num_channels: int = 3,
) -> Iterator[Batch]:
    """Batches of one size until all processes have run out; `labels` of images that only fill up are -100.

    Args:
        batches: of this process, of at most `batch_size` images.
        collate: made them.
        batch_size: images in every batch.
        any_left: tells from "this process has a batch" whether one of them has; all call it equally often.
        num_channels: of the images.
    """
    left = iter(batches)
    while True:
        batch = next(left, None)
        if not any_left(batch is not None):
            return
        if batch is None:  # of a size that every processor enlarges
            batch = collate([Example(torch.zeros(num_channels, 32, 32, dtype=torch.uint8), NOT_COUNTED)])
        yield {name: _filled(name, value, batch_size) for name, value in batch.items()}


def _filled(name: str, value: Any, size: int) -> Any:
    if not isinstance(value, Tensor) or len(value) == size:
        return value
    more = value[:1].expand(size - len(value), *value.shape[1:])
    return torch.cat([value, torch.full_like(more, NOT_COUNTED) if name == "labels" else more])
