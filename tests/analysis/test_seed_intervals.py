# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
from scipy import stats

from vitreg_hf.analysis.seed_intervals import differences_to_first, mean_over_seeds


def test_the_mean_has_the_interval_of_student():
    values = np.array([1.0, 2.0, 4.0])
    interval = mean_over_seeds(values)
    low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx((low, high))


def test_one_seed_has_no_interval():
    assert mean_over_seeds(np.array([3.0])).low is None
    assert differences_to_first(np.array([[1.0], [3.0]]))[0].low is None


def test_two_settings_are_compared_as_by_the_paired_t_test():
    values = np.array([[1.0, 5.0, 2.0, 3.0], [2.0, 5.5, 4.0, 3.5]])
    difference = differences_to_first(values)[0]
    paired = stats.ttest_rel(values[1], values[0]).confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx((paired.low, paired.high))


def test_what_seeds_have_in_common_is_no_noise():
    seeds = np.array([0.0, 100.0, -50.0])
    noise = np.array([[0.1, -0.1, 0.0], [0.0, 0.1, -0.1], [-0.1, 0.0, 0.1]])
    changes = differences_to_first(seeds + noise + np.array([[0.0], [1.0], [0.0]]))
    assert changes[0].excludes_zero
    assert not changes[1].excludes_zero


def test_all_intervals_hold_together():
    """Of 400 comparisons of six settings that do not differ, about 5 % find any difference at all."""
    draw = np.random.default_rng(0)
    found = [any(one.excludes_zero for one in differences_to_first(draw.normal(size=(6, 3)))) for _ in range(400)]
    assert np.mean(found) < 0.08


def test_equal_numbers_differ_by_nothing():
    change = differences_to_first(np.array([[0.0, 0.0], [0.0, 0.0]]))[0]
    assert (change.mean, change.low, change.high) == (0, 0, 0)


def test_too_few_numbers_are_refused():
    with pytest.raises(ValueError, match="2 settings or more"):
        differences_to_first(np.zeros((1, 3)))
