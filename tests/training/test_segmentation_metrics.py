# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Mean IoU against sets of pixels."""

import pytest
import torch
from torch import Tensor

from vitreg_hf.training.segmentation_metrics import MeanIoU


def slow_iou(predictions: Tensor, references: Tensor, label: int, ignored: int) -> float | None:
    """Intersection over union of two sets of pixels."""
    pixels = [
        (place, predicted, true)
        for place, (predicted, true) in enumerate(zip(predictions.flatten().tolist(), references.flatten().tolist()))
        if true != ignored
    ]
    predicted = {place for place, one, _ in pixels if one == label}
    true = {place for place, _, one in pixels if one == label}
    return len(predicted & true) / len(predicted | true) if predicted | true else None


@pytest.mark.parametrize("ignored", [255, -100])
def test_it_equals_sets_of_pixels(ignored: int) -> None:
    generator = torch.Generator().manual_seed(0)
    predictions = torch.randint(0, 5, (6, 9, 11), generator=generator)
    references = torch.where(torch.rand(6, 9, 11, generator=generator) < 0.5, predictions, predictions.flip(0))
    references = torch.where(torch.rand(6, 9, 11, generator=generator) < 0.1, ignored, references)
    metric = MeanIoU(7, ignored)
    for start in (0, 2, 4):
        metric.add_batch(predictions=predictions[start : start + 2], references=references[start : start + 2])
    found = metric.compute()
    expected = [slow_iou(predictions, references, label, ignored) for label in range(7)]
    assert found["iou"] == pytest.approx(expected)
    present = [value for value in expected if value is not None]
    assert len(present) == 5
    assert found["mean_iou"] == pytest.approx(sum(present) / 5)
    assert found["absent_classes"] == 2
    counted = references != ignored
    assert found["pixel_accuracy"] == pytest.approx((predictions == references)[counted].double().mean().item())


def test_a_class_that_is_only_predicted_counts_as_wrong() -> None:
    metric = MeanIoU(3)
    metric.add_batch(torch.tensor([[0, 2]]), torch.tensor([[0, 0]]))
    assert metric.compute() == {
        "mean_iou": 0.25,
        "pixel_accuracy": 0.5,
        "iou": [0.5, None, 0.0],
        "absent_classes": 1,
    }


def test_every_computation_starts_anew_and_counts_add_up_over_processes() -> None:
    one, other, both = MeanIoU(4), MeanIoU(4), MeanIoU(4)
    for seed, metric in enumerate((one, other)):
        maps = torch.randint(0, 4, (2, 3, 5, 5), generator=torch.Generator().manual_seed(seed))
        metric.add_batch(*maps)
        both.add_batch(*maps)
    one.confusion += other.confusion
    assert one.compute() == both.compute()
    with pytest.raises(ValueError, match="Expected pixels with a label, got none"):
        one.compute()


def test_what_cannot_be_counted_is_refused() -> None:
    metric = MeanIoU(3)
    with pytest.raises(ValueError, match=r"predictions of shape \(2, 2\), got \(1, 2\)"):
        metric.add_batch(torch.zeros(1, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"Expected references in 0..2, got 0..3"):
        metric.add_batch(torch.zeros(1, 2), torch.tensor([[0, 3]]))
    with pytest.raises(ValueError, match=r"Expected predictions in 0..2, got -1..0"):
        metric.add_batch(torch.tensor([[0, -1]]), torch.zeros(1, 2))
    metric.add_batch(torch.tensor([[9]]), torch.tensor([[255]]))  # what is predicted for ignored pixels is free
    for classes, ignored in ((0, 255), (3, 2)):
        with pytest.raises(ValueError, match="at least one class and an ignored label that is none"):
            MeanIoU(classes, ignored)
