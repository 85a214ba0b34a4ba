# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Attention of a few tokens onto all, without keys and values of all.

A query meets a key in `q . (W_k x + b_k) = (W_k^T q) . x + q . b_k`, and what it takes is `sum_n p_n (W_v x_n + b_v) =
W_v (sum_n p_n x_n) + b_v`, as probabilities sum to 1. So projecting a query through `W_k`, and what it has taken
through `W_v`, gives the same as projecting every token: exact, and of the cost of 2 h / D of it per query.

Shapes: B images, Q queries, N tokens, D channels of the residual stream, h heads of d channels.
"""

import torch
from torch import Tensor


def logits_of(query: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What queries `(B, h, Q, d)` and the keys of tokens `(B, N, D)` have in common, `(B, h, Q, N)`, not scaled.

    `weight` `(h * d, D)` and `bias` `(h * d,)` are those of the projection to keys.
    """
    heads, head_dim = query.shape[1], query.shape[-1]
    by_head = weight.view(heads, head_dim, -1)
    through = torch.einsum("bhqe,hed->bhqd", query, by_head)  # not by @, which copies the weights for every image
    logits = (through.flatten(1, 2) @ tokens.transpose(1, 2)).unflatten(1, (heads, -1))
    return logits if bias is None else logits + (query * bias.view(heads, 1, head_dim)).sum(dim=-1, keepdim=True)


def taken_by(probabilities: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The attention output `(B, Q, h * d)` of probabilities `(B, h, Q, N)` over tokens `(B, N, D)`.

    `weight` `(h * d, D)` and `bias` `(h * d,)` are those of the projection to values.
    """
    heads = probabilities.shape[1]
    mixed = (probabilities.flatten(1, 2) @ tokens).unflatten(1, (heads, -1))  # (B, h, Q, D)
    by_head = weight.view(heads, -1, tokens.shape[-1])  # (h, d, D)
    taken = torch.einsum("bhqd,hed->bqhe", mixed, by_head).flatten(2)
    return taken if bias is None else taken + bias
