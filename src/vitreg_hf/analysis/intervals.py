# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Means with bootstrap intervals over images: patches of one image are no independent samples, images are."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

CONFIDENCE = 0.95
_RESAMPLES = 2_000
_BEYOND_EACH_END = 10  # resamples at least; the ends of wide intervals would be those of one or two else


@dataclass(frozen=True)
class Interval:
    """A mean over images with a percentile bootstrap interval, of 95 % where not said otherwise.

    Attributes:
        mean: NaN if no image has the quantity.
        low, high: ends of the interval; None with fewer than two images.
        n: images that have the quantity.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval is known and holds only numbers of one sign."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean_interval(values: NDArray[np.float64], seed: int = 0, confidence: float = CONFIDENCE) -> Interval:
    """Mean of one number per image, `(images,)`; NaN where an image does not have the quantity."""
    present = np.asarray(values, dtype=np.float64)
    present = present[~np.isnan(present)]
    if present.size < 2:
        return Interval(float(present.mean()) if present.size else float("nan"), None, None, present.size)
    mean = float(present.mean())
    if np.ptp(present) == 0:  # nothing to resample
        return Interval(mean, mean, mean, present.size)
    resampled = bootstrap(
        (present,),
        np.mean,
        n_resamples=max(_RESAMPLES, round(2 * _BEYOND_EACH_END / (1 - confidence))),
        batch=max(1, 10_000_000 // present.size),  # bounds memory
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = resampled.confidence_interval
    return Interval(mean, float(low), float(high), present.size)


def difference_interval(
    first: NDArray[np.float64], second: NDArray[np.float64], confidence: float = CONFIDENCE
) -> Interval:
    """Mean difference `second - first` over the same images in the same order, `(images,)`.

    Raises:
        ValueError: if the numbers of images differ.
    """
    if len(first) != len(second):
        raise ValueError(f"Expected the same images for both models, got {len(first)} and {len(second)}")
    return mean_interval(
        np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64), confidence=confidence
    )
