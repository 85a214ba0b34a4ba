# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""From the teacher's scores to the distributions that the student is to predict, without all images getting one.

Two ways against that collapse: a moving average of scores is taken off (centring, DINO), or scores are balanced so
that every prototype gets the same share of the batch (Sinkhorn-Knopp, SwAV and DINOv2). Both look at the tokens of all
processes, also where the processes hold different numbers of them, as with masked patches.

Shapes: M tokens in this process, K prototypes.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Centring(nn.Module):
    """Softmax of scores less a moving average of their mean over all tokens (Caron et al., arXiv 2104.14294).

    Args:
        num_prototypes: K.
        momentum: how much of the old mean stays per call.

    Raises:
        ValueError: if the momentum is not in [0, 1).
    """

    centre: Tensor

    def __init__(self, num_prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"Expected a momentum in [0, 1), got {momentum}")
        self.momentum = momentum
        self.register_buffer("centre", torch.zeros(num_prototypes))

    @torch.no_grad()
    def forward(self, scores: Tensor, temperature: float) -> Tensor:
        """Targets `(M, K)` of scores `(M, K)`, whose mean then moves the centre."""
        scores = scores.float()
        targets = ((scores - self.centre) / temperature).softmax(dim=-1)
        total = torch.cat([scores.sum(dim=0), scores.new_tensor([len(scores)])])
        _reduce(total)
        self.centre.lerp_(total[:-1] / total[-1].clamp(min=1), 1 - self.momentum)
        return targets


class SinkhornKnopp(nn.Module):
    """Distributions over prototypes that together give each of them the same weight (Caron et al., arXiv 2006.09882).

    Args:
        iterations: how often prototypes, then tokens, are normalised.

    Raises:
        ValueError: if there is no iteration.
    """

    def __init__(self, iterations: int = 3) -> None:
        super().__init__()
        if iterations < 1:
            raise ValueError(f"Expected at least 1 iteration, got {iterations}")
        self.iterations = iterations

    @torch.no_grad()
    def forward(self, scores: Tensor, temperature: float) -> Tensor:
        """Targets `(M, K)` of scores `(M, K)`; a process may hold none."""
        scores = scores.float() / temperature
        highest = torch.cat([scores.flatten(), scores.new_full((1,), -torch.inf)]).max()
        _reduce(highest, largest=True)
        targets = (scores - highest).exp()  # one factor for all, which the first normalisation takes off again
        for _ in range(self.iterations):
            per_prototype = targets.sum(dim=0)
            _reduce(per_prototype)
            targets = targets / per_prototype
            targets = targets / targets.sum(dim=1, keepdim=True)
        return targets


def target_rule(name: str, num_prototypes: int) -> nn.Module:
    """The rule of a name, `centring` or `sinkhorn`: a module of scores `(M, K)` and a temperature.

    Raises:
        ValueError: for another name.
    """
    if name not in ("centring", "sinkhorn"):
        raise ValueError(f"Expected centring or sinkhorn, got {name!r}")
    return Centring(num_prototypes) if name == "centring" else SinkhornKnopp()


def _reduce(values: Tensor, largest: bool = False) -> None:
    """Sum or largest of a tensor over all processes, in place; on one process nothing changes."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
