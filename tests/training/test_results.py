# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What a training leaves behind."""

import json
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from vitreg_hf.training.results import hardware, staged_folder, versions, write_results


@pytest.fixture
def accelerator() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


def test_a_failed_write_leaves_the_old_results(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results({"loss": 0.5}, path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results({"loss": float("nan")}, path)
    assert json.loads(path.read_text()) == {"loss": 0.5}
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_files_appear_together_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "kept").write_text("kept")
    with pytest.raises(OSError, match="disk full"), staged_folder(tmp_path) as folder:
        (folder / "old").write_text("new")
        raise OSError("disk full")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"old": "old", "kept": "kept"}
    with staged_folder(tmp_path) as folder:
        (folder / "old").write_text("new")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"old": "new", "kept": "kept"}


def test_versions_and_hardware_are_json(accelerator: Accelerator) -> None:
    assert {"python", "vitreg_hf", "torch", "transformers"} <= set(versions())
    described = hardware(accelerator)
    assert described["device"] == "cpu"
    assert described["processes"] == 1
    json.dumps([versions(), described])
