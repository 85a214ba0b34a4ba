# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What registers change in a model that was trained without: before and after, and how many neurons it took.

Shapes: B images, H x W pixels, rows x columns patches.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from vitreg_hf.analysis.figures.canvas import colour_bar, draw_image, draw_map, fitted, new_figure, save

Maps = tuple[NDArray[Any], NDArray[Any]]  # before and after, (B, rows, columns) each


def before_after_figure(
    images: NDArray[np.uint8],
    norms: Maps,
    attention: Maps | None,
    path: Path,
    *,
    captions: Sequence[str],
    title: str,
    on_patches: tuple[Sequence[float], Sequence[float]] | None = None,
) -> None:
    """One row per image: the image, norms of patches before and after, what CLS attends to before and after.

    Args:
        images: RGB `(B, H, W, 3)`.
        norms: of patches, on one scale for both.
        attention: of the first token to patches, as multiples of an even share, on one scale; None without one.
        path: PNG to write.
        captions: B texts.
        title: model and what was done to it.
        on_patches: share of the first token's attention that is on patches, per image, before and after.
    """
    blocks = [("norm of each patch", norms, "inferno", "L2 norm before the final norm")]
    if attention is not None:
        elsewhere = "what is not on patches is on CLS, registers or their bias"
        label = f"attention / even share (last layer, mean of heads)\n{elsewhere}"
        blocks.append(("what CLS attends to", attention, "viridis", label))
    width = 2.0 * (1 + 2 * len(blocks)) + 2.2
    figure = new_figure(width, 2.05 * len(images) + 1.4)
    grid = figure.subplots(len(images), 1 + 2 * len(blocks), squeeze=False)
    for row, image in enumerate(images):
        draw_image(grid[row, 0], image, captions[row])
    grid[0, 0].set_title("input", fontsize=10)
    for index, (name, both, colours, label) in enumerate(blocks):
        columns = slice(1 + 2 * index, 3 + 2 * index)
        highest = float(max(maps.max() for maps in both)) or 1.0
        for maps, column, when in zip(both, grid[:, columns].T, ("before", "after"), strict=True):
            for axes, values, image in zip(column, maps, images, strict=True):
                drawn = draw_map(axes, values, image.shape[:2], highest=highest, colours=colours)
            column[0].set_title(f"{name}\n{when}", fontsize=10)
        colour_bar(figure, drawn, grid[:, columns], label)
    for shares, column in zip(on_patches or (), grid[:, 3:].T, strict=False):
        for axes, share in zip(column, shares, strict=True):
            axes.set_title(f"{axes.get_title()}\n{100 * share:.0f} % on patches".strip(), fontsize=8)
    figure.suptitle(fitted(title, width))
    save(figure, path)


def trials_figure(trials: Sequence[dict[str, Any]], chosen: int, path: Path, *, title: str) -> None:
    """What moving the first neurons of a ranking does, over their number, up to where outliers have vanished.

    Args:
        trials: per number of neurons, from 0, `count`, `outlier_share`, `largest_norm` and `pooled_cosine`.
        chosen: the number that was taken.
        path: PNG to write.
        title: model and images.
    """
    figure = new_figure(11.5, 3.7)
    panels = figure.subplots(1, 3)
    counts = [trial["count"] for trial in trials]
    _curve(panels[0], counts, [100 * trial["outlier_share"] for trial in trials], chosen)
    panels[0].set(title="outliers left", ylabel="patches above the cutoff (%)")
    _curve(panels[1], counts, [trial["largest_norm"] for trial in trials], chosen)
    panels[1].set(title="largest norm left", ylabel="L2 norm before the final norm")
    cosines = [trial["pooled_cosine"] for trial in trials]
    _curve(panels[2], counts, cosines, chosen, lowest=min(0.9, *cosines) - 0.02)
    panels[2].set(title="what becomes of the pooled feature", ylabel="cosine to that of the original")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle(fitted(title, 11.5))
    save(figure, path)


def _curve(axes: Axes, counts: list[int], values: list[float], chosen: int, lowest: float = 0.0) -> None:
    places = list(range(len(counts)))
    axes.plot(places, values, "o-", color="tab:blue", ms=4, label="measured")
    axes.axhline(values[0], color="0.6", lw=1, ls=":", label="before")
    if chosen in counts:  # else it was told, not tried
        axes.axvline(counts.index(chosen), color="tab:red", lw=1, label=f"taken: {chosen}")
    axes.set_xticks(places, [str(count) for count in counts], fontsize=8)
    axes.set(xlabel="neurons moved", ylim=(lowest, 1.06 * max(values)))
    axes.grid(alpha=0.3)
