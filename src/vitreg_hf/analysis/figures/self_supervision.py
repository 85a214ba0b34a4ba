# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What a backbone learns without labels."""

from pathlib import Path
from typing import Any

from vitreg_hf.analysis.figures.canvas import new_figure, save

_UNTRAINED, _TRAINED = "tab:gray", "tab:blue"
_LOSSES = {
    "dino": "DINO (CLS)",
    "ibot": "iBOT (masked patches)",
    "koleo": "KoLeo (-log of distances, two crops)",
    "gram": "Gram",
}


def knn_curve(results: dict[str, Any], path: Path) -> None:
    """Draw the accuracy of nearest neighbours over the steps of a self-supervised training, and its losses.

    Args:
        results: content of a `results.json` of `examples/pretrain_dino.py`.
        path: PNG to write.

    Raises:
        ValueError: if there is nothing to draw besides the untrained network.
    """
    curve = results["curve"]
    if len(curve) < 2:
        raise ValueError(f"Expected a curve of at least two evaluations, got {len(curve)}")
    figure = new_figure(10, 4.2)
    accuracy, losses = figure.subplots(1, 2)
    steps, metrics = [entry["step"] for entry in curve], results["metrics"]
    accuracy.plot(steps, [100 * entry["knn_accuracy"] for entry in curve], "o-", markersize=3, color=_TRAINED)
    accuracy.axhline(100 * metrics["untrained_knn_accuracy"], linestyle="--", color=_UNTRAINED, label="untrained")
    accuracy.set(title=f"{metrics['neighbours']} nearest neighbours", ylabel="held-out images correct (%)")
    accuracy.legend()
    for name, label in _LOSSES.items():
        values = [entry[f"{name}_loss"] for entry in curve[1:]]
        if any(values):
            losses.plot(steps[1:], values, "o-", markersize=3, label=label)
    losses.set(title="Losses, mean since the last evaluation", ylabel="loss, before its weight (nats)")
    low, high = losses.get_ylim()
    losses.set_ylim(low, high + 0.35 * (high - low))  # room for the legend
    losses.legend(loc="upper right")
    for axes in (accuracy, losses):
        axes.set_xlabel("updates of the weights")
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"{results['model']['name']}, {results['data']['train_images']} images without labels: "
        f"{100 * metrics['untrained_knn_accuracy']:.1f} % to {100 * metrics['knn_accuracy']:.1f} % of {metrics['n']}"
    )
    save(figure, path)
