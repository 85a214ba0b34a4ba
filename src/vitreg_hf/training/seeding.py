# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Random numbers that follow from counters, so that nothing random has a past.

A training that was interrupted continues bit by bit because the order of images, their augmentation, mixing, dropout
and drop path are functions of the seed and of where the training is: never of the random numbers drawn before, of
the number of loading processes, or of how often it was stopped.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What a seed is for: the first counter after the seed of the training, so that no two uses share numbers."""

    ORDER = 0
    SAMPLE = 1
    STEP = 2
    WEIGHTS = 3
    SHARDS = 4


def derived_seed(*counters: int) -> int:
    """A seed below 2**32 from whole numbers of 0 or more; neighbouring arguments give unrelated seeds."""
    return int(np.random.SeedSequence(counters).generate_state(1)[0])


def seed_step(seed: int, step: int, process_index: int = 0) -> None:
    """Seed everything that a training step draws in this process: dropout, drop path, mixing, masks.

    Args:
        seed: of the training.
        step: updates of the weights before this one.
        process_index: processes draw unrelated numbers.
    """
    _seed_all(derived_seed(seed, Purpose.STEP, step, process_index))


def seed_weights(seed: int) -> None:
    """Seed initial weights: the same in every process."""
    _seed_all(derived_seed(seed, Purpose.WEIGHTS))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of Python, NumPy and torch (CPU) for a block; afterwards they are as they were before."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the generators of GPUs, too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
