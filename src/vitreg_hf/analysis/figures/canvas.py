# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What all pictures share: how they are written, how an image and a map over it are drawn.

No picture touches matplotlib's global state. Shapes: H x W pixels, rows x columns patches.
"""

import os
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

_DOTS_PER_INCH = 150
_DECADES_WITHOUT_STEPS = 3
_GRID_LINES_UP_TO = 16  # patches per side: more lines would hide the map


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches, whose parts make room for one another."""
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write a PNG under a temporary name, so that there is never half a picture."""
    FigureCanvasAgg(figure)
    unfinished = path.with_name(f".{path.name}.unfinished")
    figure.savefig(unfinished, format="png", dpi=_DOTS_PER_INCH)
    os.replace(unfinished, path)


def fitted(text: str, inches: float, size: float = 12) -> str:
    """Text of a font size in points in lines that a width in inches holds, so that no title is cut off."""
    per_line = max(12, int(inches * 72 / (0.56 * size)))  # a letter is a little over half as wide as its size
    return "\n".join(part for line in text.split("\n") for part in textwrap.wrap(line, per_line))


def plain_ticks(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis that has its data: powers of ten, 2 and 5 between, even steps if short."""
    low, high = axis.get_view_interval()
    decades = float(np.log10(high / low))
    steps = LogLocator(subs=(1, 2, 5) if decades < _DECADES_WITHOUT_STEPS else (1,))
    axis.set_major_locator(AutoLocator() if decades < 1 else steps)
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_locator(NullLocator() if decades < 1 else LogLocator(subs=range(2, 10)))
    axis.set_minor_formatter(NullFormatter())


def _plain(value: float, _: Any) -> str:
    return f"{value:,.0f}" if 1_000 <= abs(value) < 1e7 else f"{value:g}"


def colour_bar(figure: Figure, drawn: Any, axes: Any, label: str) -> None:
    """A colour bar as tall as its panels and no wider for it."""
    figure.colorbar(drawn, ax=axes, label=label, aspect=20 * max(1.0, np.shape(axes)[0] / 1.5))


def draw_image(axes: Axes, image: NDArray[np.uint8], caption: str = "") -> None:
    """An RGB image `(H, W, 3)` without ticks, a caption at its left."""
    height, width = image.shape[:2]
    axes.imshow(image, extent=(0, width, height, 0))
    axes.set_ylabel(caption, fontsize=9)
    axes.set(xticks=[], yticks=[])


def draw_map(
    axes: Axes,
    values: NDArray[Any],
    size: tuple[int, ...],
    highest: float | None = None,
    lowest: float = 0.0,
    colours: str = "viridis",
) -> Any:
    """A map `(rows, columns)`, or colours `(rows, columns, 3)`, over the extent of its image; returns the artist."""
    (height, width), (rows, columns) = size, values.shape[:2]
    drawn = axes.imshow(values, extent=(0, width, height, 0), vmin=lowest, vmax=highest, cmap=colours)
    axes.set(xticks=[], yticks=[])
    if max(rows, columns) <= _GRID_LINES_UP_TO:
        axes.set_xticks(np.linspace(0, width, columns + 1), minor=True)
        axes.set_yticks(np.linspace(0, height, rows + 1), minor=True)
        axes.grid(which="minor", color="white", linewidth=0.4)
        axes.tick_params(which="minor", length=0)
    return drawn
