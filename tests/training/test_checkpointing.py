# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints: complete or absent, limited in number, compared with their lists, refused where they do not fit."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from vitreg_hf.training import checkpointing
from vitreg_hf.training.checkpoint_files import broken_files, checkpoint_to_resume, list_checkpoints
from vitreg_hf.training.checkpointing import (
    CheckpointError,
    Progress,
    agreed_checkpoint,
    load_checkpoint,
    own_totals,
    save_checkpoint,
    totals_of_all,
)
from vitreg_hf.training.optim import create_ema

SETTINGS = {"learning_rate": 0.1, "scale": (0.5, 1.0)}


class Small:
    """A training in miniature."""

    def __init__(self, lr: float = 0.1, decay: float = 0.01) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        self.accelerator = Accelerator(cpu=True)
        model = nn.Linear(2, 2)
        self.ema = create_ema(model, 0.5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.scheduler = LambdaLR(optimizer, lambda step: 0.5**step)

    def step(self) -> None:
        self.model(torch.ones(1, 2)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.ema.update_parameters(self.model)

    def save(self, folder: Path, step: int, keep: int = 2) -> Path:
        progress = Progress(step, 10 * step, [{"epoch": 1, "loss": 0.1}], [[1.5, 2.0]], {"seen": 3}, SETTINGS)
        return save_checkpoint(self.accelerator, folder, progress, self.scheduler, {"ema": self.ema}, keep)

    def load(self, checkpoint: Path, settings: dict[str, Any] = SETTINGS, accept: bool = False) -> Progress:
        return load_checkpoint(
            self.accelerator, checkpoint, settings, self.scheduler, {"ema": self.ema}, accept_changes=accept
        )

    def state(self) -> list[Any]:
        weights = [parameter.detach().clone() for parameter in self.model.parameters()]
        averages = [parameter.detach().clone() for parameter in self.ema.module.parameters()]
        return [weights, averages, self.scheduler.get_last_lr(), int(self.ema.n_averaged)]


@pytest.fixture
def small() -> Small:
    return Small()


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def test_what_is_loaded_is_what_was_saved(small: Small, tmp_path: Path) -> None:
    for _ in range(3):
        small.step()
    checkpoint, saved = small.save(tmp_path, 3), small.state()
    assert checkpoint == tmp_path / "step-00000003"
    small.step()
    continued = small.state()

    torch.manual_seed(7)
    fresh = Small()
    progress = fresh.load(checkpoint)
    assert progress == Progress(3, 30, [{"epoch": 1, "loss": 0.1}], [[1.5, 2.0]], {"seen": 3}, SETTINGS)
    torch.testing.assert_close(fresh.state(), saved, rtol=0, atol=0)
    fresh.step()
    torch.testing.assert_close(fresh.state(), continued, rtol=0, atol=0)


def test_only_the_newest_are_kept(small: Small, tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        small.save(tmp_path, step)
    assert names(tmp_path) == ["step-00000003", "step-00000010"]
    assert not (tmp_path / ".unfinished").exists()
    with pytest.raises(ValueError, match="keep at least 1"):
        small.save(tmp_path, 11, keep=0)


@pytest.mark.parametrize(("keep", "expected"), [(1, [5]), (2, [4, 5]), (3, [2, 4, 5])])
def test_later_ones_do_not_displace_the_one_just_written(
    small: Small, tmp_path: Path, keep: int, expected: list[int]
) -> None:
    """As when the newest was passed over because it is broken."""
    for step in (2, 4, 6, 8):
        small.save(tmp_path, step, keep=9)
    small.save(tmp_path, 5, keep)
    assert names(tmp_path) == [f"step-{step:08d}" for step in expected]


def test_a_step_that_is_trained_again_replaces_its_checkpoint(small: Small, tmp_path: Path) -> None:
    checkpoint = small.save(tmp_path, 1)
    (checkpoint / "left_over").touch()
    small.save(tmp_path, 1)
    assert not (checkpoint / "left_over").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("renames", [0, 1])
def test_killed_while_a_checkpoint_is_replaced(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """Before the old one is moved aside, and between that and the naming of the new one."""
    small.save(tmp_path, 1, keep=1)
    original, left = os.replace, [renames]

    def interrupted(*paths: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        original(*paths)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small.save(tmp_path, 1, keep=1)
    monkeypatch.undo()
    found = checkpoint_to_resume("latest", tmp_path)
    assert found == tmp_path / "step-00000001"
    assert broken_files(found) == []
    small.save(tmp_path, 2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_which_checkpoint_is_resumed(small: Small, tmp_path: Path) -> None:
    assert checkpoint_to_resume(None, tmp_path / "none") is None
    assert checkpoint_to_resume("auto", tmp_path / "none") is None
    with pytest.raises(ValueError, match=r"Expected a complete checkpoint in .*none, got none"):
        checkpoint_to_resume("latest", tmp_path / "none")
    older, newer = small.save(tmp_path, 1), small.save(tmp_path, 2)
    assert checkpoint_to_resume(str(older), tmp_path / "none") == older
    assert checkpoint_to_resume("latest", tmp_path) == checkpoint_to_resume("auto", tmp_path) == newer
    with pytest.raises(ValueError, match=r"without checkpoints for a new training, got .*step-00000002"):
        checkpoint_to_resume(None, tmp_path)
    with pytest.raises(ValueError, match=r"Expected a complete checkpoint, got .* with manifest\.json"):
        checkpoint_to_resume(str(tmp_path), tmp_path)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def grow(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")


def forget_progress(file: Path) -> None:
    listed = json.loads(file.read_text())
    del listed["progress.json"]
    file.write_text(json.dumps(listed))


DAMAGES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("model.safetensors", Path.unlink, "model.safetensors: missing"),
    ("optimizer.bin", cut, r"optimizer.bin: \d+ bytes, not \d+"),
    ("ema.safetensors", flip, "ema.safetensors: other bytes than were written"),
    ("progress.json", grow, r"progress.json: \d+ bytes, not \d+"),
    ("manifest.json", cut, "manifest.json: Expecting"),
    ("manifest.json", lambda file: file.write_text("[1]"), "manifest.json: .*no attribute"),
    ("manifest.json", lambda file: file.write_text('{"a": 1}'), "manifest.json: "),
    ("manifest.json", lambda file: file.write_text('{"a": {"bytes": 1}}'), "manifest.json: 'sha256'"),
    ("manifest.json", lambda file: file.write_bytes(b"\xff\xfe"), "manifest.json: .*decode"),
    ("manifest.json", forget_progress, "progress.json: not listed"),
]


@pytest.mark.parametrize(("name", "damage", "told"), DAMAGES)
def test_a_broken_checkpoint_is_passed_over_aloud_or_refused(
    small: Small,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], Any],
    told: str,
) -> None:
    older, newer = small.save(tmp_path, 1), small.save(tmp_path, 2)
    damage(newer / name)
    assert checkpoint_to_resume("latest", tmp_path) == older
    out = capsys.readouterr().out
    assert out.startswith(f"passed over {newer} (")
    with pytest.raises(ValueError, match=told):
        checkpoint_to_resume(str(newer), tmp_path)
    shutil.rmtree(older)
    with pytest.raises(ValueError, match="got only broken ones"):
        checkpoint_to_resume("auto", tmp_path)


def test_without_a_manifest_it_is_no_checkpoint(small: Small, tmp_path: Path) -> None:
    small.save(tmp_path, 1)
    (small.save(tmp_path, 2) / "manifest.json").unlink()
    (tmp_path / "step-3").mkdir()
    assert names(tmp_path) == ["step-00000001"]


def test_other_settings_are_refused_by_name(small: Small, tmp_path: Path) -> None:
    small.step()
    checkpoint, before = small.save(tmp_path, 1), small.state()
    small.step()
    after = small.state()
    with pytest.raises(ValueError, match=r"learning_rate 0.1 \(got 0.2\), new None \(got 1\)"):
        small.load(checkpoint, {**SETTINGS, "learning_rate": 0.2, "new": 1})
    torch.testing.assert_close(small.state(), after, rtol=0, atol=0)
    small.load(checkpoint)
    torch.testing.assert_close(small.state(), before, rtol=0, atol=0)


def test_accepted_changes_take_effect_and_are_printed(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        small.step()
    checkpoint, weights = small.save(tmp_path, 2), small.state()[0]
    other = Small(lr=0.4, decay=0.3)
    other.accelerator.step = 1
    progress = other.load(checkpoint, {**SETTINGS, "learning_rate": 0.4}, accept=True)
    assert "not exactly: learning_rate 0.1 (got 0.4)" in capsys.readouterr().out
    assert progress.settings["learning_rate"] == 0.4
    torch.testing.assert_close(other.state()[0], weights, rtol=0, atol=0)
    (group,) = other.optimizer.param_groups
    assert group["weight_decay"] == 0.3
    assert group["lr"] == other.scheduler.get_last_lr()[0] == pytest.approx(0.4 * 0.5**2)
    assert other.accelerator.step == 0  # windows of accumulation begin anew
    other.step()
    assert other.optimizer.param_groups[0]["lr"] == pytest.approx(0.4 * 0.5**3)


@pytest.mark.parametrize("error", [OSError("no room"), RuntimeError("no room")])
def test_a_checkpoint_that_cannot_be_written_leaves_the_others(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(checkpointing, "_save_module", fail)
    with pytest.raises(CheckpointError, match=f"got {type(error).__name__}: no room; there is none yet"):
        small.save(tmp_path, 1)
    monkeypatch.undo()
    kept = small.save(tmp_path, 1)
    monkeypatch.setattr(checkpointing, "_save_module", fail)
    with pytest.raises(CheckpointError, match=r"the newest that is complete is .*step-00000001"):
        small.save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert broken_files(kept) == []


def test_what_goes_wrong_in_another_process_is_raised_in_this_one(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointing, "gather_object", lambda own: [*own, "OSError: no room there"])
    with pytest.raises(CheckpointError, match="OSError: no room there"):
        small.save(tmp_path, 1)


def test_a_refusal_of_the_main_process_is_that_of_all(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = small.save(tmp_path, 1)
    assert agreed_checkpoint(small.accelerator, "auto", tmp_path) == checkpoint
    with pytest.raises(ValueError, match="Expected a folder without checkpoints"):
        agreed_checkpoint(small.accelerator, None, tmp_path)
    monkeypatch.setattr(checkpointing, "broadcast_object_list", lambda answer: [None, "refused there"])
    with pytest.raises(ValueError, match="refused there"):
        agreed_checkpoint(small.accelerator, "auto", tmp_path)


def test_running_sums_of_another_number_of_processes_are_added(small: Small) -> None:
    totals = totals_of_all(torch.tensor([0.1, 2.0], dtype=torch.float64))
    assert totals == [[0.1, 2.0]]
    assert own_totals(totals, small.accelerator).tolist() == [0.1, 2.0]
    assert own_totals([[1.0, 2.0], [3.0, 4.0]], small.accelerator).tolist() == [4.0, 6.0]
    assert replace(Progress(), totals=totals).totals == totals
