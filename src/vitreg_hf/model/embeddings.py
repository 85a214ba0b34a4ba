# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""From pixels to the first block's tokens: CLS (with its position), registers (without), patches with positions.

Shapes: B images, C channels, H x W pixels, P patches on a grid of rows x columns, N tokens, D channels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_vitreg import ViTRegConfig
from .position_embedding import InterpolationRule, PositionInterpolation, split_positions
from .token_layout import TokenLayout


class Embedded(NamedTuple):
    """What the embeddings hand to the first block."""

    tokens: Tensor  # (B, N, D)
    grid: tuple[int, int] | None  # rows, columns of patches; None where some were left out
    patch_mask: Tensor | None  # (B, P), True for patches with real pixels


def is_tracing() -> bool:
    """Whether this pass is compiled, exported or traced, so that sizes may be symbols and values are unknown."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class ViTRegPatchEmbeddings(nn.Module):
    """One linear projection per patch: `(B, C, H, W)` to `(B, D, rows, columns)`."""

    def __init__(self, config: ViTRegConfig) -> None:
        super().__init__()
        patch_size = config.patch_height_width
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projection(pixel_values.to(self.projection.weight.dtype))


class ViTRegEmbeddings(nn.Module):
    """Patches with positions, behind CLS (with its position) and the registers (without)."""

    def __init__(self, config: ViTRegConfig, use_mask_token: bool = False) -> None:
        super().__init__()
        self.config = config
        self.layout = TokenLayout.from_config(config)
        self.interpolation = PositionInterpolation(InterpolationRule.from_config(config), config.position_grid)
        width, (rows, columns) = config.hidden_size, config.position_grid
        self.patch_embeddings = ViTRegPatchEmbeddings(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.use_cls_token else None
        registers = config.num_register_tokens
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.num_cls_tokens + rows * columns, width))
        # A parameter without a gradient stops distributed training, so there is one only where masking happens.
        wanted = use_mask_token or config.use_mask_token
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if wanted else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, pixel_mask: Tensor | None = None
    ) -> Embedded:
        pixel_values, pixel_mask = self._fitted(pixel_values, pixel_mask)
        feature_map = self.patch_embeddings(pixel_values)
        grid = (feature_map.shape[-2], feature_map.shape[-1])
        patches = self.layout.embedded_patches(feature_map)
        if bool_masked_pos is not None:
            patches = self._masked(patches, bool_masked_pos)
        patch_mask = None if pixel_mask is None else self.layout.patch_mask(pixel_mask)
        cls_position, positions = self._positions(grid, patch_mask)
        cls_token: Tensor | None = self.cls_token
        if cls_token is not None and cls_position is not None:
            cls_token = cls_token + cls_position
        patches = patches + positions
        left_out = self.leaves_out_patches()
        if left_out:
            patches, patch_mask = self._thinned(patches, patch_mask)
        tokens = self.layout.join(cls_token, self.register_tokens, patches)
        return Embedded(self.dropout(tokens), None if left_out else grid, patch_mask)

    def leaves_out_patches(self) -> bool:
        """Whether this pass is training with patch dropout, after which patches are no grid."""
        return self.training and self.config.patch_dropout_rate > 0

    def _thinned(self, patches: Tensor, patch_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Patch dropout: some patches of each image, and their mask."""
        count = max(int(patches.shape[1] * (1.0 - self.config.patch_dropout_rate)), 1)
        chosen = self.layout.random_patches(patches, count, patch_mask)
        mask = None if patch_mask is None else self.layout.chosen_patches(patch_mask, chosen)
        return self.layout.chosen_patches(patches, chosen), mask

    def _positions(self, grid: tuple[int, int], patch_mask: Tensor | None) -> tuple[Tensor | None, Tensor]:
        own_grid, num_cls = self.interpolation.table_grid, self.config.num_cls_tokens
        cls_position, table = split_positions(self.position_embeddings, num_cls, own_grid)
        true_grids = None if patch_mask is None else self.layout.true_grids(patch_mask, grid)
        # Traced sizes may be symbols, and comparing them would bake this size in.
        if true_grids is None and not is_tracing() and grid == own_grid:
            return cls_position, table.flatten(0, 1)[None]
        return cls_position, self.interpolation(table, grid, true_grids, cached=not is_tracing())

    def _masked(self, patches: Tensor, bool_masked_pos: Tensor) -> Tensor:
        if self.mask_token is None:
            raise ValueError("Expected use_mask_token=True in the config for bool_masked_pos, got False")
        if self.leaves_out_patches():
            rate = self.config.patch_dropout_rate
            raise ValueError(f"Expected patch_dropout_rate=0 to train with bool_masked_pos, got {rate}")
        if bool_masked_pos.shape != patches.shape[:2]:
            expected = tuple(patches.shape[:2])
            raise ValueError(f"Expected bool_masked_pos of shape {expected}, got {tuple(bool_masked_pos.shape)}")
        return torch.where(bool_masked_pos.bool()[..., None], self.mask_token.to(patches.dtype), patches)

    def _fitted(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Images and mask in a size that the patch size divides, checked."""
        self._check_pixels(pixel_values, pixel_mask)
        missing_rows, missing_columns = self.layout.missing_pixels(*pixel_values.shape[-2:])
        if not self.config.pad_to_patch_size:
            self._check_divisible(pixel_values, missing_rows, missing_columns)
            return pixel_values, pixel_mask
        padding = (0, missing_columns, 0, missing_rows)
        pixel_mask = None if pixel_mask is None else F.pad(pixel_mask, padding)
        return F.pad(pixel_values, padding), pixel_mask

    def _check_pixels(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> None:
        channels = self.config.num_channels
        if not isinstance(pixel_values, Tensor):
            raise ValueError(f"Expected pixel_values as a torch tensor, got {type(pixel_values).__name__}")
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            expected = f"pixel_values of shape (batch, {channels}, height, width)"
            raise ValueError(f"Expected {expected}, got {tuple(pixel_values.shape)}")
        if pixel_mask is None:
            return
        batch_size, _, height, width = pixel_values.shape
        if pixel_mask.shape != (batch_size, height, width):
            expected = f"pixel_mask of shape ({batch_size}, {height}, {width})"
            raise ValueError(f"Expected {expected}, got {tuple(pixel_mask.shape)}")
        if not is_tracing():
            _check_top_left(pixel_mask)

    def _check_divisible(self, pixel_values: Tensor, missing_rows: int, missing_columns: int) -> None:
        if torch.compiler.is_compiling():
            torch._check(missing_rows == 0, lambda: "Expected a height that the patch size divides")
            torch._check(missing_columns == 0, lambda: "Expected a width that the patch size divides")
        elif not torch.jit.is_tracing() and (missing_rows or missing_columns):
            (patch_height, patch_width), (height, width) = self.layout.patch_size, pixel_values.shape[-2:]
            raise ValueError(
                f"Expected an image size that the patch size {patch_height} x {patch_width} divides, got "
                f"{height} x {width}: resize the image, pad it (size_divisor of the image processor), or set "
                "pad_to_patch_size=True in the config"
            )


def _check_top_left(pixel_mask: Tensor) -> None:
    """Real pixels must be a rectangle at the top left, as padding on the right and at the bottom leaves them.

    The answer has to reach the CPU, so a GPU is waited for; without a mask nothing is.
    """
    real = pixel_mask.bool()
    rectangle = real[:, :, :1] & real[:, :1, :]
    falling = (real[:, 1:, 0] <= real[:, :-1, 0]).all() & (real[:, 0, 1:] <= real[:, 0, :-1]).all()
    if not bool((real == rectangle).all() & falling & real[:, 0, 0].all()):
        raise ValueError(
            "Expected pixel_mask to mark one rectangle at the top left of every image (padding stands on the right "
            "and at the bottom), got another shape"
        )
