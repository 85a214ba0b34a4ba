# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Entries of a curve, and when a training has gone on for long enough."""

import pytest
import torch
from accelerate import Accelerator

from vitreg_hf.training.curve import describe_epoch, should_stop


@pytest.mark.parametrize(("mixed", "accuracy"), [(False, 0.25), (True, None)])
def test_an_entry_holds_means_over_images(mixed: bool, accuracy: float | None) -> None:
    totals = torch.tensor([30.0, 5.0, 20.0, 4.0], dtype=torch.float64)  # loss, right answers, images, seconds
    metrics = {"loss": 2.5, "accuracy": 0.125}
    entry = describe_epoch(
        totals, Accelerator(cpu=True), metrics, epoch=2, step=7, seconds_of_evaluation=1.5, labels_are_mixed=mixed
    )
    assert entry == {
        **{"epoch": 2, "step": 7, "train_loss": 1.5, "train_accuracy": accuracy, "eval_loss": 2.5},
        **{"eval_accuracy": 0.125, "images_per_second": 5.0, "seconds": 5.5},
    }


@pytest.mark.parametrize(
    ("accuracies", "patience", "stops"),
    [
        ([], 1, False),
        ([0.1, 0.2, 0.2], None, False),
        ([0.1, 0.2, 0.2], 1, True),  # as good is not better
        ([0.1, 0.2, 0.2], 2, False),
        ([0.3, 0.2, 0.25], 2, True),
    ],
)
def test_patience_counts_epochs_since_the_best(accuracies: list[float], patience: int | None, stops: bool) -> None:
    assert should_stop([{"eval_accuracy": accuracy} for accuracy in accuracies], patience) is stops
