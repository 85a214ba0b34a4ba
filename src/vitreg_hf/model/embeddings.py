# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""From pixels to the first block's tokens: CLS, registers and patches, and the positions of those that have one.

Shapes: B images, C channels, H x W pixels, P patches on a grid of rows x columns, N tokens, D channels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_vitreg import ViTRegConfig
from .inference import is_tracing
from .moved_neurons import initial_tokens
from .position_embedding import (
    InterpolationRule,
    PositionInterpolation,
    RotaryPositions,
    Rotation,
    split_positions,
)
from .token_layout import TokenLayout


class Embedded(NamedTuple):
    """What the embeddings hand to the first block."""

    tokens: Tensor  # (B, N, D)
    grid: tuple[int, int] | None  # rows, columns of patches; None where some were left out
    patch_mask: Tensor | None  # (B, P), True for patches with real pixels
    rotation: Rotation | None  # (1 or B, 1, N, d), for the queries and keys of every block; None with a position table


class ViTRegPatchEmbeddings(nn.Module):
    """One linear projection per patch: `(B, C, H, W)` to `(B, D, rows, columns)`."""

    def __init__(self, config: ViTRegConfig) -> None:
        super().__init__()
        patch_size = config.patch_height_width
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, patch_size, stride=patch_size, bias=config.patch_bias
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projection(pixel_values.to(self.projection.weight.dtype))


class ViTRegEmbeddings(nn.Module):
    """CLS and registers before the patches. With a position table, patches have a position in it, CLS too unless the
    config says otherwise, and registers if it says so."""

    def __init__(self, config: ViTRegConfig, use_mask_token: bool = False) -> None:
        super().__init__()
        self.config = config
        self.layout = TokenLayout.from_config(config)
        self.interpolation = PositionInterpolation(InterpolationRule.from_config(config), config.position_grid)
        self.rotary = RotaryPositions(config) if config.position_embedding_type == "rotary" else None
        width, registers, positions = config.hidden_size, config.num_register_tokens, config.num_positions
        self.patch_embeddings = ViTRegPatchEmbeddings(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.use_cls_token else None
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.position_embeddings = nn.Parameter(torch.zeros(1, positions, width)) if positions else None
        # A parameter without a gradient stops distributed training, so there is one only where masking happens.
        wanted = use_mask_token or config.use_mask_token
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if wanted else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        has_norm = config.embedding_norm
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if has_norm else nn.Identity()

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
        true_grids = None if patch_mask is None else self.layout.true_grids(patch_mask, grid)
        cls_token, registers, patches = self._with_positions(patches, grid, true_grids)
        rotation = self._rotation(grid, patches.device, true_grids)
        left_out = self.leaves_out_patches()
        if left_out:
            patches, patch_mask, rotation = self._thinned(patches, patch_mask, rotation)
        tokens = self.norm(self.dropout(self.layout.join(cls_token, registers, patches)))
        tokens = self._with_test_time(tokens, patch_mask)
        return Embedded(tokens, None if left_out else grid, patch_mask, self._of_all_tokens(rotation))

    def _with_test_time(self, tokens: Tensor, patch_mask: Tensor | None) -> Tensor:
        """Tokens with test-time registers, behind the norm, so that a zero is one for the first block."""
        if not self.config.num_test_time_registers:
            return tokens
        initial = initial_tokens(self.config, self.layout.patches_without_test_time(tokens), patch_mask)
        return self.layout.with_test_time(tokens, initial)

    def leaves_out_patches(self) -> bool:
        """Whether this pass is training with patch dropout, after which patches are no grid."""
        return self.training and self.config.patch_dropout_rate > 0

    def _thinned(
        self, patches: Tensor, patch_mask: Tensor | None, rotation: Rotation | None
    ) -> tuple[Tensor, Tensor | None, Rotation | None]:
        """Patch dropout: some patches of each image, their mask, and their rotation."""
        count = max(int(patches.shape[1] * (1.0 - self.config.patch_dropout_rate)), 1)
        chosen = self.layout.random_patches(patches, count, patch_mask)
        mask = None if patch_mask is None else self.layout.chosen_patches(patch_mask, chosen)
        if rotation is not None:
            rotation = Rotation(*(self.layout.chosen_patches(part, chosen) for part in rotation))
        return self.layout.chosen_patches(patches, chosen), mask, rotation

    def _with_positions(
        self, patches: Tensor, grid: tuple[int, int], true_grids: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """CLS, registers and patches, plus the positions that the table has for them."""
        if self.position_embeddings is None:
            return self.cls_token, self.register_tokens, patches
        table_grid = self.interpolation.table_grid  # other than that of a config that was changed since
        positions = split_positions(self.position_embeddings, self.config, table_grid)
        # Traced sizes may be symbols, and comparing them would bake this size in.
        if true_grids is None and not is_tracing() and grid == table_grid:
            resized = positions.patches.flatten(0, 1)[None]
        else:
            resized = self.interpolation(positions.patches, grid, true_grids, cached=not is_tracing())
        cls_token, registers = self.cls_token, self.register_tokens
        return _moved(cls_token, positions.cls_token), _moved(registers, positions.registers), patches + resized

    def _rotation(self, grid: tuple[int, int], device: torch.device, true_grids: Tensor | None) -> Rotation | None:
        """What rotary positions do to patches; None with a table."""
        if self.rotary is None:
            return None
        augmented = self.training and self.config.augments_coordinates
        return self.rotary(grid, device, true_grids, augmented, cached=not is_tracing())

    def _of_all_tokens(self, rotation: Rotation | None) -> Rotation | None:
        """The same for all tokens and heads: those before the patches are not turned."""
        if rotation is None:
            return None
        cos, sin = self.layout.of_all_tokens(rotation.cos, 1.0), self.layout.of_all_tokens(rotation.sin, 0.0)
        return Rotation(cos[:, None], sin[:, None])

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
            hint = ": images of many sizes go through forward_packed" if isinstance(pixel_values, list) else ""
            raise ValueError(f"Expected pixel_values as a torch tensor, got {type(pixel_values).__name__}{hint}")
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


def _moved(token: Tensor | None, position: Tensor | None) -> Tensor | None:
    return token if token is None or position is None else token + position


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
