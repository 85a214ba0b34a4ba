# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Averages over images that added registers start from: of patches, and of keys and values of a register.

Shapes: B images, h heads of d channels, D channels of the residual stream, L blocks.
"""

from typing import Any

import torch
from torch import Tensor

from vitreg_hf.analysis.extract import read, subject_of
from vitreg_hf.analysis.recorder import AttentionCall, Readers
from vitreg_hf.model.modeling_vitreg import ViTRegPreTrainedModel
from vitreg_hf.register_neurons.adding import add_attention_bias
from vitreg_hf.register_neurons.finding import Images, batches_of


def mean_patch(
    model: ViTRegPreTrainedModel,
    images: Images,
    processor: Any = None,
    *,
    num_images: int = 100,
) -> Tensor:
    """The average patch as the first block gets it, `(D,)`, for `add_registers`; arguments as in `mean_register`."""
    subject = subject_of(model, processor, device=str(model.device))
    readers = Readers(hidden=lambda i, x: subject.layout.patch_tokens(x).double().mean((0, 1)) if i == 0 else None)
    means = [
        (read(subject, pixel_values, readers).hidden[0], len(pixel_values))
        for pixel_values in batches_of(images, processor, num_images)()
    ]
    total = sum(count for _, count in means)
    return torch.stack([mean * count / total for mean, count in means]).sum(dim=0).float()


def mean_register(
    model: ViTRegPreTrainedModel,
    images: Images,
    processor: Any = None,
    *,
    num_images: int = 1000,
) -> tuple[Tensor, Tensor]:
    """Mean key and value of the first test-time register in every block, `(L, h, d)` each.

    Args:
        model: with test-time registers.
        images: folder of images, or pixel values `(n, C, H, W)`.
        processor: image processor, for a folder.
        num_images: at most so many are read; the authors take 1,000.

    Raises:
        ValueError: if the model has no test-time registers, or images do not fit.
    """
    if not model.config.num_test_time_registers:
        raise ValueError("Expected a model with test-time registers, got one without")
    subject = subject_of(model, processor, device=str(model.device))

    def keep(_: int, call: AttentionCall) -> Tensor:
        both = torch.stack([call.key, call.value]).double()  # (2, B, h, N, d)
        of_register = subject.layout.first_test_time(both)  # (2, B, h, d)
        return of_register.sum(dim=1)

    total, images_read = torch.zeros(()), 0
    for pixel_values in batches_of(images, processor, num_images)():
        total = total + torch.stack(read(subject, pixel_values, Readers(attention=keep)).attention).cpu()
        images_read += len(pixel_values)
    keys, values = (total / images_read).float().unbind(dim=1)  # (L, h, d)
    return keys, values


def bias_from_images(
    model: ViTRegPreTrainedModel,
    images: Images,
    processor: Any = None,
    *,
    num_images: int = 1000,
) -> ViTRegPreTrainedModel:
    """The model with its test-time registers turned into a bias of attention: mean key and value of each head."""
    return add_attention_bias(model, *mean_register(model, images, processor, num_images=num_images))
