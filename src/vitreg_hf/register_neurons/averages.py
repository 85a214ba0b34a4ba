# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Averages over images that added registers start from: of patches, and of keys and values of a register.

Shapes: B images, h heads of d channels, D channels of the residual stream, L blocks.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from vitreg_hf.analysis.extract import read, subject_of
from vitreg_hf.analysis.recorder import AttentionCall, Readers
from vitreg_hf.model.modeling_vitreg import ViTRegModel, ViTRegPreTrainedModel
from vitreg_hf.register_neurons.adding import add_attention_bias
from vitreg_hf.register_neurons.finding import Images, batches_of, evaluated


def mean_patch(
    model: ViTRegPreTrainedModel,
    images: Images,
    processor: Any = None,
    *,
    num_images: int = 100,
    batch_size: int = 8,
    image_size: int | None = None,
) -> Tensor:
    """The average patch `(D,)` that added registers start from; arguments as in `mean_register`.

    With its position, and before the norm of the embeddings if there is one: there, registers join the patches. Only
    the embeddings are computed.

    Raises:
        ValueError: if images do not fit.
    """
    batches = batches_of(images, processor, num_images, batch_size, image_size)
    embeddings = cast(ViTRegModel, model.base_model).embeddings
    norm, means = embeddings.norm, []
    embeddings.norm = nn.Identity()
    try:
        with evaluated(model), torch.inference_mode():
            model.eval()
            for pixel_values in batches():
                tokens = embeddings(pixel_values.to(model.device, model.dtype)).tokens
                means.append((embeddings.layout.patch_tokens(tokens).double().mean((0, 1)).cpu(), len(tokens)))
    finally:
        embeddings.norm = norm
    total = sum(count for _, count in means)
    return torch.stack([mean * count / total for mean, count in means]).sum(dim=0).float()


def mean_register(
    model: ViTRegPreTrainedModel,
    images: Images,
    processor: Any = None,
    *,
    num_images: int = 1000,
    batch_size: int = 8,
    image_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean key and value of the test-time register in every block, `(L, h, d)` each.

    Args:
        model: with one test-time register.
        images: folder of images, or pixel values `(n, C, H, W)`.
        processor: image processor, for a folder.
        num_images: at most so many are read; the authors take 1,000.
        batch_size: images at a time.
        image_size: side in pixels in place of the processor's.

    Raises:
        ValueError: if the model has no test-time register or several, or images do not fit.
    """
    if (count := model.config.num_test_time_registers) != 1:
        raise ValueError(f"Expected a model with one test-time register, got {count}")
    batches = batches_of(images, processor, num_images, batch_size, image_size)

    def keep(_: int, call: AttentionCall) -> Tensor:
        both = torch.stack([call.key, call.value]).double()  # (2, B, h, N, d)
        of_register = cast(ViTRegModel, model.base_model).layout.first_test_time(both)  # (2, B, h, d)
        return of_register.sum(dim=1)

    total, images_read = torch.zeros(()), 0
    with evaluated(model):
        subject = subject_of(model, device=str(model.device))
        for pixel_values in batches():
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
    batch_size: int = 8,
    image_size: int | None = None,
) -> ViTRegPreTrainedModel:
    """The model with its test-time register turned into a bias of attention; arguments and errors as in
    `mean_register` and `add_attention_bias`."""
    keys, values = mean_register(
        model, images, processor, num_images=num_images, batch_size=batch_size, image_size=image_size
    )
    return add_attention_bias(model, keys, values)
