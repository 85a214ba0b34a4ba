# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""DINOv2's own files (facebookresearch/dinov2): backbones with and without registers, linear heads of 1 and 4 layers.

Queries, keys and values are one matrix, as are gate and value of SwiGLU. Files say neither how many heads there are
(one per 64 channels) nor how positions are interpolated: with registers by size and with antialiasing, without
registers by the factor `(grid + 0.1) / table` and without antialiasing.
"""

from collections.abc import Mapping
from typing import Any

import torch

from vitreg_hf.conversion.labels import named_labels
from vitreg_hf.conversion.layout import Reading, Told, Writing
from vitreg_hf.conversion.processors import evaluation
from vitreg_hf.conversion.reference_names import (
    BLOCKS,
    GATE_AND_VALUE,
    HEAD,
    MLP,
    common_fields,
    grid_side,
    head_fields,
    shape_of,
)
from vitreg_hf.conversion.rules import Reshaped, Rule, Table
from vitreg_hf.conversion.stored import Source
from vitreg_hf.model.configuration_vitreg import ViTRegConfig

_SWIGLU: Table = {GATE_AND_VALUE: "blocks.*.mlp.w12", "layers.*.mlp.down_proj": "blocks.*.mlp.w3"}
_TOKENS: Table = {
    "embeddings.register_tokens": "register_tokens",
    "embeddings.mask_token": "mask_token",
    "classifier": HEAD.removesuffix("."),
}
_DROPPED = {r"^mask_token$": "stands for masked patches in training alone (use_mask_token keeps it)"}


class Dinov2Layout:
    """The layout of DINOv2's own files."""

    name = "dinov2"
    title = "DINOv2's own .pth"
    reads = ("num_attention_heads", "layer_norm_eps", "use_mask_token")

    def recognise(self, source: Source) -> str | None:
        names = source.tensors
        if source.config is not None or "pos_embed" not in names or "storage_tokens" in names:
            return None
        if "register_tokens" in names:
            return "register_tokens beside blocks"
        if "mask_token" in names and "blocks.0.ls1.gamma" in names:
            return "mask_token and ls1.gamma beside blocks"
        return None

    def read(self, source: Source, told: Told) -> Reading:
        fields = common_fields(source, told)
        width, patch = fields["hidden_size"], fields["patch_size"]
        side = grid_side(shape_of(source, "pos_embed", 3)[1] - 1, source)
        registers = shape_of(source, "register_tokens", 3)[1] if "register_tokens" in source.tensors else 0
        has_swiglu = "blocks.0.mlp.w12.weight" in source.tensors
        inner = shape_of(source, "blocks.0.mlp.w3.weight" if has_swiglu else "blocks.0.mlp.fc2.weight", 2)[1]
        has_head = "linear_head.weight" in source.tensors
        head = head_fields(source, width) if has_head else {}
        config = ViTRegConfig(
            **fields,
            image_size=side * patch if isinstance(patch, int) else [side * one for one in patch],
            num_register_tokens=registers,
            use_swiglu_ffn=has_swiglu,
            intermediate_size=inner,
            position_interpolation_antialias=registers > 0,
            position_interpolation_offset=0.0 if registers else 0.1,
            token_initializer_range=1e-6,
            **(head | named_labels(head.pop("num_labels")) if has_head else {}),
        )
        return Reading(
            config,
            _table(config),
            has_head,
            rules=_rules(config),
            dropped={} if config.use_mask_token else _DROPPED,
            processor=evaluation(256, 224, patch),
        )

    def write(self, config: ViTRegConfig, has_head: bool, facts: Mapping[str, Any], processor: dict) -> Writing:
        added = {} if config.use_mask_token else {"mask_token": torch.zeros(1, config.hidden_size)}
        return Writing(
            _table(config), "model.pth", _rules(config), added, cls_position=True, apart={HEAD: "linear_head.pth"}
        )


def _table(config: ViTRegConfig) -> Table:
    return {**BLOCKS, **_TOKENS, **(_SWIGLU if config.use_swiglu_ffn else MLP)}


def _rules(config: ViTRegConfig) -> dict[str, Rule]:
    width = config.hidden_size
    return {"mask_token": Reshaped((1, 1, width), (1, width))}
