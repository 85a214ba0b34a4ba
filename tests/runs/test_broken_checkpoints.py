# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The newest checkpoint has been damaged, or the settings have changed: said, and dealt with as asked."""

import shutil
import signal

import pytest

from .outcome import CLASSIFY, NEWEST, RANDOM, checkpoints, differing


@pytest.fixture(scope="module")
def interrupted(trainer, tmp_path_factory):
    """Folder of a training that was killed after step 6, with two checkpoints."""
    folder = tmp_path_factory.mktemp("interrupted")
    fault = {"backward": 20, "signal": signal.SIGKILL}
    assert trainer.run(CLASSIFY, *RANDOM, "--output_dir", folder, fault=fault).returncode == -signal.SIGKILL
    assert checkpoints(folder) == ["step-00000004", "step-00000006"]
    return folder


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "model.safetensors": (flip, "other bytes than were written"),
    "optimizer.bin": (lambda file: file.write_bytes(file.read_bytes()[:-1000]), "bytes, not "),
    "ema.safetensors": (lambda file: file.unlink(), "missing"),
    "manifest.json": (lambda file: file.write_text("{"), "Expecting property name"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_older_one_is_used_and_this_is_said(trainer, uninterrupted, interrupted, tmp_path, name):
    folder = tmp_path / "training"
    shutil.copytree(interrupted, folder)
    damage, told = DAMAGES[name]
    damage(folder / "checkpoints" / "step-00000006" / name)
    done = trainer.run(CLASSIFY, *RANDOM, *NEWEST, "--save_total_limit", 1, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("passed over")]
    assert "step-00000006" in line
    assert f"{name}: " in line
    assert told in line
    assert differing(folder, uninterrupted) == []


def test_other_settings_are_refused_with_the_difference_or_accepted(trainer, uninterrupted, interrupted, tmp_path):
    folder = tmp_path / "training"
    shutil.copytree(interrupted, folder)
    argv = [*RANDOM, *NEWEST, "--learning_rate", 0.003, "--output_dir", folder]
    refused = trainer.run(CLASSIFY, *argv)
    assert refused.returncode == 1
    assert "learning_rate 0.002 (got 0.003)" in refused.stderr
    done = trainer.run(CLASSIFY, *argv, "--resume_with_changes")
    assert done.returncode == 0, done.stderr
    assert "continued with other settings than before, so not exactly: learning_rate 0.002 (got 0.003)" in done.stdout
    assert "model" in differing(folder, uninterrupted)


def test_how_images_are_loaded_and_what_is_shown_may_change(trainer, uninterrupted, interrupted, tmp_path):
    folder = tmp_path / "training"
    shutil.copytree(interrupted, folder)
    argv = ["--dataloader_num_workers", 0, "--save_total_limit", 3, "--save_steps", 4, "--output_dir", folder]
    done = trainer.run(CLASSIFY, *RANDOM, *NEWEST, *argv)
    assert done.returncode == 0, done.stderr
    assert differing(folder, uninterrupted) == []
    assert checkpoints(folder) == ["step-00000006", "step-00000008", "step-00000012"]


def test_a_new_training_does_not_mix_its_checkpoints_with_others(trainer, interrupted):
    refused = trainer.run(CLASSIFY, *RANDOM, "--output_dir", interrupted)
    assert refused.returncode == 1
    assert "Expected a folder without checkpoints for a new training" in refused.stderr


def test_a_finished_training_that_is_resumed_is_evaluated_again(trainer, uninterrupted, interrupted, tmp_path):
    folder = tmp_path / "training"
    shutil.copytree(interrupted, folder)
    for _ in range(2):
        assert trainer.run(CLASSIFY, *RANDOM, *NEWEST, "--output_dir", folder).returncode == 0
        assert differing(folder, uninterrupted) == []
