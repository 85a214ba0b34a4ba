# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What augmentation makes of training images.

Shapes: H x W pixels of C channels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from vitreg_hf.analysis.figures.canvas import fitted, new_figure, save

_PANEL = 1.7  # inches, the longer side of the largest image
_OPACITY = 0.55  # of classes over an image
_CLASSES_NAMED = 24  # more in a legend would be larger than the images
# Neighbouring classes differ: bright colours in an order that no rainbow has.
_COLOURS = (
    *(
        "tab:blue",
        "tab:orange",
        "tab:green",
        "tab:red",
        "tab:purple",
        "tab:brown",
        "tab:pink",
        "tab:olive",
        "tab:cyan",
    ),
    *("gold", "navy", "lime", "maroon", "teal", "magenta", "black"),
)


class Sample(NamedTuple):
    """An image of a sheet.

    Attributes:
        image: uint8 `(H, W, C)`; `analysis.images.as_seen` makes one of normalised pixels. Channels other than 3 are
            shown as their mean.
        mask: class of each pixel `(H, W)`, laid over the image in colours; None for an image without.
    """

    image: NDArray[np.uint8]
    mask: NDArray[Any] | None = None


def augmentation_sheet(
    rows: Sequence[Sequence[Sample]],
    path: Path,
    *,
    column_names: Sequence[str],
    captions: Sequence[str],
    title: str,
    mask_classes: Mapping[int, str] | None = None,
) -> None:
    """Draw one row per training image: the image as it was read, then what the model is shown of it.

    Images to train on are drawn in one scale, so that small crops are small; the first column fits its panels.

    Args:
        rows: the image and its variants, in the order of the columns.
        path: PNG to write.
        column_names: what each column shows, such as `original` and `augmented 1`.
        captions: a text for the left of each row, such as the class of the image.
        title: data and settings.
        mask_classes: names of the classes in masks; pixels of other classes stay as they are.

    Raises:
        ValueError: if there is no image, or the numbers of images, names and captions do not fit.
    """
    lengths = {len(row) for row in rows}
    if not column_names or lengths != {len(column_names)} or len(rows) != len(captions):
        raise ValueError(
            f"Expected rows of {len(column_names)} images, one for each column, and a caption for each row, "
            f"got {len(rows)} rows of {sorted(lengths)} images and {len(captions)} captions"
        )
    columns, classes = len(column_names), dict(mask_classes or {})
    largest = max(max(sample.image.shape[:2]) for row in rows for sample in row[1:] or row)
    figure = new_figure(_PANEL * columns + 0.9, (_PANEL + 0.25) * len(rows) + 0.9 + 0.3 * bool(classes))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for panels, row, caption in zip(grid, rows, captions, strict=True):
        for place, (axes, sample) in enumerate(zip(panels, row, strict=True)):
            _draw(axes, sample, None if place == 0 else largest, classes)
        panels[0].set_ylabel(fitted(caption, _PANEL, 9), fontsize=9)
    for axes, name in zip(grid[0], column_names, strict=True):
        axes.set_title(fitted(name, _PANEL, 10), fontsize=10)
    masks = [sample.mask for row in rows for sample in row if sample.mask is not None]
    _name_classes(figure, classes, any(not np.isin(mask, [*classes]).all() for mask in masks))
    figure.suptitle(fitted(title, figure.get_figwidth()))
    save(figure, path)


def _draw(axes: Axes, sample: Sample, scale: int | None, classes: Mapping[int, str]) -> None:
    """An image and its mask, its size below; with a scale, as large as that many pixels fill the panel."""
    image = sample.image
    height, width = image.shape[:2]
    if image.shape[2] != 3:
        image = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2).round().astype(np.uint8)
    placed: dict[str, Any] = {"extent": (0, width, height, 0), "interpolation": "nearest"}
    axes.imshow(image, **placed)
    if sample.mask is not None:
        colours: dict[str, Any] = {"cmap": ListedColormap(_COLOURS), "vmin": -0.5, "vmax": len(_COLOURS) - 0.5}
        classes_alone = np.ma.masked_array(_places(sample.mask, classes), ~np.isin(sample.mask, [*classes]))
        axes.imshow(classes_alone, alpha=_OPACITY, **placed, **colours)
    if scale is not None:
        axes.set(xlim=(width / 2 - scale / 2, width / 2 + scale / 2))
        axes.set(ylim=(height / 2 + scale / 2, height / 2 - scale / 2))
    axes.set(xticks=[], yticks=[])
    below: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "top"}
    axes.annotate(f"{width} by {height} px", (width / 2, height), (0, -2), fontsize=7, **below)
    axes.spines[:].set_visible(False)


def _places(mask: NDArray[Any], classes: Mapping[int, str]) -> NDArray[np.int64]:
    """Number of the colour of each pixel; colours repeat when there are many classes."""
    places = np.zeros(mask.shape, np.int64)
    for place, label in enumerate(classes):
        places[mask == label] = place % len(_COLOURS)
    return places


def _name_classes(figure: Figure, classes: Mapping[int, str], others: bool) -> None:
    if not 0 < len(classes) <= _CLASSES_NAMED:
        return
    named = zip(classes.values(), _COLOURS * 2)
    handles = [Patch(color=colour, alpha=_OPACITY, label=name) for name, colour in named]
    if others:
        handles.append(Patch(facecolor="none", edgecolor="grey", label="no colour: left out of the loss"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=8)
