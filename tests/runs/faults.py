# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What happens to a training that is to be interrupted: installed in its process before it begins.

A fault is a place and an action, as JSON.

    {"backward": 7, "signal": 9}      at the 7th call of Accelerator.backward, so also inside gradient accumulation
    {"file": 12, "signal": 15}        at the 12th event of a file below a folder `checkpoints`, between its files
    {"backward": 7, "room": 20000}    from then on no file grows beyond 20,000 bytes: a disk that is full
    {"images": 4}                     a training step on more images than that runs out of memory

Events are what Python tells audit hooks: opening, renaming, making and removing. How many there were is written to
`events` in the folder of the job, so that a test knows how many places there are.
"""

import os
import resource
import sys
from functools import wraps
from pathlib import Path
from typing import Any

_EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.scandir", "os.listdir", "shutil.rmtree"}


def install(fault: dict[str, Any], folder: Path) -> None:
    """Arm a fault in this process; its children do not count.

    Args:
        fault: as above; empty: only count.
        folder: of the job.
    """
    _at_backward(fault)
    _at_file(fault, folder)
    if "images" in fault:
        _at_forward(fault["images"])


def _act(fault: dict[str, Any]) -> None:
    if "signal" in fault:
        os.kill(os.getpid(), fault["signal"])
    else:  # the kernel sends SIGXFSZ, which Python ignores, and fails the write with EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["room"], resource.RLIM_INFINITY))


def _at_backward(fault: dict[str, Any]) -> None:
    from accelerate import Accelerator

    original, calls = Accelerator.backward, 0

    def backward(self: Accelerator, *args: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == fault.get("backward"):
            _act(fault)
        original(self, *args, **options)

    Accelerator.backward = backward


def _at_forward(most: int) -> None:
    import torch

    from vitreg_hf import ViTRegForImageClassification

    original = ViTRegForImageClassification.forward

    @wraps(original)
    def forward(self: Any, pixel_values: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and len(pixel_values) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")
        return original(self, pixel_values, **options)

    ViTRegForImageClassification.forward = forward


def _at_file(fault: dict[str, Any], folder: Path) -> None:
    count, pid = 0, os.getpid()
    log = os.open(folder / "events", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in _EVENTS or os.getpid() != pid:
            return
        if not any("/checkpoints" in os.fsdecode(path) for path in arguments if isinstance(path, str | bytes | Path)):
            return
        count += 1
        os.pwrite(log, b"%d" % count, 0)
        if count == fault.get("file"):
            _act(fault)

    sys.addaudithook(listen)
