# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""From what was measured of texts to numbers with intervals over texts, to sentences, and to the page.

Shapes: n texts, L layers, h heads, K kinds of tokens, S tokens of a text whose logits are averaged, M rows.
Layers count from 1; state 0 of the residual stream is what layer 1 gets.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitreg_hf.analysis.intervals import mean_interval
from vitreg_hf.analysis.report import Picture, Section, Table, interval, number
from vitreg_hf.analysis.text_batches import EPSILON, KINDS, MASSIVE, SINKS, Numbers, mean_logits

_MASSIVE_RULES = ("massive_absolute", "massive_relative", "massive_both")
_LISTED_CHANNELS = 5
_NO_OP = (
    "A head with nothing to add can attend to a token that has nothing to give: outliers of the FFN output with the "
    "strongest channel, and the head that idles most in the layer after it (arXiv 2306.12929), both for one text."
)


# Numbers


def summarize(numbers: Numbers) -> dict[str, Any]:
    """Numbers of `text_sinks.measure_batch` of all texts, as means over texts with intervals."""
    texts, tokens = len(numbers["length"]), numbers["sum_tokens"]
    return {
        "texts": {
            "n": texts,
            "skipped_too_short": int(numbers["sum_skipped"]),
            "tokens": int(tokens.sum()),
            "tokens_by_kind": dict(zip(KINDS, tokens.tolist(), strict=True)),
        },
        "kinds": {name: _kind(numbers, kind) for kind, name in enumerate(KINDS)},
        "entropy": _by_layer({"nats": numbers["entropy"], "over_even": numbers["entropy_over_even"]}),
        "sinks": {
            "epsilon": EPSILON,
            "tokens": {name: _sink(numbers, index) for index, name in enumerate(SINKS)},
            "score": {name: _interval(numbers["sink_score"][:, :, i].mean(axis=1)) for i, name in enumerate(SINKS)},
        },
        "channels": {
            "ffn": _channels(numbers, "ffn", first=1),
            "residual": _channels(numbers, "state", first=0),
            "strongest": strongest_channel(numbers["rows_ffn"], numbers["share"].shape[1], texts),
        },
        "no_op_heads": (numbers["sum_no_op"] / texts).tolist(),
        "logits": _logits(numbers),
    }


def _by_layer(columns: Mapping[str, NDArray[Any]], first: int = 1) -> list[dict[str, Any]]:
    """One dict per layer of intervals over texts, of columns `(n, L)`; NaN where a text does not have the quantity."""
    layers = range(next(iter(columns.values())).shape[1])
    return [
        {"layer": first + i, **{name: _interval(column[:, i]) for name, column in columns.items()}} for i in layers
    ]


def _interval(values: NDArray[Any]) -> dict[str, Any]:
    found = asdict(mean_interval(values.astype(np.float64)))
    return {**found, "mean": found["mean"] if math.isfinite(found["mean"]) else None}


def _kind(numbers: Numbers, kind: int) -> dict[str, Any]:
    even = numbers["even_share"][:, kind].astype(np.float64)
    share = numbers["share"][:, :, kind].astype(np.float64)
    times = np.divide(share, even[:, None], out=np.full_like(share, np.nan), where=even[:, None] > 0)
    return {
        "even_share": _interval(even),
        "layers": _by_layer({"share": share, "times_even": times}),
        "heads": (numbers["sum_head_share"][:, :, kind] / len(even)).tolist(),
    }


def _sink(numbers: Numbers, index: int) -> list[dict[str, Any]]:
    columns = {"received": "received", "score": "sink_score", "times_even": "sink_times_even"}
    return _by_layer({name: numbers[column][:, :, index] for name, column in columns.items()})


def _channels(numbers: Numbers, place: str, first: int) -> list[dict[str, Any]]:
    columns = {name: numbers[f"{place}_{name}"] for name in ("sigma_outliers", "kurtosis", "infinity_norm")}
    if place == "state":
        columns |= {name: numbers["state_massive"][:, :, rule] for rule, name in enumerate(_MASSIVE_RULES)}
    rows = numbers[f"rows_{place}"]
    layers = _by_layer(columns, first)
    return [{**layer, **_which(rows[rows[:, 0] == index])} for index, layer in enumerate(layers)]


def _which(rows: NDArray[Any]) -> dict[str, Any]:
    """Which channels have values beyond 6 sigma, and on which kinds of tokens, of rows of one layer `(M, 5)`."""
    listed = [{"channel": int(channel), **_counted(rows[rows[:, 1] == channel])} for channel in np.unique(rows[:, 1])]
    listed.sort(key=lambda one: -one["variance"])
    return {"outliers": {**_counted(rows), "num_channels": len(listed), "channels": listed[:_LISTED_CHANNELS]}}


def _counted(rows: NDArray[Any]) -> dict[str, Any]:
    by_kind = np.bincount(rows[:, 2].astype(int), weights=rows[:, 3], minlength=len(KINDS)).astype(int)
    return {
        "values": int(by_kind.sum()),
        "variance": float(rows[:, 4].sum()),
        "by_kind": dict(zip(KINDS, by_kind.tolist(), strict=True)),
    }


def strongest_channel(rows: NDArray[Any], layers: int, texts: int) -> dict[str, Any] | None:
    """The channel of one of the first layers whose values beyond 6 sigma hold most of an FFN output's variance.

    Variance, because many values just beyond 6 sigma are a heavy tail and one value at 90 sigma is not.

    Args:
        rows: layer from 0, channel, kind of token, values beyond 6 sigma, their share of the variance, `(M, 5)`.
        layers: how many layers are looked at.
        texts: n, over which the share of the variance is a mean.
    """
    rows = rows[rows[:, 0] < layers]
    if not len(rows):
        return None
    places, where = np.unique(rows[:, :2], axis=0, return_inverse=True)
    best = int(np.bincount(where.ravel(), weights=rows[:, 4]).argmax())
    found = _counted(rows[where.ravel() == best])
    found["variance"] /= texts
    return {"layer": int(places[best, 0]) + 1, "channel": int(places[best, 1]), **found}


def _logits(numbers: Numbers) -> dict[str, Any]:
    mean = mean_logits(numbers)
    found: dict[str, Any] = {
        "length": numbers["logit_ids"].shape[1],
        "texts": int(numbers["sum_logit_texts"]),
        "too_short": int(numbers["sum_logit_too_short"]),
    }
    if mean is None:
        return {**found, "mean_over_heads": None, "first_minus_others": None}
    others = np.nanmean(mean[:, :, 1:, 1:], axis=3)  # every query but the first sees at least itself
    averaged = mean.mean(axis=1)
    plain = averaged.astype(object)
    plain[np.isnan(averaged)] = None  # forbidden by the mask
    return {
        **found,
        "mean_over_heads": plain.tolist(),
        "first_minus_others": (mean[:, :, 1:, 0] - others).mean(axis=2).tolist(),
    }


# The page


def present_kinds(results: dict[str, Any]) -> list[str]:
    """Kinds of tokens that the texts have."""
    return [name for name, count in results["texts"]["tokens_by_kind"].items() if count]


def present_sinks(results: dict[str, Any]) -> list[str]:
    """Tokens whose sinks are shown: those that texts have; CLS is not shown twice where it comes first."""
    tokens = results["sinks"]["tokens"]
    known = [name for name in SINKS if tokens[name][0]["score"]["n"]]
    return known[1:] if len(known) > 1 and tokens["[CLS]"] == tokens[SINKS[0]] else known


def lead(results: dict[str, Any]) -> str:
    """The finding in numbers: the kind of token that gets most beyond its even share, and where."""
    layer, name = max(
        ((layer, name) for name in present_kinds(results) for layer in range(len(results["kinds"][name]["layers"]))),
        key=lambda place: _beyond_even(results["kinds"][place[1]], place[0]),
    )
    kind = results["kinds"][name]
    shares, best = [one["share"]["mean"] for one in kind["layers"]], kind["layers"][layer]
    text = (
        f"Of {results['texts']['n']} texts, most attention beyond an even share goes to {name}: in layer {layer + 1} "
        f"it gets {_percent(best['share'])} of all attention, {number(best['times_even']['mean'])} times an even "
        f"share (from {number(100 * min(shares))} to {number(100 * max(shares))} % over all layers)."
    )
    if name in SINKS:
        score = results["sinks"]["tokens"][name][layer]["score"]
        text += f" It is a sink, with more than {EPSILON} of attention, in {_percent(score)} of that layer's heads."
    return text


def _percent(value: dict[str, Any]) -> str:
    ends = "" if value["low"] is None else f" ({number(100 * value['low'])} to {number(100 * value['high'])})"
    return f"{number(100 * value['mean'])} %{ends}"


def _beyond_even(kind: dict[str, Any], layer: int) -> float:
    return float(kind["layers"][layer]["share"]["mean"] - kind["even_share"]["mean"])


def sections(results: dict[str, Any], pictures: Mapping[str, Sequence[Picture]]) -> list[Section]:
    """The parts of the report; `pictures` of each by its key."""
    texts, logits = results["texts"], results["logits"]
    too_long = f"longer ones cut off after {texts['max_length']}"
    return [
        Section(
            "Where attention goes",
            [
                f"{texts['n']} texts, {texts['tokens']:,} tokens ({too_long}; {texts['skipped_too_short']} texts of "
                "fewer than two tokens left out), with the special tokens that the tokenizer adds. Padding counts "
                "nowhere. Layers count from 1. A text that lacks a kind of token counts with a share of 0 and is left "
                "out of the ratios. Evenly means: every query attends equally to all tokens that it may see.",
            ],
            [_kinds_table(results, "share", 100), _kinds_table(results, "times_even", 1), _entropy_table(results)],
            pictures["kinds"],
        ),
        Section(
            "Sinks",
            [
                f"Score: share of heads in which a token gets more than {EPSILON} of all attention (arXiv 2410.10781, "
                "there with texts of 64 tokens). An even share depends on the length of a text, so the ratio to it is "
                "given too. CLS is the first one of a text, SEP the last one.",
            ],
            [_sinks_table(results)],
            pictures["sinks"],
        ),
        Section(
            "Mean attention logits",
            [
                f"{logits['texts']} texts cut to exactly {logits['length']} tokens, special tokens among them; "
                f"{logits['too_short']} texts were too short. Softmax ignores what a whole row has in common, so "
                "compare within rows only (after figure 2 of arXiv 2309.17453).",
            ],
            pictures=pictures["logits"],
        ),
        Section(
            "Outlier channels",
            [
                "Values further than 6 standard deviations from the mean of the activations of a text (arXiv "
                "2306.12929). Channels count from 0; listed first is the channel whose outliers hold most variance.",
                _massive_text(results["massive"]),
            ],
            [_channel_table(results, "ffn"), _channel_table(results, "residual")],
            pictures["channels"],
        ),
        Section("Heads that do nothing", [_NO_OP], pictures=pictures["no_op"]),
    ]


def _kinds_table(results: dict[str, Any], key: str, factor: float) -> Table:
    names = present_kinds(results)
    layers = [results["kinds"][name]["layers"] for name in names]
    rows = [
        [str(of_kinds[0]["layer"]), *(interval(one[key], factor=factor) for one in of_kinds)]
        for of_kinds in zip(*layers)
    ]
    even = ", ".join(f"{name} {100 * results['kinds'][name]['even_share']['mean']:.3g} %" for name in names)
    caption = {
        "share": f"Share of attention in %, mean over queries and heads, 95 % interval over texts. Evenly: {even}.",
        "times_even": "The same over the even share (1: even), mean over the texts with such tokens.",
    }
    return Table(["layer", *names], rows, caption[key])


def _entropy_table(results: dict[str, Any]) -> Table:
    rows = [[str(one["layer"]), interval(one["nats"]), interval(one["over_even"])] for one in results["entropy"]]
    return Table(["layer", "nats", "over that of even attention"], rows, "Entropy, mean over queries and heads.")


def _sinks_table(results: dict[str, Any]) -> Table:
    names, tokens = present_sinks(results), results["sinks"]["tokens"]
    header = [part for name in names for part in (f"{name}: heads, %", f"{name}: over even share")]
    rows = [
        [str(i + 1)] + [cell for name in names for cell in _sink_cells(tokens[name][i])]
        for i in range(len(tokens[SINKS[0]]))
    ]
    scores = ", ".join(f"{name} {interval(results['sinks']['score'][name], factor=100)}" for name in names)
    return Table(["layer", *header], rows, f"Mean over texts, 95 % interval. Score over all layers, in %: {scores}.")


def _sink_cells(layer: dict[str, Any]) -> tuple[str, str]:
    return interval(layer["score"], factor=100), interval(layer["times_even"])


def _channel_table(results: dict[str, Any], place: str) -> Table:
    massive = _MASSIVE_RULES if place == "residual" else ()
    columns = ("sigma_outliers", "kurtosis", "infinity_norm")
    rows = [
        [
            str(layer["layer"]),
            *(interval(layer[name]) for name in columns),
            *("/".join(number(layer[name]["mean"]) for name in massive) for _ in massive[:1]),
            "; ".join(map(_channel_cell, layer["outliers"]["channels"][:3])) or "-",
        ]
        for layer in results["channels"][place]
    ]
    header = ["layer", "outliers per text", "kurtosis", "largest magnitude"]
    caption = {
        "ffn": "Output of each layer's FFN. Kurtosis of a Gaussian: 3.",
        "residual": "Residual stream after each layer (0: before the first), and massive activations per text by "
        f"magnitude above {MASSIVE[0]:g} / by {MASSIVE[1]:g} medians / by both (arXiv 2402.17762).",
    }
    return Table([*header, *("massive" for _ in massive[:1]), "channels: outliers by kind"], rows, caption[place])


def _channel_cell(channel: dict[str, Any]) -> str:
    kinds = ", ".join(f"{count} on {name}" for name, count in channel["by_kind"].items() if count)
    return f"{channel['channel']}: {kinds}"


def _massive_text(found: dict[str, Any]) -> str:
    text = (
        f"The largest value of the residual stream of all texts is {number(found['value'])} after layer "
        f"{found['state']}, {number(found['over_median'])} times the median magnitude of its text, in channel "
        f"{found['channel']} at token {found['position']} ({found['token']}, {found['kind']}). The FFN that does most "
        f"for it is that of layer {found['ffn_layer']}: before that layer the place holds {number(found['before'])}, "
        f"attention adds {number(found['attention'])}, the FFN {number(found['ffn'])}. Of the {found['traced']} texts "
        f"with the largest values {found['same_ffn_layer']} have it written by that layer, {found['same_channel']} in "
        "that channel."
    )
    return (
        text
        if found["adds_up"]
        else text
        + (
            " The branches do not add up to the value: a norm follows each addition (post-norm), as in BERT, so these "
            "are parts of what the norm gets, and the layer is the one whose FFN writes most there."
        )
    )


def no_op_text(found: dict[str, Any]) -> str:
    """What the pictures of a head that does nothing show, and whether it is the pattern of arXiv 2306.12929."""
    shown, missing = found["example"], [claim for claim, holds in found["pattern"].items() if not holds]
    texts = ["No channel of an FFN output that a later layer reads has values beyond 6 sigma."]
    if found["channel"] is not None:
        tokens = " ".join(shown["outlier_tokens"]) or "no token"
        texts = [
            f"Strongest channel: {found['channel']} of layer {found['ffn_layer']}'s FFN output; its outliers hold "
            f"{number(100 * found['variance'])} % of the variance. In the text shown they are on {tokens}."
        ]
    texts.append(
        f"In layer {found['layer']}, head {found['head']} idles most: {number(100 * found['no_op_share'])} % of "
        "queries over all texts put more than half of their attention on delimiters (CLS, SEP, first token, "
        "punctuation, newline) whose value vectors are shorter than half the median. What queries of the text shown "
        f"take has {number(shown['output_norm_over_median'])} times the median norm of value vectors."
    )
    if shown["outlier_tokens"]:
        texts.append(
            f"They put {number(100 * shown['attention_on_outlier_tokens'])} % of their attention on tokens with the "
            f"channel's outliers, whose value vectors have {number(shown['value_norm_over_median'])} times that norm."
        )
    verdict = f"is not there; it is not so that {', nor that '.join(missing)}" if missing else "is there"
    return " ".join([*texts, f"The pattern of Bondarenko et al. {verdict}."])
