# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The one object that a training loop tells how each step went.

It guards the loss, and every so many steps writes a record: to a file, to trackers, behind a progress bar, and to the
section `steps` of `results.json`. No step waits for the GPU: a loss is read one step after it was computed, everything
else when a record is made.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from vitreg_hf.training.guards import LossGuard, TrainingDiverged
from vitreg_hf.training.replay import save_for_replay
from vitreg_hf.training.step_statistics import memory_megabytes, whole
from vitreg_hf.training.trackers import log_to_trackers

LOG_FILE = "training_log.jsonl"
# What differs between a training and its exact repetition.
TIMING_FIELDS = ("images_per_second", "waiting_for_data", "memory_megabytes")
_MOST_RECORDS = 200

Record = dict[str, Any]


def without_timing(records: Sequence[Record]) -> list[Record]:
    """Records without what depends on the machine: those of a resumed training are equal to those of one in one go."""
    return [{name: value for name, value in record.items() if name not in TIMING_FIELDS} for record in records]


@dataclass
class _Unread:
    """Numbers of a step that are on their way from the device, and what is to be kept if they are bad."""

    step: int
    numbers: Tensor  # loss and norm of the gradient, means over processes, and the loss of this one
    has_norm: bool
    arrived: Any  # event of CUDA; None where nothing is under way
    batches: Sequence[Any]

    def read(self) -> tuple[float, float | None, float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, norm, own_loss = self.numbers.tolist()
        return loss, norm if self.has_norm else None, own_loss


class TrainingLog:
    """Records of a training, the same in all processes but for their timing. As a context manager it closes the bar.

    Args:
        accelerator: of the launch; its trackers have been started.
        folder: where the file of records and what is kept for replay go.
        logging_steps: updates between two records.
        total_steps: updates in the whole training; None if nobody knows.
        guard: judges every loss.
        facts: what is to be kept with the batches of a step that broke: seed, settings.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        logging_steps: int,
        total_steps: int | None,
        guard: LossGuard | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.accelerator, self.folder, self.logging_steps = accelerator, folder, logging_steps
        self.guard, self.facts = guard or LossGuard(), dict(facts or {})
        self.bar = tqdm(total=total_steps, unit="step", disable=not accelerator.is_main_process)
        self._records: list[Record] = []  # every `_stride`-th, so that a long training does not fill its checkpoints
        self._stride, self._made = 1, 0
        self._last: Record | None = None
        self._losses: list[float] = []
        self._images, self._seconds, self._waited = 0, 0.0, 0.0
        self._since = time.perf_counter()
        self._unread: _Unread | None = None
        self._file_is_ready = False

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def due(self, step: int) -> bool:
        """Whether a record is made after that step, and so whether its statistics are worth computing."""
        return step % self.logging_steps == 0

    def update(
        self,
        step: int,
        loss: Tensor,
        learning_rate: float,
        images: int,
        batches: Sequence[Any] = (),
        gradient_norm: Tensor | float | None = None,
        statistics: Mapping[str, Tensor | float] | None = None,
    ) -> None:
        """Tell how a step went; to be called by every process.

        Args:
            step: updates of the weights so far, this one included.
            loss: of this process, mean over the step; its mean over processes is taken here.
            learning_rate: highest of all groups.
            images: that all processes have had in this step.
            batches: the micro-batches of this process as the loader gave them, best on the host: they are held until
                the next step.
            gradient_norm: of the whole gradient; None where it is unknown or the update was left out.
            statistics: further numbers by name, read if a record is due.

        Raises:
            TrainingDiverged: in every process, if the guard refuses this loss or that of the step before; the batches
                have been kept in `replay/` of the folder.
        """
        self.flush()
        norm = None if gradient_norm is None else whole(torch.as_tensor(gradient_norm)).detach()
        self._unread = self._sent(step, loss, norm, batches)
        now = time.perf_counter()
        self._images, self._seconds, self._since = self._images + images, self._seconds + now - self._since, now
        self.bar.update()
        if self.due(step):
            self.flush()
            self._record(step, learning_rate, norm, statistics or {})

    def flush(self) -> None:
        """Judge the last step; to be called by every process, before weights are kept.

        Raises:
            TrainingDiverged: as `update`.
        """
        unread, self._unread = self._unread, None
        if unread is None:
            return
        loss, gradient_norm, own_loss = unread.read()
        try:
            self.guard.check(unread.step, loss, gradient_norm)
        except TrainingDiverged as error:
            error.folder = str(self._keep(unread, error, own_loss))
            error.add_note(f"its batches are kept in {error.folder}")
            raise
        self._losses.append(loss)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block whose time does not count as training: evaluation, writing a checkpoint."""
        self._seconds += time.perf_counter() - self._since
        try:
            yield
        finally:
            self._since = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A block that waits for batches: its share of the time is `waiting_for_data` of the next record."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - started

    def log_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send the numbers of an evaluation to the trackers."""
        log_to_trackers(self.accelerator, metrics, step)

    @property
    def records(self) -> list[Record]:
        """At most 200 records, evenly spaced, and the last one: section `steps` of the results."""
        thinned = self._records[:: math.ceil(len(self._records) / _MOST_RECORDS) or 1]
        return thinned if self._last is None or self._last in thinned[-1:] else [*thinned, self._last]

    # Resuming

    def state(self) -> dict[str, Any]:
        """What `load_state` restores exactly, in numbers that JSON keeps; to be called by every process.

        Raises:
            TrainingDiverged: as `update`, so that no checkpoint holds the weights of a training that has broken.
        """
        self.flush()
        return {
            "records": list(self._records),
            "stride": self._stride,
            "made": self._made,
            "last": self._last,
            "losses": list(self._losses),
            "images": self._images,
            "seconds": self._seconds,
            "waited": self._waited,
            "guard": self.guard.state(),
        }

    def load_state(self, state: dict[str, Any], step: int) -> None:
        """Go on where another log was after `step` updates; records that came later leave the file."""
        self._records, self._stride, self._made = list(state["records"]), state["stride"], state["made"]
        self._last, self._losses = state["last"], list(state["losses"])
        self._images, self._seconds, self._waited = state["images"], state["seconds"], state["waited"]
        self.guard.load_state(state["guard"])
        self.bar.initial = self.bar.n = self.bar.last_print_n = step
        self.bar.refresh()
        self._start_file(step)
        self._since = time.perf_counter()

    # Parts

    def _sent(self, step: int, loss: Tensor, gradient_norm: Tensor | None, batches: Sequence[Any]) -> _Unread:
        own = loss.detach().float()
        norm = torch.zeros_like(own) if gradient_norm is None else gradient_norm.to(own)
        # Both over all processes: a number that is not finite in one of them is not finite in all.
        means = self.accelerator.reduce(torch.stack([own, norm]), reduction="mean")
        numbers, arrived = torch.cat([means, own[None]]).to("cpu", non_blocking=True), None
        if own.device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()
        return _Unread(step, numbers, gradient_norm is not None, arrived, batches)

    def _keep(self, unread: _Unread, error: TrainingDiverged, own_loss: float) -> Path:
        process = self.accelerator.process_index
        numbers = {"step": error.step, "loss": error.loss, "own_loss": own_loss, "reason": error.reason}
        # A step is seeded by the number of updates before it.
        facts = {**self.facts, **numbers, "seed_step": [error.step - 1, process], "process_index": process}
        folder = self.folder / "replay" / f"step-{error.step:08d}-process-{process}"
        return save_for_replay(folder, unread.batches, facts)

    def _record(
        self, step: int, learning_rate: float, gradient_norm: Tensor | None, statistics: Mapping[str, Tensor | float]
    ) -> None:
        named = {**({} if gradient_norm is None else {"gradient_norm": gradient_norm}), **statistics}
        record = {
            "step": step,
            "loss": sum(self._losses) / len(self._losses),
            "learning_rate": learning_rate,
            **{name: _finite(value) for name, value in _read(named).items()},
            "images_per_second": self._images / self._seconds if self._seconds > 0 else None,
            "waiting_for_data": self._waited / self._seconds if self._seconds > 0 else None,
            "memory_megabytes": memory_megabytes(self.accelerator.device),
        }
        self._losses, self._images, self._seconds, self._waited = [], 0, 0.0, 0.0
        self._remember(record)
        log_to_trackers(self.accelerator, {name: record[name] for name in record if name != "step"}, step)
        if self.accelerator.is_main_process:
            if not self._file_is_ready:
                self._start_file(0)
            with (self.folder / LOG_FILE).open("a") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
        speed = record["images_per_second"]
        self.bar.set_postfix({"loss": f"{record['loss']:.4g}"} | ({"images/s": f"{speed:.0f}"} if speed else {}))

    def _remember(self, record: Record) -> None:
        if self._made % self._stride == 0:
            self._records.append(record)
        self._made, self._last = self._made + 1, record
        if len(self._records) > 2 * _MOST_RECORDS:
            self._records, self._stride = self._records[::2], 2 * self._stride

    def _start_file(self, step: int) -> None:
        """Leave in the file the records up to a step; a line that was cut off by a crash is none."""
        self._file_is_ready = True
        if not self.accelerator.is_main_process:
            return
        file = self.folder / LOG_FILE
        lines = file.read_text().splitlines(keepends=True) if step and file.is_file() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f".{file.name}.unfinished")
        unfinished.write_text("".join(kept))
        os.replace(unfinished, file)


def _read(named: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Numbers of tensors without dimensions, all of them read off the device at once."""
    tensors = {name: value.detach().float() for name, value in named.items() if isinstance(value, Tensor)}
    values = torch.stack(list(tensors.values())).tolist() if tensors else []
    read = dict(zip(tensors, values, strict=True))
    return {name: read.get(name, value) for name, value in named.items()}


def _finite(value: float) -> float | None:
    """JSON has no other numbers."""
    return value if math.isfinite(value) else None
