# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""A training that is killed wherever it is, as often as it is, ends bit by bit as one that is left alone.

VITREG_KILLS is how many random histories are tried; `0`, `1`, ... are always the same ones, but for those that are
killed by the clock.
"""

import os
import random
import signal
import time

import pytest

from .outcome import BATCHES, CLASSIFY, NEWEST, RANDOM, checkpoints, differing, outcome

HISTORIES = int(os.environ.get("VITREG_KILLS", "18"))
VARIANTS = (
    ["--save_steps", "1"],
    ["--save_steps", "2", "--dataloader_num_workers", "0"],
    ["--save_steps", "3", "--save_total_limit", "1"],
)
OTHER_KINDS = {
    "subset of a batch skips a block": ["--drop_path_kind", "subset", "--drop_path_rate", "0.5"],
    "repeated 3-augment": ["--three_augment", "true", "--rand_augment", "false", "--repeated_augmentation", "3"],
    "binary loss": ["--loss", "bce", "--label_smoothing_factor", "0", "--drop_path_schedule", "uniform"],
}
FILE_EVENTS = 240  # a little more than a training of this size has; a fault beyond the last one does nothing


def kill_somewhere(trainer, draw, *argv):
    """Start a training and kill it at a batch, at a file, or after a time."""
    fault = draw.choice(
        [
            {"backward": draw.randint(1, BATCHES), "signal": signal.SIGKILL},
            {"file": draw.randint(1, FILE_EVENTS), "signal": signal.SIGKILL},
            None,
        ]
    )
    job = trainer.start(CLASSIFY, *argv, fault=fault)
    if fault is None:
        time.sleep(draw.uniform(0, 2))
        job.send(signal.SIGKILL)
    return job.wait()


@pytest.mark.parametrize("history", range(HISTORIES))
def test_killed_at_random_places_and_resumed(trainer, uninterrupted, tmp_path, history):
    draw = random.Random(history)
    argv = [*RANDOM, *VARIANTS[history % len(VARIANTS)], *NEWEST, "--output_dir", tmp_path]
    for _ in range(draw.choice((1, 1, 2, 3))):
        killed = kill_somewhere(trainer, draw, *argv)
        assert killed.returncode in (-signal.SIGKILL, 0), killed.stderr
        if killed.returncode == 0:  # the place was behind the end
            break
    done = trainer.run(CLASSIFY, *argv)
    assert done.returncode == 0, done.stderr
    assert differing(tmp_path, uninterrupted) == []


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_random_things_are_as_exact(trainer, tmp_path, kind):
    whole, killed = [[*RANDOM, *OTHER_KINDS[kind], *NEWEST, "--output_dir", tmp_path / name] for name in ("a", "b")]
    done = trainer.run(CLASSIFY, *whole)
    assert done.returncode == 0, done.stderr
    fault = {"backward": 23, "signal": signal.SIGKILL}
    assert trainer.run(CLASSIFY, *killed, fault=fault).returncode == -signal.SIGKILL
    assert trainer.run(CLASSIFY, *killed).returncode == 0
    assert differing(tmp_path / "b", outcome(tmp_path / "a")) == []


def test_killed_between_the_files_of_a_checkpoint_there_is_always_one(trainer, uninterrupted, tmp_path):
    """Of two with the same step, one replacing the other, and only one that is kept."""
    argv = [*RANDOM, "--save_steps", "4", "--save_every_epochs", "1", "--save_total_limit", "1"]
    argv += ["--max_steps", "4", "--num_train_epochs", "1", "--dataloader_num_workers", "0"]
    whole = trainer.run(CLASSIFY, *argv, "--output_dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert whole.events > 30
    there = False
    for event in range(1, whole.events + 1, 1 if HISTORIES > 99 else 7):
        folder = tmp_path / str(event)
        fault = {"file": event, "signal": signal.SIGKILL}
        killed = trainer.run(CLASSIFY, *argv, "--output_dir", folder, fault=fault)
        assert killed.returncode == -signal.SIGKILL
        if there:  # one that was complete once
            looked = trainer.run(CLASSIFY, *argv, "--output_dir", folder, "--resume_from_checkpoint", "latest")
            assert looked.returncode == 0, looked.stderr
        there = there or bool(checkpoints(folder))
