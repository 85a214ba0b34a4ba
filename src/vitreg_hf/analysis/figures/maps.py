# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Maps over images: what tokens attend to.

Shapes: B images, H x W pixels, T prefix tokens (CLS, then registers), rows x columns patches.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vitreg_hf.analysis.figures.canvas import draw_image, draw_map, new_figure, save


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
            drawn = draw_map(grid[row, column], shown, image.shape[:2], values.max())
            grid[row, column].set_title(f"{100 * shown.sum():.0f} % on patches", fontsize=8)
    for axes, name in zip(grid[0], ["input", *token_names], strict=True):
        axes.set_title(name if name == "input" else f"{name}\n{axes.get_title()}", fontsize=10)
    figure.colorbar(drawn, ax=grid[:, 1:], label="attention to a patch (probability, mean of heads)")
    figure.suptitle(
        f"{title}\n% on patches: share of a token's attention on patches, the rest is on CLS and registers; "
        f"equal attention to all tokens of this model would be {equal_share:.3f} each"
    )
    save(figure, path)
