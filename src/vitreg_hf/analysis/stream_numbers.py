# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The numbers of `channels` for every state of every image of a pass, read together: each alone reads, checks and
copies the state anew. `channels` says what they are, and is what these are tested against.

Shapes: B images, N tokens, D channels.
"""

import numpy as np
import torch
from torch import Tensor

from vitreg_hf.analysis.channels import MASSIVE_ABSOLUTE, MASSIVE_RATIO

_SIGMAS = 6.0  # of `channels.sigma_outliers`


def stream_numbers(state: Tensor) -> dict[str, Tensor]:
    """Largest value, moments and counts of outliers of each image's residual stream.

    Args:
        state: `(B, N, D)`, before the final norm.

    Returns:
        `infinity_norm`, `kurtosis` `(B,)`, float32; `sigma_outliers`, `massive`, by both rules of
        `channels.massive_activations`, and `relatively_massive`, by the relative rule alone, `(B,)`, int64; `peak`
        `(B, 2)`, token and channel of the largest magnitude, the first of equal ones.

    Raises:
        ValueError: if the state is not finite.
    """
    values = state.float().flatten(1)
    magnitudes = values.abs()
    place = _places_of_largest(magnitudes)
    highest = magnitudes.gather(1, place[:, None])[:, 0]
    if not bool(highest.isfinite().all()):  # a NaN counts as the largest
        raise ValueError("Expected finite activations, got NaN or infinity")
    kurtosis, outliers = _moments(values)
    massive, relatively_massive = _massive(magnitudes, highest)
    return {
        "infinity_norm": highest,
        "kurtosis": kurtosis.float(),
        "sigma_outliers": outliers,
        "massive": massive,
        "relatively_massive": relatively_massive,
        "peak": torch.stack([place // state.shape[2], place % state.shape[2]], dim=1),
    }


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Kurtosis, float64, and how many values are outliers by standard deviations, of `(B, n)`."""
    distance = values.double()
    squares = distance.sub_(distance.mean(dim=1, keepdim=True)).square_()  # in place: large copies cost most here
    variance = squares.mean(dim=1, keepdim=True)
    outliers = _count(squares > _SIGMAS**2 * variance)
    fourth = squares.norm(dim=1).square() / squares.shape[1]  # mean of squared squares, without a copy of them
    return fourth / variance[:, 0].square(), outliers


def _massive(magnitudes: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
    """How many massive activations each image has, by both rules and by the relative one alone.

    None where half of all values are 0: there is no ratio to them.
    """
    medians = _lower_medians(magnitudes)
    possible = (medians > 0) & (highest >= MASSIVE_RATIO * medians)
    if not bool(possible.any()):  # as in most states of most models: no need to count
        none = torch.zeros_like(medians, dtype=torch.int64)
        return none, none
    least = MASSIVE_RATIO * medians
    relative = _count(magnitudes >= least[:, None]) * possible
    # Where the relative rule asks for more than the absolute one, what it finds holds by both.
    both = torch.where(least > MASSIVE_ABSOLUTE, relative, _count(magnitudes > MASSIVE_ABSOLUTE) * possible)
    return both, relative


# PyTorch's own functions take several times as long on a CPU; together they would be most of what a state costs there.


def _count(marked: Tensor) -> Tensor:
    """How many are True in each row of `(B, n)`, int64; summed in 32 bits, in which PyTorch is fast."""
    return marked.sum(dim=1, dtype=torch.int32).long()


def _places_of_largest(values: Tensor) -> Tensor:
    """`values.argmax(dim=1)` of `(B, n)`."""
    if values.device.type != "cpu":
        return values.argmax(dim=1)
    return torch.from_numpy(values.numpy().argmax(axis=1))


def _lower_medians(values: Tensor) -> Tensor:
    """`values.median(dim=1).values` of `(B, n)`."""
    if values.device.type != "cpu":
        return values.median(dim=1).values
    middle = (values.shape[1] - 1) // 2
    return torch.from_numpy(np.partition(values.numpy(), middle, axis=1)[:, middle].copy())
