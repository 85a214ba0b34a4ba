# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Metrics of `evaluate` that need neither Hub nor cache."""

from pathlib import Path

import evaluate
import pytest
import torch

from vitreg_hf.training.metrics import Accuracy, TopKAccuracy


def test_accuracy_over_batches() -> None:
    accuracy = Accuracy()
    accuracy.add_batch(predictions=torch.tensor([0, 1, 2]), references=torch.tensor([0, 1, 1]))
    accuracy.add_batch(predictions=[3], references=[3])
    assert accuracy.compute() == {"accuracy": 0.75}
    assert accuracy.compute(predictions=[1], references=[2]) == {"accuracy": 0.0}  # starts anew


def test_top_k_accuracy() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.4], [0.2, 0.3, 0.5], [1.0, 0.0, 0.5]])
    top2 = TopKAccuracy(k=2)
    top2.add_batch(predictions=scores, references=torch.tensor([2, 0, 0]))
    assert top2.compute() == {"top2_accuracy": pytest.approx(2 / 3)}
    best = TopKAccuracy(k=1).compute(predictions=scores, references=[1, 2, 0])
    assert best == {"top1_accuracy": 1.0}


def test_of_equal_scores_the_lower_class_comes_first() -> None:
    tied = TopKAccuracy(k=1).compute(predictions=[[1.0, 1.0], [1.0, 1.0]], references=[0, 1])
    assert tied == {"top1_accuracy": 0.5}


def test_top_k_needs_more_than_k_classes() -> None:
    with pytest.raises(ValueError, match="more than 5 classes for top-5 accuracy, got 3"):
        TopKAccuracy(k=5).compute(predictions=[[0.0, 1.0, 2.0]], references=[0])
    with pytest.raises(ValueError, match="k of 1 or more, got 0"):
        TopKAccuracy(k=0)


def test_metrics_combine() -> None:
    both = evaluate.combine([Accuracy(), Accuracy()])
    assert set(both.compute(predictions=[0], references=[0]).values()) == {1.0}


def test_nothing_is_written_unless_asked_for(tmp_path: Path) -> None:
    Accuracy(cache_dir=str(tmp_path)).compute(predictions=[0], references=[0])
    assert list(tmp_path.iterdir()) == []
    on_disk = Accuracy(cache_dir=str(tmp_path), keep_in_memory=False)
    assert on_disk.compute(predictions=[0], references=[0]) == {"accuracy": 1.0}
    assert list(tmp_path.iterdir()) != []
