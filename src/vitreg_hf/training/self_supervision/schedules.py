# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""How temperature, momentum, weight decay and learning rate run: functions of the step alone.

A continued training needs nothing of them from its past. Steps count updates of the weights, from 0.
"""

import math


def linear(start: float, end: float, step: int, num_steps: int) -> float:
    """From `start` at step 0 straight to `end` at step `num_steps`, and `end` from there on."""
    return end if step >= num_steps else start + (end - start) * step / num_steps


def cosine(start: float, end: float, step: int, num_steps: int) -> float:
    """The same along half a cosine."""
    share = linear(0.0, 1.0, step, num_steps)
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def warmup_cosine(peak: float, end: float, step: int, warmup_steps: int, num_steps: int) -> float:
    """From 0 linearly to `peak` at step `warmup_steps`, then along half a cosine to `end` at step `num_steps`.

    Raises:
        ValueError: if the warm-up is longer than the training.
    """
    if not 0 <= warmup_steps <= num_steps:
        raise ValueError(f"Expected a warm-up of 0 to {num_steps} steps, got {warmup_steps}")
    if step < warmup_steps:
        return linear(0.0, peak, step, warmup_steps)
    return cosine(peak, end, step - warmup_steps, num_steps - warmup_steps)
