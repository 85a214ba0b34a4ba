# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""LOST against a literal reference, by hand, and on planted objects; CorLoc by hand."""

import dataclasses

import numpy as np
import pytest
import torch

from vitreg_hf.analysis.object_discovery import (
    PAPER_DEFAULT,
    LostSettings,
    correct_localization,
    discover,
    intersection_over_union,
    sweep_settings,
)

PLAIN = {"normalize": False, "bias": 0.0, "num_expansion": 100}


def reference(features, patch_size, image_size, normalize, bias, num_expansion):
    """LOST word for word (arXiv 2109.14279, section 3), one patch after the other: box, seed, component, degrees."""
    rows, columns, _ = features.shape
    patches = [(row, column) for row in range(rows) for column in range(columns)]
    vectors = {patch: [float(x) for x in features[patch]] for patch in patches}
    if normalize:
        for patch, vector in vectors.items():
            length = sum(x * x for x in vector) ** 0.5
            vectors[patch] = [x / length for x in vector]

    def alike(p, q):
        return sum(x * y for x, y in zip(vectors[p], vectors[q])) + bias

    degree = {p: sum(alike(p, q) > 0 for q in patches if q != p) for p in patches}
    ordered = sorted(patches, key=lambda p: degree[p])  # Python's sort keeps the order of equals
    seed = ordered[0]
    similar = [p for p in ordered[:num_expansion] if alike(seed, p) > 0]
    inside = {p for p in patches if sum(alike(s, p) for s in similar) > 0}
    component, frontier = {seed}, [seed]
    while frontier:
        row, column = frontier.pop()
        for near in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if near in inside and near not in component:
                component.add(near)
                frontier.append(near)
    if seed not in inside:
        component = {seed}
    in_rows, in_columns = [row for row, _ in component], [column for _, column in component]
    box = (
        min(in_columns) * patch_size,
        min(in_rows) * patch_size,
        min((max(in_columns) + 1) * patch_size, image_size[1]),
        min((max(in_rows) + 1) * patch_size, image_size[0]),
    )
    return box, seed, component, degree


def planted(rows, columns, top, left, height, width):
    """One direction for an object, the opposite one for its background, both with a little noise of their own."""
    features = -torch.tensor([1.0, 0.0, 0.0]) + 0.1 * torch.randn(rows, columns, 3)
    features[top : top + height, left : left + width] *= -1
    return features


# Whole numbers are exact in every order of summation, so that similarities of exactly 0 agree as well.
@pytest.mark.parametrize(("whole", "normalize"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("bias", [0.0, -0.5, 0.5])
@pytest.mark.parametrize("num_expansion", [1, 4, 100])
def test_agrees_with_the_literal_reference(whole, normalize, bias, num_expansion):
    for rows, columns, dims in [(5, 5, 2), (4, 7, 3), (7, 3, 4), (1, 6, 2), (1, 1, 3)]:
        features = torch.randn(rows, columns, dims, dtype=torch.float64)
        if whole:
            features = features.mul(1.5).round()
        image_size = (rows * 8 - 3, columns * 8 - 5)
        arguments = {"normalize": normalize, "bias": bias, "num_expansion": num_expansion}
        found = discover(features, 8, image_size, **arguments)
        box, seed, component, degree = reference(features, 8, image_size, **arguments)
        assert (found.box, found.seed) == (box, seed)
        assert {(int(row), int(column)) for row, column in np.argwhere(found.mask)} == component
        assert found.degree.tolist() == [[degree[row, column] for column in range(columns)] for row in range(rows)]


@pytest.mark.parametrize(
    ("rows", "columns", "top", "left", "height", "width"),
    [(14, 14, 5, 6, 4, 3), (9, 20, 0, 0, 3, 5), (20, 9, 16, 6, 4, 3), (12, 16, 0, 10, 12, 3), (10, 10, 4, 4, 1, 1)],
    ids=["inside", "corner", "opposite corner", "touching two sides", "one patch"],
)
@pytest.mark.parametrize("normalize", [False, True])
def test_a_planted_object_is_found(rows, columns, top, left, height, width, normalize):
    features = planted(rows, columns, top, left, height, width)
    found = discover(features, 14, (rows * 14, columns * 14), normalize=normalize, bias=0.0, num_expansion=100)
    truth = (left * 14, top * 14, (left + width) * 14, (top + height) * 14)
    assert intersection_over_union(found.box, truth) >= 0.5
    assert found.box == truth  # the noise is small: nothing is lost
    assert found.mask.sum() == height * width
    assert found.mask[found.seed]


def test_of_two_objects_only_the_component_of_the_seed_is_kept():
    features = planted(8, 12, 1, 1, 3, 3)
    features[4:6, 4:6] = features[1, 1]  # alike, and it touches the first at a corner alone
    found = discover(features, 16, (128, 192), **PLAIN)
    assert found.box == (16, 16, 64, 64)
    assert found.mask.sum() == 9
    assert not found.mask[4, 4]


def test_where_nothing_stands_out_the_box_is_the_whole_image():
    found = discover(torch.ones(6, 9, 4), 16, (96, 144), **PLAIN)
    assert found.box == (0, 0, 144, 96)
    assert found.seed == (0, 0)  # all degrees are equal
    assert found.mask.all()
    assert (found.degree == 53).all()


def test_an_object_that_reaches_into_the_padding_ends_with_the_image():
    features = planted(5, 7, 3, 4, 2, 3)
    assert discover(features, 16, (80, 112), **PLAIN).box == (64, 48, 112, 80)
    assert discover(features, 16, (65, 109), **PLAIN).box == (64, 48, 109, 65)
    assert discover(features, (16, 10), (65, 69), **PLAIN).box == (40, 48, 69, 65)


def on_2_x_3():
    """Row-major `a b c / d d d`: a.b = 6, a.d = -1.8, b.d = -1.2, both cosines with d -0.6, c orthogonal to all."""
    a, b, c, d = [3.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 1.0], [-0.6, 0.8, 0.0]
    return torch.tensor([[a, b, c], [d, d, d]], dtype=torch.float64)


def test_by_hand_without_bias():
    # Positive: a with b, the three d with one another, c with none but itself, so the seed c stays alone.
    found = discover(on_2_x_3(), 10, (20, 30), **PLAIN)
    assert found.degree.tolist() == [[1, 1, 0], [2, 2, 2]]
    assert found.inverse_degree.tolist() == [[1 / 2, 1 / 2, 1], [1 / 3, 1 / 3, 1 / 3]]
    assert found.seed == (0, 2)
    assert found.mask.tolist() == [[False, False, True], [False, False, False]]
    assert found.box == (20, 0, 30, 10)


def test_by_hand_with_a_bias():
    # Plus 0.5: c is positive with all, d with a and b is not. Degrees: a 2, b 2, c 5, d 3 each. The seed is a, the
    # candidates are a and b, and what they sum to: a 9.5 + 6.5, b 6.5 + 4.5, c 0.5 + 0.5, d -1.3 - 0.7.
    found = discover(on_2_x_3(), 10, (20, 30), normalize=False, bias=0.5, num_expansion=2)
    assert found.degree.tolist() == [[2, 2, 5], [3, 3, 3]]
    assert found.seed == (0, 0)
    assert found.mask.tolist() == [[True, True, True], [False, False, False]]
    assert found.box == (0, 0, 30, 10)


def test_by_hand_with_more_candidates():
    # Plus 1.25: a.d = -0.55, b.d = 0.05. Degrees: a 2, b 5, c 5, d 4 each. The seed is a. Alone it gives d -0.55; with
    # all candidates b and c join it (d does not): d -0.55 + 0.05 + 1.25.
    few = discover(on_2_x_3(), 10, (20, 30), normalize=False, bias=1.25, num_expansion=1)
    many = discover(on_2_x_3(), 10, (20, 30), normalize=False, bias=1.25, num_expansion=100)
    assert few.degree.tolist() == many.degree.tolist() == [[2, 5, 5], [4, 4, 4]]
    assert few.box == (0, 0, 30, 10)
    assert many.box == (0, 0, 30, 20)


def test_by_hand_with_normalised_features():
    # Plus 0.7: d with a and b is -1.1 and -0.5 by dot products, but 0.1 by cosines. Then all are positive.
    raw = discover(on_2_x_3(), 10, (20, 30), normalize=False, bias=0.7, num_expansion=100)
    cosines = discover(on_2_x_3(), 10, (20, 30), normalize=True, bias=0.7, num_expansion=100)
    assert raw.degree.tolist() == [[2, 2, 5], [3, 3, 3]]
    assert cosines.degree.tolist() == [[5, 5, 5], [5, 5, 5]]
    assert cosines.box == (0, 0, 30, 20)
    assert raw.box == (0, 0, 30, 10)


def test_a_seed_outside_the_mask_is_the_object_alone():
    # Minus 100 leaves no similarity positive: every degree is 0, the seed is the first patch and has no company.
    found = discover(on_2_x_3(), 10, (20, 30), normalize=False, bias=-100.0, num_expansion=100)
    assert (found.degree == 0).all()
    assert found.seed == (0, 0)
    assert found.mask.tolist() == [[True, False, False], [False, False, False]]
    assert found.box == (0, 0, 10, 10)
    zeros = discover(torch.zeros(2, 2, 3), 10, (20, 20), **PLAIN)
    assert zeros.box == (0, 0, 10, 10)


def test_the_lowest_degree_wins_over_the_order_of_patches():
    features = torch.ones(3, 4, 2)
    features[2, 1] = torch.tensor([1.0, -3.0])
    assert discover(features, 8, (24, 32), **PLAIN).seed == (2, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype):
    features = (200 * planted(10, 10, 3, 3, 4, 4)).to(dtype)  # the sum of similarities is beyond float16
    found = discover(features.requires_grad_(), 16, (160, 160), **PLAIN)
    assert found.box == (48, 48, 112, 112)


def test_the_features_are_left_as_they_were():
    features = planted(6, 6, 2, 2, 2, 2)
    before = features.clone()
    discover(features, 16, (96, 96), normalize=True, bias=-0.2, num_expansion=10)
    assert torch.equal(features, before)


@pytest.mark.parametrize(
    ("features", "image_size", "message"),
    [
        (torch.ones(4, 3), (32, 32), r"shape \(rows, columns, d\), got torch.float32 of shape \(4, 3\)"),
        (torch.ones(2, 2, 3, dtype=torch.long), (32, 32), "floating-point features .* got torch.int64"),
        (torch.ones(2, 2, 0), (32, 32), r"got torch.float32 of shape \(2, 2, 0\)"),
        (torch.ones(2, 3, 4), (33, 48), "3 x 3 patches of 16 x 16 pixels for an image of 33 x 48, got 2 x 3"),
        (torch.ones(3, 2, 4), (32, 48), "2 x 3 patches .* got 3 x 2"),
        (torch.ones(1, 1, 4), (0, 16), "positive sizes"),
        (torch.full((2, 2, 3), torch.nan), (32, 32), "finite features"),
        (torch.full((2, 2, 3), torch.inf), (32, 32), "finite features"),
    ],
)
def test_features_that_do_not_fit_are_refused(features, image_size, message):
    with pytest.raises(ValueError, match=message):
        discover(features, 16, image_size, **PLAIN)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bias": float("nan")}, "finite bias, got nan"),
        ({"normalize": True, "bias": -1.5}, "within -1..1 for normalised features, got -1.5"),
        ({"num_expansion": 0}, "num_expansion of 1 or more, got 0"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        LostSettings("key", **wrong)
    with pytest.raises(ValueError, match=message):
        discover(torch.ones(2, 2, 3), 16, (32, 32), **{**PLAIN, **wrong})


def test_settings():
    assert dataclasses.astuple(PAPER_DEFAULT) == ("key", -1, False, 0.0, 100)
    with pytest.raises(ValueError, match="one of key, query, value, got 'keys'"):
        LostSettings("keys")
    assert LostSettings("value", bias=-30.0).bias == -30.0  # dot products have no scale of their own


def test_the_sweep_holds_every_combination_once():
    grid = sweep_settings()
    assert len(grid) == len(set(grid)) == 4 * 3 * (1 + 10)
    assert PAPER_DEFAULT in grid
    assert {setting.layer for setting in grid} == {-1, -2, -3, -4}
    assert {setting.feature for setting in grid} == {"key", "query", "value"}
    assert {setting.bias for setting in grid if not setting.normalize} == {0.0}
    cosines = {setting.bias for setting in grid if setting.normalize}
    assert min(cosines) == -0.9
    assert max(cosines) == 0.0
    small = sweep_settings(layers=(5,), features=("value",), biases_raw=(0.0, -2.0), biases_normalized=())
    assert small == [LostSettings("value", 5), LostSettings("value", 5, bias=-2.0)]


def test_an_empty_or_impossible_sweep_is_refused():
    with pytest.raises(ValueError, match="got 0 layers, 3 features and 11 biases"):
        sweep_settings(layers=())
    with pytest.raises(ValueError, match="got 4 layers, 3 features and 0 biases"):
        sweep_settings(biases_raw=(), biases_normalized=())
    with pytest.raises(ValueError, match=r"within -1\.\.1"):
        sweep_settings(biases_normalized=(-2.0,))


@pytest.mark.parametrize(
    ("a", "b", "overlap"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
        ((0, 0, 10, 10), (0, 0, 10, 5), 0.5),
        ((0, 0, 10, 10), (5, 5, 15, 15), 25 / 175),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0.0),  # half-open boxes that touch share no pixel
        ((0, 0, 10, 10), (20, 20, 30, 30), 0.0),  # both differences are negative: their product must not count
        ((2, 3, 2, 3), (2, 3, 2, 3), 0.0),
    ],
)
def test_intersection_over_union(a, b, overlap):
    assert intersection_over_union(a, b) == intersection_over_union(b, a) == pytest.approx(overlap)


def test_an_inverted_box_is_refused():
    with pytest.raises(ValueError, match=r"minima up to its maxima, got \(5, 0, 4, 9\)"):
        intersection_over_union((0, 0, 1, 1), (5, 0, 4, 9))


def test_correct_localization_by_hand():
    boxes = [(0, 0, 10, 10)] * 4
    ground_truth = [
        [(50, 50, 60, 60), (0, 0, 10, 5)],  # the second is half of the box: exactly 0.5 counts
        [(0, 0, 10, 4)],  # 0.4
        [(0, 0, 5, 10), (5, 0, 9, 10)],  # 0.5 and 0.4
        [(20, 20, 30, 30)],
    ]
    found = correct_localization(boxes, ground_truth)
    assert found.dtype == bool
    assert found.tolist() == [True, False, True, False]
    assert found.mean() == 0.5
    assert correct_localization(boxes, ground_truth, threshold=0.4).tolist() == [True, True, True, False]
    assert correct_localization(boxes, ground_truth, threshold=0.6).tolist() == [False] * 4


def test_what_cannot_be_localized_is_refused():
    box = (0, 0, 1, 1)
    with pytest.raises(ValueError, match="for each image, got 2 and 1"):
        correct_localization([box, box], [[box]])
    with pytest.raises(ValueError, match="for each image, got 0 and 0"):
        correct_localization([], [])
    with pytest.raises(ValueError, match=r"got none in 2 of 3 \(the first is image 1\)"):
        correct_localization([box] * 3, [[box], [], []])
    for threshold in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="above 0 and up to 1"):
            correct_localization([box], [[box]], threshold=threshold)
