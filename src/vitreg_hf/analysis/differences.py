# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Paired differences between models: each image is measured with all of them, and each later one against the first."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vitreg_hf.analysis.extract import Subject
from vitreg_hf.analysis.intervals import CONFIDENCE, difference_interval, mean_interval
from vitreg_hf.analysis.outliers import Outliers, per_image
from vitreg_hf.analysis.records import Records

# Quantity of `outliers.per_image` -> how it is called, its unit, and the factor that brings it to that unit. Norms
# themselves are left out: those of different models do not compare.
COMPARED = {
    "outlier_share": ("patches above the model's own cutoff", "% of an image's patches", 100),
    "largest_over_median": ("largest norm", "times the median of the image", 1),
    "first_token_area": ("area that the first token attends to", "% of the image", 100),
    "mass_on_registers": ("attention of the first token on registers", "%", 100),
    "received_by_outliers": ("attention that an outlier gets", "times an even share", 1),
}
# With fewer images, percentile bootstraps find differences of models that do not differ far too often. The wider an
# interval is, the more images it takes: with these numbers the share of false findings stays about that of two models.
_FEWEST_IMAGES, _MORE_PER_MODEL = 20, 5
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
MOST_MODELS = len(_ORDINALS)
_KEYS = ("quantity", "name", "unit", "difference", "differs")  # of a row, beside the names of its two models


@dataclass(frozen=True)
class Compared:
    """One of the models that are compared.

    Attributes:
        name: what it is called here, unlike any other.
        subject: the model.
        records: of all images.
        outliers: its own.
        grid: rows and columns of patches.
    """

    name: str
    subject: Subject
    records: Records
    outliers: Outliers
    grid: tuple[int, int]


def distinct(names: Sequence[str]) -> list[str]:
    """Names of models, with their places where several have the same name or one is called like a key of a row."""
    counts = Counter([*names, *_KEYS])
    placed = [f"{name} ({place})" for name, place in zip(names, _ORDINALS, strict=False)]
    mixed = [new if counts[name] > 1 else name for name, new in zip(names, placed, strict=True)]
    return mixed if len(set(mixed)) == len(mixed) else placed


def fewest_images(models: int) -> int:
    """How many images have to have a quantity for a difference to be told."""
    return _FEWEST_IMAGES + _MORE_PER_MODEL * (models - 2)


def differences(models: Sequence[Compared]) -> list[dict[str, Any]]:
    """Paired differences of every later model to the first, `later - first`, in every quantity that both have.

    Returns:
        Model by model, per quantity its `name`, `unit`, a mean with interval for each of the two models, by its name,
        and for the `difference`, and `differs`: whether that interval excludes 0; None with too few images to tell.
        Intervals of differences are wider than 95 % by Bonferroni's rule, so that all of them together miss in 5 % of
        comparisons.

    Raises:
        ValueError: if different images could be read for the models.
    """
    if len({tuple(one.records.measured_images().tolist()) for one in models}) > 1:
        raise ValueError("Expected the same readable images for all models, got different ones")
    confidence = 1 - (1 - CONFIDENCE) / (len(COMPARED) * (len(models) - 1))
    first, *others = ((one.name, per_image(one.records, one.outliers)) for one in models)
    return [
        _row(key, (first[0], first[1][key]), (name, values[key]), confidence, fewest_images(len(models)))
        for name, values in others
        for key in COMPARED
        if key in first[1] and key in values
    ]


def _row(key: str, first: tuple[str, Any], second: tuple[str, Any], confidence: float, fewest: int) -> dict[str, Any]:
    name, unit, factor = COMPARED[key]
    (first_name, a), (second_name, b) = first, second
    change = difference_interval(factor * a, factor * b, confidence)
    return {
        "quantity": key,
        "name": name,
        "unit": unit,
        first_name: asdict(mean_interval(factor * a)),
        second_name: asdict(mean_interval(factor * b)),
        "difference": asdict(change),
        "differs": change.excludes_zero if change.n >= fewest else None,
    }


def rows_by_model(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows of `differences` in the results, by the later model that each is about."""
    _, *others = results["models"]
    return {name: [row for row in results["differences"] if name in row] for name in others}
