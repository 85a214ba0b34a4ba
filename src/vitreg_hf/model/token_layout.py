# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The order of tokens, `[CLS][registers][test-time registers][patches]`, and the patch grid.

This is the only place that slices a token sequence or reshapes it to an image grid. Shapes used below:
B images, N tokens, P patches (rows x columns, row-major), D channels, C image channels, H x W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_vitreg import ViTRegConfig


@dataclass(frozen=True)
class TokenLayout:
    """How many tokens of each kind stand before the patches, and how large a patch is in pixels."""

    num_cls: int
    num_registers: int
    num_test_time_registers: int
    patch_size: tuple[int, int]

    @classmethod
    def from_config(cls, config: ViTRegConfig) -> "TokenLayout":
        """Read the layout off a config."""
        registers, test_time = config.num_register_tokens, config.num_test_time_registers
        return cls(config.num_cls_tokens, registers, test_time, config.patch_height_width)

    @property
    def num_prefix(self) -> int:
        """Tokens before the first patch."""
        return self.num_cls + self.num_registers + self.num_test_time_registers

    def num_pooled(self, pooling: str) -> int | None:
        """How many tokens a pooling of the config reads, which are the first; None for all."""
        return {"cls": self.num_cls, "cls_register_mean": self.num_cls + self.num_registers}.get(pooling)

    def num_tokens(self, height: int, width: int) -> int:
        """Tokens of an image of H x W pixels, a patch that its edge cuts among them."""
        patch_height, patch_width = self.patch_size
        return self.num_prefix + -(-height // patch_height) * -(-width // patch_width)

    # Tokens

    def first(self, tokens: Tensor, count: int | None) -> Tensor:
        """View of the first tokens, `(B, count, ...)` of `(B, N, ...)`; None for all of them."""
        return tokens if count is None else tokens[:, :count]

    @staticmethod
    def first_by_head(values: Tensor, count: int) -> Tensor:
        """View of the first tokens' queries, rotations or rows of a mask, `(..., count, d)` of `(..., N, d)`."""
        return values[..., :count, :]

    def join(self, cls_token: Tensor | None, registers: Tensor | None, patches: Tensor) -> Tensor:
        """Build the sequence `(B, N, D)` from CLS `(1, 1, D)`, registers `(1, R, D)` and patches `(B, P, D)`."""
        batch_size = patches.shape[0]
        prefix = [token.expand(batch_size, -1, -1) for token in (cls_token, registers) if token is not None]
        return torch.cat([*prefix, patches], dim=1)

    def with_prefix(self, prefix: Tensor, patches: Tensor) -> Tensor:
        """Build the sequence `(B, N, D)` from all before the patches, `(B, prefix, D)`, and patches `(B, P, D)`."""
        return torch.cat([prefix, patches], dim=1)

    def without_test_time(self, tokens: Tensor) -> Tensor:
        """All tokens but test-time registers, `(B, N - T, ...)` of `(B, N, ...)`."""
        if not self.num_test_time_registers:
            return tokens
        first = self.num_cls + self.num_registers
        return torch.cat([tokens[:, :first], tokens[:, self.num_prefix :]], dim=1)

    def with_test_time(self, tokens: Tensor, test_time: Tensor) -> Tensor:
        """Undo that: put test-time registers `(1 or B, T, D)` between the registers and the patches."""
        first = self.num_cls + self.num_registers
        test_time = test_time.expand(tokens.shape[0], -1, -1)
        return torch.cat([tokens[:, :first], test_time, tokens[:, first:]], dim=1)

    def patches_without_test_time(self, tokens: Tensor) -> Tensor:
        """View of the patches, `(B, P, D)`, of tokens among which there are no test-time registers yet."""
        return tokens[:, self.num_cls + self.num_registers :]

    def test_time_registers(self, tokens: Tensor) -> Tensor | None:
        """View of the test-time registers, `(B, T, D)`, or None if there are none."""
        first = self.num_cls + self.num_registers
        return tokens[:, first : self.num_prefix] if self.num_test_time_registers else None

    def first_test_time(self, by_head: Tensor) -> Tensor:
        """View of the first test-time register, `(..., d)`, of keys or values `(..., N, d)`."""
        return by_head[..., self.num_cls + self.num_registers, :]

    def cls_alone(self, tokens: Tensor) -> Tensor:
        """Tokens `(B, N, D)` with zeros for all but CLS."""
        return F.pad(tokens[:, : self.num_cls], (0, 0, 0, tokens.shape[1] - self.num_cls))

    def of_all_tokens(self, values: Tensor, prefix_value: float) -> Tensor:
        """Values `(B, N, D)` of all tokens from those of the patches, `(B, P, D)`, and one for all before them."""
        return F.pad(values, (0, 0, self.num_prefix, 0), value=prefix_value)

    def cls_token(self, tokens: Tensor) -> Tensor | None:
        """View of the CLS token, `(B, D)`, or None if the model has none."""
        return tokens[:, 0] if self.num_cls else None

    def register_tokens(self, tokens: Tensor) -> Tensor | None:
        """View of the trained registers, `(B, R, D)`, or None if there are none."""
        return tokens[:, self.num_cls : self.num_cls + self.num_registers] if self.num_registers else None

    def patch_tokens(self, tokens: Tensor) -> Tensor:
        """View of the patches, `(B, P, D)`, in row-major grid order."""
        return tokens[:, self.num_prefix :]

    def patch_map(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """View of the patches as an image, `(B, D, rows, columns)`."""
        return self.patch_tokens(tokens).unflatten(1, grid).permute(0, 3, 1, 2)

    def prefix_queries(self, queries: Tensor) -> Tensor:
        """View of what CLS and registers ask, `(B, heads, prefix, d)`, from the queries of all tokens."""
        return queries[:, :, : self.num_prefix]

    def attention_to_patches(self, attention: Tensor, grid: tuple[int, int]) -> Tensor:
        """View of attention onto patches as images, `(..., rows, columns)`, from weights `(..., N)` on all tokens."""
        return self.patches_of(attention).unflatten(-1, grid)

    def prefix_tokens(self, tokens: Tensor) -> Tensor:
        """View of everything before the patches, `(B, prefix, D)`."""
        return tokens[:, : self.num_prefix]

    def prefix_of(self, attention: Tensor) -> Tensor:
        """View of attention onto everything before the patches, `(..., prefix)`, from weights `(..., N)`."""
        return attention[..., : self.num_prefix]

    def patches_of(self, attention: Tensor) -> Tensor:
        """View of attention onto patches, `(..., P)`, from weights `(..., N)` on all tokens."""
        return attention[..., self.num_prefix :]

    def by_kind(self, attention: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of attention `(..., N)` onto CLS, onto registers of both kinds, and onto patches."""
        registers = self.num_registers + self.num_test_time_registers
        sizes = [self.num_cls, registers, attention.shape[-1] - self.num_prefix]
        cls, register, patches = attention.split(sizes, dim=-1)
        return cls, register, patches

    def random_patches(self, patches: Tensor, count: int, patch_mask: Tensor | None) -> Tensor:
        """Draw patches of each image, `(B, count)` indices of `(B, P, D)` in grid order, padded ones only at last."""
        rank = torch.rand(patches.shape[:2], device=patches.device)
        if patch_mask is not None:
            rank = rank + (~patch_mask).to(rank.dtype)
        return rank.argsort(dim=1)[:, :count].sort(dim=1).values

    def chosen_patches(self, patches: Tensor, chosen: Tensor) -> Tensor:
        """Patches `(B, count, ...)` of `(B, P, ...)`, by their indices `(B, count)` in each image."""
        return patches.take_along_dim(chosen.view(*chosen.shape, *(1,) * (patches.ndim - 2)), dim=1)

    # Grid

    def missing_pixels(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of pixels that an image lacks to reach the next multiple of the patch size."""
        patch_height, patch_width = self.patch_size
        # Not `-height % patch_height`: exporting with a dynamic height takes no remainder of a negative number.
        return (patch_height - height % patch_height) % patch_height, (patch_width - width % patch_width) % patch_width

    def embedded_patches(self, feature_map: Tensor) -> Tensor:
        """Sequence `(B, P, D)` from the output of the patch convolution, `(B, D, rows, columns)`."""
        return feature_map.flatten(2).transpose(1, 2)

    def pixels(self, patch_pixels: Tensor) -> Tensor:
        """Image `(B, C, H, W)` from the pixels predicted per patch, `(B, C * patch pixels, rows, columns)`."""
        batch_size, _, rows, columns = patch_pixels.shape
        height, width = self.patch_size
        patches = patch_pixels.reshape(batch_size, -1, height, width, rows, columns)
        return patches.permute(0, 1, 4, 2, 5, 3).reshape(batch_size, -1, rows * height, columns * width)

    def pixel_mask_of(self, patches_marked: Tensor, grid: tuple[int, int]) -> Tensor:
        """Mark the pixels `(B, H, W)` of the patches that are marked, `(B, P)`."""
        on_grid = patches_marked.unflatten(1, grid)
        return on_grid.repeat_interleave(self.patch_size[0], 1).repeat_interleave(self.patch_size[1], 2)

    # Padding

    def patch_mask(self, pixel_mask: Tensor) -> Tensor:
        """Mark the patches `(B, P)` that hold at least one real pixel of `pixel_mask` `(B, H, W)`."""
        blocks = pixel_mask.bool().unflatten(2, (-1, self.patch_size[1])).unflatten(1, (-1, self.patch_size[0]))
        return blocks.any(dim=4).any(dim=2).flatten(1)

    def token_mask(self, patch_mask: Tensor) -> Tensor:
        """Mark the tokens `(B, N)` that take part: every prefix token, and the patches of `patch_mask` `(B, P)`."""
        return torch.cat([patch_mask.new_ones(patch_mask.shape[0], self.num_prefix), patch_mask], dim=1)

    def true_grids(self, patch_mask: Tensor, grid: tuple[int, int]) -> Tensor:
        """Rows and columns of real patches in each padded image, `(B, 2)`, from a mask `(B, P)`."""
        on_grid = patch_mask.unflatten(1, grid)
        return torch.stack([on_grid.any(dim=2).sum(dim=1), on_grid.any(dim=1).sum(dim=1)], dim=1)


def packed(groups: Sequence[Tensor]) -> Tensor:
    """All tokens of groups `(B_i, N_i, D)` behind one another, `(sum of B_i * N_i, D)`."""
    rows = [group.flatten(0, 1) for group in groups]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def unpacked(tokens: Tensor, sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
    """Undo `packed`: views `(B_i, N_i, ...)` of all tokens `(T, ...)`, given `(B_i, N_i)` of each."""
    parts = tokens.split([images * count for images, count in sizes])
    return tuple(part.unflatten(0, size) for part, size in zip(parts, sizes, strict=True))
