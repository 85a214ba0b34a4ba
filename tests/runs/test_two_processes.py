# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Two processes that train one model: killed, stopped, short of room, and continued as one."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .outcome import AUGMENTED, CLASSIFY, NEWEST, RANDOM, TINY, checkpoints, differing, outcome

BATCHES = 18  # of a process
KILL, STOP = {"signal": signal.SIGKILL}, {"signal": signal.SIGTERM}


def launch(trainer, *argv, faults=(None, None)):
    """Results of both processes; the one that is left alone notices."""
    return [job.wait() for job in trainer.start_ranks(CLASSIFY, *argv, faults=faults)]


@pytest.fixture(scope="module")
def together(trainer, tmp_path_factory) -> dict[str, Any]:
    """What two processes leave to which nothing happens."""
    folder = tmp_path_factory.mktemp("together")
    results = launch(trainer, *RANDOM, "--output_dir", folder)
    assert [one.returncode for one in results] == [0, 0], results[0].stderr
    return outcome(folder)


FAULTS = {
    "first killed": ({"backward": 11, **KILL}, None),
    "second killed": (None, {"backward": 14, **KILL}),
    "both killed": ({"backward": 8, **KILL}, {"backward": 9, **KILL}),
    "killed between files": ({"file": 31, **KILL}, None),
    "first stopped": ({"backward": 8, **STOP}, None),
    "both stopped one after the other": ({"backward": 11, **STOP}, {"backward": 5, **STOP}),
    "first has no room": ({"backward": 9, "room": 30_000}, None),
    "second has no room": (None, {"backward": 9, "room": 8_000}),
}
CODES = {"stopped": [85, 85], "no room": [1, 1]}


@pytest.mark.parametrize("name", FAULTS)
def test_interrupted_and_resumed(trainer, together, tmp_path, name):
    argv = [*RANDOM, *NEWEST, "--output_dir", tmp_path]
    ended = launch(trainer, *argv, faults=FAULTS[name])
    for word, codes in CODES.items():
        assert word not in name or [one.returncode for one in ended] == codes, ended[0].stderr
    assert any(one.returncode != 0 for one in ended)
    assert "no room" not in name or ended[1].stderr == "" or "Traceback" not in ended[0].stderr + ended[1].stderr
    assert [one.returncode for one in launch(trainer, *argv)] == [0, 0]
    assert differing(tmp_path, together) == []


def test_another_number_of_processes_is_refused_or_accepted(trainer, tmp_path):
    argv = [*RANDOM, *NEWEST, "--output_dir", tmp_path]
    launch(trainer, *argv, faults=({"backward": 14, **KILL}, {"backward": 14, **KILL}))
    assert checkpoints(tmp_path) == ["step-00000002", "step-00000004"]
    alone = trainer.run(CLASSIFY, *argv)
    assert alone.returncode == 1
    assert "processes 2 (got 1)" in alone.stderr
    asked = trainer.run(CLASSIFY, *argv, "--resume_with_changes")
    assert "Expected 48 images per step as in the checkpoint, got 24" in asked.stderr
    done = trainer.run(CLASSIFY, *argv, "--resume_with_changes", "--gradient_accumulation_steps", 6)
    assert done.returncode == 0, done.stderr
    assert "gradient_accumulation_steps 3 (got 6), processes 2 (got 1)" in done.stdout
    progress = json.loads((tmp_path / "checkpoints" / checkpoints(tmp_path)[-1] / "progress.json").read_text())
    assert (progress["step"], progress["position"]) == (6, 6 * 48)
    curve = json.loads((tmp_path / "results.json").read_text())["curve"]
    assert [entry["step"] for entry in curve] == [2, 4, 6]


def test_one_and_two_processes_train_the_same_model(trainer, tmp_path):
    """Of the same images per step, in the same order, with the same augmentation."""
    argv = [*TINY, *AUGMENTED, "--label_smoothing_factor", "0.1", "--ema_decay", "0.8", "--logging_steps", "2"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert trainer.run(CLASSIFY, *argv, "--gradient_accumulation_steps", 6, "--output_dir", one).returncode == 0
    assert [job.returncode for job in launch(trainer, *argv, "--output_dir", two)] == [0, 0]
    alone, shared = ([_losses(entry) for entry in outcome(folder)["curve"]] for folder in (one, two))
    torch.testing.assert_close(torch.tensor(shared), torch.tensor(alone), rtol=1e-5, atol=1e-6)
    weights, others = (load_file(folder / "model.safetensors") for folder in (one, two))
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-3, atol=1e-4, msg=name)


def _losses(entry: dict[str, Any]) -> list[float]:
    return [entry["train_loss"], entry["eval_loss"]]


def test_a_launch_that_was_asked_for_more_than_it_starts_is_refused(trainer, tmp_path: Path):
    """`torchrun` without ACCELERATE_USE_CPU: each process would train a model of its own."""
    refused = trainer.run(CLASSIFY, *TINY, "--output_dir", tmp_path / "never", environment={"WORLD_SIZE": "2"})
    assert refused.returncode == 1
    assert "Expected 2 processes that train one model (WORLD_SIZE=2), got 1" in refused.stderr
    assert not (tmp_path / "never").exists()
