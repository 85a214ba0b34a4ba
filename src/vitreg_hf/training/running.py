# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""When a training writes a checkpoint, and how it stops when it is asked to."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from vitreg_hf.training.checkpointing import (
    CheckpointError,
    Progress,
    own_totals,
    save_checkpoint,
    totals_of_all,
)
from vitreg_hf.training.timetable import Timetable
from vitreg_hf.training.training_log import TrainingLog

# Neither success (0) nor failure (1, 2) nor death by a signal (128 and more): schedulers that restart jobs use this
# number for "checkpointed, start me again".
STOPPED_EXIT_CODE = 85


_STOPPING = (signal.SIGTERM, signal.SIGINT)


def exit_with_a_sentence(main: Callable[[], None]) -> None:
    """Run a program that a mistake of its user ends without a traceback: messages of ours begin with "Expected"."""
    try:
        main()
    except ValueError as error:
        if not str(error).lower().startswith("expected"):
            raise
        sys.exit(str(error))


class StopRequest:
    """Whether a training was asked to stop: by SIGTERM of a scheduler that wants the machine back, or by Ctrl-C.

    As a context manager it listens, and puts back what listened before. A second Ctrl-C ends the program at once.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.received = accelerator, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in _STOPPING}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def agreed(self) -> bool:
        """Whether any process was asked; to be called by all of them at the same step."""
        if self.accelerator.num_processes == 1:
            return self.received
        asked = torch.tensor(float(self.received), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, reduction="sum").item())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = True


def outlive_stop(worker: int) -> None:
    """Have a process that loads images heed its parent's SIGTERM alone, not Ctrl-C: the `worker_init_fn` of a loader.

    Schedulers send the signal to every process of a job at once, but a training needs its batches until it has written
    its checkpoint. The parent sends it when it exits. Systems that do not tell who sent a signal (macOS) go without.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # of this thread and those that it starts
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


class Saver:
    """Writes checkpoints when they are due, and one more when the training is asked to stop.

    Args:
        accelerator: has prepared model and optimizer.
        folder: of the checkpoints of this training.
        scheduler: of the learning rate.
        modules: what else has a state, by name.
        stop: listens for SIGTERM.
        save_steps: write a checkpoint after that many steps, and so on; 0: none.
        keep: how many checkpoints stay.
        agree_steps: of several processes, ask one another that often whether one was asked to stop.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        scheduler: LRScheduler,
        modules: Mapping[str, nn.Module],
        stop: StopRequest,
        save_steps: int = 0,
        keep: int = 2,
        agree_steps: int = 10,
    ) -> None:
        self.accelerator, self.folder, self.scheduler, self.modules = accelerator, folder, scheduler, modules
        self.stop, self.save_steps, self.keep = stop, save_steps, keep
        self.agree_steps = agree_steps if accelerator.num_processes > 1 else 1

    def after_step(self, step: int, progress: Callable[[], Progress]) -> None:
        """To be called by every process after every step, with what tells where the training is."""
        if step % self.agree_steps == 0 and self.stop.agreed():
            self.leave(progress())
        if self.save_steps and step % self.save_steps == 0:
            self.save(progress())

    def save(self, progress: Progress) -> Path:
        """Write a checkpoint now; a program that cannot ends here, with one sentence and exit code 1."""
        try:
            return save_checkpoint(self.accelerator, self.folder, progress, self.scheduler, self.modules, self.keep)
        except CheckpointError as error:
            sys.exit(str(error) if self.accelerator.is_main_process else 1)

    def leave(self, progress: Progress) -> None:
        """Write a checkpoint and leave the program with `STOPPED_EXIT_CODE`."""
        checkpoint = self.save(progress)
        if self.accelerator.is_main_process:
            print(f"stopped   after step {progress.step}, as asked; --resume_from_checkpoint latest continues")
            print(f"saved     {checkpoint}")
        self.accelerator.end_training()
        sys.exit(STOPPED_EXIT_CODE)


class Resumable:
    """What every training says of where it is, for a dataclass with these fields. Every process calls it at once."""

    accelerator: Accelerator
    timetable: Timetable
    log: TrainingLog
    fixed: dict[str, Any]  # what a run that continues this one must have in common with it
    totals: Tensor  # running sums of this process since the last evaluation
    step: int  # updates of the weights so far
    position: int  # training samples taken so far, by all processes
    curve: list[dict[str, Any]]

    def all_skipped(self) -> list[str]:
        """Images that all processes have left out."""
        return []

    def progress(self) -> Progress:
        """Where the training is."""
        totals, skipped = totals_of_all(self.totals), self.all_skipped()
        return Progress(self.step, self.position, self.curve, totals, self.log.state(), self.fixed, skipped)

    def resume(self, progress: Progress) -> None:
        """Go on from where another run of this training was.

        Raises:
            ValueError: if its steps took another number of images: there would be another number of them, too.
        """
        taken, expected = progress.position, progress.step * self.timetable.images_per_step
        if taken != expected:
            raise ValueError(
                f"Expected {taken // progress.step} images per step as in the checkpoint, got "
                f"{self.timetable.images_per_step}: gradient_accumulation_steps makes up for processes and batch sizes"
            )
        self.step, self.position, self.curve = progress.step, progress.position, progress.curve
        self.totals = own_totals(progress.totals, self.accelerator).to(self.totals)
        self.log.load_state(progress.log, progress.step)
