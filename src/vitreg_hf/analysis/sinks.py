# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Attention sinks: which tokens heads attend to when they have nothing to attend to.

One layer at a time; `RunningMean` gathers over inputs, so memory does not grow with their number.

Shapes: B inputs, h heads, N tokens (rows queries, columns keys), T real tokens of an input, K kinds of tokens.
`token_mask` `(B, N)` is True for real tokens: padding counts neither as query nor as key. Results are NaN at padding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitreg_hf.analysis.token_kinds import one_hot_kinds, real_tokens

_STRAY = 1e-3  # attention of one query that rounding to 16 bits may leave where there should be none

EPSILON = 0.3  # attention above which a token is a sink in the paper of `sink_heads`


class RunningMean:
    """Mean over inputs of tensors of one shape, summed in float64 on the CPU.

    Args:
        shape: of what one input contributes; `()` for a number.

    Attributes:
        total: sum of what was counted, float64 `shape`.
        count: how often each entry was counted, int64 `shape`.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.total = torch.zeros(tuple(shape), dtype=torch.float64)
        self.count = torch.zeros(tuple(shape), dtype=torch.int64)

    def update(self, values: Tensor, counted: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            values: `(B, *shape)`.
            counted: which values exist, boolean, of a shape that broadcasts to that of `values`. None: all.

        Raises:
            ValueError: if a shape differs, or a counted value is not finite: it would hide all others.
        """
        if values.shape[1:] != self.total.shape or values.ndim == 0:
            raise ValueError(f"Expected values (B, *{tuple(self.total.shape)}), got shape {tuple(values.shape)}")
        counted = torch.ones_like(values, dtype=torch.bool) if counted is None else counted.expand_as(values)
        kept = values.detach().masked_fill(~counted, 0)
        if not bool(kept.isfinite().all()):
            raise ValueError("Expected finite values where counted, got NaN or infinity")
        self.total += kept.sum(dim=0, dtype=torch.float64).cpu()
        self.count += counted.sum(dim=0).cpu()

    def result(self) -> Tensor:
        """Mean, float64 `shape`; NaN where nothing was counted."""
        return self.total / self.count

    def state_dict(self) -> dict[str, Tensor]:
        """Copy of all that was gathered."""
        return {"total": self.total.clone(), "count": self.count.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: if it is the state of another shape.
        """
        if state["total"].shape != self.total.shape:
            expected, got = tuple(self.total.shape), tuple(state["total"].shape)
            raise ValueError(f"Expected a saved mean of shape {expected}, got {got}")
        self.total, self.count = state["total"].clone(), state["count"].clone()


class MeanLogits:
    """Mean over sentences of the attention logits of one layer, for sentences of one length without padding.

    Args:
        num_heads: h.
        length: N, tokens of every sentence; 16 in the picture of StreamingLLM, over 256 sentences.

    Reference: Xiao et al., Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453), figure 2.
    """

    def __init__(self, num_heads: int, length: int) -> None:
        self._mean = RunningMean((num_heads, length, length))

    def update(self, logits: Tensor) -> None:
        """Add logits before the softmax, `(B, h, N, N)`, -inf where a causal mask forbids.

        Raises:
            ValueError: if the shape differs, or there are NaN, infinity, or a mask's lowest finite number, which no
                mean survives.
        """
        if logits.shape[1:] != self._mean.total.shape or logits.ndim != 4:
            expected = ", ".join(map(str, self._mean.total.shape))
            raise ValueError(f"Expected logits (B, {expected}), got shape {tuple(logits.shape)}")
        allowed = ~logits.isneginf()
        if bool((allowed & (logits <= torch.finfo(logits.dtype).min / 2)).any()):
            raise ValueError("Expected -inf where a mask forbids, got about the lowest finite number")
        self._mean.update(logits, counted=allowed)

    def result(self) -> Tensor:
        """Mean logits, float64 `(h, N, N)`; NaN where the mask forbids."""
        return self._mean.result()

    def state_dict(self) -> dict[str, Tensor]:
        """Copy of all that was gathered."""
        return self._mean.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved state; ValueError if it is that of other heads or another length."""
        self._mean.load_state_dict(state)


# Padding and causality


def real_attention(
    probabilities: Tensor, token_mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Check attention maps and set to 0 the rows and columns of padding, whatever stood there.

    Rows need not sum to 1: those of softmax with a sink logit, or of clipped softmax, do not.

    Returns:
        Attention `(B, h, N, N)` in float32 at least, and the mask of real tokens `(B, N)`.

    Raises:
        ValueError: if these are no probabilities `(B, h, N, N)`, if a real token attends to padding, if `causal` and
            a token attends to a later one, or for a wrong `token_mask`.
    """
    if probabilities.ndim != 4 or probabilities.shape[-1] != probabilities.shape[-2]:
        raise ValueError(f"Expected probabilities (B, h, N, N), got shape {tuple(probabilities.shape)}")
    real = real_tokens(token_mask, probabilities, probabilities.shape[-1])
    floats = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
    attention = floats.masked_fill(~real[:, None, :, None], 0)
    lowest, highest = attention.min().item(), attention.max().item()
    if not 0 <= lowest <= highest <= 1 + _STRAY:  # false for NaN, too
        raise ValueError(f"Expected probabilities from 0 to 1, got {lowest:.3g} to {highest:.3g}")
    to_padding = attention.masked_fill(real[:, None, None, :], 0).sum(dim=-1).max().item()
    if to_padding > _STRAY:
        raise ValueError(f"Expected no attention to padding, got {to_padding:.3g} of a query")
    to_later = attention.triu(1).sum(dim=-1).max().item() if causal else 0.0
    if to_later > _STRAY:
        raise ValueError(f"Expected no attention to later tokens of a causal model, got {to_later:.3g} of a query")
    return attention.masked_fill(~real[:, None, None, :], 0), real


def _count_queries(real: Tensor, causal: bool) -> Tensor:
    """How many real queries may see each key, `(B, N)`."""
    return _sum_from_here_on(real.long()) if causal else real.sum(dim=1, keepdim=True).expand_as(real)


def _count_keys(real: Tensor, causal: bool) -> Tensor:
    """How many real keys each query may see, `(B, N)`."""
    return real.cumsum(dim=1) if causal else real.sum(dim=1, keepdim=True).expand_as(real)


def _sum_from_here_on(values: Tensor) -> Tensor:
    return values.flip(1).cumsum(dim=1).flip(1)


# Sinks


def received_attention(probabilities: Tensor, token_mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Mean attention that each key gets, over the queries that may see it.

    Args:
        probabilities: `(B, h, N, N)`.
        token_mask: `(B, N)`; padding may stand on either side. None: all tokens are real.
        causal: whether a query sees only itself and earlier keys, as in the paper; otherwise all queries count.

    Returns:
        The paper's alpha, `(B, h, N)`, from 0 to 1; NaN at padding.

    Raises:
        ValueError: as `real_attention` does.

    Reference: Gu et al., When Attention Sink Emerges in Language Models (arXiv 2410.10781).
    """
    attention, real = real_attention(probabilities, token_mask, causal)
    received = attention.sum(dim=-2) / _count_queries(real, causal)[:, None]
    return received.masked_fill(~real[:, None], torch.nan)


def sink_heads(received: Tensor, key: int | Tensor, epsilon: float = EPSILON) -> Tensor:
    """Which heads make a sink of a token.

    Args:
        received: mean attention that each key gets, `(B, h, N)`, of `received_attention`.
        key: position of the token, one for all inputs or one per input `(B,)`.
        epsilon: mean attention above which a token is a sink; 0.3 is the paper's.

    Returns:
        Boolean `(B, h)`.

    Raises:
        ValueError: if the shape of `received` or `key` differs, a position is outside or padding, or epsilon is not
            between 0 and 1.
    """
    if received.ndim != 3:
        raise ValueError(f"Expected received attention (B, h, N), got shape {tuple(received.shape)}")
    if not 0 < epsilon < 1:
        raise ValueError(f"Expected epsilon between 0 and 1, got {epsilon}")
    keys = torch.as_tensor(key, device=received.device)
    if keys.ndim > 1 or (keys.ndim == 1 and len(keys) != len(received)) or keys.is_floating_point():
        raise ValueError(f"Expected an integer position or ({len(received)},) of them, got {tuple(keys.shape)}")
    if bool(((keys < 0) | (keys >= received.shape[2])).any()):
        raise ValueError(f"Expected positions from 0 to {received.shape[2] - 1}, got {keys.tolist()}")
    at_key = received[torch.arange(len(received), device=received.device), :, keys]
    if bool(at_key.isnan().any()):
        raise ValueError(f"Expected positions of real tokens, got padding among {keys.tolist()}")
    return at_key > epsilon


def sink_score(received: Tensor, key: int | Tensor, epsilon: float = EPSILON) -> Tensor:
    """Share of the layer's heads that make a sink of a token, `(B,)`, from 0 to 1.

    The paper's score, which it prints in percent, is the mean of this over inputs and layers (all of as many heads).
    Arguments and errors are those of `sink_heads`.

    Reference: Gu et al. (arXiv 2410.10781).
    """
    return sink_heads(received, key, epsilon).float().mean(dim=1)


def times_uniform(received: Tensor, token_mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Attention that each key gets, relative to what it would get if all queries attended evenly.

    Evenly means 1 / T to each key or, in a causal model, 1 / (i + 1) from query i to each key up to it. Unlike the
    sink score this compares inputs of different lengths.

    Args:
        received: `(B, h, N)`, of `received_attention` with the same `token_mask` and `causal`.
        token_mask: `(B, N)`. None: all tokens are real.
        causal: as in `received_attention`.

    Returns:
        Ratio `(B, h, N)`, 1 for a uniform map; NaN at padding.

    Raises:
        ValueError: if `received` is not `(B, h, N)`, or for a wrong `token_mask`.
    """
    if received.ndim != 3:
        raise ValueError(f"Expected received attention (B, h, N), got shape {tuple(received.shape)}")
    real = real_tokens(token_mask, received, received.shape[2])
    evenly = (1 / _count_keys(real, causal).to(received.dtype)).masked_fill(~real, 0)
    total = _sum_from_here_on(evenly) if causal else evenly.sum(dim=1, keepdim=True)
    uniform = total / _count_queries(real, causal)
    return (received / uniform[:, None]).masked_fill(~real[:, None], torch.nan)


def share_by_kind(probabilities: Tensor, kinds: Tensor, num_kinds: int, token_mask: Tensor | None = None) -> Tensor:
    """Share of attention that goes to each kind of token, mean over real queries.

    Args:
        probabilities: `(B, h, N, N)`, causal or not.
        kinds: kind of each token, integers `(B, N)` from 0 to `num_kinds - 1`; at padding they are not looked at.
        num_kinds: K.
        token_mask: `(B, N)`. None: all tokens are real.

    Returns:
        `(B, h, K)`; sums to 1 over kinds as far as the rows of `probabilities` do.

    Raises:
        ValueError: if `kinds` has another shape or range, and as `real_attention` does.

    Reference: the share of [SEP] in Bondarenko et al., Quantizable Transformers (arXiv 2306.12929).
    """
    attention, real = real_attention(probabilities, token_mask)
    membership = one_hot_kinds(kinds, num_kinds, real).to(attention)
    mean_over_queries = attention.sum(dim=-2) / real.sum(dim=1)[:, None, None]
    return mean_over_queries @ membership


# Entropy


def attention_entropy(probabilities: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Entropy of each query's attention in nats, `(B, h, N)`; NaN at padding.

    Raises:
        ValueError: as `real_attention` does.
    """
    attention, real = real_attention(probabilities, token_mask)
    return torch.special.entr(attention).sum(dim=-1).masked_fill(~real[:, None], torch.nan)


def entropy_over_uniform(entropy: Tensor, token_mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Entropy relative to that of even attention to all keys that the query may see, `(B, h, N)`, from 0 to 1.

    NaN at padding, and where a query sees but one key: there is nothing to choose.

    Args:
        entropy: nats, `(B, h, N)`, of `attention_entropy`.
        token_mask: `(B, N)`. None: all tokens are real.
        causal: whether a query sees only itself and earlier keys.

    Raises:
        ValueError: if `entropy` is not `(B, h, N)`, or for a wrong `token_mask`.
    """
    if entropy.ndim != 3:
        raise ValueError(f"Expected entropy (B, h, N), got shape {tuple(entropy.shape)}")
    real = real_tokens(token_mask, entropy, entropy.shape[2])
    keys = _count_keys(real, causal)
    return (entropy / keys.to(entropy.dtype).log()[:, None]).masked_fill((~real | (keys < 2))[:, None], torch.nan)


# What tokens offer to a head


@dataclass(frozen=True)
class HeadNorms:
    """L2 norms in one layer, each `(B, h, N)`, NaN at padding.

    Attributes:
        value: of the value vector of each token.
        output: of what each query takes from the head, before the output projection.
    """

    value: Tensor
    output: Tensor


def head_norms(probabilities: Tensor, values: Tensor, token_mask: Tensor | None = None) -> HeadNorms:
    """Norms of what tokens offer and queries take, for each head.

    Args:
        probabilities: `(B, h, N, N)`.
        values: `(B, h, N, d)`, repeated for all heads that share them.
        token_mask: `(B, N)`. None: all tokens are real.

    Raises:
        ValueError: if the shape of `values` differs, or as `real_attention` does.

    Reference: Bondarenko et al. (arXiv 2306.12929).
    """
    attention, real = real_attention(probabilities, token_mask)
    if values.ndim != 4 or values.shape[:3] != attention.shape[:3]:
        raise ValueError(f"Expected values {(*attention.shape[:3], 'd')}, got shape {tuple(values.shape)}")
    offered = values.to(attention.dtype).masked_fill(~real[:, None, :, None], 0)
    taken = attention @ offered
    norms = [vectors.norm(dim=-1).masked_fill(~real[:, None], torch.nan) for vectors in (offered, taken)]
    return HeadNorms(*norms)
