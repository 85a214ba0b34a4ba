# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Losses, against what their papers write down."""

import math

import pytest
import torch

from vitreg_hf.training.losses import classification_loss

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])


def literal_bce(logits: torch.Tensor, targets: list[list[float]]) -> float:
    """Mean over images and classes of -log p where the target is 1, else of -log(1 - p)."""
    terms = []
    for row, wanted in zip(logits.tolist(), targets, strict=True):
        for logit, target in zip(row, wanted, strict=True):
            p = 1 / (1 + math.exp(-logit))
            terms.append(-math.log(p if target else 1 - p))
    return sum(terms) / len(terms)


def test_binary_loss_of_classes_and_of_mixed_images() -> None:
    loss = classification_loss("bce")
    expected = literal_bce(LOGITS, [[0, 0, 1], [1, 0, 0]])
    assert loss(LOGITS, torch.tensor([2, 0])).item() == pytest.approx(expected)
    shares = torch.tensor([[0.3, 0.0, 0.7], [1.0, 0.0, 0.0]])
    assert loss(LOGITS, shares).item() == pytest.approx(literal_bce(LOGITS, [[1, 0, 1], [1, 0, 0]]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_classes_and_of_shares(smoothing: float) -> None:
    loss, labels = classification_loss("cross_entropy", smoothing), torch.tensor([2, 0])
    wanted = torch.nn.functional.one_hot(labels, 3) * (1 - smoothing) + smoothing / 3
    expected = -(wanted * LOGITS.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(loss(LOGITS, labels), expected)
    torch.testing.assert_close(loss(LOGITS, torch.nn.functional.one_hot(labels, 3).float()), expected)
