# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures of attention sinks and outlier channels of text models.

Shapes: L layers, h heads, S tokens of the texts whose logits are averaged, N tokens of one text, D channels. Layers
and heads count from 1 in every picture.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from vitreg_hf.analysis.figures.canvas import new_figure, save
from vitreg_hf.analysis.figures.curves import COLOURS

_TICK_SIZE = 7
_HEADS_PER_ROW = 8  # of small maps on a page


def logit_maps(
    maps: Mapping[str, NDArray[Any]], path: Path, *, columns: int, positions: Sequence[str], title: str
) -> None:
    """Mean attention logits, one map `(S, S)` per name, on one colour scale (after Fig. 2 of arXiv 2309.17453).

    Args:
        maps: rows are queries, columns keys; NaN where a mask forbids.
        path: PNG to write.
        columns: maps per row.
        positions: what stands at each position, S texts.
        title: model and number of texts.
    """
    rows = -(-len(maps) // columns)
    small = columns > 4
    side = 1.5 if small else 3.0
    figure = new_figure(side * columns + 1.6, (side + 0.25) * rows + 1.2)
    grid = figure.subplots(rows, columns, squeeze=False)
    finite = np.concatenate([values[np.isfinite(values)] for values in maps.values()])
    low, high = np.percentile(finite, [1, 99])  # one huge logit would leave all others one colour
    for axes in grid.flat[len(maps) :]:
        axes.axis("off")
    for index, (axes, (name, values)) in enumerate(zip(grid.flat, maps.items())):
        drawn = axes.imshow(values, vmin=low, vmax=high, cmap="coolwarm")
        axes.set_title(name, fontsize=8 if small else 10)
        places = range(0, len(positions), 5 if small else 1)
        axes.set_xticks(places, _as_they_are([positions[i] for i in places]), rotation=90, fontsize=_TICK_SIZE)
        axes.set_yticks(places, _as_they_are([positions[i] for i in places]), fontsize=_TICK_SIZE)
        if index % columns == 0:
            axes.set_ylabel("query at position", fontsize=8)
        if index + columns >= len(maps):
            axes.set_xlabel("key at position", fontsize=8)
    figure.colorbar(drawn, ax=grid, label="mean logit before softmax", extend="both", shrink=0.8, aspect=40)
    hidden = any(np.isnan(values).any() for values in maps.values())
    figure.suptitle(f"{title}\nwhite: tokens that a query does not see" if hidden else title)
    save(figure, path)


def kind_curves(kinds: Mapping[str, Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Share of attention on each kind of token in every layer, and over its even share, with 95 % intervals.

    Args:
        kinds: `results["kinds"]`, those to draw.
        path: PNG to write.
        title: model and number of texts.
    """
    figure = new_figure(10.5, 4.4)
    share, times = figure.subplots(1, 2)
    for (name, kind), colour in zip(kinds.items(), COLOURS):
        _curve(share, kind["layers"], "share", name, colour, 100)
        _curve(times, kind["layers"], "times_even", name, colour)
        share.axhline(100 * kind["even_share"]["mean"], color=colour, linestyle=":", linewidth=0.9)
    share.set(ylabel="share of attention (%)", title="Attention on each kind of token (dotted: even share)")
    share.set_ylim(0, 100)
    times.axhline(1, color="black", linewidth=0.8)
    times.set(ylabel="share of attention / even share, log scale", title="Over its even share (1: even)")
    _log_scale(times)
    times.legend(fontsize=8)
    figure.suptitle(f"{title}; mean of queries and heads, band: 95 % interval over texts")
    save(figure, path)


def kind_heads(heads: Mapping[str, NDArray[Any]], path: Path, *, title: str) -> None:
    """Share of attention on each kind of token per layer and head, one map `(L, h)` per kind."""
    layers, count = next(iter(heads.values())).shape
    columns = len(heads) if len(heads) < 4 else -(-len(heads) // 2)
    rows = -(-len(heads) // columns)
    figure = new_figure(4.1 * columns + 1, max(2.6, 0.24 * layers + 1.6) * rows + 0.6)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(heads) :]:
        axes.axis("off")
    for axes, (name, shares) in zip(grid.flat, heads.items()):
        drawn = axes.imshow(
            100 * shares, vmin=0, vmax=100, cmap="viridis", aspect="auto", extent=(0.5, count + 0.5, layers + 0.5, 0.5)
        )
        axes.set(title=f"on {name}", xlabel="head", ylabel="layer")
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(12, integer=True))
    figure.colorbar(drawn, ax=grid, label="share of attention (%), mean of queries and texts", aspect=40)
    figure.suptitle(title)
    save(figure, path)


def text_sink_curves(
    tokens: Mapping[str, Sequence[Mapping[str, Any]]], epsilon: float, path: Path, *, title: str
) -> None:
    """In how many heads a token is a sink, and what it gets over an even share, in every layer with 95 % intervals."""
    figure = new_figure(10.5, 4.4)
    score, times = figure.subplots(1, 2)
    for (name, layers), colour in zip(tokens.items(), COLOURS):
        _curve(score, layers, "score", name, colour, 100)
        _curve(times, layers, "times_even", name, colour)
    score.set(ylabel="heads (%)", title=f"Heads in which it gets more than {epsilon} of all attention", ylim=(-3, 103))
    times.axhline(1, color="black", linewidth=0.8)
    times.set(ylabel="attention received / even share, log scale", title="Over an even share (1: even)")
    _log_scale(times)
    score.legend(fontsize=8)
    figure.suptitle(f"{title}; band: 95 % interval over texts")
    save(figure, path)


def text_channel_curves(places: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, *, title: str) -> None:
    """Values beyond 6 standard deviations, kurtosis and largest magnitude in every layer, with 95 % intervals.

    Args:
        places: rows of `results["channels"]` by the name of where they were read.
        path: PNG to write.
        title: model and number of texts.
    """
    figure = new_figure(13, 4.2)
    drawn = (
        ("sigma_outliers", "values beyond 6 standard deviations, per text"),
        ("kurtosis", "kurtosis (a Gaussian has 3), log scale"),
        ("infinity_norm", "largest magnitude, log scale"),
    )
    for axes, (key, label) in zip(figure.subplots(1, 3), drawn, strict=True):
        for (name, layers), colour in zip(places.items(), COLOURS):
            _curve(axes, layers, key, name, colour)
        if label.endswith("log scale"):
            _log_scale(axes)
        axes.set(ylabel=label, xlabel="layer (0: residual stream before the first)")
    axes.legend(fontsize=8)
    figure.suptitle(f"{title}; mean over texts, band: 95 % interval")
    save(figure, path)


def _curve(
    axes: Axes, layers: Sequence[Mapping[str, Any]], key: str, label: str, colour: str, factor: float = 1
) -> None:
    """Means of intervals over layers with a band; layers without a mean are left out."""
    known = [(one["layer"], one[key]) for one in layers if one[key]["mean"] is not None]
    places, means = [place for place, _ in known], [factor * value["mean"] for _, value in known]
    axes.plot(places, means, "o-", markersize=3, color=colour, label=label)
    if known and all(value["low"] is not None for _, value in known):
        low, high = ([factor * value[end] for _, value in known] for end in ("low", "high"))
        axes.fill_between(places, low, high, color=colour, alpha=0.2)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _log_scale(axes: Axes) -> None:
    """Logarithmic with plain numbers: 0.5, 1, 2, 5, 10."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _as_they_are(tokens: Sequence[str]) -> list[str]:
    """Tokens that matplotlib does not take for formulas."""
    return [token.replace("$", r"\$") for token in tokens]


def outlier_tokens(
    sigmas: NDArray[Any], tokens: Sequence[str], channel: int, path: Path, *, title: str, num_sigmas: float = 6.0
) -> None:
    """Where one text's FFN output lies far from its mean, tokens x channels (after arXiv 2306.12929).

    Args:
        sigmas: signed distance from the mean in standard deviations `(N, D)`.
        tokens: N strings.
        channel: the one to name.
        path: PNG to write.
        title: model, layer, and which text.
        num_sigmas: distance from which a value is drawn; 6 is the paper's.
    """
    figure = new_figure(9.5, max(3.2, 0.19 * len(tokens) + 1.5))
    axes = figure.subplots()
    token, at = np.nonzero(np.abs(sigmas) > num_sigmas)
    far = sigmas[token, at]
    most = max(float(np.abs(sigmas).max()), num_sigmas)
    drawn = axes.scatter(at, token, c=far, cmap="coolwarm", vmin=-most, vmax=most, s=45, edgecolor="black", zorder=3)
    axes.axvline(channel, color="grey", linewidth=0.8, linestyle="--")
    axes.annotate(
        f"channel {channel}",
        (channel, len(tokens) - 0.4),
        xytext=(4, 2),
        textcoords="offset points",
        fontsize=_TICK_SIZE,
    )
    axes.set_yticks(range(len(tokens)), _as_they_are(tokens), fontsize=_TICK_SIZE)
    axes.set(xlim=(-0.02 * sigmas.shape[1], 1.02 * sigmas.shape[1]), ylim=(len(tokens) - 0.4, -0.6))
    axes.set(xlabel=f"channel (of {sigmas.shape[1]})", ylabel="token")
    axes.grid(axis="y", alpha=0.3)
    figure.colorbar(drawn, label="distance from the mean (standard deviations)")
    found = f"{len(far)} of {sigmas.size:,} values are beyond {num_sigmas:g} standard deviations from the mean"
    figure.suptitle(f"{title}\n{found}")
    save(figure, path)


def head_at_rest(
    attention: NDArray[Any],
    value_norms: NDArray[Any],
    output_norms: NDArray[Any],
    tokens: Sequence[str],
    path: Path,
    *,
    title: str,
) -> None:
    """What one head does in one text: attention, what each token offers, what each query takes (arXiv 2306.12929).

    Args:
        attention: probabilities `(N, N)`, rows are queries.
        value_norms: L2 norm of each token's value vector `(N,)`.
        output_norms: L2 norm of what each query takes, `(N,)`.
        tokens: N strings.
        path: PNG to write.
        title: model, layer, head, and which text.
    """
    side = max(3.6, 0.19 * len(tokens) + 0.8)
    figure = new_figure(2.1 * side + 2.5, side + 1.6)
    maps, offered, taken = figure.subplots(1, 3, width_ratios=(3, 1, 1))
    drawn = maps.imshow(attention, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    maps.set_xticks(range(len(tokens)), _as_they_are(tokens), rotation=90, fontsize=_TICK_SIZE)
    maps.set(xlabel="key", ylabel="query", title="attention")
    figure.colorbar(drawn, ax=maps, location="left", label="attention (probability)", shrink=0.8)
    places, most = np.arange(len(tokens)), 1.05 * max(value_norms.max(), output_norms.max())
    offered.barh(places, value_norms, color=COLOURS[0])
    taken.barh(places, output_norms, color=COLOURS[1])
    for axes, name in ((offered, "offered by token:\nnorm of its value"), (taken, "taken by query:\nnorm of the sum")):
        axes.set(title=name, xlabel="L2 norm", xlim=(0, most), ylim=(len(tokens) - 0.5, -0.5))
        axes.axvline(float(np.median(value_norms)), color="black", linestyle="--", linewidth=0.8)
        axes.title.set_fontsize(9)
    for axes in (maps, offered, taken):
        axes.set_yticks(places, _as_they_are(tokens), fontsize=_TICK_SIZE)
    figure.suptitle(f"{title}\ndashed: median norm of value vectors")
    save(figure, path)
