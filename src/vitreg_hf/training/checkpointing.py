# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints at epoch boundaries that continue a training bit by bit.

Every epoch starts from a seed of its own (`epoch_seed`), so nothing random crosses the boundary between two epochs:
order, augmentation, mixing, dropout and the seeds of loading processes follow from seed and epoch alone.

A checkpoint is written under a temporary name and renamed when complete. No pickle is loaded without `weights_only`.
"""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

_PROGRESS_FILE = "progress.json"
_EMA_FILE = "ema.safetensors"
_NAME = re.compile(r"epoch-(\d{5})")


def epoch_seed(seed: int, epoch: int, process_index: int = 0) -> int:
    """Seed of one epoch in one process; neighbouring arguments give unrelated numbers (below 2**32)."""
    return int(np.random.SeedSequence([seed, epoch, process_index]).generate_state(1)[0])


@dataclass(frozen=True)
class Progress:
    """How far a training is, besides weights and optimizer.

    Attributes:
        epoch: epochs completed.
        step: updates of the weights so far.
        curve: one entry per epoch, as in `results.json`.
        settings: what has to be equal for the continuation to be exact; compared on resuming.
    """

    epoch: int
    step: int
    curve: list[dict[str, Any]]
    settings: dict[str, Any]


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    progress: Progress,
    scheduler: LRScheduler,
    ema: AveragedModel | None = None,
    keep: int = 2,
) -> Path:
    """Write `folder/epoch-<n>`, then delete all but the newest. To be called by every process.

    Args:
        accelerator: has prepared model and optimizer.
        folder: holds the checkpoints of one training.
        progress: where the training is.
        scheduler: not prepared by the accelerator.
        ema: moving average of the weights, if there is one.
        keep: how many checkpoints stay, this one included.

    Returns:
        The checkpoint.

    Raises:
        ValueError: if `keep` is not positive.
    """
    if keep < 1:
        raise ValueError(f"Expected to keep at least 1 checkpoint, got {keep}")
    final, unfinished = folder / f"epoch-{progress.epoch:05d}", folder / ".unfinished"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if ema is not None:
            save_file(ema.state_dict(), unfinished / _EMA_FILE)
        record = {**asdict(progress), "scheduler": scheduler.state_dict()}
        (unfinished / _PROGRESS_FILE).write_text(json.dumps(record, indent=2))
        shutil.rmtree(final, ignore_errors=True)  # of a training that was continued from an earlier epoch
        os.replace(unfinished, final)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(
    accelerator: Accelerator,
    checkpoint: Path,
    settings: dict[str, Any],
    scheduler: LRScheduler,
    ema: AveragedModel | None = None,
) -> Progress:
    """Restore what `save_checkpoint` wrote, and say where the training was. To be called by every process.

    Raises:
        ValueError: if the checkpoint is incomplete or was written with other settings, naming them.
    """
    record = _read_progress(checkpoint)
    _check_settings(checkpoint, record["settings"], settings)
    accelerator.load_state(str(checkpoint))
    scheduler.load_state_dict(record.pop("scheduler"))
    if ema is not None:
        ema.load_state_dict(load_file(checkpoint / _EMA_FILE))
    return Progress(**record)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest epoch first."""
    named = [path for path in folder.glob("epoch-*") if _NAME.fullmatch(path.name)]
    return sorted(path for path in named if (path / _PROGRESS_FILE).is_file())


def checkpoint_to_resume(wanted: str | None, folder: Path) -> Path | None:
    """The checkpoint to continue from.

    Args:
        wanted: path of a checkpoint, `latest` for the newest complete one in `folder`, or None for a new training.
        folder: where this training keeps its checkpoints.

    Raises:
        ValueError: if the checkpoint does not exist, or if a new training would mix its checkpoints with others.
    """
    found = list_checkpoints(folder)
    if wanted is None:
        if found:
            raise ValueError(
                f"Expected a folder without checkpoints for a new training, got {found[-1]}: resume it (latest)"
            )
        return None
    if wanted != "latest":
        _read_progress(Path(wanted))
        return Path(wanted)
    if not found:
        raise ValueError(f"Expected a complete checkpoint in {folder}, got none")
    return found[-1]


def _read_progress(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / _PROGRESS_FILE
    if not file.is_file():
        raise ValueError(f"Expected a complete checkpoint with {_PROGRESS_FILE}, got {str(checkpoint)!r}")
    return json.loads(file.read_text())


def _check_settings(checkpoint: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    now = json.loads(json.dumps(now))  # tuples become the lists that the file holds
    differing = [name for name in sorted(saved.keys() | now.keys()) if saved.get(name) != now.get(name)]
    if differing:
        listed = ", ".join(f"{name} {saved.get(name)!r} (got {now.get(name)!r})" for name in differing)
        raise ValueError(f"Expected the settings that {checkpoint} was written with: {listed}")
