# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Linear classifiers on frozen features, by what they read and how fast they learn."""

from pathlib import Path
from typing import Any

from vitreg_hf.analysis.figures.canvas import fitted, new_figure, plain_ticks, save

_WIDTH = 7.5


def probe_sweep(results: dict[str, Any], path: Path) -> None:
    """Draw the accuracy of every classifier over its learning rate, a line for each kind of features; mark the best.

    Args:
        results: content of a `results.json` of `examples/evaluate_features.py --task linear`.
        path: PNG to write.
    """
    sweep, best = results["sweep"], results["metrics"]
    figure = new_figure(_WIDTH, 4.8)
    axes = figure.subplots()
    kinds = dict.fromkeys((entry["last_blocks"], entry["average_pool"]) for entry in sweep)
    for blocks, average_pool in kinds:
        line = [entry for entry in sweep if (entry["last_blocks"], entry["average_pool"]) == (blocks, average_pool)]
        rates, accuracies = ([entry[name] for entry in line] for name in ("learning_rate", "accuracy"))
        label = f"CLS of {blocks} block{'s' if blocks > 1 else ''}{', mean of patches' if average_pool else ''}"
        axes.plot(rates, [100 * accuracy for accuracy in accuracies], "o-", markersize=3, label=label)
    axes.plot(best["learning_rate"], 100 * best["accuracy"], "o", markersize=11, fillstyle="none", color="black")
    axes.set_xscale("log")
    plain_ticks(axes.xaxis)
    axes.set(xlabel="learning rate (for batches of 256 images)", ylabel="held-out images correct (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    title = (
        f"{results['model']['name']}: the best of {len(sweep)} linear classifiers is right for "
        f"{100 * best['accuracy']:.1f} % of {best['n']} images, which it was chosen on"
    )
    axes.set_title(fitted(title, _WIDTH))
    save(figure, path)
