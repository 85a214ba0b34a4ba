# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Principal components of patch features, and how much alike two sets of features are.

Shapes: n samples of D features; B images, P patches, k components.
"""

import torch
from torch import Tensor


def principal_components(features: Tensor, count: int = 3) -> tuple[Tensor, Tensor]:
    """Coordinates of samples along their first principal components, each with mean 0 and standard deviation 1.

    Args:
        features: `(n, D)`, patches of one or several images.
        count: k, how many components.

    Returns:
        Coordinates `(n, k)`, and the share of the variance that each component explains, `(k,)`. Signs are chosen so
        that the third moment is positive: the rarer side is the bright one.

    Raises:
        ValueError: if there are not more than k samples and at least k features.

    Reference: Darcet et al. (arXiv 2309.16588), Fig. 20, draws the first one in the range -3 to 3.
    """
    samples, width = features.shape
    if not 1 <= count < samples or count > width:
        raise ValueError(f"Expected more than {count} samples of {count} features or more, got {samples} of {width}")
    centred = features.double() - features.double().mean(dim=0)
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    coordinates = left[:, :count] * samples**0.5  # columns of `left` have length 1 and mean 0
    sign = torch.where((coordinates**3).sum(dim=0) < 0, -1.0, 1.0)
    explained = singular[:count] ** 2 / (singular**2).sum().clamp(min=torch.finfo(torch.float64).tiny)
    return (coordinates * sign).float(), explained.float()


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Linear centred kernel alignment of two sets of features of the same samples, `(n, D)` and `(n, E)`.

    1 when one is a rotation and scaling of the other, near 0 when they have nothing in common; NaN if one is constant.
    With fewer samples than features it comes out high whatever the features are.

    Raises:
        ValueError: if the numbers of samples differ or are below 2.

    Reference: Kornblith et al. (arXiv 1905.00414).
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"Expected two sets of the same 2 or more samples, got {len(first)} and {len(second)}")
    first = first.double() - first.double().mean(dim=0)
    second = second.double() - second.double().mean(dim=0)
    shared = (first.T @ second).norm() ** 2
    return float(shared / ((first.T @ first).norm() * (second.T @ second).norm()))
