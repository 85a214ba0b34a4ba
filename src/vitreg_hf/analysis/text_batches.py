# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What one batch of texts, and one text, say about attention sinks and outlier channels of a model.

Shapes: B texts, N tokens (shorter texts are filled up on the right), L layers, h heads, K kinds of tokens, D channels,
S tokens of the texts whose logits are averaged, M rows. Layers and heads count from 0; state 0 of the residual stream
is what layer 0 gets, state `i + 1` what comes after layer `i`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitreg_hf.analysis import channels, sinks, writers
from vitreg_hf.analysis.extract import Subject, read
from vitreg_hf.analysis.recorder import AttentionCall, Readers
from vitreg_hf.analysis.token_kinds import TextKind, kinds_of, one_hot_kinds

Numbers = dict[str, NDArray[Any]]

KINDS = ("[CLS]", "[SEP]", "first token", "punctuation", "newline", "other")  # in the order of `TextKind`
RESTING = [kind for kind in TextKind if kind not in (TextKind.OTHER, TextKind.PADDING)]
SINKS = ("first token", "[CLS]", "[SEP]")
EPSILON = sinks.EPSILON
MASSIVE = (channels.MASSIVE_ABSOLUTE, channels.MASSIVE_RATIO)


# Texts as tokens


@dataclass(frozen=True)
class TextBatch:
    """Tokens of some texts.

    Attributes:
        ids: int64 `(B, N)`; 0 past the end of a text.
        mask: boolean `(B, N)`, True for real tokens.
        kinds: `TextKind` of each token, int64 `(B, N)`.
        strings: the tokens of each text as the vocabulary spells them.
    """

    ids: Tensor
    mask: Tensor
    kinds: Tensor
    strings: list[list[str]]

    def inputs(self) -> dict[str, Tensor]:
        """What a model gets."""
        return {"input_ids": self.ids, "attention_mask": self.mask.long()}

    def sink_keys(self) -> Tensor:
        """Position of the first token, of the first CLS and of the last SEP of each text, `(B, 3)`; -1 if none."""
        cls, sep = self.kinds == TextKind.CLS, self.kinds == TextKind.SEP
        last_sep = sep.shape[1] - 1 - sep.flip(1).long().argmax(dim=1)
        first_cls = cls.long().argmax(dim=1)
        found = torch.stack([torch.ones(len(cls), dtype=torch.bool), cls.any(dim=1), sep.any(dim=1)], dim=1)
        return torch.stack([torch.zeros_like(first_cls), first_cls, last_sep], dim=1).masked_fill(~found, -1)


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids of each text with the special tokens that the tokenizer adds, cut off after `max_length`."""
    return [list(ids) for ids in tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]]


def text_batch(subject: Subject, ids: Sequence[Sequence[int]]) -> TextBatch:
    """Put texts of token ids side by side. What fills up shorter ones is masked, so no padding token is needed."""
    tokenizer, length = subject.preprocess, max(map(len, ids))
    mask = torch.tensor([[place < len(one) for place in range(length)] for one in ids])
    strings = [tokenizer.convert_ids_to_tokens(list(one)) for one in ids]
    special = {name: getattr(tokenizer, f"{name}_token", None) for name in ("cls", "sep", "bos")}
    kinds = kinds_of(strings, causal=subject.anatomy.causal, token_mask=mask, **special)
    return TextBatch(torch.tensor([[*one, *[0] * (length - len(one))] for one in ids]), mask, kinds, strings)


# One batch


def measure_batch(subject: Subject, batch: TextBatch) -> dict[str, Tensor]:
    """Everything that a report needs of a batch, on the CPU.

    Returns:
        Numbers per text, first dimension B: `share` `(B, L, K)`, attention on each kind of token, mean over queries
        and heads, and `even_share` `(B, K)`, what it would be if all queries attended evenly; `entropy` (nats) and
        `entropy_over_even` `(B, L)`; `received`, `sink_score` and `sink_times_even` `(B, L, 3)` of the first token,
        CLS and SEP, NaN where a text has none; for `ffn` `(B, L)` and `state` `(B, L + 1)` `<place>_infinity_norm`,
        `_kurtosis`, `_sigma_outliers`; `state_massive` `(B, L + 1, 3)`, counts by the absolute rule, by the relative
        one, by both. Sums over texts: `sum_head_share` `(L, h, K)`, `sum_no_op` `(L, h)`, `sum_tokens` `(K,)`. Rows
        `rows_ffn` and `rows_state` `(M, 5)`: layer or state, channel, kind, how many values beyond 6 sigma, their
        share of the variance, summed over texts.
    """
    causal = subject.anatomy.causal
    readers = Readers(
        hidden=lambda layer, state: {**_channels(layer, state, batch), "massive": _massive(state, batch.mask)},
        attention=lambda layer, call: _attention(call, batch, causal),
        ffn_update=lambda layer, update: _channels(layer, update, batch),
    )
    recorded = read(subject, batch.inputs(), readers)
    measured = {
        name: torch.stack([one[name] for one in recorded.attention], dim=1).cpu() for name in recorded.attention[0]
    }
    for name in ("head_share", "no_op"):
        measured[f"sum_{name}"] = measured.pop(name).sum(dim=0, dtype=torch.float64)
    for place, layers in (("ffn", recorded.ffn_updates), ("state", recorded.hidden)):
        measured[f"rows_{place}"] = torch.cat([one.pop("rows") for one in layers])
        measured.update({f"{place}_{name}": torch.stack([one[name] for one in layers], 1) for name in layers[0]})
    measured["sum_tokens"] = one_hot_kinds(batch.kinds, len(KINDS), batch.mask).sum(dim=(0, 1))
    return {**measured, "even_share": _even_share(batch, causal), "length": batch.mask.sum(dim=1)}


def _attention(call: AttentionCall, batch: TextBatch, causal: bool) -> dict[str, Tensor]:
    """Numbers of one layer: those of `measure_batch` without L, `head_share` `(B, h, K)` and `no_op` `(B, h)`."""
    probabilities, mask, kinds = call.probabilities(), batch.mask, batch.kinds
    received = sinks.received_attention(probabilities, mask, causal)
    entropy = sinks.attention_entropy(probabilities, mask)
    head_share = sinks.share_by_kind(probabilities, kinds, len(KINDS), mask)
    keys = batch.sink_keys().to(received.device)
    known, missing = keys.clamp(min=0), keys < 0
    at_keys = known[:, None].expand(-1, received.shape[1], -1)
    score = [sinks.sink_score(received, key, EPSILON) for key in known.unbind(dim=1)]
    times_even = sinks.times_uniform(received, mask, causal).gather(2, at_keys).mean(dim=1)
    return {
        "head_share": head_share,
        "share": head_share.mean(dim=1),
        "entropy": entropy.nanmean(dim=(1, 2)),
        "entropy_over_even": sinks.entropy_over_uniform(entropy, mask, causal).nanmean(dim=(1, 2)),
        "received": received.gather(2, at_keys).mean(dim=1).masked_fill(missing, torch.nan),
        "sink_score": torch.stack(score, dim=1).masked_fill(missing, torch.nan),
        "sink_times_even": times_even.masked_fill(missing, torch.nan),
        "no_op": channels.no_op_share(probabilities, call.values(), kinds, RESTING, mask),
    }


def _even_share(batch: TextBatch, causal: bool) -> Tensor:
    """Share of each kind if every query attended evenly to all tokens that it may see, `(B, K)`."""
    allowed = batch.mask[:, :, None] & batch.mask[:, None]
    allowed = (allowed.tril() if causal else allowed).double()
    even = allowed / allowed.sum(dim=-1, keepdim=True).clamp(min=1)
    return sinks.share_by_kind(even[:, None], batch.kinds, len(KINDS), batch.mask)[:, 0].float()


def deviations(x: Tensor, mask: Tensor) -> Tensor:
    """Distance from the mean of each text in its standard deviations, signed float64 `(B, N, D)`, 0 at padding."""
    real = mask.to(x.device)[..., None].expand(x.shape)
    values = x.double().masked_fill(~real, torch.nan)
    distance = values - values.nanmean(dim=(1, 2), keepdim=True)
    return (distance / distance.square().nanmean(dim=(1, 2), keepdim=True).sqrt()).nan_to_num(0)


def _channels(layer: int, x: Tensor, batch: TextBatch) -> dict[str, Tensor]:
    marked = channels.sigma_outliers(x, batch.mask)
    text, token, channel = marked.nonzero().cpu().unbind(dim=1)
    # The squares of all deviations sum to the number of values.
    variance = deviations(x, batch.mask)[marked].square().cpu() / (batch.mask.sum(dim=1)[text] * x.shape[2])
    places = torch.stack([torch.full_like(channel, layer), channel, batch.kinds[text, token]], dim=1)
    places, where = places.unique(dim=0, return_inverse=True)
    counted = torch.zeros(len(places), 2, dtype=torch.float64)
    counted.index_add_(0, where, torch.stack([torch.ones_like(variance), variance], dim=1))
    return {
        "infinity_norm": channels.infinity_norm(x, batch.mask).float().cpu(),
        "kurtosis": channels.kurtosis(x, batch.mask).float().cpu(),
        "sigma_outliers": marked.sum(dim=(1, 2)).cpu(),
        "rows": torch.cat([places, counted], dim=1),
    }


def _massive(state: Tensor, mask: Tensor) -> Tensor:
    """How many massive activations each text has by the absolute, by the relative, by both rules, `(B, 3)`."""
    return torch.tensor([_count_massive(one[real.to(one.device)][None]) for one, real in zip(state, mask)])


def _count_massive(state: Tensor) -> list[int]:
    absolute, ratio = MASSIVE
    large = int((state.abs() > absolute).sum())
    if bool(state.abs().median() == 0):  # half of all values are 0: there is no ratio to the median
        return [large, 0, 0]
    return [large, *(channels.massive_activations(state, None, a, ratio, limit=1).total for a in (0, absolute))]


def measure_logits(subject: Subject, ids: list[list[int]], length: int, wanted: int, batch_size: int) -> Numbers:
    """Sums of attention logits over texts of `length` = S tokens, at most `wanted` of them.

    Returns:
        `sum_logits_total` and `sum_logits_count` `(L, h, S, S)`, if there is such a text; `logit_ids` `(n, S)`; how
        many texts were used and were too short.
    """
    fitting = [one for one in ids if len(one) == length]
    used = fitting[: max(wanted, 0)]
    means: dict[int, sinks.MeanLogits] = {}

    def add(layer: int, call: AttentionCall) -> None:
        logits = call.logits()
        means.setdefault(layer, sinks.MeanLogits(logits.shape[1], length)).update(logits)

    for start in range(0, len(used), batch_size):
        read(subject, text_batch(subject, used[start : start + batch_size]).inputs(), Readers(attention=add))
    states = [means[layer].state_dict() for layer in sorted(means)]
    names = states[0] if used else ()
    sums = {f"sum_logits_{name}": np.stack([one[name].numpy() for one in states]) for name in names}
    counts = {"sum_logit_texts": np.array(len(used)), "sum_logit_too_short": np.array(len(ids) - len(fitting))}
    return {**sums, **counts, "logit_ids": np.array(used, dtype=np.int64).reshape(-1, length)}


# Many batches


def merge(parts: Iterable[Mapping[str, NDArray[Any]]]) -> Numbers:
    """Join numbers of several batches: those whose names begin with `sum_` add up, others follow one another."""
    gathered: dict[str, list[NDArray[Any]]] = {}
    for part in parts:
        for name, values in part.items():
            held = gathered.setdefault(name, [])
            held[:] = [held[0] + values] if held and name.startswith("sum_") else [*held, values]
    return {name: np.concatenate(held) if held[0].ndim else held[0] for name, held in gathered.items()}


def mean_logits(numbers: Numbers) -> NDArray[np.float64] | None:
    """Mean attention logits `(L, h, S, S)`, NaN where a mask forbids; None if no text was long enough."""
    if "sum_logits_total" not in numbers:
        return None
    total, count = numbers["sum_logits_total"], numbers["sum_logits_count"]
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


# Single texts


def follow_largest(subject: Subject, ids: list[int]) -> dict[str, Any]:
    """The largest value of the residual stream of one text, on which token it stands, and the FFN that wrote it."""
    batch = text_batch(subject, [ids])
    found = writers.follow_largest(subject, batch.inputs())
    token, kind = batch.strings[0][found.position], KINDS[int(batch.kinds[0, found.position])]
    return {**asdict(found), "token": token, "kind": kind}


def read_head(
    subject: Subject, ids: list[int], layer: int, head: int, ffn_layer: int | None, channel: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What one head does in one text, next to the outliers of an FFN output before it.

    Args:
        subject: a text model.
        ids: tokens of the text, N.
        layer, head: the head.
        ffn_layer, channel: where outliers were found, None for none.

    Returns:
        Numbers: `outlier_tokens`, those with the channel's values beyond 6 sigma; `attention_on_outlier_tokens`, mean
        over queries; `value_norm_over_median` of these tokens; `output_norm_over_median`, median over queries of what
        they take, in median norms of value vectors; None where there are no such tokens. And what a picture needs:
        `tokens`, `attention` `(N, N)`, `value_norms` and `output_norms` `(N,)`, `sigmas` `(N, D)` or None.
    """
    batch = text_batch(subject, [ids])

    def attention(index: int, call: AttentionCall) -> Any:
        if index != layer:
            return None
        probabilities = call.probabilities()
        norms = sinks.head_norms(probabilities, call.values())
        return [part[0, head].double().cpu() for part in (probabilities, norms.value, norms.output)]

    def update(index: int, x: Tensor) -> Any:
        return deviations(x, batch.mask)[0].cpu() if index == ffn_layer else None

    recorded = read(subject, batch.inputs(), Readers(attention=attention, ffn_update=update))
    probabilities, values, outputs = recorded.attention[layer]
    sigmas = None if ffn_layer is None else recorded.ffn_updates[ffn_layer]
    carrying = torch.zeros(len(ids), dtype=torch.bool) if sigmas is None else sigmas[:, channel].abs() > 6
    found, median = bool(carrying.any()), values.median()
    numbers = {
        "outlier_tokens": [token for token, marked in zip(batch.strings[0], carrying) if marked],
        "attention_on_outlier_tokens": probabilities[:, carrying].sum(dim=1).mean().item() if found else None,
        "value_norm_over_median": (values[carrying].mean() / median).item() if found else None,
        "output_norm_over_median": (outputs.median() / median).item(),
    }
    arrays = {"attention": probabilities, "value_norms": values, "output_norms": outputs, "sigmas": sigmas}
    shown = {name: None if value is None else value.numpy() for name, value in arrays.items()}
    return numbers, {"tokens": batch.strings[0], **shown}


def pattern(example: dict[str, Any]) -> dict[str, bool]:
    """Which parts of the pattern of Bondarenko et al. (arXiv 2306.12929) numbers of `read_head` show.

    That half of the attention and half of the norm decide is this package's choice, as in `channels.no_op_share`.
    """
    attention, norm = example["attention_on_outlier_tokens"], example["value_norm_over_median"]
    return {
        "the channel has values beyond 6 sigma": attention is not None,
        "queries put more than half of their attention on these tokens": attention is not None and attention > 0.5,
        "the value vectors of these tokens are shorter than half the median": norm is not None and norm < 0.5,
    }
