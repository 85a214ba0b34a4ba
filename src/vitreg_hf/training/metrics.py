# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Accuracy and top-k accuracy as `evaluate` metrics.

`evaluate.load("accuracy")` fetches its code from the Hub; these classes need no Hub, no cache folder and no
scikit-learn. In distributed training gather predictions first (`accelerator.gather_for_metrics`), then compute.

An empty metric is falsy (it has a length), so test `metric is not None`.
"""

from typing import Any

import datasets
import evaluate
import numpy as np


class _InMemoryMetric(evaluate.Metric):
    """A metric that writes no files unless asked to: a home may be read-only."""

    def __init__(self, *args: Any, keep_in_memory: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, keep_in_memory=keep_in_memory, **kwargs)

    def _build_data_dir(self) -> str:
        return "" if self.keep_in_memory else super()._build_data_dir()


class Accuracy(_InMemoryMetric):
    """Share of images whose predicted class is the right one.

    `compute(predictions=(B,) class indices, references=(B,) class indices)` returns `{"accuracy": 0..1}`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference.",
            citation="",
            inputs_description="predictions, references: class indices",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class TopKAccuracy(_InMemoryMetric):
    """Share of images whose right class is among the k highest scores.

    `compute(predictions=(B, K) scores, references=(B,) class indices)` returns `{"top<k>_accuracy": 0..1}`. Of
    equal scores, that of the lower class index counts as the higher one.

    Args:
        k: how many classes count.

    Raises:
        ValueError: if `k` is not positive, or there are no more than `k` classes.
    """

    def __init__(self, *args: Any, k: int = 5, **kwargs: Any) -> None:
        if k < 1:
            raise ValueError(f"Expected k of 1 or more, got {k}")
        self.k = k
        super().__init__(*args, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        scores = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=f"Share of references among the {self.k} classes of the highest scores.",
            citation="",
            inputs_description="predictions: scores per class; references: class indices",
            features=datasets.Features({"predictions": scores, "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        scores, right = np.asarray(predictions), np.asarray(references)
        if scores.shape[1] <= self.k:
            raise ValueError(f"Expected more than {self.k} classes for top-{self.k} accuracy, got {scores.shape[1]}")
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self.k]
        return {f"top{self.k}_accuracy": float(np.mean((best == right[:, None]).any(axis=1)))}
