# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What the number of registers changes, one panel per quantity (as Fig. 8 of arXiv 2309.16588)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from vitreg_hf.analysis.figures.canvas import fitted, new_figure, save
from vitreg_hf.analysis.register_counts import QUANTITIES

_COLUMNS, _WIDTH, _HEIGHT = 3, 4.1, 2.9
_TOLD, _UNTOLD, _POINTS = "tab:red", "tab:blue", "0.45"


def register_counts_figure(results: Mapping[str, Any], path: Path) -> None:
    """Draw every quantity over the number of registers: each seed, the mean with its interval, and what differs.

    Args:
        results: `results.json` of an ablation.
        path: PNG to write.
    """
    compared, settings = results["compared"], results["settings"]
    names = [name for name, quantity in QUANTITIES.items() if name in compared and quantity.title]
    rows = -(-len(names) // _COLUMNS)
    figure = new_figure(_COLUMNS * _WIDTH, rows * _HEIGHT + 1.3)
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    for axes, name in zip(panels, names):
        _panel(axes, name, compared[name], [str(count) for count in settings["num_register_tokens"]])
    for axes in list(panels):
        axes.set_axis_off()
    handles: list[Any]
    handles, labels = figure.axes[0].get_legend_handles_labels()
    first = settings["num_register_tokens"][0]
    seeds = len(settings["seeds"])
    told: Any = figure.axes[0].errorbar([], [], fmt="o", color=_TOLD, capsize=3)
    figure.legend(
        [*handles, told],
        [*labels, f"the same, and different from {first} registers (all comparisons together: 95 %)"],
        loc="outside lower center",
        ncols=3,
        fontsize=9,
    )
    title = (
        f"The same network with {first} to {max(settings['num_register_tokens'])} registers, {seeds} trainings each "
        f"on {results['data']['train_images']} images of {results['data']['source']}, scored on "
        f"{results['data']['evaluation_images']} others"
    )
    figure.suptitle(fitted(title, _COLUMNS * _WIDTH))
    save(figure, path)


def _panel(axes: Axes, name: str, of_quantity: Mapping[str, Any], counts: list[str]) -> None:
    quantity, changes = QUANTITIES[name], of_quantity.get("change", {})
    for place, count in enumerate(counts):
        if count not in of_quantity["mean"]:
            continue
        values = quantity.factor * np.array(of_quantity["values"][count])
        spread = np.linspace(-0.18, 0.18, len(values)) if len(values) > 1 else np.zeros(1)
        axes.plot(place + spread, values, ".", color=_POINTS, ms=5, label="one training" if place == 0 else None)
        mean = of_quantity["mean"][count]
        ends = [mean["mean"], mean["mean"]] if mean["low"] is None else [mean["low"], mean["high"]]
        arms = quantity.factor * np.abs(np.array(ends) - mean["mean"])[:, None]
        told = changes.get(count, {}).get("verdict") in ("higher", "lower")
        label = "mean and its 95 % interval" if place == 0 else None
        axes.errorbar(
            place,
            quantity.factor * mean["mean"],
            arms,
            fmt="o",
            color=_TOLD if told else _UNTOLD,
            capsize=3,
            label=label,
        )
    better = f"\n({quantity.better} is better)" if quantity.better else "\n"
    axes.set_title(quantity.title + better, fontsize=9.5)
    axes.set_xticks(range(len(counts)), counts)
    axes.set(xlabel="number of registers", ylabel=quantity.unit, xlim=(-0.5, len(counts) - 0.5))
    axes.grid(alpha=0.3, axis="y")
    if quantity.unit == "%":  # intervals of few seeds reach beyond what there is
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -2.0) if high > 1 else -0.05, min(high, 102.0) if high > 1 else 1.0)
