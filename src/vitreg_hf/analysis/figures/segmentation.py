# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What a segmentation model makes of images, beside the truth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.patches import Patch
from numpy.typing import NDArray

from vitreg_hf.analysis.figures.canvas import draw_image, fitted, new_figure, save

_NO_CLASS = np.array([1.0, 1.0, 1.0])
_GREY, _YELLOW = 7, (1.0, 0.9, 0.2)  # of ten colours the grey one, and what stands in its place
_IN_LEGEND = 24  # classes: of more, those that cover most


def segmentation_figure(
    images: Sequence[NDArray[np.uint8]],
    truths: Sequence[NDArray[np.int64]],
    predictions: Sequence[NDArray[np.int64]],
    class_names: Sequence[str],
    path: Path,
    *,
    title: str,
) -> None:
    """Draw one column per image: pixels, the class of each pixel, and what the model says.

    Args:
        images: `(H, W, 3)` each.
        truths, predictions: class of every pixel, `(H, W)` each; numbers beyond the names are of no class, white.
        class_names: by index.
        path: PNG to write.
        title: what is seen.

    Raises:
        ValueError: if there is no image, or truths or predictions are of another number.
    """
    if not images or not len(images) == len(truths) == len(predictions):
        raise ValueError(f"Expected as many maps as images, got {len(images)}, {len(truths)}, {len(predictions)}")
    colours = _colours(len(class_names))
    figure = new_figure(1.7 * len(images) + 1.6, 6.6)
    rows = figure.subplots(3, len(images), squeeze=False)
    for column, (image, truth, prediction) in enumerate(zip(images, truths, predictions, strict=True)):
        for row, (picture, caption) in enumerate(
            ((image, "image"), (_painted(truth, colours), "truth"), (_painted(prediction, colours), "prediction"))
        ):
            draw_image(rows[row, column], picture, caption if column == 0 else "")
    figure.legend(
        handles=[
            Patch(color=colours[index], label=class_names[index]) for index in _legend(truths, predictions, colours)
        ],
        loc="outside right upper",
        fontsize=8,
    )
    figure.suptitle(fitted(title, 1.7 * len(images)))
    save(figure, path)


def _colours(count: int) -> NDArray[np.float64]:
    """RGB of each class, `(K, 3)`: the first one grey, which is often the background; ten that are easily told apart,
    or distinct hues where there are more."""
    named = np.delete(colormaps["tab10"](np.arange(10))[:, :3], _GREY, axis=0)
    few = np.concatenate([named, [_YELLOW]])
    hues = colormaps["gist_rainbow"](np.linspace(0, 1, max(count - 1, 1)))[:, :3]
    order = np.argsort(np.arange(len(hues)) * 0.618 % 1)  # neighbours get hues that lie apart
    return np.concatenate([[[0.25, 0.25, 0.25]], few if count <= len(few) + 1 else hues[order]])[:count]


def _painted(classes: NDArray[np.int64], colours: NDArray[np.float64]) -> NDArray[np.uint8]:
    known = (classes >= 0) & (classes < len(colours))
    painted: NDArray[Any] = np.where(known[..., None], colours[np.where(known, classes, 0)], _NO_CLASS)
    return np.rint(255 * painted).astype(np.uint8)


def _legend(
    truths: Sequence[NDArray[np.int64]], predictions: Sequence[NDArray[np.int64]], colours: NDArray[np.float64]
) -> list[int]:
    """Classes that are seen, in their order; of many, those of most pixels."""
    seen = np.concatenate([classes.ravel() for classes in (*truths, *predictions)])
    counts = np.bincount(seen[(seen >= 0) & (seen < len(colours))], minlength=len(colours))
    most = np.argsort(-counts, kind="stable")[:_IN_LEGEND]
    return sorted(int(index) for index in most if counts[index])
