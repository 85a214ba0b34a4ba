# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Positions: a learned table and its interpolation to another grid, or rotation by angles of rows and columns.

Bicubic and bilinear interpolation are separable: a table `(rows, columns, D)` is resized by one small weight matrix
per axis. The matrices are computed here from the target size with plain tensor operations, so the same code runs
eagerly, is exported, compiled with dynamic sizes and trained, and takes one target size per image where a batch is
padded. The numbers are those of `torch.nn.functional.interpolate`, which does none of that for antialiased bicubic.
Angles of rotary positions are computed in the same way, per axis and from the target size.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

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


class Positions(NamedTuple):
    """Views of a position table, each added to the tokens that it is named for."""

    cls_token: Tensor | None  # (1, 1, D)
    registers: Tensor | None  # (1, R, D)
    patches: Tensor  # (rows, columns, D)


def split_positions(
    position_embeddings: Tensor, config: ViTRegConfig, table_grid: tuple[int, int] | None = None
) -> Positions:
    """Views of the position of CLS and those of registers, each None if it has none, and of the table of patches.

    Args:
        position_embeddings: `(1, positions, D)`: CLS, registers, then patches in row-major order.
        config: says which of them have a position, and the grid of the table.
        table_grid: of the table, where the config may have changed since it was made.
    """
    grid = table_grid or config.position_grid
    sizes = [config.num_cls_positions, config.num_register_positions, math.prod(grid)]
    cls_position, registers, patches = position_embeddings.split(sizes, dim=1)
    return Positions(
        cls_position if config.num_cls_positions else None,
        registers if config.num_register_positions else None,
        patches[0].unflatten(0, grid),
    )


class RecentSizes:
    """Keeps tensors that depend on a grid alone, for the last few grids.

    Args:
        compute: gives them from the grid and the device.
        max_sizes: grids that are kept.
    """

    def __init__(
        self, compute: Callable[[tuple[int, int], torch.device], tuple[Tensor, Tensor]], max_sizes: int
    ) -> None:
        self.compute = compute
        self.max_sizes = max_sizes
        self._kept: dict[tuple, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def __call__(self, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """What belongs to a grid, computed only if it is not kept."""
        # Tensors made under inference mode cannot be used where gradients are recorded: they get a key of their own.
        key = (*grid, device, torch.is_inference_mode_enabled())
        if key in self._kept:
            return self._kept[key]
        tensors = self.compute(grid, device)
        if type(tensors[0]) is Tensor:  # and not one that only pretends, as under a fake tensor mode
            while len(self._kept) >= self.max_sizes:
                self._kept.pop(next(iter(self._kept)), None)
            self._kept[key] = tensors
        return tensors


def _lengths(grid: tuple[int, int], true_grids: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns as float32, `()` each for one grid, or `(B, 1)` for the true grids `(B, 2)` of a padded one."""
    if true_grids is None:
        rows, columns = (torch.scalar_tensor(n, dtype=torch.float32, device=device) for n in grid)
    else:
        rows, columns = true_grids.to(torch.float32)[:, :, None].unbind(1)
    return rows, columns


class PositionInterpolation:
    """Resizes a table of patch positions, in float32 whatever autocast says.

    The weights depend on sizes and rule alone, not on the table, so those of the last few sizes are kept.

    Args:
        rule: the interpolation rule.
        table_grid: rows and columns of the table.
        max_sizes: sizes that are kept.
    """

    def __init__(self, rule: InterpolationRule, table_grid: tuple[int, int], max_sizes: int = 64) -> None:
        self.rule = rule
        self.table_grid = table_grid
        self._kept = RecentSizes(self._of_grid, max_sizes)

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
            target = [length[..., None] for length in _lengths(grid, true_grids, table.device)]
            return self._resized(table, self._weights(grid, target))
        weights = self._kept(grid, table.device) if cached else self._of_grid(grid, table.device)
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

    def _of_grid(self, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        return self._weights(grid, _lengths(grid, None, device))


class Rotation(NamedTuple):
    """By what the queries and keys of each token are turned, float32; see `rotated`.

    `(1 or B, P, d)` for patches, `(1 or B, 1, N, d)` for all tokens, where CLS and registers are not turned at all.
    """

    cos: Tensor
    sin: Tensor  # negative in the first half of the channels


def rotated(tokens: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair of channels `j`, `j + d / 2` of queries or keys `(B, h, N, d)` by the angle of its token."""
    cos, sin = rotation.cos.to(tokens.dtype), rotation.sin.to(tokens.dtype)
    first, second = tokens.chunk(2, dim=-1)
    return torch.addcmul(tokens * cos, torch.cat([second, first], dim=-1), sin)


class RotaryPositions:
    """Angles of patches from their rows and columns (RoPE, Su et al., arXiv 2104.09864, on two axes as in DINOv3).

    Half of a token's angles are those of its row, half those of its column, each at `d / 4` frequencies
    `theta ** -(j / (d / 4))`. All is computed in float32, whatever autocast says.

    Args:
        config: with the fields for rotary positions.
        max_sizes: grids whose angles are kept.
    """

    def __init__(self, config: ViTRegConfig, max_sizes: int = 64) -> None:
        self.config = config
        self._kept = RecentSizes(self._of_grid, max_sizes)

    def __call__(
        self,
        grid: tuple[int, int],
        device: torch.device,
        true_grids: Tensor | None = None,
        augmented: bool = False,
        cached: bool = True,
    ) -> Rotation:
        """The rotation of every patch.

        Args:
            grid: rows and columns of the padded or only grid.
            device: where it is needed.
            true_grids: rows and columns of each image without its padding, `(B, 2)`; patches then have the angles
                that they have in the image on its own.
            augmented: draw shift and scale of the coordinates, as the config says, once for all images.
            cached: keep the angles of this size; not while tracing, where a size may be a symbol.

        Returns:
            `(1, P, d)`, or `(B, P, d)` with `true_grids`.
        """
        if true_grids is None and cached and not augmented:
            return Rotation(*self._kept(grid, device))
        return self._rotation(grid, _lengths(grid, true_grids, device), augmented)

    def _of_grid(self, grid: tuple[int, int], device: torch.device) -> Rotation:
        return self._rotation(grid, _lengths(grid, None, device), augmented=False)

    def _rotation(self, grid: tuple[int, int], lengths: tuple[Tensor, Tensor], augmented: bool) -> Rotation:
        axes = zip(grid, lengths, self.config.position_grid, strict=True)
        coordinates = [self._coordinates(count, length, reference) for count, length, reference in axes]
        if augmented:
            coordinates = self._augmented(coordinates)
        rows, columns = (self._angles(axis) for axis in coordinates)  # (1 or B, rows or columns, d / 4)
        on_grid = rows[:, :, None].expand(-1, -1, grid[1], -1), columns[:, None].expand(-1, grid[0], -1, -1)
        angles = torch.cat(on_grid, dim=-1).flatten(1, 2)
        cos, sin = angles.cos(), angles.sin()
        return Rotation(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))

    def _coordinates(self, count: int, length: Tensor, reference: int) -> Tensor:
        """Places of patches along one axis that has `length` of them, `(1 or B, count)`."""
        index = torch.arange(count, device=length.device, dtype=torch.float32)[None]
        if self.config.rope_coordinates == "grid":
            return index / length * reference
        return (index + 0.5) / length * 2 - 1

    def _augmented(self, coordinates: Sequence[Tensor]) -> list[Tensor]:
        """Coordinates of both axes after a shift and two scales, drawn in the order of DINOv3."""
        device, config = coordinates[0].device, self.config

        def drawn(count: int, extent: float) -> Tensor:
            return torch.empty(count, device=device, dtype=torch.float32).uniform_(-extent, extent)

        shift, scale = torch.zeros(2, device=device), torch.ones(2, device=device)
        if config.pos_embed_shift is not None:
            shift = drawn(2, config.pos_embed_shift)
        if config.pos_embed_jitter is not None:
            scale = drawn(2, math.log(config.pos_embed_jitter)).exp()
        if config.pos_embed_rescale is not None:
            scale = scale * drawn(1, math.log(config.pos_embed_rescale)).exp()
        return [(axis + shift[i]) * scale[i] for i, axis in enumerate(coordinates)]

    def _angles(self, coordinates: Tensor) -> Tensor:
        quarter = self.config.attention_head_dim // 4
        exponents = torch.arange(quarter, device=coordinates.device, dtype=torch.float32) / quarter
        turn = 1.0 if self.config.rope_coordinates == "grid" else 2 * math.pi
        return (turn * coordinates)[..., None] * float(self.config.rope_theta) ** -exponents
