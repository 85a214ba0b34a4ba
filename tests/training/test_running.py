# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""When checkpoints are written, and how a training stops; `tests/runs` stops whole trainings."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from vitreg_hf.training import running
from vitreg_hf.training.checkpointing import CheckpointError, Progress
from vitreg_hf.training.running import STOPPED_EXIT_CODE, Saver, StopRequest


@pytest.fixture
def accelerator() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True)


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps at which checkpoints were written."""
    steps: list[int] = []

    def save(accelerator: Any, folder: Path, progress: Progress, *rest: Any) -> Path:
        steps.append(progress.step)
        return folder / str(progress.step)

    monkeypatch.setattr(running, "save_checkpoint", save)
    return steps


def run(saver: Saver, steps: int) -> None:
    for step in range(1, steps + 1):
        saver.after_step(step, lambda step=step: Progress(step))


def saver_of(accelerator: Accelerator, stop: StopRequest, folder: Path, save_steps: int) -> Saver:
    scheduler: Any = None
    return Saver(accelerator, folder, scheduler, {}, stop, save_steps)


def test_checkpoints_are_written_when_they_are_due(accelerator: Accelerator, saved: list[int], tmp_path: Path) -> None:
    run(saver_of(accelerator, StopRequest(accelerator), tmp_path, 3), 10)
    assert saved == [3, 6, 9]
    run(saver_of(accelerator, StopRequest(accelerator), tmp_path, 0), 10)
    assert saved == [3, 6, 9]


def test_a_stop_request_ends_the_step_writes_a_checkpoint_and_leaves(
    accelerator: Accelerator, saved: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(accelerator) as stop:
        saver = saver_of(accelerator, stop, tmp_path, 3)
        run(saver, 4)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit) as left:
            saver.after_step(5, lambda: Progress(5))
    assert left.value.code == STOPPED_EXIT_CODE == 85
    assert saved == [3, 5]
    assert "stopped   after step 5, as asked" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_program_that_cannot_write_leaves_with_a_sentence(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*args: Any) -> Path:
        raise CheckpointError("no room")

    monkeypatch.setattr(running, "save_checkpoint", save)
    with pytest.raises(SystemExit) as left:
        run(saver_of(accelerator, StopRequest(accelerator), tmp_path, 1), 1)
    assert left.value.code == "no room"
