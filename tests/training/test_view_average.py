# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The average over shifted and mirrored views against one that is written out patch by patch."""

import pytest
import torch
from torch import Tensor

from vitreg_hf.training.seeding import seeded
from vitreg_hf.training.view_average import View, draw_views, farthest_shift, moved_back, seen_in, view_average

PATCH = (2, 3)
VIEWS = [View(0, 0), View(1, 0), View(-1, 2), View(0, -1, True), View(2, 1, True), View(0, 0, True)]


def images_of(rows: int = 4, columns: int = 5) -> Tensor:
    return torch.randn(2, 3, rows * PATCH[0], columns * PATCH[1], generator=torch.Generator().manual_seed(0))


def pixels_of(images: Tensor) -> Tensor:
    """A network whose features of a patch are its pixels: what it sees moves exactly with the image."""
    rows, columns = images.shape[-2] // PATCH[0], images.shape[-1] // PATCH[1]
    patches = images.unflatten(3, (columns, PATCH[1])).unflatten(2, (rows, PATCH[0]))
    return patches.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def mean_pixel_of(images: Tensor) -> Tensor:
    """The same for what a mirror does not change inside a patch."""
    return torch.nn.functional.avg_pool2d(images, PATCH)


def place_and_whole(images: Tensor) -> Tensor:
    """A network that tells where a patch is and what else is there, as transformers do: no view is like another."""
    means = mean_pixel_of(images)
    place = torch.arange(means[0, 0].numel()).view(1, 1, *means.shape[-2:])
    return means * (1 + place) + means.square().mean(dim=(2, 3), keepdim=True)


def literal_average(features_of, images: Tensor, views: list[View]) -> Tensor:
    """Every patch of every view, one at a time."""
    rows, columns = images.shape[-2] // PATCH[0], images.shape[-1] // PATCH[1]
    seen: dict[tuple[int, int], list[Tensor]] = {}
    for view in views:
        shown = torch.empty_like(images)
        for y in range(images.shape[-2]):
            for x in range(images.shape[-1]):
                from_y = min(max(y - view.rows * PATCH[0], 0), images.shape[-2] - 1)
                from_x = min(max(x - view.columns * PATCH[1], 0), images.shape[-1] - 1)
                to_x = images.shape[-1] - 1 - x if view.mirrored else x
                shown[..., y, to_x] = images[..., from_y, from_x]
        features = features_of(shown)
        for row in range(rows):
            for column in range(columns):
                at = columns - 1 - column if view.mirrored else column
                place = (row - view.rows, column - view.columns)
                seen.setdefault(place, []).append(features[..., row, at])
    means = [torch.stack(seen[row, column]).mean(dim=0) for row in range(rows) for column in range(columns)]
    return torch.stack(means, dim=-1).unflatten(-1, (rows, columns))


@pytest.mark.parametrize("features_of", [mean_pixel_of, place_and_whole])
def test_it_is_the_mean_over_the_views_that_have_seen_a_patch(features_of):
    images = images_of()
    expected = literal_average(features_of, images, VIEWS)
    torch.testing.assert_close(view_average(features_of, images, VIEWS, PATCH), expected)


def test_views_that_do_not_move_change_nothing():
    images = images_of()
    average = view_average(place_and_whole, images, [View(0, 0)] * 3, PATCH)
    torch.testing.assert_close(average, place_and_whole(images))


@pytest.mark.parametrize("view", [View(1, 0), View(-2, 1), View(0, -3), View(3, 4)])
def test_features_that_move_with_the_image_come_back_exactly(view):
    images = images_of()
    average = view_average(pixels_of, images, [View(0, 0), view], PATCH)
    torch.testing.assert_close(average, pixels_of(images), rtol=0, atol=0)
    once = moved_back(view, pixels_of(seen_in(view, images, PATCH)))
    there = moved_back(view, torch.ones(1, 1, 4, 5)).bool()
    torch.testing.assert_close(once[:, :, there[0, 0]], pixels_of(images)[:, :, there[0, 0]], rtol=0, atol=0)
    assert there.sum() == (4 - abs(view.rows)) * (5 - abs(view.columns))
    assert not once[:, :, ~there[0, 0]].any()


def test_a_mirrored_view_comes_back_to_its_place():
    images = images_of()
    average = view_average(mean_pixel_of, images, [View(1, -1, True), View(0, 0)], PATCH)
    torch.testing.assert_close(average, mean_pixel_of(images))


def test_what_leaves_the_image_is_replaced_by_its_edge():
    images = images_of()
    shown = seen_in(View(1, 0), images, PATCH)
    torch.testing.assert_close(shown[..., PATCH[0] :, :], images[..., : -PATCH[0], :], rtol=0, atol=0)
    torch.testing.assert_close(shown[..., : PATCH[0], :], images[..., :1, :].expand(-1, -1, PATCH[0], -1))


def test_noise_of_places_is_averaged_away():
    """What a network adds at one place of the grid, as an artifact, is spread over the views."""
    artifact = torch.zeros(1, 1, 4, 5)
    artifact[..., 1, 1] = 100.0
    views = [View(rows, columns) for rows in (-1, 0, 1) for columns in (-1, 0, 1)]
    average = view_average(lambda images: mean_pixel_of(images)[:, :1] + artifact, images_of(), views, PATCH)
    error = (average - mean_pixel_of(images_of())[:, :1]).abs()
    assert error.max() <= 100 / 4 + 1e-4  # a corner is seen by four views alone
    assert error[..., 1, 1].max() <= 100 / 9 + 1e-4


def test_views_follow_from_the_generator_and_stay_in_reach():
    with seeded(3):
        views = draw_views(200, (1, 2), mirror=True)
    with seeded(3):
        assert draw_views(200, (1, 2), mirror=True) == views
    assert views[0] == View(0, 0, False)
    assert {view.rows for view in views} == {-1, 0, 1}
    assert {view.columns for view in views} == {-2, -1, 0, 1, 2}
    assert {view.mirrored for view in views} == {True, False}
    assert not any(view.mirrored for view in draw_views(20, (1, 1), mirror=False))
    assert set(draw_views(5, (0, 0), mirror=False)) == {View(0, 0)}


@pytest.mark.parametrize(
    ("share", "grid", "expected"),
    [(0.15, (4, 4), (1, 1)), (0.15, (37, 14), (5, 2)), (0.0, (37, 14), (0, 0)), (0.5, (3, 1), (1, 0))],
)
def test_the_farthest_shift_is_whole_patches(share, grid, expected):
    assert farthest_shift(share, grid) == expected


def test_what_cannot_be_averaged_is_refused():
    with pytest.raises(ValueError, match="one view or more, got 0"):
        draw_views(0, (1, 1), mirror=False)
    with pytest.raises(ValueError, match=r"patches of \(2, 3\) pixels divide, got 7 x 15"):
        view_average(mean_pixel_of, torch.zeros(1, 3, 7, 15), VIEWS, PATCH)
    with pytest.raises(ValueError, match="together see every patch"):
        view_average(mean_pixel_of, images_of(), [View(1, 0)], PATCH)
