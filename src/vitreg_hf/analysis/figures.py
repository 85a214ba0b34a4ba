# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The pictures of this package, drawn without touching matplotlib's global state.

Shapes: B images, H x W pixels, T prefix tokens (CLS, then registers), rows x columns patches.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

_TRAINING, _EVALUATION = "tab:blue", "tab:orange"
_SOFTEN_TARGETS = ("label_smoothing_factor", "mixup_alpha", "cutmix_alpha")
_DOTS_PER_INCH = 150
_GRID_LINES_UP_TO = 16  # patches per side: more lines would hide the map


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
    figure = Figure(figsize=(10, 4.2), layout="constrained")
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
    _save(figure, path)


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


def attention_figure(
    images: NDArray[np.uint8],
    maps: Tensor,
    path: Path,
    *,
    token_names: Sequence[str],
    captions: Sequence[str],
    title: str,
    equal_share: float,
) -> None:
    """Draw one row per image: the image, then what CLS and each register attend to, on one colour scale.

    Args:
        images: RGB `(B, H, W, 3)` as the model saw them, before normalisation.
        maps: probabilities `(B, T, rows, columns)`, mean over heads; each map names the share that is on patches.
        path: PNG to write.
        token_names: T names.
        captions: B texts for the left of each row.
        title: model and layer.
        equal_share: attention that each token would get if all got the same, for comparison.

    Raises:
        ValueError: if the numbers of images, maps, names and captions do not fit.
    """
    expected, got = (len(images), len(token_names)), tuple(maps.shape[:2])
    if expected != got or len(captions) != len(images):
        raise ValueError(
            f"Expected maps for {expected[0]} images and {expected[1]} tokens, got {got}, and {len(captions)} captions"
        )
    values = maps.float().cpu().numpy()
    rows, columns = len(images), 1 + len(token_names)
    figure = Figure(figsize=(1.9 * columns + 1.6, 1.95 * rows + 1.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for row, image in enumerate(images):
        _draw_image(grid[row, 0], image, captions[row])
        for column in range(1, columns):
            drawn = _draw_map(grid[row, column], values[row, column - 1], image.shape[:2], values.max())
    for axes, name in zip(grid[0], ["input", *token_names], strict=True):
        axes.set_title(name if name == "input" else f"{name}\n{axes.get_title()}", fontsize=10)
    figure.colorbar(drawn, ax=grid[:, 1:], label="attention to a patch (probability, mean of heads)")
    figure.suptitle(
        f"{title}\n% on patches: share of a token's attention on patches, the rest is on CLS and registers; "
        f"equal attention to all tokens of this model would be {equal_share:.3f} each"
    )
    _save(figure, path)


def _draw_image(axes: Axes, image: NDArray[np.uint8], caption: str) -> None:
    height, width = image.shape[:2]
    axes.imshow(image, extent=(0, width, height, 0))
    axes.set_ylabel(caption, fontsize=9)
    axes.set(xticks=[], yticks=[])


def _draw_map(axes: Axes, values: NDArray[np.float32], size: tuple[int, ...], highest: float) -> Any:
    """One map, a flat square per patch, over the extent of its image in pixels."""
    (height, width), (rows, columns) = size, values.shape
    drawn = axes.imshow(values, extent=(0, width, height, 0), vmin=0, vmax=highest, cmap="viridis")
    axes.set_title(f"{100 * values.sum():.0f} % on patches", fontsize=8)
    axes.set(xticks=[], yticks=[])
    if max(rows, columns) <= _GRID_LINES_UP_TO:
        axes.set_xticks(np.linspace(0, width, columns + 1), minor=True)
        axes.set_yticks(np.linspace(0, height, rows + 1), minor=True)
        axes.grid(which="minor", color="white", linewidth=0.4)
        axes.tick_params(which="minor", length=0)
    return drawn


def _save(figure: Figure, path: Path) -> None:
    """Write under a temporary name, so that there is never half a picture."""
    FigureCanvasAgg(figure)
    unfinished = path.with_name(f".{path.name}.unfinished")
    figure.savefig(unfinished, format="png", dpi=_DOTS_PER_INCH)
    os.replace(unfinished, path)
