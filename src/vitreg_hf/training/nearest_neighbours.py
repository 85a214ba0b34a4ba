# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Classification of features by their nearest labelled neighbours, as DINO evaluates what was learned without labels.

Features are L2-normalised; each of the k most similar labelled images votes for its class with the weight
softmax(similarity / temperature) over the k. Nothing is trained, so nothing is chosen but k.

Shapes: n labelled images, B images to be classified, D channels, K classes. Reference: Caron et al., Emerging
Properties in Self-Supervised Vision Transformers (arXiv 2104.14294), section 4.1; Oquab et al., DINOv2
(arXiv 2304.07193), which weights by the softmax.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = (10, 20, 100, 200)  # of the evaluations of DINO and DINOv2; 20 is their headline
_SIMILARITIES = 2**24  # held at a time: 64 MiB of float32


def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    k: int,
    num_classes: int,
    temperature: float = 0.07,
) -> Tensor:
    """Votes for each class. It runs in float32 on the device of the features.

    Args:
        train_features: features of labelled images, float `(n, D)`.
        train_labels: their classes, int `(n,)`.
        test_features: features to classify, float `(B, D)`.
        k: neighbours that vote.
        num_classes: K.
        temperature: small values let the nearest decide alone.

    Returns:
        Float32 `(B, K)`, each row adding up to 1; the largest vote is the prediction.

    Raises:
        ValueError: if shapes or labels do not fit, k is not between 1 and n, or the temperature is not positive.
    """
    _check(train_features, train_labels, test_features, num_classes, temperature)
    if not 1 <= k <= len(train_features):
        raise ValueError(f"Expected k of 1 to {len(train_features)} labelled images, got {k}")
    neighbours = _neighbours(train_features, train_labels, test_features, k)
    return torch.cat([_votes(similarity, label, num_classes, temperature) for similarity, label in neighbours])


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    num_classes: int,
    ks: Sequence[int] = NEIGHBOURS,
    temperature: float = 0.07,
) -> dict[int, float]:
    """Share of right predictions for several k, from one search of neighbours.

    Args:
        train_features, train_labels, test_features, num_classes, temperature: as in `knn_predict`.
        test_labels: classes of what is classified, int `(B,)`.
        ks: numbers of neighbours; those beyond the n labelled images are left out.

    Returns:
        k -> accuracy between 0 and 1, in the order of `ks`.

    Raises:
        ValueError: as `knn_predict`; if nothing is to be classified, or every k is too large.
    """
    _check(train_features, train_labels, test_features, num_classes, temperature)
    if len(test_labels) != len(test_features) or not len(test_labels):
        raise ValueError(f"Expected {len(test_features)} labels of at least 1 test image, got {len(test_labels)}")
    possible = [k for k in ks if 1 <= k <= len(train_features)]
    if not possible:
        raise ValueError(f"Expected a k of 1 to {len(train_features)} labelled images, got {list(ks)}")
    right = dict.fromkeys(possible, 0)
    expected = iter(test_labels.to(test_features.device).split(_rows_at_a_time(train_features)))
    for similarity, label in _neighbours(train_features, train_labels, test_features, max(possible)):
        truth = next(expected)
        for k in right:
            votes = _votes(similarity[:, :k], label[:, :k], num_classes, temperature)
            right[k] += int((votes.argmax(dim=1) == truth).sum())
    return {k: count / len(test_labels) for k, count in right.items()}


def _check(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, num_classes: int, temperature: float
) -> None:
    shapes = tuple(train_features.shape), tuple(test_features.shape)
    if train_features.ndim != 2 or test_features.ndim != 2 or shapes[0][1] != shapes[1][1]:
        raise ValueError(f"Expected features (n, D) and (B, D), got {shapes[0]} and {shapes[1]}")
    if train_labels.shape != (len(train_features),) or not len(train_labels):
        raise ValueError(f"Expected one label for each of {shapes[0][0]} images, got {tuple(train_labels.shape)}")
    low, high = int(train_labels.min()), int(train_labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"Expected labels from 0 to {num_classes - 1}, got {low} to {high}")
    if temperature <= 0:
        raise ValueError(f"Expected a positive temperature, got {temperature}")


def _rows_at_a_time(train_features: Tensor) -> int:
    return max(_SIMILARITIES // len(train_features), 1)


def _neighbours(train: Tensor, labels: Tensor, test: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Similarities and labels of the k nearest, nearest first, `(rows, k)` each, for some rows at a time."""
    labels = labels.to(test.device)
    train = F.normalize(train.to(test.device).float(), dim=1)
    for rows in test.split(_rows_at_a_time(train)):
        nearest = (F.normalize(rows.float(), dim=1) @ train.T).topk(k, dim=1)
        yield nearest.values, labels[nearest.indices]


def _votes(similarity: Tensor, label: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Summed weights `(rows, K)` of neighbours `(rows, k)`."""
    weights = (similarity / temperature).softmax(dim=1)
    return weights.new_zeros(len(weights), num_classes).scatter_add_(1, label.long(), weights)
