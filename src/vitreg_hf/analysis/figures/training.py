# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The curve of a training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from vitreg_hf.analysis.figures.canvas import new_figure, save

_TRAINING, _EVALUATION = "tab:blue", "tab:orange"
_SOFTEN_TARGETS = ("label_smoothing_factor", "mixup_alpha", "cutmix_alpha")


def training_curve(results: dict[str, Any], path: Path) -> None:
    """Draw loss and accuracy per epoch of a training.

    Args:
        results: content of a `results.json`.
        path: PNG to write.

    Raises:
        ValueError: if there is no epoch to draw.
    """
    curve = results["curve"]
    if not curve:
        raise ValueError("Expected a curve of at least one epoch, got an empty one")
    figure = new_figure(10, 4.2)
    loss, accuracy = figure.subplots(1, 2)
    _draw_series(loss, curve, "loss", 1)
    _draw_series(accuracy, curve, "accuracy", 100)
    softened = any(results["hyperparameters"].get(name) for name in _SOFTEN_TARGETS)
    loss.set(title="Loss (in training: against softened targets)" if softened else "Loss")
    loss.set(ylabel="cross-entropy (nats)", ylim=(0, None))
    accuracy.set(title="Accuracy", ylabel="images classified correctly (%)")
    data, metrics = results["data"], results["metrics"]
    figure.suptitle(
        f"{results['model']['name']} on {data['source']}: {100 * metrics['accuracy']:.1f} % of {metrics['n']} "
        f"held-out images correct after epoch {curve[-1]['epoch']}, trained on {data['train_images']} images"
    )
    save(figure, path)


def _draw_series(axes: Axes, curve: Sequence[dict[str, Any]], quantity: str, factor: float) -> None:
    epochs = [entry["epoch"] for entry in curve]
    for label, key, colour in (
        ("training, mean of the epoch", "train", _TRAINING),
        ("held-out, end of the epoch", "eval", _EVALUATION),
    ):
        values = [entry[f"{key}_{quantity}"] for entry in curve]
        if None not in values:  # there is no training accuracy where labels are mixed
            axes.plot(epochs, [factor * value for value in values], "o-", markersize=3, color=colour, label=label)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
