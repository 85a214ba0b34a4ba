# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What one forward pass of a trained model costs: size, operations and time."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from vitreg_hf.training.results import processor_name

_PASSES, _SECONDS = 3, 0.15  # at least that many passes, and more while there is time


def describe_speed(
    model: PreTrainedModel, processor: Callable[..., Any], batch_size: int = 32
) -> dict[str, int | float | str | list[int]]:
    """Section `speed` of the results: the model alone, on its device, without reading and preparing images.

    Mode, random state and attention backend of the model stay as they are. Takes about half a second for a small
    model, and four passes over `batch_size` images for a large one.

    Args:
        model: on the device to measure; not wrapped for several processes.
        processor: its image processor, which says how large images are: a square one is passed through it.
        batch_size: images per batch, for `images_per_second_in_batches`; one that evaluation had room for.

    Returns:
        `image_size` (height and width in pixels), `flops_per_image` (a multiply-add counts as two),
        `weights_megabytes` (parameters and buffers, 10^6 bytes), `milliseconds_per_image` (median of some passes of
        one image), `images_per_second_in_batches` (from the median of some passes), `batch_size`, `device`,
        `threads`, `precision`.
    """
    square = np.zeros((256, 256, model.config.num_channels), np.uint8)
    image = processor(square, return_tensors="pt")["pixel_values"]
    one = image.to(device=model.device, dtype=model.dtype)
    with torch.inference_mode(), _evaluating(model):
        # The method of the class: Accelerate puts one under autocast in its place, on the object.
        forward = partial(type(model).forward, model)
        alone = _seconds_per_pass(forward, one)
        together = _seconds_per_pass(forward, one.repeat(batch_size, 1, 1, 1))
    on_gpu = model.device.type == "cuda"
    return {
        "image_size": list(one.shape[-2:]),
        "flops_per_image": _flops(model, one.shape),
        "weights_megabytes": sum(tensor.nbytes for tensor in model.state_dict().values()) / 1e6,
        "milliseconds_per_image": 1000 * alone,
        "images_per_second_in_batches": batch_size / together,
        "batch_size": batch_size,
        "device": torch.cuda.get_device_name(model.device) if on_gpu else processor_name(),
        "threads": torch.get_num_threads(),
        "precision": str(model.dtype).removeprefix("torch."),
    }


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _seconds_per_pass(forward: Callable[..., Any], pixel_values: Tensor) -> float:
    """Median over some passes, after one that is not counted."""
    taken: list[float] = []
    while len(taken) <= _PASSES or sum(taken[1:]) < _SECONDS:
        started = time.perf_counter()
        forward(pixel_values=pixel_values)
        if pixel_values.is_cuda:
            torch.cuda.synchronize(pixel_values.device)
        taken.append(time.perf_counter() - started)
    return median(taken[1:])


def _flops(model: PreTrainedModel, shape: torch.Size) -> int:
    """Counted on a model of the same shape without memory, with the attention whose every operation is visible."""
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config))
    twin.set_attn_implementation("eager")
    twin.eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        twin(pixel_values=torch.empty(shape, device="meta"))
    return counter.get_total_flops()
