# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""From a trained model to one that is trained further: other classes, another size, other channels, less to train.

Shapes: D channels of the residual stream, C image channels.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from vitreg_hf.model.configuration_vitreg import ViTRegConfig
from vitreg_hf.model.modeling_vitreg import ViTRegForImageClassification
from vitreg_hf.model.position_embedding import InterpolationRule, PositionInterpolation, split_positions

Tuning = Literal["full", "partial", "linear", "lora"]
_HEAD = "classifier."
_POSITIONS = "vitreg.embeddings.position_embeddings"
_PATCHES = "vitreg.embeddings.patch_embeddings.projection.weight"


def load_for_finetuning(
    source: str,
    class_names: Sequence[str],
    image_size: int | None = None,
    num_channels: int | None = None,
    **changes: Any,
) -> ViTRegForImageClassification:
    """A classifier on the backbone of a checkpoint, with labels of its own, in one call.

    The head is the one of the checkpoint if it was made for the same classes in the same order and reads the same
    tokens; else it is new. Everything else comes from the checkpoint, or the call fails.

    Args:
        source: folder or id on the Hub of a ViTReg: a classifier, any other head, or a backbone.
        class_names: name of each class, by index.
        image_size: height and width that the position table is to have; it is resized by the rule of the config, to
            what the model computes at that size when it runs. None: as it is.
        num_channels: image channels. The filters of a single channel are the sum of the old ones, so that grey images
            look to it as they did; more channels repeat the old filters, scaled so that the response keeps its size.
        changes: fields of the config that only training reads, such as `drop_path_rate`, or `pooling`.

    Raises:
        ValueError: if the checkpoint is no ViTReg, lacks weights of the backbone or has some that nothing reads, or
            sizes do not fit.
    """
    kind = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    if kind != ViTRegConfig.model_type:
        raise ValueError(f"Expected a checkpoint of model type {ViTRegConfig.model_type!r} in {source}, got {kind!r}")
    loaded, found = ViTRegForImageClassification.from_pretrained(source, output_loading_info=True)
    missing, unread = set(found["missing_keys"]), set(found["unexpected_keys"])
    if absent := sorted(name for name in missing if not name.startswith(_HEAD)) + sorted(unread):
        raise ValueError(f"Expected the weights of a backbone in {source}, got others: {', '.join(absent[:10])}")
    config = _config_of(loaded.config, class_names, image_size, num_channels, changes)
    model = ViTRegForImageClassification(config)
    weights = _fitted(loaded.state_dict(), loaded.config, config)
    same_head = not missing and _reads_the_same(loaded.config, config)
    kept = {name: value for name, value in weights.items() if same_head or not name.startswith(_HEAD)}
    model.load_state_dict({**model.state_dict(), **kept})
    return model


def _config_of(
    source: ViTRegConfig,
    class_names: Sequence[str],
    image_size: int | None,
    num_channels: int | None,
    changes: dict[str, Any],
) -> ViTRegConfig:
    names = dict(enumerate(class_names))
    chosen = {"image_size": image_size, "num_channels": num_channels, **changes}
    return ViTRegConfig.from_dict(
        {
            **source.to_dict(),
            **{name: value for name, value in chosen.items() if value is not None},
            "id2label": names,
            "label2id": {name: index for index, name in names.items()},
            "architectures": None,
        }
    )


def _reads_the_same(source: ViTRegConfig, config: ViTRegConfig) -> bool:
    return source.id2label == config.id2label and source.pooling == config.pooling


def _fitted(weights: dict[str, Tensor], source: ViTRegConfig, config: ViTRegConfig) -> dict[str, Tensor]:
    """Weights with the positions and the filters that another config wants."""
    positions = resized_positions(weights[_POSITIONS], source, config.position_grid)
    filters = filters_for_channels(weights[_PATCHES], config.num_channels)
    return {**weights, _POSITIONS: positions, _PATCHES: filters}


def resized_positions(positions: Tensor, config: ViTRegConfig, grid: tuple[int, int]) -> Tensor:
    """Position table `(1, CLS + rows * columns, D)` for another grid, by the rule of the config that it comes from."""
    if grid == config.position_grid:
        return positions
    cls_position, table = split_positions(positions, config.num_cls_tokens, config.position_grid)
    resized = PositionInterpolation(InterpolationRule.from_config(config), config.position_grid)(table, grid)
    return resized if cls_position is None else torch.cat([cls_position, resized], dim=1)


def filters_for_channels(filters: Tensor, num_channels: int) -> Tensor:
    """Filters of patches `(D, C, height, width)` for another number of image channels."""
    have = filters.shape[1]
    if num_channels == have:
        return filters
    if num_channels == 1:
        return filters.sum(dim=1, keepdim=True)
    repeated = filters.repeat(1, math.ceil(num_channels / have), 1, 1)[:, :num_channels]
    return repeated * (have / num_channels)


# What is trained


def choose_trained(model: ViTRegForImageClassification, tuning: Tuning, num_layers: int = 1) -> None:
    """Freeze what is not to be trained.

    Args:
        model: with a head.
        tuning: `linear` trains the head alone; `partial` the last blocks, the final norm and the head; `full`
            everything. For `lora`, call `add_lora`.
        num_layers: blocks that `partial` trains.

    Raises:
        ValueError: if the model has fewer blocks.
    """
    blocks = model.config.num_hidden_layers
    if tuning == "partial" and not 1 <= num_layers <= blocks:
        raise ValueError(f"Expected num_tuned_layers of 1 to {blocks}, the blocks of the model, got {num_layers}")
    lowest = {"full": 0, "linear": blocks + 1, "partial": blocks + 1 - num_layers}[tuning]
    layers = model.parameter_layers()
    head = {id(parameter) for parameter in model.classifier.parameters()}
    for name, parameter in model.named_parameters():
        trained = id(parameter) in head or (tuning != "linear" and layers[name] >= lowest)
        parameter.requires_grad_(trained)


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(model: ViTRegForImageClassification, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> None:
    """Put LoRA (Hu et al., arXiv 2106.09685) on every projection of the blocks; only its matrices and the head learn.

    The projections keep their names (`LORA_TARGETS`), also for adapters that peft itself adds. The model stays what it
    is, and saves and loads its weights with the matrices until `merge_lora`.

    Raises:
        ValueError: without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError('Expected peft for LoRA, got no such package: pip install "vitreg_hf[train]"') from error
    named = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = [name for name in LORA_TARGETS if name in named]
    lora = LoraConfig(r=rank, lora_alpha=cast(int, alpha), lora_dropout=dropout, target_modules=targets)
    inject_adapter_in_model(lora, model)
    model.classifier.requires_grad_(True)


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add LoRA's matrices to the projections that they belong to, in place: what is left is a model without LoRA."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module.get_base_layer())
