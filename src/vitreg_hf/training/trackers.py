# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Curves in TensorBoard, trackio and Weights & Biases, through Accelerate.

Accelerate passes over a tracker that is not installed with at most a warning, and then records nothing; here that is
an error before the training starts. A run that is resumed goes on in the same curves.
"""

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelerate import Accelerator

TRACKERS = ("tensorboard", "trackio", "wandb")  # Accelerate's names, which are those of the packages too
_FOLDER, _RUN = "trackers", "run.json"


def check_trackers(names: Sequence[str]) -> list[str]:
    """The trackers that are meant by names, for `Accelerator(log_with=...)`.

    Args:
        names: some of `TRACKERS`; or `all` alone, those that are installed; or `none` alone.

    Raises:
        ValueError: if a name is unknown, none is installed for `all`, or one that is asked for is not installed.
    """
    if unknown := [name for name in names if name not in (*TRACKERS, "all", "none")]:
        raise ValueError(f"Expected report_to out of {', '.join(TRACKERS)}, all and none, got {', '.join(unknown)}")
    if len(set(names)) > 1 and {"all", "none"} & set(names):
        raise ValueError(f"Expected report_to with all or none alone, got {', '.join(names)}")
    if "none" in names:
        return []
    if "all" in names:
        found = [name for name in TRACKERS if _is_installed(name)]
        if not found:
            raise ValueError(f"Expected one of {', '.join(TRACKERS)} to be installed for report_to all, got none")
        return found
    missing = [name for name in TRACKERS if name in names and not _is_installed(name)]
    if missing:
        raise ValueError(
            f"Expected {' and '.join(missing)} to be installed for report_to, got no such package: "
            f"pip install {' '.join(missing)}"
        )
    return list(dict.fromkeys(names))


def _is_installed(name: str) -> bool:
    """Whether a package is installed; a folder `wandb` that an earlier run left can be imported, but is none."""
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def tracker_folder(output_folder: Path) -> Path:
    """Where the trackers of a training write, for `Accelerator(project_dir=...)`."""
    return output_folder / _FOLDER


def start_trackers(
    accelerator: Accelerator, project: str, output_folder: Path, hyperparameters: Mapping[str, Any], step: int = 0
) -> None:
    """Start the trackers of a training, or go on with those of one that is resumed. To be called by every process.

    All of them write below `tracker_folder`, trackio unless TRACKIO_DIR says otherwise. Steps after the checkpoint
    that the earlier run had reached already are replaced in TensorBoard, stay as they were in wandb, and are there
    twice in trackio: with equal numbers, as the resumed run is the same.

    Args:
        accelerator: made with `log_with=check_trackers(...)` and `project_dir=tracker_folder(...)`.
        project: what runs are sorted under.
        output_folder: of the training; its name becomes part of that of the run.
        hyperparameters: of a new run; numbers, texts and truth values of it are recorded.
        step: updates of the weights so far; 0 starts a new run.
    """
    if not accelerator.log_with:
        return
    folder = tracker_folder(output_folder)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TRACKIO_DIR", str((folder / "trackio").resolve()))  # read when trackio is imported
    run = _run_name(output_folder, step) if accelerator.is_main_process else ""
    accelerator.init_trackers(
        project,
        config=None if step else _flat(hyperparameters),
        init_kwargs={
            # 0 hides what an earlier training has left in the same folder.
            "tensorboard": {"purge_step": step + 1 if step else 0},
            "trackio": {"name": run, "resume": "allow", "embed": False, "auto_log_gpu": False, "auto_log_cpu": False},
            "wandb": {"name": run, "id": run, "resume": "allow", "dir": str(folder)},
        },
    )
    if accelerator.is_main_process:
        for tracker in accelerator.trackers:
            print(f"curves    {_how_to_see(tracker.name, project, folder)}")


def _how_to_see(name: str, project: str, folder: Path) -> str:
    if name == "tensorboard":
        return f"tensorboard --logdir {folder}"
    return f"TRACKIO_DIR={os.environ['TRACKIO_DIR']} trackio show --project {project}" if name == "trackio" else name


def log_to_trackers(accelerator: Accelerator, numbers: Mapping[str, Any], step: int) -> None:
    """Record the numbers of a step, leaving out what is no finite number."""
    if finite := {name: value for name, value in numbers.items() if _is_number(value)}:
        accelerator.log(finite, step=step)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _run_name(output_folder: Path, step: int) -> str:
    """The name of this run: that of the training which it continues, or a new one that no other run has."""
    file = tracker_folder(output_folder) / _RUN
    if step and file.is_file():
        return json.loads(file.read_text())["name"]
    name = f"{output_folder.resolve().name}-{secrets.token_hex(4)}"
    file.write_text(json.dumps({"name": name}) + "\n")
    return name


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Settings in one level, `outer/inner`; lists as texts, and nothing that is None."""
    flat: dict[str, str | int | float | bool] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}/")
        elif value is not None:
            flat[f"{prefix}{name}"] = value if isinstance(value, str | int | float | bool) else str(value)
    return flat
