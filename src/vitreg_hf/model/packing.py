# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Images of many sizes in one sequence without padding: which of its tokens are of which image.

Images of one size stand behind one another in a group, so that a backend without a kernel for variable lengths attends
once per size. Shapes: T tokens of all images, B_i images of N_i tokens in group i, d channels of a head.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .position_embedding import Rotation
from .token_layout import unpacked

BLOCK = 128  # queries and keys of a block of flex attention


class Subset(NamedTuple):
    """Tokens of some images, of which a branch is computed."""

    rows: Tensor  # (T',), where they are in the sequence
    factors: Tensor  # (T', 1), by what their branch is scaled up
    packing: "Packing"  # of these tokens alone


class Packing:
    """Where the tokens of each image are.

    Args:
        sizes: `(B_i, N_i)` of each group, in the order of the sequence.
        device: of the tokens.
        rotations: what rotary positions do to each group, `(1 or B_i, 1, N_i, d)`; empty with a position table.
        apart: whether stochastic depth draws its subsets from each group by itself, as it does for crops of several
            resolutions, or from all images together.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        device: torch.device,
        rotations: Sequence[Rotation] = (),
        apart: bool = False,
    ) -> None:
        self.sizes = tuple(sizes)
        self.device = device
        self.apart = apart
        self._block_masks: dict[tuple[tuple[int, int], ...], BlockMask] = {}
        # Made once for all blocks, because most of them need it and sizes would have to be sent to a GPU each time.
        self.rotation = _of_all_groups(rotations, self.sizes) if rotations else None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each image."""
        return [count for images, count in self.sizes for _ in range(images)]

    @cached_property
    def ends(self) -> Tensor:
        """Where images begin and end, int32 `(images + 1,)`, from 0 to T."""
        lengths = torch.tensor([0, *self.lengths], dtype=torch.int32)
        return lengths.cumsum(0, dtype=torch.int32).to(self.device, non_blocking=True)

    @cached_property
    def image_of_token(self) -> Tensor:
        """Number of the image that each token is of, `(T,)`."""
        lengths = self.ends.diff()
        numbers = torch.arange(len(lengths), device=self.device)
        return numbers.repeat_interleave(lengths, output_size=sum(self.lengths))

    def by_group(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Views `(B_i, N_i, ...)` of `(T, ...)`."""
        return unpacked(tokens, self.sizes)

    # Parts

    def first(self, count: int | None) -> "Packing":
        """The packing of the first `count` tokens of each image; the same for None."""
        return self if count is None else Packing([(images, count) for images, _ in self.sizes], self.device)

    def first_rows(self, tokens: Tensor, count: int | None) -> Tensor:
        """The first tokens of each image, `(images * count, ...)` of `(T, ...)`; all of them for None."""
        if count is None:
            return tokens
        rows = self.ends[:-1, None] + torch.arange(count, device=self.device)
        return tokens.index_select(0, rows.flatten())

    def subset(self, rate: float) -> Subset | None:
        """Random images that are not dropped, `max(int(B * (1 - rate)), 1)` of B; None for all, as of one image."""
        kept = self._kept_of_groups(rate) if self.apart else self._kept_of_all(rate)
        if all(one is None for one in kept):
            return None
        rows, factors, sizes, start = [], [], [], 0
        total = sum(images for images, _ in self.sizes)
        left = sum(images if own is None else len(own) for own, (images, _) in zip(kept, self.sizes, strict=True))
        for own, (images, count) in zip(kept, self.sizes, strict=True):
            own = torch.arange(images, device=self.device) if own is None else own
            if len(own):
                factor = images / len(own) if self.apart else total / left
                rows.append((start + own[:, None] * count + torch.arange(count, device=self.device)).flatten())
                factors.append(torch.full((len(own) * count, 1), factor, device=self.device))
                sizes.append((len(own), count))
            start += images * count
        part = Packing(sizes, self.device, apart=self.apart)
        if self.rotation is not None:
            part.rotation = Rotation(*(angles.index_select(0, torch.cat(rows)) for angles in self.rotation))
        return Subset(torch.cat(rows), torch.cat(factors), part)

    def _kept_of_groups(self, rate: float) -> list[Tensor | None]:
        """Of each group the images that are kept, None for all: as many in every pass, so that this compiles."""
        counts = [max(int(images * (1.0 - rate)), 1) for images, _ in self.sizes]
        return [
            None if keep >= images else torch.randperm(images, device=self.device)[:keep]
            for keep, (images, _) in zip(counts, self.sizes, strict=True)
        ]

    def _kept_of_all(self, rate: float) -> list[Tensor | None]:
        """The same, drawn from all images on the CPU: how many are of each group has to be known there."""
        images = [count for count, _ in self.sizes]
        keep = max(int(sum(images) * (1.0 - rate)), 1)
        if keep >= sum(images):
            return [None] * len(images)
        marked = torch.zeros(sum(images), dtype=torch.bool)
        marked[torch.randperm(sum(images))[:keep]] = True
        return [own.nonzero().flatten().to(self.device, non_blocking=True) for own in marked.split(images)]

    # Kernels

    def kernel_arguments(self, backend: str | None, queries: "Packing") -> tuple[Any, dict[str, Any]] | None:
        """The mask and other arguments by which a backend attends within each image in one call; None if it cannot.

        Args:
            backend: as the config names it.
            queries: the packing of the tokens that attend: this one, or that of the first of each image.
        """
        if backend == "flex_attention":
            return self._block_mask(queries), {}
        if backend is not None and "flash" in backend:
            return None, {
                "cu_seq_lens_q": queries.ends,
                "cu_seq_lens_k": self.ends,
                "max_length_q": max(queries.lengths),
                "max_length_k": max(self.lengths),
            }
        return None

    def _block_mask(self, queries: "Packing") -> BlockMask:
        """Which blocks of queries and keys share an image, without a map of all tokens."""
        if queries.sizes not in self._block_masks:
            self._block_masks[queries.sizes] = _block_mask(queries.image_of_token, self.image_of_token)
        return self._block_masks[queries.sizes]


def _of_all_groups(rotations: Sequence[Rotation], sizes: Sequence[tuple[int, int]]) -> Rotation:
    """Rotation of all tokens and heads, `(T, 1, d)`, from those of the groups."""
    groups = zip(rotations, sizes, strict=True)
    expanded = [[part.expand(images, -1, -1, -1) for part in rotation] for rotation, (images, _) in groups]
    cos, sin = (torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts]) for parts in zip(*expanded))
    return Rotation(cos, sin)


def _block_mask(images_of_queries: Tensor, images_of_keys: Tensor) -> BlockMask:
    """Mask of flex attention for queries and keys of the same image, whose numbers rise along both sequences."""

    def same_image(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return images_of_queries[query] == images_of_keys[key]

    (first_query, last_query), (first_key, last_key) = map(_range_of_blocks, (images_of_queries, images_of_keys))
    shared = (first_query[:, None] <= last_key) & (first_key <= last_query[:, None])  # (query blocks, key blocks)
    return BlockMask.from_kv_blocks(
        shared.sum(1, dtype=torch.int32)[None, None],
        shared.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=same_image,
        seq_lengths=(len(images_of_queries), len(images_of_keys)),
    )


def _range_of_blocks(images: Tensor) -> tuple[Tensor, Tensor]:
    """First and last image that has tokens in each block."""
    starts = torch.arange(0, len(images), BLOCK, device=images.device)
    return images[starts], images[(starts + BLOCK - 1).clamp(max=len(images) - 1)]
