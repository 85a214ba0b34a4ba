# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The curve of a classification training: an entry per epoch, and what follows from it."""

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from torch import Tensor


def describe_epoch(
    totals: Tensor,
    accelerator: Accelerator,
    metrics: Mapping[str, Any],
    *,
    epoch: int,
    step: int,
    seconds_of_evaluation: float,
    labels_are_mixed: bool,
) -> dict[str, Any]:
    """The entry of an epoch; to be called by every process.

    Args:
        totals: of this process in the epoch: loss, right answers, images, seconds.
        accelerator: of the launch.
        metrics: of the evaluation at its end.
        epoch: from 1.
        step: updates of the weights so far.
        seconds_of_evaluation: how long that took.
        labels_are_mixed: a mixed image has no single right answer, so none are counted.
    """
    loss, right, count, seconds = accelerator.reduce(totals, reduction="sum").tolist()
    return {
        "epoch": epoch,
        "step": step,
        "train_loss": loss / count,
        "train_accuracy": None if labels_are_mixed else right / count,
        "eval_loss": metrics["loss"],
        "eval_accuracy": metrics["accuracy"],
        "images_per_second": count * accelerator.num_processes / seconds,
        "seconds": seconds / accelerator.num_processes + seconds_of_evaluation,
    }


def should_stop(curve: Sequence[Mapping[str, Any]], patience: int | None) -> bool:
    """Whether the held-out accuracy has not risen for as many epochs as patience allows; None: never."""
    accuracies = [entry["eval_accuracy"] for entry in curve]
    return patience is not None and bool(curve) and len(curve) - 1 - accuracies.index(max(accuracies)) >= patience
