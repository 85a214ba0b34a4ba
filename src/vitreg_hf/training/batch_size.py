# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The largest batch that fits into memory, at the same number of images per update.

What does not fit is divided into more batches per update, so that a training computes the same on a small device as on
a large one, and later.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import find_executable_batch_size, gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
# What a training holds per trained number besides weight and gradient: two moments of AdamW, and of several processes
# the buffer in which gradients travel.
_MOMENTS, _BUFFER = 2, 1


class BatchSize(NamedTuple):
    """Images per batch and process, and batches per update; their product is what was asked for."""

    per_device: int
    accumulation: int


def find_batch_size(
    probe: Callable[[int], None], per_device: int, accumulation: int, accelerator: Accelerator
) -> BatchSize:
    """The largest batch size, not above the one asked for, with which a step fits into the memory of every process.

    Tries divisors of the images per update and process, from `per_device` down. To be called by every process.

    Args:
        probe: makes one training step with a batch size, as `training_probe` does; talks to no other process.
        per_device: images per batch and process that were asked for.
        accumulation: batches per update that were asked for.
        accelerator: of the launch.

    Returns:
        The batch size on which all processes agree, with more batches per update if it is smaller.

    Raises:
        ValueError: in every process, if not even one image fits; or if the model is sharded, where a process cannot
            try anything alone.
        RuntimeError: in every process, what went wrong in one other than for want of memory.
    """
    if accelerator.distributed_type in _SHARDED:
        raise ValueError(
            "Expected a whole model in each process to find a batch size, "
            f"got one sharded by {accelerator.distributed_type.value}: choose the batch size by hand"
        )
    images = per_device * accumulation
    smaller = [size for size in range(per_device, 0, -1) if images % size == 0]
    found, error = 0, None
    try:
        found = _largest(probe, smaller)
    except Exception as caught:  # the other processes must not wait for this one
        error = caught
    answers = gather_object([(found, None if error is None else f"{type(error).__name__}: {error}")])
    if error is not None:
        raise error
    if others := [text for _, text in answers if text is not None]:
        raise RuntimeError(f"Expected a training step to try batch sizes with, got in another process {others[0]}")
    agreed = min(size for size, _ in answers)
    if agreed == 0:
        raise ValueError("Expected memory for a batch of 1 image or more, got out of memory with 1 image")
    return BatchSize(agreed, images // agreed)


def _largest(probe: Callable[[int], None], sizes: list[int]) -> int:
    """The first size with which the probe has enough memory; 0 if there is none."""
    left = iter([*sizes[1:], 0])

    def tried(batch_size: int) -> int:
        probe(batch_size)
        return batch_size

    search = find_executable_batch_size(tried, starting_batch_size=sizes[0], reduce_batch_size_fn=lambda: next(left))
    try:
        return search()
    except RuntimeError:
        if next(left, None) is None:  # all have been tried, and what was raised says so
            return 0
        raise


def training_probe(
    model: nn.Module,
    batch_of: Callable[[int], Any],
    loss_of: Callable[[nn.Module, Any], Tensor],
    accelerator: Accelerator,
) -> Callable[[int], None]:
    """A step on made-up images: forward and backward pass, with room for what an optimizer and DDP hold.

    Weights stay as they are; gradients are gone afterwards.

    Args:
        model: as it will be trained, on the device and in training mode, before the accelerator prepares it.
        batch_of: a batch of so many images, on the device.
        loss_of: the loss of model and batch.
        accelerator: gives precision and number of processes.

    Returns:
        A function of a batch size.
    """
    copies = _MOMENTS + (_BUFFER if accelerator.num_processes > 1 else 0)

    def probe(batch_size: int) -> None:
        try:
            with accelerator.autocast():
                loss = loss_of(model, batch_of(batch_size))
            loss.backward()
            held = [torch.empty_like(p) for p in model.parameters() if p.requires_grad for _ in range(copies)]
            if loss.device.type == "cuda":
                torch.cuda.synchronize(loss.device)
            del held
        finally:
            model.zero_grad(set_to_none=True)

    return probe


def recompute_activations(model: PreTrainedModel) -> None:
    """Compute activations again in the backward pass in place of keeping them: slower, and with less memory."""
    now, before = "activation_checkpointing_enable", "gradient_checkpointing_enable"  # names in Transformers
    getattr(model, now if hasattr(model, now) else before)({"use_reentrant": False})
