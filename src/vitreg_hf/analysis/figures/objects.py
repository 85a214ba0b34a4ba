# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The objects that LOST finds, over their images.

Shapes: H x W pixels, rows x columns patches. A box is `(x_min, y_min, x_max, y_max)` in pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray

from vitreg_hf.analysis.figures.canvas import draw_image, draw_map, new_figure, save
from vitreg_hf.analysis.object_discovery import Box, Discovery

_FOUND, _TRUE, _SEED = "red", "deepskyblue", "magenta"
_COVERED = ListedColormap(["none", _FOUND])
_HEADINGS = ("image and boxes", "inverse degree", "patches of the object")


def boxes_figure(
    images: Sequence[NDArray[np.uint8]],
    discoveries: Sequence[Discovery],
    path: Path,
    *,
    captions: Sequence[str],
    title: str,
    patch_size: tuple[int, int] | None,
    truths: Sequence[Sequence[Box]] | None = None,
) -> None:
    """One row per image: its boxes, the inverse-degree map with the seed, the object (Figures 13, 14, 2309.16588).

    Args:
        images: RGB, each `(H, W, 3)`, of any sizes.
        discoveries: what was found in each, boxes in its pixels.
        path: PNG to write.
        captions: one text per image.
        title: model, feature and layer.
        patch_size: height and width of a patch in the images' pixels, where the last patches may reach beyond the
            image (`image_size="original"`); None where the patches cover each image exactly.
        truths: the true boxes of each image; None where they are not known.

    Raises:
        ValueError: if there are no images, or not as many discoveries, captions or truths.
    """
    counts = [len(discoveries), len(captions), len(images if truths is None else truths)]
    if len(images) == 0 or counts != [len(images)] * 3:
        raise ValueError(
            f"Expected one discovery, caption and list of true boxes for each of 1 or more images, got {len(images)} "
            f"images and {counts[0]}, {counts[1]} and {counts[2]} of these"
        )
    heights = [image.shape[0] / image.shape[1] for image in images]
    figure = new_figure(9.2, 2.55 * sum(heights) + 0.35 * len(images) + 1.6)
    grid = figure.subplots(len(images), 3, squeeze=False, gridspec_kw={"height_ratios": heights})
    scale = _scale(discoveries)
    for row, (image, found) in enumerate(zip(images, discoveries, strict=True)):
        extent = _extent(image, found, patch_size)
        draw_image(grid[row, 0], image, captions[row])
        _draw_boxes(grid[row, 0], found.box, () if truths is None else truths[row])
        drawn = draw_map(grid[row, 1], found.inverse_degree, extent)
        drawn.set_norm(scale)
        _draw_seed(grid[row, 1], found, extent)
        draw_image(grid[row, 2], np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8))
        grid[row, 2].imshow(found.mask, extent=(0, extent[1], extent[0], 0), cmap=_COVERED, vmin=0, vmax=1, alpha=0.5)
        grid[row, 2].set_title(f"{found.mask.sum()} of {found.mask.size} patches", fontsize=8)
        for axes in grid[row]:
            axes.set(xlim=(0, image.shape[1]), ylim=(image.shape[0], 0))
    for axes, name in zip(grid[0], _HEADINGS, strict=True):
        axes.set_title(f"{name}\n{axes.get_title()}".strip(), fontsize=10)
    label = "1 / (1 + similar patches)"
    figure.colorbar(drawn, ax=grid, label=label, shrink=min(1.0, 3 / len(images)))
    figure.legend(handles=_legend(truths is not None), loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle(
        f"{title} (n = {len(images)})\nLOST looks for one object per image, from a seed patch that is similar to the "
        "fewest others (bright)",
        fontsize=11,
    )
    save(figure, path)


def _extent(image: NDArray[np.uint8], found: Discovery, patch_size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width in pixels that the patches cover."""
    if patch_size is None:
        return image.shape[0], image.shape[1]
    return found.mask.shape[0] * patch_size[0], found.mask.shape[1] * patch_size[1]


def _scale(discoveries: Sequence[Discovery]) -> LogNorm:
    """One scale for all maps, of some length even where all patches are alike."""
    lowest = min(float(one.inverse_degree.min()) for one in discoveries)
    highest = max(float(one.inverse_degree.max()) for one in discoveries)
    return LogNorm(lowest if lowest < highest else highest / 10, highest)


def _draw_boxes(axes: Axes, found: Box, truths: Sequence[Box]) -> None:
    """The found box last, dashed, so that one that agrees with it still shows."""
    for box, colour, style in [*((truth, _TRUE, "-") for truth in truths), (found, _FOUND, "--")]:
        x_min, y_min, x_max, y_max = box
        corner, size = (x_min, y_min), (x_max - x_min, y_max - y_min)
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linestyle=style, linewidth=2))


def _draw_seed(axes: Axes, found: Discovery, extent: tuple[int, int]) -> None:
    (row, column), (rows, columns) = found.seed, found.mask.shape
    x, y = (column + 0.5) * extent[1] / columns, (row + 0.5) * extent[0] / rows
    axes.plot(x, y, "*", color=_SEED, markeredgecolor="white", markersize=11, clip_on=False)


def _legend(with_truth: bool) -> list[Any]:
    found = Patch(fill=False, edgecolor=_FOUND, linestyle="--", label="found box")
    seed = Line2D([], [], linestyle="none", marker="*", color=_SEED, markersize=10, label="seed patch")
    return [found, *([Patch(fill=False, edgecolor=_TRUE, label="true box")] if with_truth else []), seed]
