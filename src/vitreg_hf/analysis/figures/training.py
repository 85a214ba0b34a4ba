# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The curve of a training, by epochs and by steps."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from vitreg_hf.analysis.figures.canvas import fitted, new_figure, plain_ticks, save

_TRAINING, _EVALUATION = "tab:blue", "tab:orange"
_SOFTEN_TARGETS = ("label_smoothing_factor", "mixup_alpha", "cutmix_alpha")
_LOSSES = {"bce": "training: binary cross-entropy, held-out: cross-entropy"}
_PANELS_PER_ROW = 3
_WIDE = 30  # largest over smallest value from which an axis is logarithmic


class _Panel(NamedTuple):
    """What is drawn against the steps in one place: fields of records with their labels, and colours of their own."""

    title: str
    unit: str
    fields: Mapping[str, str]
    scale: Literal["from 0", "free", "logarithmic"] = "free"  # logarithmic if values are far apart


_TOKENS = {"norm_cls": "CLS", "norm_registers": "registers", "norm_patches": "patches"}
_PANELS = (
    _Panel("Training loss", "mean since the last record", {"loss": "loss"}, "logarithmic"),
    _Panel("Learning rate", "highest of all parameters", {"learning_rate": "learning rate"}, "from 0"),
    _Panel(
        *("Gradient", "L2 norm"),
        {"gradient_norm": "all, before clipping", "gradient_norm_tokens": "tokens, positions: clipped"},
        "logarithmic",
    ),
    _Panel(
        *("Tokens before the final norm", "L2 norm, mean of a batch"),
        {f"residual_{field}": label for field, label in _TOKENS.items()}
        | {"residual_norm_patches_highest": "highest patch of an image"},
        "logarithmic",
    ),
    _Panel(
        *("Tokens after the final norm", "L2 norm, mean of a batch"),
        {f"output_{field}": label for field, label in _TOKENS.items()}
        | {"output_norm_patches_highest": "highest patch of an image"},
        "logarithmic",
    ),
    _Panel(
        *("Are registers alike? (1: all equal)", "mean cosine of pairs"),
        {
            "register_cosine": "as learned, before the first layer",
            "residual_cosine_registers": "of an image, before the final norm",
            "output_cosine_registers": "of an image, after the final norm",
        },
    ),
    _Panel("Learned registers", "L2 norm, mean", {"register_norm": "registers"}),
    _Panel("Speed", "images per second", {"images_per_second": "images per second"}, "from 0"),
    _Panel("Memory", "MB", {"memory_megabytes": "memory"}, "from 0"),
)


def training_curve(results: dict[str, Any], path: Path) -> None:
    """Draw loss and accuracy per epoch of a training, and below what its steps have recorded, if they have.

    Args:
        results: content of a `results.json`; records of steps in its section `steps`.
        path: PNG to write.

    Raises:
        ValueError: if there is no epoch to draw.
    """
    curve, records = results["curve"], results.get("steps") or []
    if not curve:
        raise ValueError("Expected a curve of at least one epoch, got an empty one")
    panels = _panels_of(records)
    rows = math.ceil(len(panels) / _PANELS_PER_ROW)
    figure = new_figure(10, 4.2 + 2.6 * rows)
    above: Any = figure
    if rows:
        parts: Any = figure.subfigures(2, 1, height_ratios=[4.2, 2.6 * rows])
        above, below = parts
        _draw_panels(below, panels, records, results["hyperparameters"])
    loss, accuracy = above.subplots(1, 2)
    _draw_series(loss, curve, "loss", 1)
    _draw_series(accuracy, curve, "accuracy", 100)
    softened = any(results["hyperparameters"].get(name) for name in _SOFTEN_TARGETS)
    loss.set(title="Loss (in training: against softened targets)" if softened else "Loss")
    loss.set(ylabel=_LOSSES.get(results["hyperparameters"].get("loss"), "cross-entropy (nats)"), ylim=(0, None))
    accuracy.set(title="Accuracy", ylabel="images classified correctly (%)")
    data, metrics = results["data"], results["metrics"]
    images = "an unknown number of" if data["train_images"] is None else data["train_images"]
    above.suptitle(
        f"{results['model']['name']} on {data['source']}: {100 * metrics['accuracy']:.1f} % of {metrics['n']} "
        f"held-out images correct after epoch {curve[-1]['epoch']}, trained on {images} images"
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


# Steps


def step_curves(records: Sequence[Mapping[str, Any]], path: Path, *, title: str, max_grad_norm: float = 0) -> None:
    """Draw what the steps of a training have recorded: loss, learning rate, gradients, tokens, speed, memory.

    Args:
        records: of a training log; a panel whose fields no record has is left out.
        path: PNG to write.
        title: model, data and outcome.
        max_grad_norm: norm to which gradients were clipped; 0: they were not.

    Raises:
        ValueError: if nothing is recorded.
    """
    panels = _panels_of(records)
    if not panels:
        raise ValueError("Expected records of steps, got none")
    rows = math.ceil(len(panels) / _PANELS_PER_ROW)
    figure = new_figure(10, 2.6 * rows + 0.5)
    _draw_panels(figure, panels, records, {"max_grad_norm": max_grad_norm})
    figure.suptitle(fitted(title, 10))
    save(figure, path)


def _panels_of(records: Sequence[Mapping[str, Any]]) -> list[_Panel]:
    """The panels for which something was recorded."""
    recorded = {name for record in records for name, value in record.items() if value is not None}
    if any(name.startswith("residual_") for name in recorded):
        recorded = {name for name in recorded if not name.startswith("output_")}  # of less to see, and as many lines
    chosen = [
        panel._replace(fields={name: label for name, label in panel.fields.items() if name in recorded})
        for panel in _PANELS
    ]
    return [panel for panel in chosen if panel.fields]


def _draw_panels(
    figure: Any, panels: Sequence[_Panel], records: Sequence[Mapping[str, Any]], hyperparameters: Mapping[str, Any]
) -> None:
    rows = math.ceil(len(panels) / _PANELS_PER_ROW)
    every = figure.subplots(rows, _PANELS_PER_ROW, squeeze=False).flatten()
    for axes, panel in zip(every, panels):
        _draw_panel(axes, panel, records)
        clipped_to = hyperparameters.get("max_grad_norm")
        if "gradient_norm" in panel.fields and clipped_to:
            axes.axhline(clipped_to, color="black", linestyle=":", linewidth=1, label=f"clipped to {clipped_to:g}")
        if len(axes.get_lines()) > 1:
            axes.legend(fontsize=7)
    for axes in every[len(panels) :]:
        axes.remove()


def _draw_panel(axes: Axes, panel: _Panel, records: Sequence[Mapping[str, Any]]) -> None:
    steps = [record["step"] for record in records]
    drawn = []
    for number, (field, label) in enumerate(panel.fields.items()):
        values = np.array([record.get(field) for record in records], dtype=float)  # None becomes a gap
        marker = "o" if len(steps) < 3 else None
        axes.plot(steps, values, linewidth=1, marker=marker, markersize=3, color=f"C{number}", label=label)
        drawn.append(values)
    low, high = np.nanmin(drawn), np.nanmax(drawn)
    axes.set_title(panel.title, fontsize=10)
    if panel.scale == "from 0":
        axes.set_ylim(0, 1.08 * high or 1.0)
    elif panel.scale == "logarithmic" and low > 0 and high > _WIDE * low:
        axes.set(yscale="log")
        plain_ticks(axes.yaxis)
    axes.set_ylabel(panel.unit + (", log scale" if axes.get_yscale() == "log" else ""), fontsize=8)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.grid(alpha=0.3)
