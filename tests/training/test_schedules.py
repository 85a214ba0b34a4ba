# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Schedules: ends, middles, and that nothing happens after the end."""

import itertools

import pytest
import torch

from vitreg_hf.training.schedules import (
    cosine,
    learning_rates,
    linear,
    set_weight_decay,
    warmup_cosine,
)


def test_temperature_rises_in_a_straight_line_and_stays():
    assert [linear(0.04, 0.07, step, 3) for step in (0, 1, 2, 3, 9)] == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07])


def test_no_steps_are_the_end():
    assert linear(0.04, 0.07, 0, 0) == 0.07
    assert cosine(0.992, 1.0, 0, 0) == 1.0


def test_momentum_rises_along_half_a_cosine():
    values = [cosine(0.992, 1.0, step, 4) for step in range(6)]
    assert values[0] == pytest.approx(0.992)
    assert values[2] == pytest.approx(0.996)
    assert values[4:] == [1.0, 1.0]
    steps = [after - before for before, after in itertools.pairwise(values)]
    assert steps[1] == pytest.approx(steps[2])
    assert steps[0] < steps[1]


def test_the_learning_rate_is_that_of_torchs_own_schedules():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3.0)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 5)
    expected = []
    for _ in range(5):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        warmup.step()
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.1)
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        annealing.step()
    assert [warmup_cosine(3.0, 0.1, step, 5, 25) for step in range(25)] == pytest.approx(expected)


def test_a_warm_up_longer_than_the_training_is_refused():
    with pytest.raises(ValueError, match="Expected a warm-up of 0 to 10 steps, got 11"):
        warmup_cosine(1.0, 0.0, 0, 11, 10)


def groups():
    """A backbone's lower layer, biases, and prototypes."""
    marks = [(0.5, True, False), (1.0, False, False), (1.0, False, True)]
    return [
        {"params": [torch.nn.Parameter(torch.zeros(1))], "lr_factor": factor, "decays": decays, "last_layer": last}
        for factor, decays, last in marks
    ]


def test_every_group_has_its_share_of_the_learning_rate_and_prototypes_rest_at_first():
    optimizer = torch.optim.SGD(groups(), lr=2.0)
    scheduler = learning_rates(optimizer, warmup_steps=2, num_steps=6, start=0.1, end=0.5, rest_steps=3)
    rates = []
    for _ in range(7):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    expected = [2.0 * warmup_cosine(1.0, 0.5, step, 2, 6, 0.1) for step in range(7)]
    assert expected[0] == pytest.approx(0.2)
    assert expected[6] == pytest.approx(1.0)
    lower, biases, prototypes = zip(*rates, strict=True)
    assert lower == pytest.approx([rate / 2 for rate in expected])
    assert biases == pytest.approx(expected)
    assert prototypes == pytest.approx([0, 0, 0, *expected[3:]])


def test_only_what_decays_gets_a_weight_decay():
    optimizer = torch.optim.SGD(groups(), lr=2.0)
    set_weight_decay(optimizer, 0.3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0, 0]
