# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Intervals over trainings that differ in nothing but their seed, and over what another setting changes.

Seeds are few, so these are intervals of Student's t, not of resampling. Shapes: k settings, n seeds.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from vitreg_hf.analysis.intervals import CONFIDENCE, Interval


def mean_over_seeds(values: NDArray[np.float64], confidence: float = CONFIDENCE) -> Interval:
    """Mean of one number per seed, `(n,)`, with the interval of Student's t; no interval for a single seed."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return Interval(mean, None, None, n)
    half = float(t.ppf((1 + confidence) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def differences_to_first(values: NDArray[np.float64], confidence: float = CONFIDENCE) -> list[Interval]:
    """What every setting but the first changes, `row - first row`, where all settings had the same seeds.

    Setting and seed are taken to add up (randomised blocks), so what is left after both, pooled over all settings, is
    the noise: a few seeds of several settings tell more than each setting alone. Intervals are widened for as many
    comparisons as there are (Bonferroni), so that all of them hold together.

    Args:
        values: one number per setting and seed, `(k, n)`.
        confidence: with which all intervals hold.

    Returns:
        `k - 1` intervals; without ends for a single seed.

    Raises:
        ValueError: if there are fewer than two settings, or no seed.
    """
    if values.ndim != 2 or len(values) < 2 or values.shape[1] < 1:
        raise ValueError(f"Expected numbers of 2 settings or more and 1 seed or more, got shape {values.shape}")
    k, n = values.shape
    changes = values[1:].mean(axis=1) - values[0].mean()
    if n < 2:
        return [Interval(float(change), None, None, n) for change in changes]
    left = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0, keepdims=True) + values.mean()
    degrees = (k - 1) * (n - 1)
    noise = math.sqrt(float(np.square(left).sum()) / degrees)
    half = float(t.ppf(1 - (1 - confidence) / (2 * (k - 1)), degrees)) * noise * math.sqrt(2 / n)
    return [Interval(float(change), float(change) - half, float(change) + half, n) for change in changes]
