"""Intervals hold the true mean about as often as they say."""

import math

import numpy as np
import pytest

from vitreg_hf.analysis import intervals
from vitreg_hf.analysis.intervals import Interval, difference_interval, mean_interval


def test_about_95_of_100_intervals_hold_the_true_mean(monkeypatch):
    monkeypatch.setattr(intervals, "_RESAMPLES", 400)
    generator, repetitions = np.random.default_rng(0), 400
    held = 0
    for seed in range(repetitions):
        found = mean_interval(generator.exponential(2.0, 60), seed)
        held += found.low <= 2.0 <= found.high
    assert 0.90 <= held / repetitions <= 0.985  # skewed data: a little below 0.95 is expected


def test_the_interval_is_as_wide_as_theory_says():
    values = np.random.default_rng(0).normal(3, 2, 1_000)
    found = mean_interval(values)
    error = 1.96 * values.std() / 1_000**0.5
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + error, abs=0.1 * error)
    assert found == mean_interval(values)  # repeatable


@pytest.mark.parametrize(("confidence", "resamples"), [(0.95, 2_000), (0.99, 2_000), (1 - 0.05 / 25, 10_000)])
def test_ends_of_wide_intervals_are_no_single_resamples(monkeypatch, confidence, resamples):
    asked, real = [], intervals.bootstrap
    monkeypatch.setattr(intervals, "bootstrap", lambda *a, **o: asked.append(o["n_resamples"]) or real(*a, **o))
    mean_interval(np.arange(30.0), confidence=confidence)
    assert asked == [resamples]


def test_equal_values_have_no_width():
    assert mean_interval(np.full(10, 0.1)) == Interval(pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1), 10)


@pytest.mark.parametrize("values", [[], [math.nan, math.nan]])
def test_no_value_no_mean(values):
    found = mean_interval(np.array(values))
    assert math.isnan(found.mean)
    assert (found.low, found.high, found.n, found.excludes_zero) == (None, None, 0, False)


def test_one_value_has_no_interval():
    found = mean_interval(np.array([5.0]))
    assert found == Interval(5.0, None, None, 1)
    assert not found.excludes_zero


def test_images_without_the_quantity_are_left_out():
    values = np.array([1.0, 2.0, 4.0])
    assert mean_interval(np.array([1.0, math.nan, 2.0, 4.0, math.nan])) == mean_interval(values)
    assert mean_interval(values).n == 3


# Pairs


def images(seed=0, count=40):
    return np.random.default_rng(seed).normal(0, 10, count)  # images differ far more than models


def test_a_planted_difference_excludes_zero():
    first, noise = images(), 0.1 * images(1)
    found = difference_interval(first, first + 1 + noise)
    assert found.excludes_zero
    assert found.low < 1 < found.high
    assert difference_interval(first + 1 + noise, first).high < 0


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_no_difference_does_not(seed):
    noise = 0.1 * images(seed)
    found = difference_interval(images(), images() + noise - noise.mean())
    assert not found.excludes_zero
    assert found.low < 0 < found.high


def test_a_pair_with_one_number_missing_is_left_out():
    first, second = np.array([1.0, math.nan, 3.0, 4.0]), np.array([2.0, 5.0, math.nan, 6.0])
    found = difference_interval(first, second)
    assert (found.mean, found.n) == (1.5, 2)


def test_other_numbers_of_images_are_refused():
    with pytest.raises(ValueError, match="same images for both models, got 3 and 4"):
        difference_interval(np.zeros(3), np.zeros(4))


@pytest.mark.parametrize(
    ("low", "high", "excludes"), [(0.1, 1.0, True), (-2.0, -1.0, True), (0.0, 1.0, False), (-1.0, 1.0, False)]
)
def test_excluding_zero(low, high, excludes):
    assert Interval(0.5, low, high, 9).excludes_zero is excludes
