# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Guards stop what breaks and nothing else, and remember exactly."""

import json
import math

import numpy as np
import pytest

from vitreg_hf.training.guards import LossGuard, TrainingDiverged


def fed(guard, losses, start=0):
    for step, loss in enumerate(losses, start=start + 1):
        guard.check(step, loss)
    return guard


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("factor", [0, 10.0])
def test_a_loss_that_is_not_finite_stops_even_in_the_first_step(loss, factor):
    with pytest.raises(TrainingDiverged, match="in step 1: it is not finite") as caught:
        LossGuard(factor).check(1, loss)
    assert caught.value.step == 1


def test_a_gradient_that_is_not_finite_stops_although_the_loss_is_fine():
    guard = LossGuard()
    guard.check(1, 2.0, 5.0)
    guard.check(2, 2.0, None)
    with pytest.raises(TrainingDiverged, match="step 3: the norm of its gradient is inf"):
        guard.check(3, 2.0, math.inf)


def test_a_spike_stops_and_says_how_high_it_is():
    guard = fed(LossGuard(10, window=20), [2.0] * 30)
    guard.check(31, 19.9)
    with pytest.raises(TrainingDiverged, match=r"21 in step 32: it is 10\.5 times the median of the last 20 losses"):
        guard.check(32, 21.0)


def test_an_explosion_in_the_first_steps_stops_too():
    with pytest.raises(TrainingDiverged, match="in step 8"):
        fed(LossGuard(10, window=50), [2.3, 2.4, 2.2, 2.3, 2.5, 2.4, 2.6, 3e5])


def test_factor_0_lets_every_finite_loss_pass():
    guard = LossGuard(0)
    fed(guard, [1.0] * 60 + [1e30])
    assert guard.state()["seen"] == 61


@pytest.mark.parametrize("seed", range(5))
def test_a_training_that_goes_well_is_left_alone(seed):
    """Losses fall by three decades, with noise of a factor of three and hard batches no worse than the beginning."""
    noise = np.random.default_rng(seed)
    usual = 2.3 * np.exp(-np.linspace(0, 7, 2_000))
    losses = usual * np.exp(noise.normal(0, 0.5, 2_000))
    losses[200::97] = 2.0
    guard = LossGuard(10)
    fed(guard, losses.tolist())
    assert guard.state()["seen"] == 2_000


def test_losses_below_zero_are_no_spikes():
    noise = np.random.default_rng(0)
    guard = LossGuard(10)
    fed(guard, (-3 + noise.normal(0, 0.5, 500)).tolist())
    assert guard.state()["seen"] == 500


def test_a_resumed_guard_judges_as_one_that_never_stopped():
    losses = np.random.default_rng(0).lognormal(size=120).tolist()
    whole, first, second = (LossGuard(10, window=20) for _ in range(3))
    fed(whole, losses)
    fed(first, losses[:37])
    second.load_state(json.loads(json.dumps(first.state())))
    fed(second, losses[37:], start=37)
    assert second.state() == whole.state()
    fresh = LossGuard()
    fresh.load_state(json.loads(json.dumps(LossGuard().state(), allow_nan=False)))
    assert fresh.state() == LossGuard().state()


@pytest.mark.parametrize("factor", [-1, 1, 0.5, math.nan])
def test_factors_that_would_stop_every_training_are_refused(factor):
    with pytest.raises(ValueError, match="spike_factor of 0 or above 1"):
        LossGuard(factor)


def test_a_window_without_a_median_is_refused():
    with pytest.raises(ValueError, match="window of 5 losses or more, got 4"):
        LossGuard(window=4)
