# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Which patches of global crops the student does not see: blocks, in exact numbers (iBOT, arXiv 2111.07832).

Everything is drawn from torch's global generator on the CPU, which a training seeds before each step. There the
masked patches are listed, too: counting them on a GPU would make every step wait for it.

Shapes: B crops, P patches on a grid of rows x columns, M masked patches of all crops together.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_ATTEMPTS = 32  # blocks tried per crop; patches still missing then are drawn one by one
_SMALLEST_BLOCK = 4  # patches
_LARGEST_ASPECT = 1 / 0.3  # of the sides of a block; the smallest is its inverse


class PatchMasks(NamedTuple):
    """Masked patches of a batch of crops.

    Attributes:
        masked: True where the student sees the mask token, bool `(B, P)`.
        indices: the masked patches of all crops in row-major order, int64 `(M,)`: places in `B * P`.
        weights: of each masked patch in the loss: one divided by how many its crop has, float32 `(M,)`.
    """

    masked: Tensor
    indices: Tensor
    weights: Tensor

    @classmethod
    def of(cls, masked: Tensor) -> "PatchMasks":
        """List the patches that are marked, bool `(B, P)`."""
        per_crop = masked.sum(dim=1, keepdim=True).clamp(min=1)
        return cls(masked, masked.flatten().nonzero().flatten(), (1 / per_crop).expand_as(masked)[masked])

    def to(self, device: torch.device) -> "PatchMasks":
        """The same on another device."""
        return PatchMasks(*(tensor.to(device, non_blocking=True) for tensor in self))


def draw_masks(
    num_crops: int, grid: tuple[int, int], share: float = 0.5, ratio: tuple[float, float] = (0.1, 0.5)
) -> PatchMasks:
    """Mask patches of a share of the crops, of each another part, spread evenly over a range.

    Args:
        num_crops: B; crops that are masked are drawn among them.
        grid: rows and columns of patches.
        share: of the crops; at least one crop is masked.
        ratio: smallest and largest part of a crop's patches; at least one patch is masked.

    Raises:
        ValueError: if there is no crop, a share is not in (0, 1], or the range is not within 0 < low <= high < 1.
    """
    if num_crops < 1 or not 0 < share <= 1:
        raise ValueError(f"Expected at least 1 crop and a share in (0, 1], got {num_crops} and {share}")
    low, high = ratio
    if not 0 < low <= high < 1:
        raise ValueError(f"Expected a ratio with 0 < low <= high < 1, got {ratio}")
    chosen = torch.randperm(num_crops)[: max(int(num_crops * share), 1)]
    places = (torch.arange(len(chosen)) + torch.rand(len(chosen))) / len(chosen)  # one in each of equal steps
    masked = torch.zeros(num_crops, grid[0] * grid[1], dtype=torch.bool)
    for crop, place in zip(chosen.tolist(), places.tolist(), strict=True):
        count = max(int((low + (high - low) * place) * masked.shape[1]), 1)
        masked[crop] = draw_blocks(grid, count)
    return PatchMasks.of(masked)


def draw_blocks(grid: tuple[int, int], count: int) -> Tensor:
    """Mark exactly `count` patches, bool `(P,)`: rectangles of random size and shape, which may overlap.

    Raises:
        ValueError: if there are fewer patches.
    """
    rows, columns = grid
    if not 0 <= count <= rows * columns:
        raise ValueError(f"Expected 0 to {rows * columns} patches to mask, got {count}")
    masked, missing = torch.zeros(grid, dtype=torch.bool), count
    for draws in torch.rand(_ATTEMPTS, 4).tolist():  # one call: numbers drawn one by one take longer than the rest
        if missing < _SMALLEST_BLOCK:
            break
        block = masked[_block(rows, columns, missing, *draws)]
        new = block.numel() - int(block.sum())
        if 0 < new <= missing:
            block.fill_(True)
            missing -= new
    free = (~masked).flatten().nonzero().flatten()
    masked.view(-1)[free[torch.randperm(len(free))[:missing]]] = True
    return masked.flatten()


def _block(
    rows: int, columns: int, largest: int, area: float, aspect: float, top: float, left: float
) -> tuple[slice, slice]:
    """Rows and columns of one rectangle within the grid, from four numbers in [0, 1)."""
    patches = _SMALLEST_BLOCK + area * (largest - _SMALLEST_BLOCK)
    sides = math.exp((2 * aspect - 1) * math.log(_LARGEST_ASPECT))
    height = min(max(round(math.sqrt(patches * sides)), 1), rows)
    width = min(max(round(math.sqrt(patches / sides)), 1), columns)
    first_row, first_column = int(top * (rows - height + 1)), int(left * (columns - width + 1))
    return slice(first_row, first_row + height), slice(first_column, first_column + width)
