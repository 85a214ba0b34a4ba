# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""SIGTERM or Ctrl-C: a checkpoint, a message, an exit code of its own, and a continuation that is exact."""

import random
import signal
import time

import pytest

from .outcome import CLASSIFY, NEWEST, RANDOM, checkpoints, differing


@pytest.mark.parametrize("batch", [1, 8, 36])
def test_asked_to_stop_it_checkpoints_the_step_and_says_so(trainer, uninterrupted, tmp_path, batch):
    argv = [*RANDOM, "--save_steps", 0, *NEWEST, "--output_dir", tmp_path]
    stopped = trainer.run(CLASSIFY, *argv, fault={"backward": batch, "signal": signal.SIGTERM})
    assert stopped.returncode == 85, stopped.stderr
    step = -(-batch // 3)  # the step that was under way is finished
    assert checkpoints(tmp_path) == [f"step-{step:08d}"]
    assert f"stopped   after step {step}, as asked; --resume_from_checkpoint latest continues" in stopped.stdout
    assert not (tmp_path / "results.json").exists()
    # nothing is done twice and nothing is left out
    assert trainer.run(CLASSIFY, *argv, "--save_steps", 2).returncode == 0
    assert differing(tmp_path, uninterrupted) == []


def test_ctrl_c_stops_like_a_scheduler(trainer, uninterrupted, tmp_path):
    argv = [*RANDOM, *NEWEST, "--output_dir", tmp_path]
    stopped = trainer.run(CLASSIFY, *argv, fault={"backward": 8, "signal": signal.SIGINT})
    assert stopped.returncode == 85, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert trainer.run(CLASSIFY, *argv).returncode == 0
    assert differing(tmp_path, uninterrupted) == []


@pytest.mark.parametrize("to_all", [False, True], ids=["training", "loaders too"])
def test_stopped_again_and_again(trainer, uninterrupted, tmp_path, to_all):
    """A scheduler may send the signal to every process of a job, loaders included."""
    argv, draw = [*RANDOM, *NEWEST, "--output_dir", tmp_path], random.Random(to_all)
    for _ in range(3):
        job = trainer.start(CLASSIFY, *argv)
        deadline = time.monotonic() + 60
        seen = checkpoints(tmp_path)
        while checkpoints(tmp_path) == seen and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.3))
        job.send(signal.SIGTERM, to_all)
        stopped = job.wait()
        assert stopped.returncode in (85, 0, -signal.SIGTERM), stopped.stderr
        if stopped.returncode != 85:  # it was done with its steps before the signal came
            break
    assert trainer.run(CLASSIFY, *argv).returncode == 0
    assert differing(tmp_path, uninterrupted) == []
