# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Histograms and curves over layers.

Each takes what `results.json` and the records hold, of several models at once where that makes sense.
Shapes: n values in no order; layers in their order, state 0 being what the first block gets.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from vitreg_hf.analysis.figures.canvas import fitted, new_figure, plain_ticks, save

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:gray")
_NORM = "L2 norm of patch tokens before the final norm"


def norm_histogram(norms: Mapping[str, NDArray[Any]], cutoffs: Mapping[str, float], path: Path, *, title: str) -> None:
    """Distribution of patch norms of one layer per model, counts on a logarithmic axis (Fig. 3 of the paper)."""
    figure = new_figure(7.5, 4.2)
    axes = figure.subplots()
    highest = max(*(float(values.max()) for values in norms.values()), *cutoffs.values())
    lowest = min(float(values.min()) for values in norms.values())
    edges = np.linspace(min(0.0, lowest), highest * 1.02, 80)
    for (name, values), colour in zip(norms.items(), cycle(COLOURS)):
        shares = np.full(len(values), 100 / len(values))
        label = f"{name}, {len(values):,} patches"
        axes.hist(
            values, bins=list(edges), weights=shares, histtype="stepfilled", alpha=0.35, color=colour, label=label
        )
        axes.axvline(cutoffs[name], color=colour, linestyle="--", label=f"cutoff of {name}: {cutoffs[name]:.3g}")
    axes.set(yscale="log", xlabel=_NORM, ylabel="share of patches (%), log scale", title=fitted(title, 7))
    axes.set_xlim(left=edges[0])
    plain_ticks(axes.yaxis)
    axes.legend(fontsize=8)
    save(figure, path)


def layer_curves(layers: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, *, title: str) -> None:
    """Norms of patches and the share of outliers after every layer (Fig. 4a of the paper), one colour per model."""
    figure = new_figure(10, 4.4)
    norm, share = figure.subplots(1, 2)
    for (name, states), colour in zip(layers.items(), cycle(COLOURS)):
        places = [state["layer"] for state in states]
        low, high = ([state[f"norm_percentile_{p}"] for state in states] for p in (2, 98))
        norm.fill_between(places, low, high, alpha=0.2, color=colour, label=f"{name}: 2nd to 98th percentile")
        norm.plot(places, [state["norm_median"] for state in states], color=colour, label=f"{name}: median")
        norm.plot(places, [state["norm_max"] for state in states], ":", color=colour, label=f"{name}: largest")
        share.plot(places, [100 * state["outlier_share"] for state in states], "o-", ms=3, color=colour, label=name)
    norm.set(yscale="log", ylabel="L2 norm of patch tokens, log scale", title="Norms")
    share.set(ylabel="patches above the cutoff (%)", title="Outliers (cutoff of the layer that decides)")
    share.set_ylim(-0.03 * (top := _room_above(share)), top)
    plain_ticks(norm.yaxis)
    for axes in (norm, share):
        _over_layers(axes)
    # Below, one column per model: inside it would cover the curve of the largest norms.
    columns = min(3, len(layers))
    figure.legend(*norm.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=columns)
    figure.suptitle(fitted(title, 10))
    save(figure, path)


def _whole_numbers() -> MaxNLocator:
    return MaxNLocator(integer=True, min_n_ticks=1)  # one layer has one tick


def _room_above(axes: Axes) -> float:
    """Upper end of an axis of percentages; 1 % if all are zero."""
    largest = max(float(np.max(line.get_ydata())) for line in axes.get_lines())
    return 1.08 * largest if largest > 0 else 1.0


def _over_layers(axes: Axes) -> None:
    axes.set_xlabel("after layer (0: what the first layer gets)")
    axes.xaxis.set_major_locator(_whole_numbers())
    axes.grid(alpha=0.3)


def similarity_density(outlier: NDArray[Any], normal: NDArray[Any], path: Path, *, title: str) -> None:
    """How much patches resemble their neighbours right after patch embedding, by what becomes of them (Fig. 5a)."""
    figure = new_figure(7.5, 4.2)
    axes = figure.subplots()
    edges = np.linspace(min(-0.1, *(float(values.min()) for values in (normal, outlier) if len(values))), 1, 61)
    for values, name, colour in ((normal, "normal", COLOURS[0]), (outlier, "outlier", COLOURS[3])):
        label = f"{name} in the output, {len(values):,} patches"
        if len(values):
            # Rounding may bring the cosine of equal patches just above 1, where no bin is.
            shown, bins = np.minimum(values, 1), list(edges)
            axes.hist(shown, bins=bins, density=True, histtype="stepfilled", alpha=0.4, color=colour, label=label)
        else:
            axes.plot([], [], color=colour, label=label)
    axes.set(xlabel="mean cosine similarity to the 4 neighbours, before positions", ylabel="density")
    axes.set_title(fitted(title, 7))
    axes.legend(fontsize=8)
    save(figure, path)


def mass_curve(cls_mass: Sequence[Sequence[float]], name: str, path: Path, *, title: str) -> None:
    """Where the attention of a prefix token goes, layer by layer: CLS, registers, patches; they add up to 100 %."""
    figure = new_figure(7.5, 4.2)
    axes = figure.subplots()
    parts = 100 * np.array(cls_mass).T
    places = np.arange(1, parts.shape[1] + 1)
    labels, colours = ("CLS", "registers", "patches"), (COLOURS[1], COLOURS[2], COLOURS[0])
    bottom = np.zeros(parts.shape[1])
    for part, label, colour in zip(parts, labels, colours, strict=True):
        if part.any():
            axes.bar(places, part, bottom=bottom, color=colour, label=f"on {label}", width=0.9)
        bottom = bottom + part
    axes.set(ylabel=f"attention of {name} (%), mean of heads", title=fitted(title, 7), ylim=(0, 100), xlabel="layer")
    axes.xaxis.set_major_locator(_whole_numbers())
    figure.legend(fontsize=9, loc="outside right upper", reverse=True)  # as the bars are stacked
    save(figure, path)


def sink_curves(tokens: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """How much attention tokens get in every layer, against an even share, and in how many heads they are sinks."""
    figure = new_figure(11.5, 4.2)
    times, score = figure.subplots(1, 2)
    for row, colour in zip(tokens, cycle(COLOURS)):
        places = range(1, len(row["score"]) + 1)
        times.plot(places, row["times_uniform"], "o-", markersize=3, color=colour, label=row["name"])
        score.plot(
            places, [100 * value for value in row["score"]], "o-", markersize=3, color=colour, label=row["name"]
        )
    times.axhline(1, color="black", linewidth=0.8)
    times.set_title("Attention received, mean of heads", fontsize=11)
    times.set(ylabel="times an even share (line: 1), log scale", yscale="log")
    plain_ticks(times.yaxis)
    score.set_title("Heads in which it gets over 0.3 of all attention", fontsize=11)
    score.set(ylabel="heads (%)", ylim=(-3, 103))
    for axes in (times, score):
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(_whole_numbers())
        axes.grid(alpha=0.3)
    figure.legend(*times.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    figure.suptitle(fitted(title, 10))
    save(figure, path)


def channel_curves(layers: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, *, title: str) -> None:
    """Largest value, kurtosis, and values beyond six standard deviations of the residual stream after every layer."""
    figure = new_figure(12, 4.2)
    drawn = (
        ("infinity_norm", "Largest magnitude", "mean over images, log scale", "log"),
        ("kurtosis", "Kurtosis (a Gaussian has 3)", "kurtosis, log scale", "log"),
        ("sigma_outliers", "Beyond 6 standard deviations", "values per image", "linear"),
    )
    for axes, (key, heading, label, scale) in zip(figure.subplots(1, 3), drawn, strict=True):
        for (name, states), colour in zip(layers.items(), cycle(COLOURS)):
            places = [state["layer"] for state in states]
            values = [np.nan if state[key] is None else state[key] for state in states]  # not drawn
            axes.plot(places, values, "o-", markersize=3, color=colour, label=name)
        axes.set(title=heading, ylabel=label, yscale=scale)
        if scale == "log":
            plain_ticks(axes.yaxis)
        else:
            axes.set_ylim(bottom=0)
        _over_layers(axes)
    axes.legend(fontsize=8)
    figure.suptitle(fitted(title, 12))
    save(figure, path)


def differences(rows: Sequence[Mapping[str, Any]], first: str, second: str, path: Path, *, title: str) -> None:
    """One line per quantity: the mean difference between two models with its 95 % interval, in its own unit."""
    figure = new_figure(8.5, 0.62 * len(rows) + 1.4)
    for axes, row in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        low, mean, high = (row["difference"][key] for key in ("low", "mean", "high"))
        colour = COLOURS[3] if row["differs"] else COLOURS[7]
        axes.axvline(0, color="black", linewidth=0.8)
        axes.plot([low, high], [0, 0], color=colour, linewidth=3)
        axes.plot([mean], [0], "o", color=colour)
        width = (max(abs(low), abs(high)) or 1.0) * 1.25
        axes.set(xlim=(-width, width), yticks=[0], yticklabels=[f"{row['name']} ({row['unit']})"], ylim=(-1, 1))
        axes.tick_params(labelsize=8)
    heading = f"{title}\n{second} minus {first}, mean and interval (all hold in 95 % of cases); red: excludes 0"
    figure.suptitle(fitted(heading, 8.5, 10), fontsize=10)
    save(figure, path)
