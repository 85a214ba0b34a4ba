# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Learned positions: the table, and its interpolation to another grid.

Bicubic and bilinear interpolation are separable: a table `(rows, columns, D)` is resized by one small weight matrix
per axis. The matrices are computed here from the target size with plain tensor operations, so the same code runs
eagerly, is exported, compiled with dynamic sizes and trained, and takes one target size per image where a batch is
padded. The numbers are those of `torch.nn.functional.interpolate`, which does none of that for antialiased bicubic.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .configuration_vitreg import ViTRegConfig

# Cubic convolution kernels: PyTorch takes a = -0.75 plainly and a = -0.5 with antialiasing (as Pillow does).
_CUBIC_A = {False: -0.75, True: -0.5}
_RADIUS = {"bicubic": 2.0, "bilinear": 1.0}


@dataclass(frozen=True)
class InterpolationRule:
    """How positions are interpolated; sources differ, so a checkpoint keeps its rule in the config.

    Attributes:
        mode: `"bicubic"` or `"bilinear"`.
        antialias: widen the kernel when the target grid is smaller than the table.
        offset: 0 scales by size, `table / target`; else by factor, `table / (target + offset)`: 0.1 in DINOv2.
    """

    mode: str
    antialias: bool
    offset: float

    @classmethod
    def from_config(cls, config: ViTRegConfig) -> "InterpolationRule":
        """Read the rule off a config."""
        return cls(
            config.position_interpolation_mode,
            config.position_interpolation_antialias,
            float(config.position_interpolation_offset),
        )

    def weights(self, length: int, target: Tensor, table_length: int) -> Tensor:
        """Weights that resize one axis of the table.

        Args:
            length: positions to compute; those at or beyond `target` belong to padding and repeat the last one.
            target: target size of the axis, a float tensor of shape `()` or `(B, 1, 1)`.
            table_length: size of the axis in the table.

        Returns:
            `(length, table_length)`, or `(B, length, table_length)`; every row sums to one.
        """
        ratio = table_length / (target + self.offset)
        index = torch.arange(length, device=target.device, dtype=target.dtype)[:, None].minimum(target - 1)
        table_index = torch.arange(table_length, device=target.device, dtype=target.dtype)
        smooth = self._antialiased if self.antialias else self._clamped
        weights = smooth((index + 0.5) * ratio, ratio, table_index)
        # At the table's own size every source returns the table itself, also where the offset would shift it.
        return torch.where(target == table_length, (index == table_index).to(weights.dtype), weights)

    def _antialiased(self, center: Tensor, ratio: Tensor, table_index: Tensor) -> Tensor:
        stretch = ratio.clamp(min=1.0)
        weights = self._kernel((table_index + 0.5 - center) / stretch)
        return weights / weights.sum(dim=-1, keepdim=True)

    def _clamped(self, center: Tensor, ratio: Tensor, table_index: Tensor) -> Tensor:
        """Without antialiasing, taps beyond the border count for the border itself."""
        source = center - 0.5
        if self.mode == "bilinear":
            source = source.clamp(min=0.0)
        first = source.floor()
        radius = int(_RADIUS[self.mode])
        weights = torch.zeros_like(center * table_index)
        for tap in range(1 - radius, radius + 1):
            position = (first + tap).clamp(0, table_index.shape[0] - 1)
            weights = weights + self._kernel(first + tap - source) * (position == table_index)
        return weights

    def _kernel(self, distance: Tensor) -> Tensor:
        x = distance.abs()
        if self.mode == "bilinear":
            return (1 - x).clamp(min=0.0)
        a = _CUBIC_A[self.antialias]
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((x - 5) * x + 8) * x * a - 4 * a
        return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def split_positions(
    position_embeddings: Tensor, num_cls: int, table_grid: tuple[int, int]
) -> tuple[Tensor | None, Tensor]:
    """Views of the position of CLS, `(1, 1, D)` or None, and of the patch table, `(rows, columns, D)`.

    Args:
        position_embeddings: `(1, num_cls + rows * columns, D)`, the position of CLS first.
        num_cls: 1 if CLS has a position, else 0.
        table_grid: rows and columns of the table.
    """
    cls_position = position_embeddings[:, :num_cls] if num_cls else None
    return cls_position, position_embeddings[0, num_cls:].unflatten(0, table_grid)


class PositionInterpolation:
    """Resizes a table of patch positions, in float32 whatever autocast says.

    The weights depend on sizes and rule alone, not on the table, so those of the last few sizes are kept.

    Args:
        rule: the interpolation rule.
        table_grid: rows and columns of the table.
        max_sizes: sizes that are kept.
    """

    def __init__(self, rule: InterpolationRule, table_grid: tuple[int, int], max_sizes: int = 16) -> None:
        self.rule = rule
        self.table_grid = table_grid
        self.max_sizes = max_sizes
        self._kept: dict[tuple, tuple[Tensor, Tensor]] = {}

    def __call__(
        self, table: Tensor, grid: tuple[int, int], true_grids: Tensor | None = None, cached: bool = True
    ) -> Tensor:
        """Resize a table to another grid.

        Args:
            table: `(rows, columns, D)`.
            grid: rows and columns of the padded or only grid.
            true_grids: rows and columns of each image without its padding, `(B, 2)`; positions are then those that
                the image has on its own, and rows and columns of padding repeat the last of them.
            cached: keep the weights of this size; not while tracing, where a size may be a symbol.

        Returns:
            `(1, rows * columns, D)`, or `(B, rows * columns, D)` with `true_grids`, in the table's dtype.
        """
        if true_grids is not None:
            target = true_grids.to(torch.float32)[:, :, None, None].unbind(1)
            return self._resized(table, self._weights(grid, target))
        weights = self._kept_weights(grid, table.device) if cached else self._weights_of(grid, table.device)
        return self._resized(table, weights)[None]

    def _resized(self, table: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
        rows, columns = weights
        device_type = table.device.type
        # Entered only where autocast is on, which it cannot be on the meta device, so that exported graphs stay plain.
        lowered = device_type != "meta" and torch.is_autocast_enabled(device_type)
        with torch.autocast(device_type, enabled=False) if lowered else nullcontext():
            resized = torch.einsum("...hi,ijd,...wj->...hwd", rows, table.float(), columns)
        return resized.flatten(-3, -2).to(table.dtype)

    def _weights(self, grid: tuple[int, int], target: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        axes = zip(grid, target, self.table_grid, strict=True)
        rows, columns = (self.rule.weights(length, size, table_length) for length, size, table_length in axes)
        return rows, columns

    def _weights_of(self, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        return self._weights(grid, [torch.scalar_tensor(n, dtype=torch.float32, device=device) for n in grid])

    def _kept_weights(self, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        # Tensors made under inference mode cannot be used where gradients are recorded: they get a key of their own.
        key = (*grid, device, torch.is_inference_mode_enabled())
        if key in self._kept:
            return self._kept[key]
        weights = self._weights_of(grid, device)
        if type(weights[0]) is Tensor:  # and not one that only pretends, as under a fake tensor mode
            while len(self._kept) >= self.max_sizes:
                self._kept.pop(next(iter(self._kept)), None)
            self._kept[key] = weights
        return weights
