"""Norms, cutoffs and the test of two groups: planted groups are found, and none where there are none."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitreg_hf.analysis.token_norms import (
    CUTOFF_RULES,
    bimodality,
    cutoff,
    neighbour_similarity,
    outlier_mask,
    patch_norms,
)
from vitreg_hf.model.token_layout import TokenLayout

NORMS = np.array([1, 2, 3, 4, 10], np.float32)


def lognormal(count, middle=20.0, sigma=0.3, seed=0):
    generator = np.random.default_rng(seed)
    return (middle * np.exp(sigma * generator.standard_normal(count))).astype(np.float32)


def two_groups(times, share=0.02, count=10_000, sigma=0.1):
    upper = int(share * count)
    return np.concatenate([lognormal(count - upper, sigma=sigma), lognormal(upper, 20.0 * times, sigma, seed=1)])


# Norms


def test_norms_are_of_patches_alone():
    hidden = torch.zeros(1, 4, 2)
    hidden[0, 0] = 100  # CLS
    hidden[0, 1] = 100  # register
    hidden[0, 2], hidden[0, 3] = torch.tensor([3.0, 4.0]), torch.tensor([0.0, -2.0])
    assert patch_norms(hidden, TokenLayout(1, 1, 0, (8, 8))).tolist() == [[5, 2]]


def test_half_precision_norms_do_not_overflow():
    hidden = torch.full((1, 2, 4), 60_000.0, dtype=torch.float16)
    assert torch.isfinite(patch_norms(hidden, TokenLayout(1, 0, 0, (8, 8)))).all()


def test_only_norms_above_the_threshold_are_outliers():
    assert outlier_mask(torch.tensor([[1.0, 2.0], [2.5, 0.0]]), 2.0).tolist() == [[False, False], [True, False]]


# Cutoffs


@pytest.mark.parametrize(
    ("rule", "value", "expected"),
    [
        ("median", None, 6.0),  # twice 3
        ("median", 3.0, 9.0),
        ("sigma", None, 4 + 3 * 10**0.5),  # variance (9 + 4 + 1 + 0 + 36) / 5
        ("sigma", 1.0, 4 + 10**0.5),
        ("percentile", 50.0, 3.0),
        ("percentile", None, 4 + 0.92 * 6),  # 98 % of the way through 4 gaps is 3.92
        ("fixed", 7.5, 7.5),
    ],
)
def test_cutoffs_by_hand(rule, value, expected):
    assert cutoff(NORMS, rule, value) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("times", [3, 10, 40])
def test_the_mixture_cutoff_lies_between_the_groups(times):
    norms = two_groups(times)
    assert norms[:-200].max() < cutoff(norms, "mixture") < norms[-200:].min()


@pytest.mark.parametrize("seed", range(4))
def test_the_mixture_marks_next_to_nothing_in_one_group(seed):
    norms = lognormal(4_000, seed=seed)
    assert (norms > cutoff(norms, "mixture")).mean() < 0.05


@pytest.mark.parametrize(
    ("norms", "rule", "value", "message"),
    [
        (NORMS, "mean", None, "cutoff rule of median, sigma, percentile, mixture, fixed, got 'mean'"),
        (NORMS[:0], "median", None, "at least one norm"),
        (NORMS, "mixture", 2.0, "no number for the cutoff rule 'mixture', got 2.0"),
        (NORMS, "fixed", None, "above 0 for the cutoff rule 'fixed', got None"),
        (NORMS, "median", 0.0, "above 0 for the cutoff rule 'median', got 0.0"),
        (NORMS, "sigma", -1.0, "above 0 for the cutoff rule 'sigma', got -1.0"),
        (NORMS, "percentile", 100.0, "below 100 for the cutoff rule 'percentile', got 100.0"),
    ],
)
def test_wrong_cutoffs_are_refused(norms, rule, value, message):
    with pytest.raises(ValueError, match=message):
        cutoff(norms, rule, value)


@pytest.mark.parametrize("rule", [rule for rule in CUTOFF_RULES if rule != "fixed"])
def test_equal_norms_have_a_cutoff(rule):
    norms = np.full(100, 5.0, np.float32)
    assert not (norms > cutoff(norms, rule)).any()


# Two groups


def test_planted_groups_are_found():
    found = bimodality(two_groups(10))
    assert found.two_groups
    assert found.low_mode == pytest.approx(20, rel=0.05)
    assert found.high_mode == pytest.approx(200, rel=0.05)
    assert found.high_share == pytest.approx(0.02, abs=0.001)
    assert found.n == 10_000


def test_a_group_of_2_percent_needs_many_patches():
    """The dip of a small group is small: what a dozen images hold is not enough for it."""
    found = bimodality(two_groups(10, count=2_400))
    assert (found.low_mode, found.high_mode) == (pytest.approx(20, rel=0.05), pytest.approx(200, rel=0.05))
    assert found.bic_gain > 0
    assert not found.two_groups


@pytest.mark.parametrize("seed", range(5))
def test_one_group_is_not_two(seed):
    assert not bimodality(lognormal(4_000, seed=seed)).two_groups


def test_groups_close_to_one_another_are_not_artifacts():
    found = bimodality(two_groups(1.5, share=0.3, sigma=0.05))
    assert found.p_value < 0.01  # there are two groups
    assert found.bic_gain > 0
    assert found.high_mode / found.low_mode == pytest.approx(1.5, rel=0.05)
    assert not found.two_groups


def test_equal_norms_are_one_group():
    found = bimodality(np.full(100, 5.0, np.float32))
    assert not found.two_groups
    assert (found.low_mode, found.high_mode, found.high_share) == (pytest.approx(5), pytest.approx(5), 0)


def test_norms_of_zero_do_not_break_the_test():
    assert np.isfinite(bimodality(np.concatenate([np.zeros(5, np.float32), lognormal(100)])).bic_gain)


def test_many_norms_are_drawn_at_random():
    """Norms come row by row of patch grids: a stride of 16 would test one column of a 16 x 16 grid."""
    norms = lognormal(16 * 50_000).reshape(-1, 16)
    norms[:, 5] *= 10  # one column of outliers
    groups = bimodality(norms.ravel())
    assert groups.n == 50_000
    assert groups.two_groups
    assert groups.high_share == pytest.approx(1 / 16, rel=0.1)


def test_too_few_norms_are_refused():
    with pytest.raises(ValueError, match="at least 8 norms for a test of two groups, got 7"):
        bimodality(NORMS.repeat(2)[:7])


# Neighbours


def slow_similarity(patches):
    images, rows, columns, _ = patches.shape
    similarity = torch.zeros(images, rows, columns)
    for image in range(images):
        for row in range(rows):
            for column in range(columns):
                steps = ((-1, 0), (1, 0), (0, -1), (0, 1))
                around = [(row + down, column + right) for down, right in steps]
                inside = [(r, c) for r, c in around if 0 <= r < rows and 0 <= c < columns]
                each = [F.cosine_similarity(patches[image, row, column], patches[image, r, c], 0) for r, c in inside]
                similarity[image, row, column] = torch.stack(each).mean()
    return similarity


@pytest.mark.parametrize("grid", [(3, 4), (1, 5), (2, 1), (2, 2)])
def test_similarity_equals_a_loop_over_neighbours(grid):
    patches = torch.randn(2, *grid, 6)
    torch.testing.assert_close(neighbour_similarity(patches), slow_similarity(patches))


def test_equal_patches_have_similarity_one_and_opposite_ones_minus_one():
    patches = torch.randn(6).expand(1, 3, 3, 6)
    torch.testing.assert_close(neighbour_similarity(patches), torch.ones(1, 3, 3))
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])[None, :, :, None] * torch.randn(6)
    torch.testing.assert_close(neighbour_similarity(board), -torch.ones(1, 2, 2))


def test_a_single_patch_has_no_neighbour():
    with pytest.raises(ValueError, match="grid of at least 2 patches, got 1 x 1"):
        neighbour_similarity(torch.randn(1, 1, 1, 4))
