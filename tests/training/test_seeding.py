# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Random numbers follow from counters and leave nothing behind."""

import random

import numpy as np
import torch

from vitreg_hf.training.seeding import Purpose, derived_seed, seed_step, seed_weights, seeded


def draw() -> list[float]:
    """A number of each generator."""
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_seeds_do_not_collide_and_stay_what_they_are() -> None:
    counters = [(s, p, e, i) for s in range(3) for p in Purpose for e in range(20) for i in range(20)]
    assert len({derived_seed(*one) for one in counters}) == len(counters)
    assert all(0 <= derived_seed(*one) < 2**32 for one in counters)
    assert derived_seed(0, Purpose.SAMPLE, 1, 2, 3) == 2621799701  # checkpoints of older versions continue


def test_seeding_a_step_settles_all_that_is_drawn_in_it() -> None:
    seed_step(7, 3, 1)
    first = draw()
    seed_step(7, 3, 1)
    assert draw() == first
    others = []
    for step, process in ((4, 1), (3, 0)):
        seed_step(7, step, process)
        others.append(draw())
    seed_weights(7)
    others.append(draw())
    assert not {*first} & {number for other in others for number in other}


def test_a_seeded_block_leaves_the_generators_as_they_were() -> None:
    seed_step(0, 0)
    expected = draw() + draw()
    seed_step(0, 0)
    found = draw()
    with seeded(2**63 - 1):
        inside = draw()
    assert found + draw() == expected
    try:
        with seeded(2**63 - 1):
            assert draw() == inside
            raise KeyError
    except KeyError:
        pass
    seed_step(0, 0)
    assert draw() + draw() == expected
