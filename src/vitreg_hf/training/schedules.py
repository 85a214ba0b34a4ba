# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""How temperature, momentum, weight decay and learning rate run: functions of the step alone.

A continued training needs nothing of them from its past. Steps count updates of the weights, from 0.
"""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def linear(start: float, end: float, step: int, num_steps: int) -> float:
    """From `start` at step 0 straight to `end` at step `num_steps`, and `end` from there on."""
    return end if step >= num_steps else start + (end - start) * step / num_steps


def cosine(start: float, end: float, step: int, num_steps: int) -> float:
    """The same along half a cosine."""
    share = linear(0.0, 1.0, step, num_steps)
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def warmup_cosine(peak: float, end: float, step: int, warmup_steps: int, num_steps: int, start: float = 0.0) -> float:
    """From `start` linearly to `peak` at step `warmup_steps`, then along half a cosine to `end` at step `num_steps`.

    Raises:
        ValueError: if the warm-up is longer than the training.
    """
    if not 0 <= warmup_steps <= num_steps:
        raise ValueError(f"Expected a warm-up of 0 to {num_steps} steps, got {warmup_steps}")
    if step < warmup_steps:
        return linear(start, peak, step, warmup_steps)
    return cosine(peak, end, step - warmup_steps, num_steps - warmup_steps)


def learning_rates(
    optimizer: Optimizer, warmup_steps: int, num_steps: int, start: float = 0.0, end: float = 0.0, rest_steps: int = 0
) -> LambdaLR:
    """Warm-up and cosine for the groups of `student_teacher.parameter_groups`, whose prototypes rest at first.

    Args:
        optimizer: its learning rate is the highest one.
        warmup_steps: in which the learning rate rises.
        num_steps: of the whole training.
        start: learning rate at the first step, as a share of the highest.
        end: that at the last step.
        rest_steps: in which prototypes stay as they are.
    """

    def factor_of(lr_factor: float, rest: int) -> Callable[[int], float]:
        def factor(step: int) -> float:
            return 0.0 if step < rest else lr_factor * warmup_cosine(1.0, end, step, warmup_steps, num_steps, start)

        return factor

    groups = optimizer.param_groups
    rests = [rest_steps if group["last_layer"] else 0 for group in groups]
    return LambdaLR(
        optimizer, [factor_of(group["lr_factor"], rest) for group, rest in zip(groups, rests, strict=True)]
    )


def set_weight_decay(optimizer: Optimizer, weight_decay: float) -> None:
    """Set the weight decay of the groups that decay."""
    for group in optimizer.param_groups:
        if group["decays"]:
            group["weight_decay"] = weight_decay
