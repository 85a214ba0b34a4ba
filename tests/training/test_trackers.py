# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Trackers record what they are asked to, in one run over all resumptions; one that is missing is an error."""

import json
import sqlite3
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
from accelerate import Accelerator

from vitreg_hf.training import trackers
from vitreg_hf.training.trackers import check_trackers, log_to_trackers, start_trackers, tracker_folder


@pytest.fixture
def installed(monkeypatch):
    """Makes believe that of the trackers only some are installed."""

    def only(*names):
        def version(name):
            if name not in names:
                raise PackageNotFoundError(name)
            return "1.0"

        monkeypatch.setattr(trackers, "version", version)

    return only


def test_none_is_none_and_all_is_what_is_installed(installed):
    installed("tensorboard", "wandb")
    assert check_trackers(["none"]) == check_trackers([]) == []
    assert check_trackers(["all"]) == ["tensorboard", "wandb"]
    assert check_trackers(["wandb", "tensorboard", "wandb"]) == ["wandb", "tensorboard"]


def test_a_tracker_that_is_not_installed_is_an_error_that_says_what_to_install(installed):
    installed("trackio")
    with pytest.raises(ValueError, match=r"tensorboard and wandb to be installed .* pip install tensorboard wandb"):
        check_trackers(["wandb", "trackio", "tensorboard"])
    installed()
    with pytest.raises(ValueError, match="one of tensorboard, trackio, wandb to be installed"):
        check_trackers(["all"])


@pytest.mark.parametrize("names", [["all", "wandb"], ["none", "tensorboard"], ["mlflow"], ["TensorBoard"]])
def test_names_without_a_meaning_are_refused(names):
    with pytest.raises(ValueError, match="Expected report_to"):
        check_trackers(names)


def test_a_folder_that_wandb_left_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        trackers.version("wandb")
    except PackageNotFoundError:
        with pytest.raises(ValueError, match="pip install wandb"):
            check_trackers(["wandb"])
    else:
        pytest.skip("wandb is installed")


def test_without_trackers_nothing_is_written(tmp_path):
    accelerator = Accelerator(cpu=True)
    start_trackers(accelerator, "digits", tmp_path, {"seed": 0})
    log_to_trackers(accelerator, {"loss": 1.0}, 10)
    assert list(tmp_path.iterdir()) == []


HYPERPARAMETERS = {"learning_rate": 1e-3, "betas": [0.9, 0.999], "ema": None, "flip": True, "data": {"name": "digits"}}


def run(name, folder, start, numbers):
    accelerator = Accelerator(cpu=True, log_with=check_trackers([name]), project_dir=tracker_folder(folder))
    start_trackers(accelerator, "digits", folder, HYPERPARAMETERS, start)
    for step, loss in numbers.items():
        log_to_trackers(accelerator, {"loss": loss, "broken": float("nan"), "unknown": None, "name": "a"}, step)
    accelerator.end_training()


def needs(name):
    try:
        check_trackers([name])
    except ValueError:
        pytest.skip(f"{name} is not installed")


def curve_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "trackers" / "digits"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    return {event.step: event.value for event in events.Scalars("loss")}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what tensorboard imports
def test_tensorboard_has_one_curve_over_resumptions(tmp_path, capsys):
    needs("tensorboard")
    run("tensorboard", tmp_path, 0, {10: 1.0, 20: 0.5, 30: 9.0})
    run("tensorboard", tmp_path, 20, {30: 0.25, 40: 0.125})
    assert curve_of(tmp_path) == {10: 1.0, 20: 0.5, 30: 0.25, 40: 0.125}
    (settings,) = (tmp_path / "trackers").rglob("hparams.yml")  # written once
    assert "data/name: digits" in settings.read_text()
    assert f"tensorboard --logdir {tmp_path / 'trackers'}" in capsys.readouterr().out
    run("tensorboard", tmp_path, 0, {10: 7.0})  # a new training in the same folder
    assert curve_of(tmp_path) == {10: 7.0}


TRACKIO = """
from pathlib import Path
import json, sys
sys.path.insert(0, {tests!r})
from test_trackers import run
run("trackio", Path({folder!r}), 0, {{10: 1.0, 20: 0.5}})
run("trackio", Path({folder!r}), 20, {{30: 0.25}})
"""


def test_trackio_has_one_run_over_resumptions_inside_the_output_folder(tmp_path, monkeypatch):
    """In a process of its own: trackio reads where it writes to when it is imported."""
    needs("trackio")
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    tests = str(__file__).rsplit("/", 1)[0]
    code = TRACKIO.format(tests=tests, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"TRACKIO_DIR={tmp_path / 'trackers' / 'trackio'} trackio show" in done.stdout
    with sqlite3.connect(tmp_path / "trackers" / "trackio" / "digits.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    database.close()
    name = json.loads((tmp_path / "trackers" / "run.json").read_text())["name"]
    assert [(run, step) for run, step, _ in rows] == [(name, 10), (name, 20), (name, 30)]
    assert [json.loads(metrics)["loss"] for _, _, metrics in rows] == [1.0, 0.5, 0.25]
