# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Attention laid over the image that it is about, as a picture in memory.

Shapes: H x W pixels, C channels, T tokens, rows x columns patches.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vitreg_hf.analysis.figures.canvas import draw_image, fitted, new_figure

_DOTS_PER_INCH = 110
_PANELS_PER_ROW = 6
_PANEL = 2.1  # inches, the longer side of an image
_COLOURS = "inferno"
_OPACITY = 0.6  # of the map over the image
_GREY = 0.5  # of the image below the colour bar
_HEADING_WIDTH = 1.6  # inches that the heading of a panel takes
_BAR = 1.9  # inches
_EXPLANATION = (
    "CLS and registers are tokens that the network adds to those of the image's patches. A panel shows how one of "
    "them shares out its attention (mean of heads): coloured patches get it, each panel from 0 to its own brightest "
    "patch; what is not on patches goes to CLS and registers."
)


def attention_overlay(
    image: NDArray[np.uint8], maps: NDArray[Any], *, token_names: Sequence[str], title: str
) -> PIL.Image.Image:
    """Draw the image, then one panel per token: the image in grey with what the token attends to in colour.

    Each panel has a colour scale of its own, from 0 to the token's most attended patch, whose probability stands over
    it, so that a token that spreads its attention shows as much as one that does not.

    Args:
        image: `(H, W, C)` as the model saw it, before normalisation; other than 3 channels are shown as their mean.
        maps: probabilities `(T, rows, columns)`.
        token_names: T names.
        title: model and layer.

    Returns:
        An RGB picture.

    Raises:
        ValueError: if there are not as many maps as names, or none.
    """
    if maps.ndim != 3 or len(maps) != len(token_names) or len(maps) == 0:
        raise ValueError(f"Expected one map (rows, columns) for each of {len(token_names)} tokens, got {maps.shape}")
    figure = _figure_for(image, 1 + len(maps), title)
    columns = min(1 + len(maps), _PANELS_PER_ROW)
    panels = figure.subplots(-(-(1 + len(maps)) // columns), columns, squeeze=False)
    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2) / 255
    draw_image(panels.flat[0], image if image.shape[2] == 3 else (255 * grey).astype(np.uint8))
    panels.flat[0].set_title("input\nas the model sees it", fontsize=9)
    for axes, values, name in zip(panels.flat[1:], maps, token_names, strict=False):
        _draw_panel(axes, grey, values.astype(float), name)
    for axes in panels.flat[1 + len(maps) :]:
        axes.axis("off")
    _add_colour_bar(figure, panels)
    return _rendered(figure)


def _figure_for(image: NDArray[np.uint8], count: int, title: str) -> Figure:
    """A figure that has room for so many panels, and for the title and the explanation that it holds already."""
    height, width = image.shape[:2]
    scale = _PANEL / max(height, width)
    columns = min(count, _PANELS_PER_ROW)
    inches = max(_HEADING_WIDTH, scale * width + 0.1) * columns + 0.2
    heading, explanation = fitted(title, inches, size=11), fitted(_EXPLANATION, inches, size=8)
    lines = 0.19 * len(heading.split("\n")) + 0.15 * len(explanation.split("\n"))
    figure = new_figure(inches, (scale * height + 0.68) * -(-count // columns) + lines + 0.6)
    figure.suptitle(heading, fontsize=11)
    figure.supxlabel(explanation, fontsize=8)
    return figure


def _draw_panel(axes: Axes, grey: NDArray[Any], values: NDArray[Any], name: str) -> None:
    height, width = grey.shape[:2]
    axes.imshow(grey, extent=(0, width, height, 0))
    highest = float(values.max())
    axes.imshow(
        values,
        extent=(0, width, height, 0),
        cmap=_COLOURS,
        vmin=0,
        vmax=highest or 1.0,
        alpha=_OPACITY,
        interpolation="nearest",
    )
    axes.set(xticks=[], yticks=[])
    shares = f"{_percent(values.sum())} on patches\nbrightest patch {_percent(highest)}"
    axes.set_title(f"{name}\n{shares}", fontsize=9)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _add_colour_bar(figure: Figure, panels: Any) -> None:
    """A colour bar in the colours of the panels, which lie over grey."""
    pure = matplotlib.colormaps[_COLOURS](np.linspace(0, 1, 256))
    over_grey = ListedColormap(_OPACITY * pure[:, :3] + (1 - _OPACITY) * _GREY)
    part = _BAR / figure.get_figwidth()
    bar = figure.colorbar(ScalarMappable(cmap=over_grey), ax=panels, location="bottom", shrink=part, aspect=18)
    bar.set_ticks([0, 1], labels=["attention 0", "brightest patch"], fontsize=8)


def _rendered(figure: Figure) -> PIL.Image.Image:
    figure.set_dpi(_DOTS_PER_INCH)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return PIL.Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
