# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Maps over images: what tokens attend to, norms, components, positions.

Shapes: B images, H x W pixels, T prefix tokens (CLS, then registers), rows x columns patches.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from numpy.typing import NDArray
from torch import Tensor

from vitreg_hf.analysis.figures.canvas import colour_bar, draw_image, draw_map, fitted, new_figure, save

_MARK = ListedColormap(["none", "red"])


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
    figure = new_figure(1.9 * columns + 1.6, 1.95 * rows + 1.3)
    grid = figure.subplots(rows, columns, squeeze=False)
    for row, image in enumerate(images):
        draw_image(grid[row, 0], image, captions[row])
        for column in range(1, columns):
            shown = values[row, column - 1]
            drawn = draw_map(grid[row, column], shown, image.shape[:2], values.max() or 1.0)
            grid[row, column].set_title(f"{100 * shown.sum():.0f} % on patches", fontsize=8)
    for axes, name in zip(grid[0], ["input", *token_names], strict=True):
        axes.set_title(name if name == "input" else f"{name}\n{axes.get_title()}", fontsize=10)
    colour_bar(figure, drawn, grid[:, 1:], "attention to a patch\n(probability, mean of heads)")
    heading = (
        f"{title}\n% on patches: share of a token's attention on patches, the rest is on CLS and registers; "
        f"equal attention to all tokens of this model would be {equal_share:.3g} each"
    )
    figure.suptitle(fitted(heading, figure.get_figwidth()))
    save(figure, path)


def norm_maps(
    images: NDArray[np.uint8], norms: NDArray[Any], cutoff: float, path: Path, *, captions: Sequence[str], title: str
) -> None:
    """One row per image: the image, the norm of each patch, and which patches are outliers (Fig. 21 of the paper).

    Args:
        images: RGB `(B, H, W, 3)`.
        norms: `(B, rows, columns)`, on one scale for all.
        cutoff: norm above which a patch is an outlier.
        path: PNG to write.
        captions: B texts.
        title: model, layer and rule.
    """
    figure = new_figure(7.6, 2.05 * len(images) + 1.2)
    grid = figure.subplots(len(images), 3, squeeze=False)
    for row, (image, norm) in enumerate(zip(images, norms, strict=True)):
        size = image.shape[:2]
        draw_image(grid[row, 0], image, captions[row])
        drawn = draw_map(grid[row, 1], norm, size, highest=float(norms.max()) or 1.0, colours="inferno")
        draw_image(grid[row, 2], np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8))
        marked = np.ma.masked_array(np.ones(norm.shape), mask=norm <= cutoff)
        grid[row, 2].imshow(marked, extent=(0, size[1], size[0], 0), cmap=_MARK, vmin=0, vmax=1, alpha=0.75)
        grid[row, 2].set_title(f"{(norm > cutoff).sum()} of {norm.size} patches", fontsize=8)
    for axes, name in zip(grid[0], ("input", "norm of each patch", "above the cutoff"), strict=True):
        axes.set_title(f"{name}\n{axes.get_title()}".strip(), fontsize=10)
    colour_bar(figure, drawn, grid[:, 1], "L2 norm before the final norm")
    figure.suptitle(fitted(title, figure.get_figwidth()))
    save(figure, path)


def map_sheet(
    columns: Sequence[tuple[str, NDArray[Any], str]],
    images: NDArray[np.uint8],
    path: Path,
    *,
    captions: Sequence[str],
    title: str,
    label: str,
    limits: tuple[float, float] | None = None,
) -> None:
    """One row per image: the image, then one map or colour picture per column.

    Args:
        columns: heading, maps `(B, rows, columns)` or pictures `(B, rows, columns, 3)` from 0 to 1, colour scale.
        images: RGB `(B, H, W, 3)`.
        path: PNG to write.
        captions: B texts.
        title: model and layer.
        label: what the colours of maps mean.
        limits: of the colours of maps; None from 0 to the largest value of all columns.
    """
    figure = new_figure(1.9 * (len(columns) + 1) + 1.4, 1.95 * len(images) + 1.2)
    grid = figure.subplots(len(images), len(columns) + 1, squeeze=False)
    highest = max((float(maps.max()) for _, maps, _ in columns if maps.ndim == 3), default=0.0) or 1.0
    low, high = (0.0, highest) if limits is None else limits
    drawn: Any = None
    for row, image in enumerate(images):
        draw_image(grid[row, 0], image, captions[row])
        for axes, (_, maps, colours) in zip(grid[row, 1:], columns, strict=True):
            if maps.ndim == 4:
                draw_map(axes, maps[row], image.shape[:2])
            else:
                drawn = draw_map(axes, maps[row], image.shape[:2], highest=high, lowest=low, colours=colours)
    for axes, name in zip(grid[0], ["input", *(name for name, _, _ in columns)], strict=True):
        axes.set_title(fitted(name, 1.9, 9), fontsize=9)
    if drawn is not None:  # colour pictures need no bar
        colour_bar(figure, drawn, grid[:, 1:], label)
    figure.suptitle(fitted(title, figure.get_figwidth()))
    save(figure, path)


def token_maps(maps: NDArray[Any], names: Sequence[str], path: Path, *, title: str, label: str) -> None:
    """One map per token over the patch grid, without images: averages, shares by position.

    Args:
        maps: `(T, rows, columns)`.
        names: T headings.
        path: PNG to write.
        title: model, and how many images.
        label: what the colours mean.
    """
    figure = new_figure(2.3 * len(maps) + 1.5, 3.1)
    grid = figure.subplots(1, len(maps), squeeze=False)[0]
    highest = float(maps.max()) or 1.0
    for axes, values, name in zip(grid, maps, names, strict=True):
        drawn = draw_map(axes, values, values.shape, highest=highest)
        axes.set_title(name, fontsize=10)
    figure.colorbar(drawn, ax=grid, label=label)
    figure.suptitle(fitted(title, figure.get_figwidth()))
    save(figure, path)
