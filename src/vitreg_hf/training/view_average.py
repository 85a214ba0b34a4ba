# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Features of an image averaged over shifted and mirrored views of it: a cleaner teacher than any single view.

Artifacts stand in other places of the scene when the image moves under the patch grid, what belongs to the scene moves
along: the average keeps the second (Yan & Chen, Vision Transformers with Self-Distilled Registers, arXiv 2505.21501).
Views move by whole patches, so that their patches fall onto one another without interpolation. What an image does not
show is filled with its edge, and such patches do not count.

Shapes: B images of C channels and H x W pixels, a grid of rows x columns patches, D channels of features.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class View(NamedTuple):
    """How an image is moved: down and to the right by patches, negative for up and left, and mirrored afterwards."""

    rows: int
    columns: int
    mirrored: bool = False


def farthest_shift(max_shift: float, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches within a share of the sides of a grid, but one at least if any shift is wanted."""
    if not max_shift:
        return 0, 0
    rows, columns = (min(max(int(max_shift * side), 1), side - 1) for side in grid)
    return rows, columns


def draw_views(count: int, farthest: tuple[int, int], mirror: bool) -> list[View]:
    """The image as it is, and random views of it; draws from torch's global generator.

    Args:
        count: of views, the image itself included: so that at least one has seen every patch.
        farthest: rows and columns that a view is moved by at most, in either direction.
        mirror: mirror half of the others.

    Raises:
        ValueError: if there is no view.
    """
    if count < 1:
        raise ValueError(f"Expected one view or more, got {count}")
    views = [View(0, 0)]
    for _ in range(count - 1):
        rows, columns = (int(torch.randint(-most, most + 1, ())) for most in farthest)
        views.append(View(rows, columns, mirror and bool(torch.rand(()) < 0.5)))
    return views


def seen_in(view: View, images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Images `(B, C, H, W)` in a view, of the same shape."""
    down, right = view.rows * patch_size[0], view.columns * patch_size[1]
    moved = _moved(images, down, right, "replicate")
    return moved.flip(-1) if view.mirrored else moved


def moved_back(view: View, patch_map: Tensor) -> Tensor:
    """Features `(B, D, rows, columns)` of a view where they are in the image; 0 where the view has not seen it."""
    upright = patch_map.flip(-1) if view.mirrored else patch_map
    return _moved(upright, -view.rows, -view.columns, "constant")


def view_average(
    features_of: Callable[[Tensor], Tensor], images: Tensor, views: Sequence[View], patch_size: tuple[int, int]
) -> Tensor:
    """Features of every patch, mean over the views that have seen it.

    Args:
        features_of: gives features `(B, D, rows, columns)` of images `(B, C, H, W)`.
        images: whose sides are whole patches.
        views: of `draw_views`; together they see every patch.
        patch_size: height and width of a patch in pixels.

    Returns:
        `(B, D, rows, columns)`.

    Raises:
        ValueError: if the patch size does not divide the images, or no view has seen a patch.
    """
    height, width = images.shape[-2:]
    if height % patch_size[0] or width % patch_size[1]:
        raise ValueError(f"Expected images that patches of {patch_size} pixels divide, got {height} x {width}")
    total: Tensor | float = 0.0
    count = images.new_zeros(1, 1, height // patch_size[0], width // patch_size[1])
    for view in views:
        total = total + moved_back(view, features_of(seen_in(view, images, patch_size)))
        count = count + moved_back(view, torch.ones_like(count))
    if not count.all():
        raise ValueError(f"Expected views that together see every patch, got {list(views)}")
    return total / count


def _moved(maps: Tensor, down: int, right: int, fill: str) -> Tensor:
    """Maps `(B, ., rows, columns)` moved; what enters is `constant` 0, or the edge in `replicate`."""
    rows, columns = maps.shape[-2:]
    padded = F.pad(maps, (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0)), mode=fill)
    top, left = max(-down, 0), max(-right, 0)
    return padded[..., top : top + rows, left : left + columns]
