# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Targets of the teacher, against loops, and in two processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitreg_hf.training.self_supervision.targets import Centring, SinkhornKnopp, target_rule

PROCESS = Path(__file__).parent / "targets_of_a_process.py"


@pytest.fixture
def scores():
    return torch.rand(7, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


def slow_sinkhorn(scores, temperature, iterations):
    """Normalise rows of prototypes to 1 / K and columns of tokens to 1 / M, one after the other, entry by entry."""
    tokens, prototypes = scores.shape
    weights = (scores.double() / temperature).exp()
    weights /= weights.sum()
    for _ in range(iterations):
        for k in range(prototypes):
            weights[:, k] /= weights[:, k].sum() * prototypes
        for m in range(tokens):
            weights[m] /= weights[m].sum() * tokens
    return weights * tokens


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("temperature", [0.04, 1.0])
def test_sinkhorn_normalises_prototypes_and_tokens_in_turns(scores, temperature, iterations):
    targets = SinkhornKnopp(iterations)(scores, temperature)
    expected = slow_sinkhorn(scores, temperature, iterations).float()
    torch.testing.assert_close(targets, expected, atol=1e-6, rtol=1e-5)


def test_sinkhorn_gives_prototypes_equal_shares_and_tokens_a_distribution(scores):
    targets = SinkhornKnopp(50)(scores, 0.5)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(7))
    torch.testing.assert_close(targets.mean(dim=0), torch.full((4,), 1 / 4), atol=1e-4, rtol=0)


def test_sinkhorn_does_not_overflow(scores):
    targets = SinkhornKnopp()(scores + 1000, 0.04)
    torch.testing.assert_close(targets, SinkhornKnopp()(scores, 0.04), atol=1e-2, rtol=0)


def test_the_centre_follows_the_mean_and_is_taken_off_before_it_moves(scores):
    centring, centre = Centring(4, momentum=0.9), torch.zeros(4)
    for shift in (0.0, 0.3, -0.2):
        targets = centring(scores + shift, 0.07)
        torch.testing.assert_close(targets, ((scores + shift - centre) / 0.07).softmax(dim=-1))
        centre = 0.9 * centre + 0.1 * (scores + shift).mean(dim=0)
    torch.testing.assert_close(centring.centre, centre)


def test_the_centre_is_saved_and_restored(scores):
    one, other = Centring(4), Centring(4)
    one(scores, 0.07)
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(other(scores, 0.07), one(scores, 0.07), rtol=0, atol=0)


def test_targets_take_no_gradients(scores):
    scores.requires_grad_()
    assert not SinkhornKnopp()(scores, 0.07).requires_grad
    assert not Centring(4)(scores, 0.07).requires_grad


@pytest.mark.parametrize("sizes", [(4, 3), (7, 0)], ids=["uneven", "one without tokens"])
def test_two_processes_compute_what_one_with_all_tokens_does(scores, sizes, tmp_path):
    for rank, part in enumerate(scores.split(sizes)):
        torch.save(part.clone(), tmp_path / f"scores_{rank}.pt")
    command = [sys.executable, str(PROCESS)]
    running = [subprocess.Popen([*command, str(rank), "2", str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    parts = [torch.load(tmp_path / f"targets_{rank}.pt", weights_only=True) for rank in range(2)]

    centring, sinkhorn = Centring(4), SinkhornKnopp()
    centring(scores, 0.1)
    torch.testing.assert_close(torch.cat([part["centred"] for part in parts]), centring(scores, 0.1))
    torch.testing.assert_close(torch.cat([part["balanced"] for part in parts]), sinkhorn(scores, 0.1))
    for part in parts:
        torch.testing.assert_close(part["centre"], centring.centre)


def test_settings_without_sense_are_refused():
    with pytest.raises(ValueError, match=r"Expected a momentum in \[0, 1\), got 1"):
        Centring(4, momentum=1)
    with pytest.raises(ValueError, match="Expected at least 1 iteration, got 0"):
        SinkhornKnopp(0)
    with pytest.raises(ValueError, match="Expected centring or sinkhorn, got 'mean'"):
        target_rule("mean", 4)
