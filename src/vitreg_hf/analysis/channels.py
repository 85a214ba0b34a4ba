# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Outlier channels, massive activations, the branch that writes them, and heads that use them to do nothing.

One layer at a time. Statistics are taken per input, over its real tokens alone, so that they depend neither on the
batch nor on padding; gather them over inputs with `sinks.RunningMean`.

Shapes: B inputs, N tokens, D channels, h heads, d channels of a head, K kinds of tokens, M found activations.
`token_mask` `(B, N)` is True for real tokens.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitreg_hf.analysis.sinks import RunningMean, head_norms, real_attention
from vitreg_hf.analysis.token_kinds import real_tokens

MASSIVE_ABSOLUTE, MASSIVE_RATIO = 100.0, 1000.0  # the rules of arXiv 2402.17762


def _real_values(x: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Activations `(B, N, D)`, at least float32, 0 at padding, and the mask of real tokens; ValueError if wrong."""
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"Expected floating-point activations (B, N, D), got {x.dtype} {tuple(x.shape)}")
    real = real_tokens(token_mask, x, x.shape[1])
    values = x.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(~real[..., None], 0)
    if not bool(values.isfinite().all()):
        raise ValueError("Expected finite activations, got NaN or infinity")
    return values, real


def _centred(x: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Distance from the mean of each input, float64 `(B, N, D)`, 0 at padding, and how many values count, `(B,)`."""
    values, real = _real_values(x, token_mask)
    count = real.sum(dim=1) * x.shape[2]
    mean = values.sum(dim=(1, 2), dtype=torch.float64) / count
    return (values.double() - mean[:, None, None]).masked_fill(~real[..., None], 0), count


# Outliers by standard deviations


def sigma_outliers(x: Tensor, token_mask: Tensor | None = None, num_sigmas: float = 6.0) -> Tensor:
    """Mark values far from the mean of their activation tensor.

    The tensor is that of one input, all tokens and channels together, and its standard deviation is that of the
    population. Of `num_sigmas`² values or fewer none can be so far.

    Args:
        x: activations `(B, N, D)`; in the paper outputs of FFNs.
        token_mask: `(B, N)`. None: all tokens are real.
        num_sigmas: how many standard deviations away, on either side; 6 is the paper's.

    Returns:
        Boolean `(B, N, D)`, False at padding. Its sum over the last two dimensions counts outliers per input, over the
        second per channel, over the last per token, which `token_kinds.count_by_kind` adds up for kinds of tokens.

    Raises:
        ValueError: if `x` is not finite or no `(B, N, D)`, `num_sigmas` is not positive, or for a wrong `token_mask`.

    Reference: Bondarenko et al., Quantizable Transformers (arXiv 2306.12929).
    """
    if num_sigmas <= 0:
        raise ValueError(f"Expected a positive number of standard deviations, got {num_sigmas}")
    distance, count = _centred(x, token_mask)
    deviation = (distance.square().sum(dim=(1, 2)) / count).sqrt()
    return distance.abs() > num_sigmas * deviation[:, None, None]


def kurtosis(x: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Pearson's kurtosis (a Gaussian has 3, not 0) over all values of each input, `(B,)`, float64.

    It is the fourth central moment over the squared variance, both of the population, as
    `scipy.stats.kurtosis(..., fisher=False)`; NaN if all values are equal.

    What to give it: the paper averages over inputs and layers, but at which place of a layer it reads is not verified
    here. The authors' script for BERT (Qualcomm-AI-research/outlier-free-transformers, validate_mlm.py) flattens each
    input, as this does, reads the FFN's output and that of the LayerNorm after it, and averages over both places. It
    divides by the unbiased deviation and adds 1e-6 to its fourth power, so small activations come out lower there.

    Args:
        x: activations `(B, N, D)`.
        token_mask: `(B, N)`. None: all tokens are real.

    Raises:
        ValueError: if `x` is not finite or no `(B, N, D)`, or for a wrong `token_mask`.

    Reference: Bondarenko et al. (arXiv 2306.12929).
    """
    distance, count = _centred(x, token_mask)
    variance = distance.square().sum(dim=(1, 2)) / count
    return distance.pow(4).sum(dim=(1, 2)) / count / variance.square()


def infinity_norm(x: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Largest magnitude of each input, `(B,)`.

    The paper's number is the mean over inputs, then the maximum over layers; for the place see `kurtosis`.

    Raises:
        ValueError: if `x` is not finite or no `(B, N, D)`, or for a wrong `token_mask`.

    Reference: Bondarenko et al. (arXiv 2306.12929).
    """
    return _real_values(x, token_mask)[0].abs().amax(dim=(1, 2))


class ChannelMagnitudes:
    """Mean and largest magnitude of each channel over all real tokens seen: a curve over channels.

    Args:
        num_channels: D.
    """

    def __init__(self, num_channels: int) -> None:
        self._mean = RunningMean((num_channels,))
        self._maximum = torch.full((num_channels,), torch.nan, dtype=torch.float64)

    def update(self, x: Tensor, token_mask: Tensor | None = None) -> None:
        """Add activations `(B, N, D)`; ValueError if they are not finite, of other channels, or the mask is wrong."""
        values, real = _real_values(x, token_mask)
        magnitudes = values[real].abs()
        self._mean.update(magnitudes)
        self._maximum = self._maximum.fmax(magnitudes.amax(dim=0).double().cpu())  # fmax: a number beats NaN

    def mean(self) -> Tensor:
        """Mean |x| of each channel, float64 `(D,)`; NaN before any update."""
        return self._mean.result()

    def maximum(self) -> Tensor:
        """Largest |x| of each channel, float64 `(D,)`; NaN before any update."""
        return self._maximum.clone()

    def state_dict(self) -> dict[str, Tensor]:
        """Copy of all that was gathered."""
        return {**self._mean.state_dict(), "maximum": self._maximum.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved state; ValueError if it is that of other channels."""
        self._mean.load_state_dict(state)
        self._maximum = state["maximum"].clone()


# Massive activations


@dataclass(frozen=True)
class MassiveActivations:
    """The largest massive activations of a hidden state, largest first.

    Attributes:
        positions: input, token and channel of each, int64 `(M, 3)`.
        values: signed activations `(M,)`.
        ratios: magnitude over the median magnitude of the input, `(M,)`.
        total: how many there are, listed or not.
    """

    positions: Tensor
    values: Tensor
    ratios: Tensor
    total: int


def massive_activations(
    x: Tensor,
    token_mask: Tensor | None = None,
    absolute: float = MASSIVE_ABSOLUTE,
    ratio: float = MASSIVE_RATIO,
    limit: int = 100,
) -> MassiveActivations:
    """Find activations that are huge by themselves and next to all others of their hidden state.

    Args:
        x: hidden state `(B, N, D)`: the residual stream after a layer, before the final norm.
        token_mask: `(B, N)`. None: all tokens are real.
        absolute: magnitude to exceed; 100 is the paper's. Those of ViTs are said to stay below 500, so that the two
            rules together often find none there: 0 leaves the relative rule alone, which `ratio` may then ease.
        ratio: magnitude to reach, in medians of |x| over the input (the lower one of two middle values); the paper's
            is about 1000.
        limit: how many to list: a hidden state has a handful, but a mistaken rule finds millions.

    Raises:
        ValueError: if `x` is not finite or no `(B, N, D)`, if the median of an input is 0 (there is no ratio to it),
            `absolute` is negative, `ratio` or `limit` is not positive, or for a wrong `token_mask`.

    Reference: Sun et al., Massive Activations in Large Language Models (arXiv 2402.17762).
    """
    if absolute < 0 or ratio <= 0 or limit < 1:
        raise ValueError(
            f"Expected absolute >= 0, ratio > 0 and limit >= 1, got absolute={absolute}, ratio={ratio}, limit={limit}"
        )
    values, real = _real_values(x, token_mask)
    magnitudes = values.abs()
    medians = magnitudes.masked_fill(~real[..., None], torch.nan).flatten(1).nanmedian(dim=1).values
    if bool((medians == 0).any()):
        raise ValueError(f"Expected a median |x| above 0 in every input, got {medians.tolist()}")
    massive = (magnitudes > absolute) & (magnitudes >= ratio * medians[:, None, None])
    positions, found = massive.nonzero(), values[massive]
    listed = found.abs().sort(descending=True, stable=True).indices[:limit]
    positions, found = positions[listed], found[listed]
    return MassiveActivations(positions, found, found.abs() / medians[positions[:, 0]], int(massive.sum()))


# Who wrote it


@dataclass(frozen=True)
class BranchContributions:
    """What the parts of one layer contribute to the residual stream at M places, each `(M,)`, signed."""

    before: Tensor
    attention: Tensor
    ffn: Tensor

    @property
    def after(self) -> Tensor:
        """Residual stream after the layer, `(M,)`."""
        return self.before + self.attention + self.ffn

    def writers(self) -> list[str]:
        """For each place the part that does most for the value there: "before", "attention" or "ffn"."""
        parts = torch.stack([self.before, self.attention, self.ffn]) * _direction(self.after)
        return [("before", "attention", "ffn")[part] for part in parts.argmax(dim=0).tolist()]


def _direction(values: Tensor) -> Tensor:
    return torch.where(values < 0, -1.0, 1.0)


def written_by(before: Tensor, attention_update: Tensor, ffn_update: Tensor, positions: Tensor) -> BranchContributions:
    """Split activations of the residual stream by the branch that wrote them.

    It holds where each branch adds to the stream (pre-norm). Where a norm follows the addition (BERT), the parts are
    those of its input.

    Args:
        before: residual stream before the layer, `(B, N, D)`.
        attention_update: what attention adds, LayerScale included, `(B, N, D)`.
        ffn_update: what the FFN adds, LayerScale included, `(B, N, D)`.
        positions: input, token and channel of each place, integers `(M, 3)`: `MassiveActivations.positions`.

    Raises:
        ValueError: if shapes differ, or a position is outside.
    """
    shapes = [tuple(part.shape) for part in (before, attention_update, ffn_update)]
    if before.ndim != 3 or len(set(shapes)) > 1:
        raise ValueError(f"Expected three tensors of one shape (B, N, D), got {shapes}")
    if positions.ndim != 2 or positions.shape[1] != 3 or positions.is_floating_point():
        raise ValueError(f"Expected integer positions (M, 3), got {positions.dtype} {tuple(positions.shape)}")
    if bool(((positions < 0) | (positions >= torch.tensor(shapes[0], device=positions.device))).any()):
        raise ValueError(f"Expected positions inside {shapes[0]}, got {positions.tolist()}")
    place = positions.to(before.device).unbind(dim=1)
    dtype = torch.promote_types(before.dtype, torch.float32)  # 16 bits would lose small parts in the sum
    return BranchContributions(*(part[place].to(dtype) for part in (before, attention_update, ffn_update)))


@dataclass(frozen=True)
class FfnWriters:
    """For each of M places the layer whose FFN wrote most of the value, each `(M,)`.

    Attributes:
        layer: index into the list of layers, int64.
        contribution: what its FFN added, signed.
        peak: the value after the layer where its magnitude is largest.
    """

    layer: Tensor
    contribution: Tensor
    peak: Tensor


def largest_ffn_writer(layers: Sequence[BranchContributions]) -> FfnWriters:
    """Find the layer whose FFN does most for the value at its peak.

    The peak, not the last layer, gives the direction: last layers often take a massive activation away again.

    Args:
        layers: `written_by` of every layer in order, at the same places.

    Raises:
        ValueError: if there is no layer, or they are of different numbers of places.
    """
    if len({tuple(layer.ffn.shape) for layer in layers}) != 1:
        raise ValueError(f"Expected layers of equally many places, got {[len(layer.ffn) for layer in layers]}")
    after, ffn = torch.stack([layer.after for layer in layers]), torch.stack([layer.ffn for layer in layers])
    peak = after.gather(0, after.abs().argmax(dim=0, keepdim=True))[0]
    chosen = (ffn * _direction(peak)).argmax(dim=0)
    return FfnWriters(chosen, ffn.gather(0, chosen[None])[0], peak)


# Heads that do nothing


def no_op_share(
    probabilities: Tensor,
    values: Tensor,
    kinds: Tensor,
    resting_kinds: Collection[int],
    token_mask: Tensor | None = None,
    attention_above: float = 0.5,
    norm_below: float = 0.5,
) -> Tensor:
    """Share of queries for which a head does nothing: they attend mostly to tokens that have little to give.

    A token is a resting place of a head if it is of one of the given kinds and its value vector is shorter than
    `norm_below` times the median over the real tokens of that input and head. A query is a no-op if it puts more than
    `attention_above` of its attention on resting places together. The paper shows this as a picture; the number, its
    two thresholds included, is this package's.

    Args:
        probabilities: `(B, h, N, N)`.
        values: `(B, h, N, d)`, repeated for all heads that share them.
        kinds: kind of each token, integers `(B, N)`.
        resting_kinds: kinds that can be resting places: separators, punctuation, registers, outlier patches.
        token_mask: `(B, N)`. None: all tokens are real.
        attention_above: half of the attention, so that the rest of a query matters less.
        norm_below: well below what is usual; in the paper's ViT about a fifth to a quarter of it.

    Returns:
        `(B, h)`, from 0 to 1, over the real queries.

    Raises:
        ValueError: if `kinds` has another shape, no kind is given, a threshold is not between 0 and 1, and as
            `head_norms` does.
    """
    if not resting_kinds:
        raise ValueError("Expected at least one kind of resting place, got none")
    if not (0 < attention_above < 1 and 0 < norm_below < 1):
        raise ValueError(f"Expected thresholds between 0 and 1, got {attention_above} and {norm_below}")
    attention, real = real_attention(probabilities, token_mask)
    if kinds.shape != real.shape:
        raise ValueError(f"Expected kinds {tuple(real.shape)}, got shape {tuple(kinds.shape)}")
    norms = head_norms(attention, values, real).value
    of_kind = torch.isin(
        kinds.to(real.device), torch.tensor([int(kind) for kind in resting_kinds], device=real.device)
    )
    short = norms < norm_below * norms.nanmedian(dim=-1, keepdim=True).values  # False at padding, where norms are NaN
    resting = (short & of_kind[:, None]).to(attention)
    on_resting = (attention @ resting[..., None])[..., 0]
    return (on_resting > attention_above).sum(dim=-1) / real.sum(dim=1, keepdim=True)
