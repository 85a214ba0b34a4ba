# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What models cost beside one another: time in turns, and memory that training an image takes."""

import time
from collections.abc import Mapping
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn


@torch.inference_mode()
def images_per_second(
    models: Mapping[int, nn.Module], pixel_values: Tensor, rounds: int = 12, seconds: float = 3.0
) -> dict[int, float]:
    """Speed of forward passes of several models that take turns.

    A machine that others use is fast in one second and slow in the next. In every round each model makes a pass, every
    other round in reverse order, and its time is compared with the mean time of this round.

    Args:
        models: in evaluation mode, on one device.
        pixel_values: one batch, on that device.
        rounds: how many passes each model makes at least, after one that does not count.
        seconds: more rounds are made until as much time has gone by.

    Returns:
        Images per second of each model: from the median over rounds of its share of a round, and the median round.

    Raises:
        ValueError: if there is no model or no round.
    """
    if not models or rounds < 1:
        raise ValueError(f"Expected at least 1 model and 1 round, got {len(models)} and {rounds}")
    for model in models.values():
        _seconds(model, pixel_values)
    taken: list[dict[int, float]] = []
    started = time.perf_counter()
    while len(taken) < rounds or time.perf_counter() - started < seconds:
        order = list(models) if len(taken) % 2 == 0 else list(models)[::-1]
        taken.append({name: _seconds(models[name], pixel_values) for name in order})
    usual = median(mean(turn.values()) for turn in taken)
    shares = {name: median(turn[name] / mean(turn.values()) for turn in taken) for name in models}
    return {name: len(pixel_values) / (share * usual) for name, share in shares.items()}


def _seconds(model: nn.Module, pixel_values: Tensor) -> float:
    started = time.perf_counter()
    model(pixel_values=pixel_values)
    if pixel_values.is_cuda:
        torch.cuda.synchronize(pixel_values.device)
    return time.perf_counter() - started


def bytes_saved_per_image(model: nn.Module, pixel_values: Tensor) -> int:
    """Bytes that a forward pass in training keeps for the backward pass, for each image more.

    They are counted, not measured: the storages of what autograd saves, each once, without those of the weights. It is
    what grows with batch and tokens, on any device; allocators, gradients and optimizer take more.

    Args:
        model: its mode stays as it is.
        pixel_values: two images or more, `(B, C, H, W)`.

    Raises:
        ValueError: for fewer than two images.
    """
    if len(pixel_values) < 2:
        raise ValueError(f"Expected at least 2 images, got {len(pixel_values)}")
    return round((_saved(model, pixel_values) - _saved(model, pixel_values[:1])) / (len(pixel_values) - 1))


def _saved(model: nn.Module, pixel_values: Tensor) -> int:
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no later tensor gets its address
        return tensor

    training = model.training
    model.train()
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(pixel_values=pixel_values.clone())
    finally:
        model.train(training)
    return sum(storage.nbytes() for storage in kept.values())
