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
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from vitreg_hf.analysis.figures.canvas import fitted, new_figure, plain_ticks, save

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:gray")
_FILLED_UP_TO = 2  # models: more areas over one another are mud
_NAME_WIDTH = 2.4  # inches of a model's name beside a panel
_NORM = "L2 norm of patch tokens before the final norm"


def norm_histogram(norms: Mapping[str, NDArray[Any]], cutoffs: Mapping[str, float], path: Path, *, title: str) -> None:
    """Distribution of patch norms of one layer per model, counts on a logarithmic axis (Fig. 3 of the paper)."""
    figure = new_figure(7.5, 4.2)
    axes = figure.subplots()
    highest = max(*(float(values.max()) for values in norms.values()), *cutoffs.values())
    lowest = min(float(values.min()) for values in norms.values())
    edges = np.linspace(min(0.0, lowest), highest * 1.02, 80)
    filled = 0.25 if len(norms) <= _FILLED_UP_TO else 0.0
    for (name, values), (colour, width) in zip(norms.items(), _lines(len(norms)), strict=True):
        shares, bins = np.full(len(values), 100 / len(values)), list(edges)
        axes.hist(values, bins=bins, weights=shares, histtype="stepfilled", alpha=filled, color=colour)
        label, cutoff = f"{name}, {len(values):,} patches", f"cutoff of {name}: {cutoffs[name]:.3g}"
        axes.hist(values, bins=bins, weights=shares, histtype="step", color=colour, linewidth=width, label=label)
        axes.axvline(cutoffs[name], color=colour, linestyle="--", linewidth=width, label=cutoff)
    axes.set(yscale="log", xlabel=_NORM, ylabel="share of patches (%), log scale", title=fitted(title, 7))
    axes.set_xlim(left=edges[0])
    plain_ticks(axes.yaxis)
    _legend_below(figure, axes)
    save(figure, path)


def layer_curves(layers: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, *, title: str) -> None:
    """Norms of patches and the share of outliers after every layer (Fig. 4a of the paper), one colour per model."""
    figure = new_figure(10, 4.4)
    norm, share = figure.subplots(1, 2)
    filled = 0.2 if len(layers) <= _FILLED_UP_TO else 0.08
    for (name, states), (colour, width) in zip(layers.items(), _lines(len(layers)), strict=True):
        line: Any = {"color": colour, "linewidth": width}
        places = [state["layer"] for state in states]
        low, high = ([state[f"norm_percentile_{p}"] for state in states] for p in (2, 98))
        norm.fill_between(places, low, high, alpha=filled, color=colour)
        norm.plot(places, [state["norm_median"] for state in states], label=name, **line)
        norm.plot(places, [state["norm_max"] for state in states], ":", **line)
        share.plot(places, [100 * state["outlier_share"] for state in states], "o-", ms=2 + width, **line)
    norm.set(yscale="log", ylabel="L2 norm of patch tokens, log scale")
    norm.set_title("Norms (line: median, dotted: largest,\nband: 2nd to 98th percentile)", fontsize=11)
    share.set(ylabel="patches above the cutoff (%)")
    share.set_title("Outliers (cutoff of the layer that decides)", fontsize=11)
    share.set_ylim(-0.03 * (top := _room_above(share)), top)
    plain_ticks(norm.yaxis)
    for axes in (norm, share):
        _over_layers(axes)
    _legend_below(figure, norm)
    figure.suptitle(fitted(title, 10))
    save(figure, path)


def _lines(models: int) -> list[tuple[str, float]]:
    """Colour and width of each model's lines: earlier ones are wider, so that equal curves do not hide one another."""
    step = min(1.0, 3 / max(models - 1, 1))
    return [(COLOURS[i % len(COLOURS)], 1.5 + step * (models - 1 - i)) for i in range(models)]


def _legend_below(figure: Figure, axes: Axes) -> None:
    """A legend below, where it covers no curve, in as many columns as the width holds; a model stays in one."""
    handles, labels = axes.get_legend_handles_labels()
    names = [fitted(label, figure.get_figwidth() - 1, 8) for label in labels]
    inches = 0.5 + 0.062 * max(len(line) for name in names for line in name.split("\n"))
    columns = int(np.clip(figure.get_figwidth() // inches, 1, len(names)))
    lines = sum(1 + name.count("\n") for name in names) / columns
    figure.set_figheight(figure.get_figheight() + 0.17 * lines)  # or many long names would leave no room for curves
    figure.legend(handles, names, fontsize=8, loc="outside lower center", ncols=columns)


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
        for (name, states), (colour, width) in zip(layers.items(), _lines(len(layers)), strict=True):
            places = [state["layer"] for state in states]
            values = [np.nan if state[key] is None else state[key] for state in states]  # not drawn
            axes.plot(places, values, "o-", markersize=2 + width, color=colour, linewidth=width, label=name)
        axes.set(title=heading, ylabel=label, yscale=scale)
        if scale == "log":
            plain_ticks(axes.yaxis)
        else:
            axes.set_ylim(bottom=0)
        _over_layers(axes)
    _legend_below(figure, axes)
    figure.suptitle(fitted(title, 12))
    save(figure, path)


def differences(rows: Mapping[str, Sequence[Mapping[str, Any]]], first: str, path: Path, *, title: str) -> None:
    """One panel per quantity, in its own unit: mean difference of every later model to the first, with its interval.

    Args:
        rows: of `differences.differences`, by later model; not every model has to have every quantity.
        first: the model that the others are compared with.
        path: PNG to write.
        title: how many models and images.
    """
    quantities = list(dict.fromkeys(row["name"] for some in rows.values() for row in some))
    labels = {name: fitted(name, _NAME_WIDTH, 8) for name in rows}
    listed = [
        [(labels[name], row) for name, some in rows.items() for row in some if row["name"] == quantity]
        for quantity in quantities
    ]
    lines = [sum(1 + label.count("\n") for label, _ in panel) for panel in listed]
    figure = new_figure(8.5, sum(0.62 + 0.2 * count for count in lines) + 1.2)
    panels = figure.subplots(len(listed), 1, squeeze=False, gridspec_kw={"height_ratios": [2 + n for n in lines]})
    for axes, panel in zip(panels[:, 0], listed, strict=True):
        _difference_panel(axes, panel)
    heading = f"{title}\neach minus {first}: mean and interval (all hold in 95 % of cases); red: differs"
    figure.suptitle(fitted(heading, 8.5, 10), fontsize=10)
    save(figure, path)


def _difference_panel(axes: Axes, panel: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    axes.axvline(0, color="black", linewidth=0.8)
    width = 0.0
    for place, (_, row) in enumerate(panel):
        low, mean, high = (row["difference"][key] for key in ("low", "mean", "high"))
        colour = COLOURS[3] if row["differs"] else COLOURS[7]
        axes.plot([low, high], [place, place], color=colour, linewidth=3)
        axes.plot([mean], [place], "o", color=colour)
        width = max(width, abs(low), abs(high))
    axes.set(xlim=(-1.25 * (width or 1.0), 1.25 * (width or 1.0)), ylim=(len(panel) - 0.4, -0.6))
    axes.set_yticks(range(len(panel)), [label for label, _ in panel])
    axes.set_title(f"{panel[0][1]['name']} ({panel[0][1]['unit']})", fontsize=9)
    axes.tick_params(labelsize=8)
