# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Models whose weights are spread over processes (FSDP2): averages beside them, and whole again at the end.

Under FSDP2 every process keeps a slice of every parameter, and puts a block together only while it runs. Everything
here does nothing to models that stay whole, so that a training reads the same with and without.
"""

import copy
import math
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

Model = TypeVar("Model", bound=nn.Module)


def shard_like(module: nn.Module, model: nn.Module) -> None:
    """Shard a copy of a model, made before the model was sharded, as the model is.

    Each process then holds the same slices of both, so that averaging needs no communication.

    Args:
        module: whole; it is changed in place. Where the model is whole, it stays as it is.
        model: prepared by the accelerator.

    Raises:
        ValueError: if the model is now kept in another precision, as DeepSpeed does: averages of rounded weights stand
            still.
    """
    for own, prepared in zip(module.parameters(), model.parameters(), strict=True):
        if own.dtype != prepared.dtype:
            raise ValueError(
                f"Expected weights in {own.dtype} to average, got {prepared.dtype}: train in full precision"
            )
    meshes = [parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)]
    if not meshes:
        return
    names = [name for name, part in model.named_modules() if isinstance(part, FSDPModule)]
    for name in reversed(names):  # the inner ones first
        # Always back to slices: a copy has no backward pass, after which FSDP2 would do that for the outermost ones.
        fully_shard(module.get_submodule(name), mesh=meshes[0], reshard_after_forward=True)


def bare_model(accelerator: Accelerator, model: nn.Module) -> Any:
    """The model inside what Accelerate puts around it for several processes, precision and compilation."""
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def spare_copy(accelerator: Accelerator, model: Model) -> Model | None:
    """A copy of a model that is about to be sharded, for `whole_model`; to be made before `prepare`.

    Returns:
        The copy in the memory of the main process; None in others, and where models stay whole.
    """
    if accelerator.distributed_type != DistributedType.FSDP or not accelerator.is_main_process:
        return None
    return copy.deepcopy(model).eval()


def whole_model(accelerator: Accelerator, model: nn.Module, spare: Model | None) -> nn.Module | None:
    """The model with all of its weights, to be saved and measured. To be called by every process.

    Args:
        accelerator: has prepared the model.
        model: the prepared model, or a copy that `shard_like` has sharded.
        spare: of `spare_copy`; the weights of a sharded model are put into it.

    Returns:
        The model without wrapper; of a sharded one, the spare copy in the main process and None in the others.
    """
    model = bare_model(accelerator, model)
    if not any(isinstance(part, FSDPModule) for part in model.modules()):
        return model
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if spare is not None:
        spare.load_state_dict(weights)
    return spare


def clip_gradients(accelerator: Accelerator, model: nn.Module, max_norm: float) -> Tensor | None:
    """Scale all gradients so that their norm is not above a number; to be called by every process, before the update.

    Args:
        accelerator: has prepared the model.
        model: the prepared model.
        max_norm: 0: leave gradients as they are.

    Returns:
        Norm of the gradients of all processes before that, without dimensions; None if DeepSpeed does not tell.
    """
    norm = accelerator.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    if norm is None:
        return None
    return norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm, device=accelerator.device)
