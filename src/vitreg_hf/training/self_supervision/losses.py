# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The losses of self-supervision, each a mean over the images of one process, in float32.

Shapes: B images, V global crops of each, S crops (global ones first), K prototypes, M masked patches of all global
crops together, P patches, D channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_EPSILON = 1e-8  # no logarithm of 0, where two images have equal features


def dino_loss(scores: Tensor, targets: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of what the student sees in a crop against what the teacher sees in other global crops.

    Args:
        scores: of the student's CLS in all crops, `(S, B, K)`.
        targets: distributions of the teacher for global crops, `(V, B, K)`.
        temperature: of the student.

    Returns:
        The mean over images and over pairs of different crops: V (S - 1) of them, 18 for 2 global and 8 local crops.

    Raises:
        ValueError: if shapes do not fit, or no pair is left.
    """
    if scores.shape[1:] != targets.shape[1:] or not len(scores) >= len(targets) or len(scores) < 2:
        expected = "scores (S, B, K) and targets (V, B, K) of V <= S crops, 2 or more"
        raise ValueError(f"Expected {expected}, got {tuple(scores.shape)} and {tuple(targets.shape)}")
    log_probabilities = (scores.float() / temperature).log_softmax(dim=-1)
    # All pairs at once, less those of a crop with itself: nothing of size S x V x B x K is made.
    every = (log_probabilities.sum(dim=0) * targets.sum(dim=0)).sum()
    same = (log_probabilities[: len(targets)] * targets).sum()
    return (same - every) / (scores.shape[1] * len(targets) * (len(scores) - 1))


def ibot_loss(scores: Tensor, targets: Tensor, weights: Tensor, num_crops: int, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of the student's masked patches against the same patches, seen by the teacher.

    Args:
        scores: of the student for masked patches, `(M, K)`.
        targets: distributions of the teacher for the same patches, `(M, K)`.
        weights: one divided by the number of masked patches of the crop, `(M,)`, as in `PatchMasks`.
        num_crops: global crops, with and without masks.
        temperature: of the student.

    Returns:
        The mean over all crops, in which those without masks count as 0, as in DINOv2.
    """
    losses = -(targets * (scores.float() / temperature).log_softmax(dim=-1)).sum(dim=-1)
    return (losses * weights).sum() / num_crops


def koleo_loss(features: Tensor) -> Tensor:
    """Minus the logarithm of the distance to the nearest neighbour in the batch: images spread out evenly.

    Args:
        features: of CLS, of one crop per image (other crops of an image are meant to be near), `(B, D)`.

    Raises:
        ValueError: if there is no other image.

    Reference: Sablayrolles et al., Spreading vectors for similarity search (arXiv 1806.03198), equation 2.
    """
    if len(features) < 2:
        raise ValueError(f"Expected at least 2 images to be apart, got {len(features)}")
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.float(), dim=-1, eps=_EPSILON)
        with torch.no_grad():
            nearest = (unit @ unit.T).fill_diagonal_(-2).argmax(dim=1)  # below any cosine
        return -(F.pairwise_distance(unit, unit[nearest], eps=_EPSILON) + _EPSILON).log().mean()


def gram_loss(patches: Tensor, gram_patches: Tensor) -> Tensor:
    """How far similarities between patches of an image are from those of an earlier model: dense features stay clean.

    Args:
        patches: of the student, `(B, P, D)`.
        gram_patches: of the Gram teacher, `(B, P, D')`, whose width may differ.

    Returns:
        Mean squared difference of cosines between all pairs of patches of an image.

    Reference: Siméoni et al., DINOv3 (arXiv 2508.10104), section 4.2.
    """
    with torch.autocast(patches.device.type, enabled=False):
        return F.mse_loss(_gram(patches), _gram(gram_patches))


def _gram(patches: Tensor) -> Tensor:
    unit = F.normalize(patches.float(), dim=-1)
    return unit @ unit.transpose(1, 2)
