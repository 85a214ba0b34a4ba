# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The ablation over numbers of registers: a whole small one, interrupted, repeated, and refused."""

import importlib.util
import json
import signal
import sys
from pathlib import Path

import PIL.Image
import pytest

from vitreg_hf.training.running import STOPPED_EXIT_CODE

ABLATE = "register_ablation"
SCRIPT = Path(__file__).resolve().parents[2] / "examples" / f"{ABLATE}.py"
FEW = [
    *("--num_register_tokens", "0", "3", "--seeds", "0", "1", "--mosaics", "8", "--max_measured_images", "16"),
    *("--timed_seconds", "0"),
]
TINY = [
    *("--num_hidden_layers", "1", "--hidden_size", "32", "--max_train_samples", "64", "--num_train_epochs", "2"),
    *("--logging_steps", "4"),
]
MODELS = ("R0-seed0", "R3-seed0", "R0-seed1", "R3-seed1")  # in the order of their training


@pytest.fixture(scope="module")
def whole(trainer, tmp_path_factory):
    """Folder of an ablation that was never interrupted, and what it said."""
    folder = tmp_path_factory.mktemp("ablation")
    done = trainer.run(ABLATE, *FEW, "--output_dir", folder, "--", *TINY)
    assert done.returncode == 0, done.stderr
    return folder, done


def results_in(folder):
    return json.loads((folder / "results.json").read_text())


def weights_in(folder):
    return {name: (folder / name / "model.safetensors").read_bytes() for name in MODELS}


def test_every_model_is_measured_and_compared(whole):
    folder, _ = whole
    results = results_in(folder)
    assert {name: list(seeds) for name, seeds in results["measures"].items()} == {"0": ["0", "1"], "3": ["0", "1"]}
    for name, seeds in results["measures"].items():
        for measures in seeds.values():
            assert 0 <= measures["dense_miou"] <= 1
            assert measures["images_per_second"] > 0
            assert ("register_similarity" in measures) == (name == "3")
    compared = results["compared"]
    assert compared["accuracy"]["change"]["3"]["n"] == 2
    assert compared["flops_per_image"]["change"]["3"]["verdict"] == "higher"
    assert compared["training_bytes_per_image"]["change"]["3"]["verdict"] == "higher"
    assert "change" not in compared["register_norm"]
    accuracies = [results_in(folder / f"R3-seed{seed}")["metrics"]["accuracy"] for seed in (0, 1)]
    assert compared["accuracy"]["values"]["3"] == accuracies


def test_the_table_and_the_picture_are_written(whole):
    folder, done = whole
    table = (folder / "ablation.md").read_text()
    assert "| R | accuracy, % |" in table
    assert "operations, against R = 0: R = 3: higher." in table
    assert all(line in done.stdout for line in table.splitlines())
    with PIL.Image.open(folder / "ablation.png") as picture:
        assert picture.width > 1500


def test_a_command_of_a_training_is_that_of_the_example(whole):
    command = results_in(whole[0] / "R3-seed1")["command"]
    assert "train_image_classification.py --num_register_tokens 3 --seed 1" in command


def test_what_is_finished_is_not_done_again(trainer, whole):
    folder, _ = whole
    files = [folder / name / file for name in MODELS for file in ("results.json", "measures.json")]
    before = [file.stat().st_mtime_ns for file in files]
    results = results_in(folder)
    again = trainer.run(ABLATE, *FEW, "--output_dir", folder, "--", *TINY)
    assert again.returncode == 0, again.stderr
    assert [file.stat().st_mtime_ns for file in files] == before
    assert results_in(folder)["compared"]["dense_miou"] == results["compared"]["dense_miou"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_same_command_goes_on_after_an_interruption(trainer, whole, tmp_path, number):
    """In the sixth of eight updates of the second model: after its first epoch, which has a checkpoint."""
    argv = [*FEW, "--output_dir", tmp_path, "--", *TINY]
    stopped = trainer.run(ABLATE, *argv, fault={"backward": 14, "signal": number})
    assert stopped.returncode == (STOPPED_EXIT_CODE if number == signal.SIGTERM else -number)
    assert (tmp_path / MODELS[0] / "results.json").is_file()
    assert not (tmp_path / MODELS[1] / "results.json").exists()
    done = trainer.run(ABLATE, *argv)
    assert done.returncode == 0, done.stderr
    assert weights_in(tmp_path) == weights_in(whole[0])


def test_models_of_other_settings_are_refused(trainer, whole):
    other = trainer.run(ABLATE, *FEW, "--output_dir", whole[0], "--", *TINY, "--learning_rate", "0.1")
    assert other.returncode == 1
    assert "learning_rate 0.002 (got 0.1)" in other.stderr


REFUSED = {
    "num_register_tokens of different numbers": ["--num_register_tokens", "0", "0"],
    "seeds of different numbers of 0 or more, got []": ["--seeds"],
    "--seed, which this script sets": ["--", "--seed", "3"],
    "mosaics of 2 or more, got 1": ["--mosaics", "1"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_options_that_make_no_sense_are_refused(ablation, tmp_path, message):
    with pytest.raises((ValueError, SystemExit), match=None if "[]" in message else message):
        ablation.main(["--output_dir", str(tmp_path), *REFUSED[message]])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def ablation(monkeypatch):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("example_register_ablation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("ends", "code"), [("sys.exit(85)", 85), ("os.kill(os.getpid(), 9)", 128 + 9)])
def test_a_launcher_that_fails_ends_the_ablation(ablation, ends, code):
    with pytest.raises(SystemExit) as stopped:
        ablation.launched([sys.executable, "-c", f"import os, sys; {ends}"])
    assert stopped.value.code == code
    ablation.launched([sys.executable, "-c", ""])  # success is silent


def test_trainings_can_be_launched(ablation, monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(ablation, "launched", commands.append)
    settings = ablation.AblationSettings(launch="--num_processes 2", recipe=None, output_dir=str(tmp_path))
    ablation.train(settings, ["--seed", "1"])
    assert commands[0][1:5] == ["-m", "accelerate.commands.launch", "--num_processes", "2"]
    assert commands[0][5].endswith("train_image_classification.py")
    assert commands[0][6:] == ["--seed", "1"]
