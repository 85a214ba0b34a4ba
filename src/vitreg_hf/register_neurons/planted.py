# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""A network with planted register neurons, and images for it: what is to be found and mended in it is known.

Blue patches are the redundant ones. Five neurons of three blocks fire for them alone; those of the last of these
blocks write a huge vector, so that blue patches become outliers there. In all blocks after it most heads attend to
whatever holds that vector, and take a value from it that every token's output depends on. It is the same value
wherever the vector stands: on a register it is as good as on patches, but it must stand somewhere. All other weights
are random.
"""

from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from vitreg_hf.analysis.images import find_images, image_batches
from vitreg_hf.model.configuration_vitreg import ViTRegConfig
from vitreg_hf.model.image_processing_vitreg import ViTRegImageProcessor
from vitreg_hf.model.modeling_vitreg import ViTRegModel, ViTRegPreTrainedModel

VIT_S: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
}
VIT_S |= {"image_size": 224, "patch_size": 16}
SMALL: dict[str, Any] = {"hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 192}
SMALL |= {"image_size": 48, "patch_size": 8}
STD = [0.5] * 3  # and mean, of the image processor
BLUE, FREE, OUT = 0, [1, 2, 3], [4, 5, 6, 7, 8, 9]  # channels: how blue, the huge vector, what it is attended to for
SINK_HEADS = 4  # of six
PlantedModel = TypeVar("PlantedModel", bound=ViTRegPreTrainedModel)
_GAIN, _OFFSET = 10.0, 3.0  # of what blue patches have to be fired for
_SMALL_STEP, _HUGE_STEP = 3.0, 500.0  # norms that a neuron writes


def planted_neurons(config: ViTRegConfig) -> list[tuple[int, int]]:
    """Pairs of layer and neuron: two in a block, one in the next, and two in the one after, which make outliers."""
    first, width = config.num_hidden_layers // 3, cast(int, config.intermediate_size)
    return [(first, 7), (first, width // 2 + 3), (first + 1, width - 2), (first + 2, 0), (first + 2, width // 3)]


def planted_network(
    model_class: type[PlantedModel] = ViTRegModel,  # type: ignore[assignment]
    *,
    swiglu: bool = False,
    registers: int = 0,
    planted: bool = True,
    **fields: Any,
) -> PlantedModel:
    """The network, of the small size unless `fields` tell another, the same on every call.

    Args:
        model_class: the backbone or a head.
        swiglu: blocks with SwiGLU, whose neurons are far below zero where they fire, but for the first and the last.
        registers: trained registers beside it all.
        planted: False has the neurons write nothing: the network as it would be without artifacts.
        fields: of the config.
    """
    fields = {**SMALL, "initializer_range": 0.03, "token_initializer_range": 0.7, **fields}
    if swiglu:
        fields["intermediate_size"] = 2 * fields["intermediate_size"] // 3
    config = ViTRegConfig(num_register_tokens=registers, use_swiglu_ffn=swiglu, **fields)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(2)
        model = model_class(config).eval()
        backbone = cast(ViTRegModel, model.base_model)
        _see_blue(backbone)
        for block in backbone.layers:
            _leave_alone(block)
        for index, (layer, neuron) in enumerate(planted_neurons(config)):
            mlp, huge = backbone.layers[layer].mlp, layer == config.num_hidden_layers // 3 + 2
            height = (_HUGE_STEP if huge else _SMALL_STEP) * planted
            _write_for_blue(mlp, neuron, height, negative=swiglu and index not in (0, 4))
        for block in backbone.layers[config.num_hidden_layers // 3 + 3 :]:
            _attend_to_vector(block.attention, config.attention_head_dim)
    return model


def planted_vit_s(swiglu: bool = False, registers: int = 0, planted: bool = True) -> ViTRegModel:
    """The network at the size of ViT-S/16, 196 patches."""
    return planted_network(swiglu=swiglu, registers=registers, planted=planted, **VIT_S)


def _see_blue(model: ViTRegModel) -> None:
    """One channel measures how much bluer than red a patch is; those of the vector and of its value are free."""
    embeddings = model.embeddings
    projection = embeddings.patch_embeddings.projection
    area = projection.weight[0, 0].numel()
    projection.weight.normal_(0, area**-0.5)
    projection.weight[[BLUE, *FREE, *OUT]] = 0
    projection.weight[BLUE, 2], projection.weight[BLUE, 0] = 5 / area, -5 / area
    if projection.bias is not None:
        projection.bias[[BLUE, *FREE, *OUT]] = 0
    cast(Tensor, embeddings.position_embeddings).normal_(0, 0.3)
    for tokens in (embeddings.position_embeddings, embeddings.cls_token, embeddings.register_tokens):
        if tokens is not None:
            tokens[..., [BLUE, *FREE, *OUT]] = 0


def _leave_alone(block: Any) -> None:
    """Random weights neither read nor write the channels that something is planted in."""
    kept = [BLUE, *FREE, *OUT]
    inputs = [block.attention.q_proj, block.attention.k_proj, block.attention.v_proj, block.mlp.up_proj]
    for linear in [*inputs, *([block.mlp.gate_proj] if hasattr(block.mlp, "gate_proj") else [])]:
        linear.weight[:, kept] = 0
    for linear in (block.attention.o_proj, block.mlp.down_proj):
        linear.weight[kept] = 0


def _write_for_blue(mlp: Any, neuron: int, height: float, negative: bool) -> None:
    """What a patch has after LayerNorm is above 1 if it is blue and below 0 if it is not."""
    fires = mlp.gate_proj if hasattr(mlp, "gate_proj") else mlp.up_proj
    fires.weight[neuron], fires.bias[neuron] = 0, -_OFFSET
    fires.weight[neuron, BLUE] = _GAIN
    if fires is not mlp.up_proj:
        mlp.up_proj.weight[neuron], mlp.up_proj.bias[neuron] = 0, -1.0 if negative else 1.0
    mlp.down_proj.weight[:, neuron] = 0
    mlp.down_proj.weight[FREE, neuron] = height / 60 / len(FREE) ** 0.5 * (-1 if negative else 1)


def _attend_to_vector(attention: Any, width: int) -> None:
    """Queries of four heads ask for the vector; the value of these is 1 in one channel where it stands, else 0."""
    largest = (attention.q_proj.weight.shape[1] * len(FREE)) ** 0.5  # of the vector's channels after LayerNorm
    for head in range(SINK_HEADS):
        row = head * width
        attention.q_proj.weight[row], attention.q_proj.bias[row] = 0, 12 * width**0.5
        for linear in (attention.k_proj, attention.v_proj):
            linear.weight[row] = 0
            linear.weight[row, FREE] = 1 / largest
        attention.o_proj.weight[:, row] = 0
        attention.o_proj.weight[OUT, row] = 1.5 * (-1) ** torch.arange(len(OUT)).float()


# Images


class Images(NamedTuple):
    """A folder of images, the same as pixel values, and which of their patches are blue `(n, P)`."""

    folder: Path
    pixels: Tensor
    blue: Tensor


def processor_for(model: ViTRegPreTrainedModel) -> ViTRegImageProcessor:
    """What the images of the network go through."""
    return ViTRegImageProcessor(size=model.config.image_size, image_mean=STD, image_std=STD)


def write_images(folder: Path, model: ViTRegPreTrainedModel, count: int, without: int = 1, classes: int = 0) -> Images:
    """Random textures with two blue squares of 2 x 2 patches each, none in the last `without` images.

    With `classes`, images stand in a folder per class, and each class has a tint of its own.
    """
    generator, patch = np.random.default_rng(4), model.config.patch_height_width[0]
    grid, masks, files = model.config.position_grid[0], [], []
    for number in range(count):
        tint = number % classes if classes else 0
        pixels = generator.integers((60, 60 * tint, 0), (256, 120 + 60 * tint, 60), (grid * patch, grid * patch, 3))
        blue = np.zeros((grid, grid), dtype=bool)
        for _ in range(2 if number < count - without else 0):
            row, column = generator.integers(0, grid - 1, 2)
            blue[row : row + 2, column : column + 2] = True
        pixels[blue.repeat(patch, axis=0).repeat(patch, axis=1)] = (0, 0, 255)
        file = folder / (f"class {tint}" if classes else "") / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(file)
        masks.append(torch.from_numpy(blue.flatten()))
        files.append(file)
    order = [files.index(file) for file in find_images(folder).files]
    values = list(image_batches(find_images(folder).files, processor_for(model), count))
    return Images(folder, torch.cat(values), torch.stack(masks)[order])
