# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What maps of attention say: how wide, where, how much alike; what flows from input to output over all layers.

Shapes: T prefix tokens (CLS, then registers), N tokens, P patches on a grid of rows x columns; `...` any batch shape.
Attention is softmax probabilities, so what a map lacks to a sum of 1 went to the prefix.
"""

import torch
from torch import Tensor

from vitreg_hf.model.token_layout import TokenLayout


def on_patches_only(maps: Tensor) -> Tensor:
    """Maps `(..., rows, columns)` scaled to a sum of 1 over the patches; one without any attention becomes even."""
    total = maps.sum(dim=(-2, -1), keepdim=True)
    even = torch.full_like(maps, 1 / (maps.shape[-2] * maps.shape[-1]))
    return torch.where(total > 0, maps / total.clamp(min=torch.finfo(maps.dtype).tiny), even)


def entropy(maps: Tensor) -> Tensor:
    """Entropy over patches of maps `(..., rows, columns)`, in nats: 0 for one patch, `log(P)` if all are alike."""
    shares = on_patches_only(maps)
    return -torch.special.xlogy(shares, shares).sum(dim=(-2, -1))


def area(maps: Tensor) -> Tensor:
    """Share of the image that a map covers, `exp(entropy) / P`: 1 when all patches get the same, `1 / P` for one."""
    return entropy(maps).exp() / (maps.shape[-2] * maps.shape[-1])


def centre(maps: Tensor) -> Tensor:
    """Centre of mass `(..., 2)` as (row, column), each from 0 (top, left) to 1 (bottom, right)."""
    shares = on_patches_only(maps)
    rows = (torch.arange(maps.shape[-2], device=maps.device) + 0.5) / maps.shape[-2]
    columns = (torch.arange(maps.shape[-1], device=maps.device) + 0.5) / maps.shape[-1]
    return torch.stack([(shares.sum(-1) * rows).sum(-1), (shares.sum(-2) * columns).sum(-1)], dim=-1)


def overlap(maps: Tensor) -> Tensor:
    """Attention that two tokens spend on the same patches, `(..., T, T)`, of maps `(..., T, rows, columns)`.

    The sum over patches of the smaller of both shares: 1 for equal maps, 0 for maps that share no patch.
    """
    shares = on_patches_only(maps).flatten(-2)
    return torch.minimum(shares[..., :, None, :], shares[..., None, :, :]).sum(dim=-1)


def mass_by_kind(attention: Tensor, layout: TokenLayout) -> Tensor:
    """Share of attention on CLS, on registers and on patches, `(..., 3)`, of attention `(..., N)`; they sum to 1."""
    return torch.stack([part.sum(dim=-1) for part in layout.by_kind(attention)], dim=-1)


def rollout_step(rolled: Tensor | None, attention: Tensor, layout: TokenLayout, registers: str = "follow") -> Tensor:
    """One layer of attention rollout (Abnar and Zuidema, arXiv 2005.00928), from the first layer to the last.

    Args:
        rolled: what the layers before returned, `(B, N, N)`; None before the first layer.
        attention: probabilities of this layer, mean over heads, `(B, N, N)`.
        layout: which tokens are registers.
        registers: `follow` lets what registers gathered flow on to whoever reads them, as it does in the model; `cut`
            takes attention to registers away and scales the rest up, which shows what came straight from patches.

    Returns:
        `(B, N, N)`, rows sum to 1: how much of each input token is in each token after this layer, if half of every
        token is what it was before the layer.

    Raises:
        ValueError: for another value of `registers`.
    """
    if registers not in ("follow", "cut"):
        raise ValueError(f"Expected registers to be 'follow' or 'cut', got {registers!r}")
    if registers == "cut":
        attention = _without_registers(attention, layout)
    tokens = attention.shape[-1]
    mixed = (attention + torch.eye(tokens, dtype=attention.dtype, device=attention.device)) / 2
    return mixed if rolled is None else mixed @ rolled


def _without_registers(attention: Tensor, layout: TokenLayout) -> Tensor:
    cls, registers, patches = layout.by_kind(attention)
    attention = torch.cat([cls, torch.zeros_like(registers), patches], dim=-1)
    return attention / attention.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(attention.dtype).tiny)
