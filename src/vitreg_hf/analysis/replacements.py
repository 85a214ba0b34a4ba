# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What stands in the place of a token: zeros, a mean, noise, or a token of another image.

Shapes: B images, N tokens, D channels, n replaced tokens of a batch, S slots. A slot is what has a mean of its own:
each register, or all outliers together. `slots` `(B, N)` is -1 for tokens that stay.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Mode = Literal["zero", "mean", "noise", "shuffle"]
Edit = Callable[[int, Tensor], Tensor]

MODES: tuple[Mode, ...] = get_args(Mode)


def moments(marked: Sequence[Tensor], slot: Tensor, num_slots: int) -> Tensor:
    """Count, sum and sum of squares of the tokens of each slot before each block; those of batches may be added.

    Args:
        marked: the tokens before each block, `(n, D)` each.
        slot: of each token, `(n,)`.
        num_slots: S.

    Returns:
        `(blocks, S, 1 + 2 D)`, float64.
    """
    tokens = torch.stack(list(marked)).double()
    ones = torch.ones_like(tokens[..., :1])
    return F.one_hot(slot, num_slots).double().T @ torch.cat([ones, tokens, tokens.square()], dim=-1)


def mean_and_std(total: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (divisor n) of each channel, `(blocks, S, D)`; 0 in a slot without tokens."""
    mean, squares = (total[..., 1:] / total[..., :1].clamp(min=1)).chunk(2, dim=-1)
    return mean, (squares - mean.square()).clamp(min=0).sqrt()


def donors(image: Tensor, batch_size: int, generator: Generator) -> Tensor:
    """For each replaced token the one that takes its place with "shuffle", never one of its own image.

    Where every image has as many, each gets all those of one other image, in their order, and no two images the same
    ones (a derangement). Where numbers differ, each token is drawn with replacement from those of all other images.

    Args:
        image: of each token, ascending, `(n,)`.
        batch_size: B.
        generator: draws them.

    Returns:
        Indices `(n,)` into the tokens, on their device; -1 where no other image has one.
    """
    images = image.cpu()
    index, counts = torch.arange(len(images)), images.bincount(minlength=batch_size)
    if batch_size > 1 and bool((counts == counts[0]).all()):
        order = torch.randperm(batch_size, generator=generator)
        giver = torch.empty_like(order)
        giver[order] = order.roll(1)  # one cycle through all images
        return index.view(batch_size, -1)[giver].flatten().to(image.device)
    chosen = torch.full_like(index, -1)
    for receiver in images.unique():
        own = images == receiver
        others = index[~own]
        if len(others):
            chosen[own] = others[torch.randint(len(others), (int(own.sum()),), generator=generator)]
    return chosen.to(image.device)


def replacing(
    mode: Mode,
    slots: Tensor,
    marked: Sequence[Tensor],
    total: Tensor,
    blocks: Collection[int],
    generator: Generator,
) -> tuple[Edit, Tensor]:
    """How tokens are replaced at the input of blocks, for `Readers.edit`.

    Args:
        mode: what they are replaced by. Means, spreads and tokens of other images are the unablated model's.
        slots: of each token, `(B, N)`.
        marked: the unablated tokens that have a slot, before each block, `(n, D)` each.
        total: `moments` over all images.
        blocks: before which blocks tokens are replaced.
        generator: draws noise, anew before each block, and donors, the same before all blocks.

    Returns:
        A function of a block's index and its input, and the images that are as they should be, boolean `(B,)`: those
        that have such tokens and, for "shuffle", whose batch has another image with some.
    """
    (image, position), (mean, std) = (slots >= 0).nonzero(as_tuple=True), mean_and_std(total)
    slot, complete = slots[image, position], (slots >= 0).any(dim=1)
    donor = donors(image, len(slots), generator) if mode == "shuffle" else torch.zeros_like(image)
    complete[image[donor < 0]] = False

    def stand_ins(block: int) -> Tensor:
        if mode == "zero":
            return torch.zeros_like(marked[block])
        if mode == "shuffle":
            return marked[block][donor]
        if mode == "mean":
            return mean[block, slot]
        noise = torch.randn(marked[block].shape, generator=generator, dtype=torch.float64)
        return mean[block, slot] + std[block, slot] * noise.to(std.device)

    def edit(block: int, tokens: Tensor) -> Tensor:
        if block not in blocks:
            return tokens
        tokens = tokens.clone()
        tokens[image, position] = stand_ins(block).to(tokens.dtype)
        return tokens

    return edit, complete
