# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""A full disk: one sentence, older checkpoints as they were, and an exact continuation when there is room again."""

import subprocess

import pytest

from vitreg_hf.training.checkpoint_files import broken_files

from .outcome import CLASSIFY, NEWEST, RANDOM, checkpoints, differing


def assert_refused_in_a_sentence(ended, folder):
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    sentence = ended.stderr.splitlines()[-1]
    assert sentence.startswith(f"Expected to write a checkpoint to {folder / 'checkpoints'}, got ")
    assert sentence.endswith("there is none yet") or str(folder / "checkpoints" / checkpoints(folder)[-1]) in sentence
    assert not (folder / "checkpoints" / ".unfinished").exists()
    for name in checkpoints(folder):
        assert broken_files(folder / "checkpoints" / name) == []


@pytest.mark.parametrize("room", [20_000, 140_000, 200_000])
def test_no_file_may_grow(trainer, uninterrupted, tmp_path, room):
    """At 20,000 bytes the weights do not fit, at 200,000 the optimizer does not."""
    argv = [*RANDOM, *NEWEST, "--output_dir", tmp_path]
    ended = trainer.run(CLASSIFY, *argv, fault={"backward": 14, "room": room})
    assert_refused_in_a_sentence(ended, tmp_path)
    assert checkpoints(tmp_path) == ["step-00000002", "step-00000004"]
    assert trainer.run(CLASSIFY, *argv).returncode == 0
    assert differing(tmp_path, uninterrupted) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system in memory with room for one checkpoint and a half, and how to give it more."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True, check=False
        )

    try:
        mounted = mount("size=900k")
    except FileNotFoundError as error:
        pytest.skip(f"needs mount: {error}")
    if mounted.returncode:
        pytest.skip(f"may not mount a file system: {mounted.stderr.strip()}")
    yield folder, lambda: mount("remount,size=20m")
    subprocess.run(["umount", folder], check=False)


def test_a_file_system_runs_full(trainer, uninterrupted, small_disk):
    folder, enlarge = small_disk
    argv = [*RANDOM, *NEWEST, "--output_dir", folder]
    ended = trainer.run(CLASSIFY, *argv)
    assert_refused_in_a_sentence(ended, folder)
    assert checkpoints(folder) == ["step-00000002"]
    assert enlarge().returncode == 0
    assert trainer.run(CLASSIFY, *argv).returncode == 0
    assert differing(folder, uninterrupted) == []
