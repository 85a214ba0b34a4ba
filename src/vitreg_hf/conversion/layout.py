# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What a file of a source family provides: how to recognise its checkpoints, read them, and write them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from vitreg_hf.conversion.rules import Rule, Table
from vitreg_hf.conversion.stored import Source
from vitreg_hf.model.configuration_vitreg import ViTRegConfig
from vitreg_hf.model.modeling_vitreg import ViTRegForImageClassification, ViTRegModel, ViTRegPreTrainedModel

CLASSIFIER = "classifier"


@dataclass(frozen=True)
class Told:
    """What a user can tell of a checkpoint that does not tell it itself.

    Attributes:
        architecture: name of a model of timm.
        num_attention_heads: heads per block; left out, one per 64 channels where nothing says so.
        layer_norm_eps: epsilon of all norms; left out, that of the layout where the checkpoint does not say it.
        use_mask_token: keep the token that stands for masked patches, for training on as DINOv2 does.
    """

    architecture: str | None = None
    num_attention_heads: int | None = None
    layer_norm_eps: float | None = None
    use_mask_token: bool = False


@dataclass(frozen=True)
class Reading:
    """How a checkpoint is read.

    Attributes:
        config: of the model here.
        table: names here, names in the source.
        has_head: whether there is a classifier.
        rules: rules for single names of the source (see `rules.rows_of`).
        dropped: patterns of names that are left out on purpose, each with its reason.
        processor: options of the image processor, as `ViTRegImageProcessor` takes them.
        facts: what is needed to write the source's own layout again, besides config and weights.
        notes: what a user should know, a sentence each.
    """

    config: ViTRegConfig
    table: Table
    has_head: bool = False
    rules: Mapping[str, Rule] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    processor: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Writing:
    """How a checkpoint is written in a source's own layout.

    Attributes:
        table: names here, names in the source.
        weights: name of the file of weights; one of `torch.save` if it ends in `.pth`.
        rules: rules for single names of the source.
        added: tensors that the source has and this family has not, which no output depends on.
        configs: other JSON files, by name.
        cls_position: whether CLS has a position in this layout's tables; None where that is as in the model.
        apart: prefixes of tensors that go to a file of their own, by its name.
    """

    table: Table
    weights: str = "model.safetensors"
    rules: Mapping[str, Rule] = field(default_factory=dict)
    added: Mapping[str, Tensor] = field(default_factory=dict)
    configs: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    cls_position: bool | None = None
    apart: Mapping[str, str] = field(default_factory=dict)


class Layout(Protocol):
    """One way in which checkpoints are stored."""

    @property
    def name(self) -> str:
        """What a user calls it."""

    @property
    def title(self) -> str:
        """What it is, in a few words."""

    @property
    def reads(self) -> Collection[str]:
        """Fields of `Told` that it reads, where the source does not say them."""

    def recognise(self, source: Source) -> str | None:
        """Why a source is of this layout, or None if it is not."""

    def read(self, source: Source, told: Told) -> Reading:
        """How to read it; raises ValueError for what the family cannot hold, with the reason."""

    def write(self, config: ViTRegConfig, has_head: bool, facts: Mapping[str, Any], processor: dict) -> Writing:
        """How to write it; raises ValueError for what the layout cannot say."""


def empty_model(config: ViTRegConfig, has_head: bool) -> ViTRegPreTrainedModel:
    """The model of a config without memory for its parameters."""
    with torch.device("meta"):
        return ViTRegForImageClassification(config) if has_head else ViTRegModel(config)


def check_depth(config: ViTRegConfig, source: Source) -> None:
    """Refuse a config of more blocks than there are tensors, before a model of so many is built; raises ValueError."""
    blocks, tensors = config.num_hidden_layers, len(source.tensors)
    if blocks > tensors:
        raise ValueError(f"Expected weights of {blocks} blocks in {source.name}, got {tensors} tensors")


def check_told(layout: Layout, config: ViTRegConfig, told: Told) -> None:
    """Refuse what is told and was not read, unless the config says the same; raises ValueError."""
    if told.use_mask_token and not config.use_mask_token:
        raise ValueError(f"Expected a mask token that can be kept, got {layout.title} without one")
    for name, value in vars(told).items():
        is_told = value is not None and value is not False
        if is_told and name not in layout.reads and value != getattr(config, name, None):
            known = f"has {getattr(config, name)!r}" if hasattr(config, name) else "does not read it"
            raise ValueError(f"Expected no {name} to be told for {layout.title}, which {known}, got {value!r}")


def own_shapes(config: ViTRegConfig, has_head: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a model by name, without the prefix that a backbone has inside a head's model."""
    model = empty_model(config, has_head)
    prefix = f"{model.base_model_prefix}."
    return {name.removeprefix(prefix): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
