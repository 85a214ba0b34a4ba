# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""A small training in which all that can be random is, and everything that it leaves but for times."""

import json
from pathlib import Path
from typing import Any

from vitreg_hf.training.training_log import TIMING_FIELDS

CLASSIFY = "train_image_classification"
TINY = [
    *("--num_hidden_layers", "2", "--hidden_size", "32", "--max_train_samples", "96", "--num_train_epochs", "3"),
    *("--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "3", "--save_steps", "2"),
]
STEPS, BATCHES = 12, 36  # of such a training in one process
AUGMENTED = ["--rand_augment", "true", "--random_resized_crop", "--horizontal_flip", "--color_jitter", "0.3"]
RANDOM = [
    *TINY,
    *AUGMENTED,
    *("--mixup_alpha", "0.8", "--cutmix_alpha", "1.0", "--label_smoothing_factor", "0.1"),
    *("--drop_path_rate", "0.3", "--patch_dropout_rate", "0.2", "--ema_decay", "0.8", "--layer_decay", "0.8"),
    *("--dataloader_num_workers", "2", "--logging_steps", "1"),
]
NEWEST = ["--resume_from_checkpoint", "auto"]
_TIMES = ("seconds", *TIMING_FIELDS)


def checkpoints(folder: Path) -> list[str]:
    """Names of the checkpoints of a training, oldest first."""
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def outcome(folder: Path) -> dict[str, Any]:
    """What a finished training has left, to be compared: weights, averages, optimizer, progress, metrics and curve.

    Files are compared as bytes. The states of generators that Accelerate writes beside them are nobody's: every step
    seeds them.
    """
    newest = folder / "checkpoints" / checkpoints(folder)[-1]
    kept = {file.name: file.read_bytes() for file in newest.iterdir() if file.suffix not in (".json", ".pkl")}
    results = json.loads((folder / "results.json").read_text())
    log = (folder / "training_log.jsonl").read_text().splitlines()
    return {
        "model": (folder / "model.safetensors").read_bytes(),
        **kept,
        "checkpoint": newest.name,
        "log": [_timeless(json.loads(line)) for line in log],
        "progress": _timeless(json.loads((newest / "progress.json").read_text())),
        **{name: _timeless(results.get(name)) for name in ("metrics", "curve", "steps")},
    }


def differing(folder: Path, reference: dict[str, Any]) -> list[str]:
    """Names of what is not exactly as in the reference."""
    found = outcome(folder)
    return sorted(name for name in found.keys() | reference.keys() if found.get(name) != reference.get(name))


def _timeless(value: Any) -> Any:
    """The same without times, which no two runs share; running sums have theirs in the last place."""
    if isinstance(value, list):
        return [_timeless(one) for one in value]
    if not isinstance(value, dict):
        return value
    kept = {name: one for name, one in value.items() if not any(word in name for word in _TIMES)}
    if "totals" in kept:
        kept["totals"] = [sums[:3] for sums in kept["totals"]]
    return {name: _timeless(one) for name, one in kept.items()}
