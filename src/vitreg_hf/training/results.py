# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What a training leaves behind: the folder, `results.json`, and where it ran."""

import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from vitreg_hf.training.classification_settings import MODEL_SETTINGS, ImageClassificationSettings
from vitreg_hf.training.labelled_images import ImageClassificationData
from vitreg_hf.training.streamed_data import StreamedImageClassificationData
from vitreg_hf.version import __version__

_PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "datasets", "evaluate", "numpy")


def describe_training(
    settings: ImageClassificationSettings,
    accelerator: Accelerator,
    model: PreTrainedModel,
    curve: Sequence[dict[str, Any]],
    epochs: int,
) -> dict[str, Any]:
    """Sections `model`, `hyperparameters`, `evaluation`, `curve`, `versions`, `hardware` and `seconds` of the results.

    `seconds.train` counts the epochs with their evaluations, of an interrupted training too; starting and writing
    files is for the caller to add.
    """
    averaged = settings.ema_decay is not None
    images_per_update = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    return {
        "model": {
            "name": f"vitreg-{settings.source_name()}",
            **(
                {}
                if settings.init_from is None or os.path.exists(settings.init_from)
                else {"base_model": settings.init_from}
            ),
            "parameters": model.num_parameters(),
            **{name: getattr(model.config, name) for name in MODEL_SETTINGS},
        },
        "hyperparameters": {
            **settings.hyperparameters(),
            "total_train_batch_size": images_per_update * accelerator.num_processes,
        },
        "evaluation": {
            "epoch": len(curve),
            "weights": "moving average of the weights" if averaged else "weights of the last epoch",
            "stopped_early": len(curve) < epochs,
        },
        "curve": list(curve),
        "versions": versions(),
        "hardware": hardware(accelerator),
        "seconds": {"train": sum(entry["seconds"] for entry in curve)},
    }


def describe_data(
    data: ImageClassificationData | StreamedImageClassificationData, skipped: Sequence[str]
) -> dict[str, Any]:
    """Section `data` of the results: where the images come from and how many there are; None if nobody knows."""
    folder = os.path.abspath(data.source)
    return {
        "source": os.path.basename(os.path.normpath(data.source)) if os.path.isabs(data.source) else data.source,
        "hub_id": data.hub_id,
        "license": data.license,
        "classes": data.class_names,
        "train_images": data.train.num_images,
        "evaluation_images": data.evaluation.num_images,
        "evaluation_split": data.evaluation_split,
        "held_out_by": data.held_out_by,
        "skipped_images": [_below(os.path.dirname(folder), _below(folder, one)) for one in skipped],
    }


def _below(folder: str, text: str) -> str:
    """The text without a folder: the rest of a path is nobody's business."""
    return text.replace(os.path.join(folder, ""), "")


def versions() -> dict[str, str]:
    """Version of Python and of every package that takes part in a training."""
    packages = {name: version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "vitreg_hf": __version__, **packages}


def hardware(accelerator: Accelerator) -> dict[str, Any]:
    """What a training runs on, and how."""
    on_gpu = accelerator.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(accelerator.device) if on_gpu else accelerator.device.type,
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "processes": accelerator.num_processes,
        "threads_per_process": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
    }


def processor_name() -> str:
    """Model of the CPU as Linux names it; its architecture elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_results(results: dict[str, Any], path: Path) -> None:
    """Write `results.json`; at `path` there is always a complete file, the old one or the new one.

    Raises:
        ValueError: if a number is not finite: JSON has none such, and a training that diverged has no results.
    """
    text = json.dumps(results, indent=2, allow_nan=False)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text + "\n")
    os.replace(unfinished, path)


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` when all are written, replacing those of the same name."""
    staging = folder / ".unfinished"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        for file in sorted(staging.iterdir()):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(staging)
