# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints: complete or absent, limited in number, refused where they do not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from vitreg_hf.training.checkpointing import (
    Progress,
    checkpoint_to_resume,
    epoch_seed,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from vitreg_hf.training.optim import create_ema

SETTINGS = {"learning_rate": 0.1, "scale": (0.5, 1.0)}


class Small:
    """A training in miniature."""

    def __init__(self) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        self.accelerator = Accelerator(cpu=True)
        model = nn.Linear(2, 2)
        self.ema = create_ema(model, 0.5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.scheduler = LambdaLR(optimizer, lambda step: 0.5**step)

    def step(self) -> None:
        self.model(torch.ones(1, 2)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.ema.update_parameters(self.model)

    def save(self, folder: Path, epoch: int, keep: int = 2) -> Path:
        progress = Progress(epoch, 10 * epoch, [{"epoch": epoch, "loss": 0.1}], SETTINGS)
        return save_checkpoint(self.accelerator, folder, progress, self.scheduler, self.ema, keep)

    def state(self) -> list[Any]:
        weights = [parameter.detach().clone() for parameter in self.model.parameters()]
        averages = [parameter.detach().clone() for parameter in self.ema.module.parameters()]
        return [weights, averages, self.scheduler.get_last_lr(), int(self.ema.n_averaged)]


@pytest.fixture
def small() -> Small:
    torch.manual_seed(0)
    return Small()


def test_what_is_loaded_is_what_was_saved(small: Small, tmp_path: Path) -> None:
    for _ in range(3):
        small.step()
    checkpoint, saved = small.save(tmp_path, epoch=3), small.state()
    small.step()
    continued = small.state()

    torch.manual_seed(7)
    fresh = Small()
    progress = load_checkpoint(fresh.accelerator, checkpoint, SETTINGS, fresh.scheduler, fresh.ema)
    assert (progress.epoch, progress.step, progress.curve) == (3, 30, [{"epoch": 3, "loss": 0.1}])
    torch.testing.assert_close(fresh.state(), saved, rtol=0, atol=0)
    fresh.step()
    torch.testing.assert_close(fresh.state(), continued, rtol=0, atol=0)


def test_only_the_newest_are_kept(small: Small, tmp_path: Path) -> None:
    for epoch in (1, 2, 3, 10):
        small.save(tmp_path, epoch)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["epoch-00003", "epoch-00010"]
    assert not (tmp_path / ".unfinished").exists()
    with pytest.raises(ValueError, match="keep at least 1"):
        small.save(tmp_path, 11, keep=0)


def test_an_epoch_that_is_trained_again_replaces_its_checkpoint(small: Small, tmp_path: Path) -> None:
    checkpoint = small.save(tmp_path, 1)
    (checkpoint / "left_over").touch()
    small.save(tmp_path, 1)
    assert not (checkpoint / "left_over").exists()


def test_a_checkpoint_that_was_cut_off_is_no_checkpoint(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.save(tmp_path, 1)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vitreg_hf.training.checkpointing.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small.save(tmp_path, 2)
    monkeypatch.undo()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["epoch-00001"]
    assert checkpoint_to_resume("latest", tmp_path) == tmp_path / "epoch-00001"
    small.save(tmp_path, 2)
    assert checkpoint_to_resume("latest", tmp_path) == tmp_path / "epoch-00002"


def test_which_checkpoint_is_resumed(small: Small, tmp_path: Path) -> None:
    assert checkpoint_to_resume(None, tmp_path / "none") is None
    with pytest.raises(ValueError, match=r"Expected a complete checkpoint in .*none, got none"):
        checkpoint_to_resume("latest", tmp_path / "none")
    checkpoint = small.save(tmp_path, 1)
    assert checkpoint_to_resume(str(checkpoint), tmp_path / "none") == checkpoint
    with pytest.raises(ValueError, match=r"without checkpoints for a new training, got .*epoch-00001"):
        checkpoint_to_resume(None, tmp_path)
    with pytest.raises(ValueError, match=r"Expected a complete checkpoint with progress\.json"):
        checkpoint_to_resume(str(tmp_path), tmp_path)


def test_other_settings_are_refused_by_name(small: Small, tmp_path: Path) -> None:
    checkpoint, before = small.save(tmp_path, 1), small.state()
    other = {**SETTINGS, "learning_rate": 0.2, "new": 1}
    with pytest.raises(ValueError, match=r"learning_rate 0.1 \(got 0.2\), new None \(got 1\)"):
        load_checkpoint(small.accelerator, checkpoint, other, small.scheduler, small.ema)
    torch.testing.assert_close(small.state(), before, rtol=0, atol=0)


def test_seeds_of_epochs_do_not_collide() -> None:
    seeds = {epoch_seed(seed, epoch, process) for seed in range(4) for epoch in range(50) for process in range(4)}
    assert len(seeds) == 4 * 50 * 4
    assert epoch_seed(3, 2, 1) == epoch_seed(3, 2, 1) < 2**32
