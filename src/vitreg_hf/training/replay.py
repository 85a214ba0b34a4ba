# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The batches of a step that broke a training, kept and looked into.

Weights are not kept with them: those of the last good checkpoint are the ones to look with, since the weights at hand
when a loss is found to be broken have been updated by it. A training that is resumed from that checkpoint arrives at
the same step again.

Shapes: B images of a batch.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import send_to_device
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.module_tracker import ModuleTracker

_TENSORS, _FACTS = "batch.safetensors", "replay.json"
_TENSOR = "tensor in batch.safetensors"  # key that stands for a tensor in replay.json

# Keeping


def save_for_replay(folder: Path, batches: Sequence[Any], facts: Mapping[str, Any]) -> Path:
    """Write the micro-batches of one step of one process; at `folder` there is always a complete replay, or none.

    Args:
        folder: to write; what was there is replaced.
        batches: as the loader gave them: tensors in mappings, lists and named tuples, with what JSON holds between.
        facts: what is to be known with them: step, seed, loss, settings, number of the process.

    Returns:
        The folder.
    """
    tensors: dict[str, Tensor] = {}
    outline = [_without_tensors(batch, str(place), tensors) for place, batch in enumerate(batches)]
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file(tensors, unfinished / _TENSORS)
    # A loss that is not finite is what this is for, so the facts are JSON as Python writes it, with NaN and Infinity.
    text = json.dumps({"facts": dict(facts), "batches": outline}, indent=2, default=str)
    (unfinished / _FACTS).write_text(text + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)
    return folder


def load_replay(folder: Path) -> tuple[list[Any], dict[str, Any]]:
    """The micro-batches and the facts that `save_for_replay` wrote; named tuples have become dictionaries.

    Raises:
        ValueError: if there is no complete replay.
    """
    try:
        content = json.loads((folder / _FACTS).read_text())
        tensors = load_file(folder / _TENSORS)
    except OSError as error:
        raise ValueError(f"Expected a folder with {_TENSORS} and {_FACTS}, got {folder}: {error}") from error
    return [_with_tensors(batch, tensors) for batch in content["batches"]], content["facts"]


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The same value with the names of tensors in their places; these are added to `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()  # views of one batch may share memory
        return {_TENSOR: name}
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): _without_tensors(one, f"{name}/{key}", tensors) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(one, f"{name}/{place}", tensors) for place, one in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {key: _with_tensors(one, tensors) for key, one in value.items()}
    return [_with_tensors(one, tensors) for one in value] if isinstance(value, list) else value


# Looking

# Their values are not computed: memory that nobody has written yet, and masks that are infinite on purpose.
_MADE_UP = ("empty", "full", "masked_fill", "scalar_tensor")


@dataclass(frozen=True)
class ReplayReport:
    """What a forward and a backward pass over a batch shows.

    Attributes:
        losses: of each image, B numbers.
        gradients: norm of the gradient of each parameter, by name; None where there is none.
        first_broken: the first weight or operation, in the order of computing, that is not finite; None if no loss
            and no gradient is broken.
    """

    losses: list[float]
    gradients: dict[str, float | None]
    first_broken: str | None

    def table(self, most: int = 10) -> str:
        """Lines to print: what broke first, the worst images, and the largest gradients."""
        norms = [(name, norm) for name, norm in self.gradients.items() if norm is not None]
        return "\n".join(
            [
                f"first that is not finite: {self.first_broken or 'nothing, all of it is finite'}",
                f"\nhighest losses of {len(self.losses)} images",
                *(f"  {loss:<12.6g} image {place}" for place, loss in _worst(enumerate(self.losses), most)),
                f"\nlargest gradients (L2 norms) of {len(norms)} parameters",
                *(f"  {norm:<12.6g} {name}" for name, norm in _worst(norms, most)),
            ]
        )


def _worst(values: Iterable[tuple[Any, float]], most: int) -> list[tuple[Any, float]]:
    """Those that are not finite, then the largest."""
    return sorted(values, key=lambda pair: (math.isfinite(pair[1]), -pair[1]))[:most]


def replay(model: nn.Module, batch: Any, loss_of: Callable[[nn.Module, Any], Tensor]) -> ReplayReport:
    """Run a batch through a model forward and backward, and report what breaks first. Weights stay as they are.

    Args:
        model: whole, not wrapped for several processes nor compiled, in the mode that the training had it in.
        batch: one of those that `load_replay` gave.
        loss_of: losses of single images `(B,)` from model and batch, mixed as in the training if it mixes; seed it
            with `seed_step` of the seed, step and process of the facts to draw what the training drew.
    """
    model.zero_grad(set_to_none=True)
    with ModuleTracker() as modules, _FirstBroken(modules) as watch:
        losses = loss_of(model, send_to_device(batch, next(model.parameters()).device))
        losses.mean().backward()
    gradients = {
        name: None if parameter.grad is None else parameter.grad.norm().item()
        for name, parameter in model.named_parameters()
    }
    model.zero_grad(set_to_none=True)
    weights = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    numbers = [*losses.tolist(), *(norm for norm in gradients.values() if norm is not None)]
    broken = not all(map(math.isfinite, numbers))
    first = f"weight {weights[0]}, before the pass" if weights else watch.found
    return ReplayReport(losses.tolist(), gradients, first if broken else None)


class _FirstBroken(TorchDispatchMode):
    """Looks at what every operation gives until one gives a number that is not finite."""

    def __init__(self, modules: ModuleTracker) -> None:
        super().__init__()
        self.modules = modules
        self.found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.")
        if self.found is None and not any(one in name for one in _MADE_UP):
            floats = [one for one in tree_leaves(made) if isinstance(one, Tensor) and one.is_floating_point()]
            if not all(one.isfinite().all() for one in floats):
                where = max(self.modules.parents - {"Global"}, key=len, default="the loss")
                self.found = f"{name} in {where}{', backward' if self.modules.is_bw else ''}"
        return made
