# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints between two steps that continue a training bit by bit.

Everything random in a training follows from its seed and from where it is (`seeding.py`), so a checkpoint holds
weights, optimizer, schedule, whatever else learns (averaged weights, teachers, centres), and numbers that say where
the training is; `checkpoint_files.py` sees to it that it is complete. No pickle is loaded without `weights_only`,
except by PyTorch from the index of a sharded checkpoint: resume such from your own only. All processes need to see
the same folder.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import checkpoint as sharded
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler

from vitreg_hf.training.checkpoint_files import (
    PROGRESS,
    begin,
    checkpoint_of,
    checkpoint_to_resume,
    complete,
    discard,
    list_checkpoints,
    rotate,
    unfinished,
)
from vitreg_hf.training.sharding import bare_model

_WEIGHTS = "model.safetensors"
# What a full disk is to Python, to PyTorch, to safetensors, and to PyTorch's sharded checkpoints.
_WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, CheckpointException)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; those that were there before still are."""


@dataclass(frozen=True)
class Progress:
    """Where a training is, besides weights and optimizer.

    Attributes:
        step: updates of the weights so far.
        position: samples taken from the stream of training images so far, by all processes.
        curve: one entry per epoch, as in `results.json`.
        totals: running sums of the unfinished epoch, a list per process.
        log: state of the training log.
        settings: what has to be equal for the continuation to be exact; compared on resuming.
        skipped: images that were left out while training because they cannot be decoded.
    """

    step: int = 0
    position: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    totals: list[list[float]] = field(default_factory=list)
    log: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


# Writing


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    progress: Progress,
    scheduler: LRScheduler,
    modules: Mapping[str, nn.Module] | None = None,
    keep: int = 2,
) -> Path:
    """Write `folder/step-<n>`, then delete all but the newest. To be called by every process, between two steps.

    Args:
        accelerator: has prepared model and optimizer.
        folder: holds the checkpoints of one training.
        progress: where the training is.
        scheduler: not prepared by the accelerator.
        modules: what else has a state, by name; whole or sharded like the model.
        keep: how many checkpoints stay, this one included; later ones never do.

    Returns:
        The checkpoint.

    Raises:
        ValueError: if `keep` is not positive.
        CheckpointError: in every process, if one could not write, for want of room or for any other reason.
    """
    if keep < 1:
        raise ValueError(f"Expected to keep at least 1 checkpoint, got {keep}")
    final, made = checkpoint_of(folder, progress.step), unfinished(folder)
    record = {**asdict(progress), "scheduler": scheduler.state_dict()}
    with _together(accelerator, folder):
        if accelerator.is_main_process:
            begin(folder)
    with _together(accelerator, folder):
        _save_state(accelerator, made)
    for name, module in (modules or {}).items():
        with _together(accelerator, folder):
            _save_module(accelerator, module, made / name)
    with _together(accelerator, folder):
        if accelerator.is_main_process:
            (made / PROGRESS).write_text(json.dumps(record, indent=2))
            complete(folder, final)
    if accelerator.is_main_process:
        rotate(final, keep)
    accelerator.wait_for_everyone()
    return final


@contextmanager
def _together(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """Raise in all processes what goes wrong in one: those that went on would wait for it forever."""
    error = None
    try:
        yield
    except _WRITE_ERRORS as caught:
        error = f"{type(caught).__name__}: {caught}"
    errors = [one for one in gather_object([error]) if one is not None]
    if not errors:
        return
    if accelerator.is_main_process:
        discard(folder)
    kept = list_checkpoints(folder)
    there = f"the newest that is complete is {kept[-1]}" if kept else "there is none yet"
    raise CheckpointError(f"Expected to write a checkpoint to {folder}, got {errors[0]}; {there}")


def _save_state(accelerator: Accelerator, folder: Path) -> None:
    """Model, optimizer and gradient scaler; whole weights under the names that they have in a single process."""

    def without_wrapper(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        if weights and accelerator.is_main_process:
            state = bare_model(accelerator, models[0]).state_dict()
            save_file({name: value.contiguous() for name, value in state.items()}, Path(folder) / _WEIGHTS)
        weights.clear()

    hook = accelerator.register_save_state_pre_hook(without_wrapper)
    try:
        accelerator.save_state(str(folder))
    finally:
        hook.remove()


def _save_module(accelerator: Accelerator, module: nn.Module, path: Path) -> None:
    state = module.state_dict()
    if _is_sharded(state):
        sharded.save(state, checkpoint_id=path)
    elif accelerator.is_main_process:
        save_file({name: value.contiguous() for name, value in state.items()}, path.with_suffix(".safetensors"))


def _is_sharded(state: Mapping[str, Any]) -> bool:
    return any(isinstance(value, DTensor) for value in state.values())


# Finding and loading


def agreed_checkpoint(accelerator: Accelerator, wanted: str | None, folder: Path) -> Path | None:
    """`checkpoint_to_resume`, found and checked by the main process for all.

    Raises:
        ValueError: in every process, as `checkpoint_to_resume`.
    """
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = checkpoint_to_resume(wanted, folder)
        except ValueError as error:
            answer[1] = str(error)
    checkpoint, refusal = broadcast_object_list(answer)
    if refusal is not None:
        raise ValueError(refusal)
    return checkpoint


def load_checkpoint(
    accelerator: Accelerator,
    checkpoint: Path,
    settings: dict[str, Any],
    scheduler: LRScheduler,
    modules: Mapping[str, nn.Module] | None = None,
    accept_changes: bool = False,
) -> Progress:
    """Restore what `save_checkpoint` wrote, and say where the training was. To be called by every process.

    Args:
        accelerator, scheduler, modules: as for `save_checkpoint`.
        checkpoint: its files have been checked (`checkpoint_to_resume`).
        settings: those of the training that continues.
        accept_changes: continue also with other settings, with what this changes printed. A schedule of the new
            settings then goes on from the step of the checkpoint.

    Raises:
        ValueError: if the checkpoint was written with other settings, naming them, unless they are accepted; if its
            weights are sharded and the model is not, or the other way round; if what has changed leaves no place for
            what the checkpoint holds.
    """
    record = json.loads((checkpoint / PROGRESS).read_text())
    changes = changed_settings(record["settings"], settings)
    if changes and not accept_changes:
        raise ValueError(
            f"Expected the settings that {checkpoint} was written with: {', '.join(changes)}; "
            "resume_with_changes accepts them"
        )
    accelerator.print(f"continues {checkpoint}")
    if changes and accelerator.is_main_process:
        print(f"continued with other settings than before, so not exactly: {', '.join(changes)}")
    _check_kind(accelerator, checkpoint)
    groups = _options_of_groups(scheduler.optimizer)
    try:
        _load_weights(accelerator, checkpoint, modules or {})
    except (ValueError, RuntimeError) as error:  # of PyTorch, if parameters or their groups are others
        if not changes:
            raise
        raise ValueError(
            f"Expected settings with which {checkpoint} can be continued, got {', '.join(changes)}: {error}. Start "
            "from its weights with init_from"
        ) from error
    if changes:
        accelerator.step = 0  # batches so far, whose sum need not be a multiple of what is accumulated from now on
        _continue_with(scheduler, groups, record["scheduler"])
    else:
        scheduler.load_state_dict(record["scheduler"])
    del record["scheduler"]
    return Progress(**{**record, "settings": settings})


def _load_weights(accelerator: Accelerator, checkpoint: Path, modules: Mapping[str, nn.Module]) -> None:
    if absent := [name for name in modules if not any(checkpoint.glob(f"{name}*"))]:
        raise ValueError(f"there is no {' and no '.join(absent)} in it")
    _load_state(accelerator, checkpoint)
    for name, module in modules.items():
        _load_module(module, checkpoint / name)


def _continue_with(scheduler: LRScheduler, groups: list[dict[str, Any]], saved: dict[str, Any]) -> None:
    """Learning rates, decay and schedule of the new settings, at the step of the checkpoint."""
    for group, options in zip(scheduler.optimizer.param_groups, groups, strict=True):
        group.update(options)
    scheduler.last_epoch, scheduler._step_count = saved["last_epoch"] - 1, saved["_step_count"]
    scheduler.step()  # to the rate of that step by the new schedule


def _check_kind(accelerator: Accelerator, checkpoint: Path) -> None:
    kinds = {True: "sharded weights", False: "whole weights"}
    wanted = accelerator.distributed_type == DistributedType.FSDP
    found = not (checkpoint / _WEIGHTS).exists()
    if accelerator.distributed_type != DistributedType.DEEPSPEED and wanted != found:
        raise ValueError(
            f"Expected a checkpoint with {kinds[wanted]}, as in this launch, got {checkpoint} with {kinds[found]}"
        )


def _options_of_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def changed_settings(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two sets of settings, one text for each."""
    now = json.loads(json.dumps(now))  # tuples become the lists that a file holds
    differing = [name for name in sorted(saved.keys() | now.keys()) if saved.get(name) != now.get(name)]
    return [f"{name} {saved.get(name)!r} (got {now.get(name)!r})" for name in differing]


def _load_state(accelerator: Accelerator, checkpoint: Path) -> None:
    def into_wrapper(models: list[nn.Module], folder: str) -> None:
        for model in models:
            bare_model(accelerator, model).load_state_dict(load_file(Path(folder) / _WEIGHTS))
        models.clear()

    hook = accelerator.register_load_state_pre_hook(into_wrapper)
    try:
        accelerator.load_state(str(checkpoint))
    finally:
        hook.remove()


def _load_module(module: nn.Module, path: Path) -> None:
    state = module.state_dict()
    if _is_sharded(state):
        sharded.load(state, checkpoint_id=path)
        module.load_state_dict(state)
    else:
        module.load_state_dict(load_file(path.with_suffix(".safetensors")))


# Running sums of several processes


def no_totals(count: int, device: torch.device) -> Tensor:
    """Sums, all 0, on a device, where adding to them makes nothing wait; in double precision if it has any."""
    return torch.zeros(count, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def totals_of_all(own: Tensor) -> list[list[float]]:
    """Running sums of every process, as `Progress.totals` keeps them. To be called by every process."""
    return gather_object([own.tolist()])


def own_totals(totals: list[list[float]], accelerator: Accelerator) -> Tensor:
    """Running sums of this process; where the number of processes has changed, the first one has those of all."""
    if len(totals) == accelerator.num_processes:
        return torch.tensor(totals[accelerator.process_index], dtype=torch.float64)
    together = torch.tensor(totals, dtype=torch.float64).sum(dim=0)
    return together if accelerator.is_main_process else torch.zeros_like(together)
