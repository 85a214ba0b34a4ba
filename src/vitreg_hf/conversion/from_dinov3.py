# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""DINOv3's own files (facebookresearch/dinov3): rotary positions, registers under the name of storage tokens.

Keys have no bias: files keep one with a mask that zeroes it. Periods of the rotation are stored, though they follow
from one number. Trainings of large models normalise the CLS of local crops apart, which evaluation never does.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitreg_hf.conversion.labels import named_labels
from vitreg_hf.conversion.layout import Reading, Told, Writing
from vitreg_hf.conversion.processors import SATELLITE_STATISTICS, squashed
from vitreg_hf.conversion.reference_names import BLOCKS, HEAD, MLP, common_fields, head_fields, shape_of
from vitreg_hf.conversion.rules import Reshaped, Rule, Stacked, Table
from vitreg_hf.conversion.stored import Source
from vitreg_hf.model.configuration_vitreg import ViTRegConfig

_IMAGE_SIZE = 256  # of the authors' transform, which squashes images; positions hold for any
_TOKENS: Table = {
    "embeddings.register_tokens": "storage_tokens",
    "embeddings.mask_token": "mask_token",
    "cls_norm": "cls_norm",
    "classifier": HEAD.removesuffix("."),
}
_SWIGLU: Table = {
    "layers.*.mlp.gate_proj": "blocks.*.mlp.w1",
    "layers.*.mlp.up_proj": "blocks.*.mlp.w2",
    "layers.*.mlp.down_proj": "blocks.*.mlp.w3",
}
_BIASES = ("layers.*.attention.q_proj.bias", "layers.*.attention.v_proj.bias")
_QKV_BIAS = "blocks.*.attn.qkv.bias"
_DROPPED = {
    r"^rope_embed\.periods$": "follows from rope_theta",
    r"\.attn\.qkv\.bias_mask$": "zeroes the bias of keys, which this family leaves out",
    r"^local_cls_norm\.": "normalises CLS of local crops in training alone",
}
_MASK_TOKEN = {r"^mask_token$": "stands for masked patches in training alone (use_mask_token keeps it)"}


class Dinov3Layout:
    """The layout of DINOv3's own files."""

    name = "dinov3"
    title = "DINOv3's own .pth"

    def recognise(self, source: Source) -> str | None:
        names = source.tensors
        if source.config is None and {"storage_tokens", "rope_embed.periods"} & names.keys():
            return "storage_tokens or rope_embed.periods beside blocks"
        return None

    def read(self, source: Source, told: Told) -> Reading:
        fields = common_fields(source, told)
        width, patch = fields["hidden_size"], fields["patch_size"]
        has_swiglu = "blocks.0.mlp.w1.weight" in source.tensors
        masked = "blocks.0.attn.qkv.bias_mask" in source.tensors
        if masked:
            _check_mask(source)
        has_head = "linear_head.weight" in source.tensors
        head = head_fields(source, width) if has_head else {}
        config = ViTRegConfig(
            **fields,
            key_bias=False if masked else None,
            image_size=_IMAGE_SIZE // patch * patch,
            position_embedding_type="rotary",
            rope_theta=_theta(source, width // fields["num_attention_heads"]),
            num_register_tokens=shape_of(source, "storage_tokens")[1] if "storage_tokens" in source.tensors else 0,
            separate_cls_norm="cls_norm.weight" in source.tensors,
            use_swiglu_ffn=has_swiglu,
            intermediate_size=shape_of(source, f"blocks.0.mlp.{'w3' if has_swiglu else 'fc2'}.weight")[1],
            layer_norm_eps=1e-5,
            **(head | named_labels(head.pop("num_labels")) if has_head else {}),
        )
        # weights of satellite images and of photos look alike; the names of the files differ
        is_satellite = "sat493m" in source.name.lower()
        return Reading(
            config,
            _table(config),
            has_head,
            rules=_rules(config),
            dropped={**_DROPPED, **({} if config.use_mask_token else _MASK_TOKEN)},
            processor=squashed(_IMAGE_SIZE, patch, **(SATELLITE_STATISTICS if is_satellite else {})),
            notes=("statistics of SAT-493M, as the name says so",) if is_satellite else (),
        )

    def write(self, config: ViTRegConfig, has_head: bool, facts: Mapping[str, Any], processor: dict) -> Writing:
        if config.rope_coordinates != "centered":
            raise ValueError(f"Expected rope_coordinates='centered' for DINOv3, got {config.rope_coordinates!r}")
        return Writing(_table(config), "model.pth", _rules(config), _added(config), apart={HEAD: "linear_head.pth"})


def _table(config: ViTRegConfig) -> Table:
    table = {**BLOCKS, **_TOKENS, **(_SWIGLU if config.use_swiglu_ffn else MLP)}
    return table | {_BIASES: _QKV_BIAS} if _without_key_bias(config) else table


def _rules(config: ViTRegConfig) -> dict[str, Rule]:
    width = config.hidden_size
    rules: dict[str, Rule] = {"mask_token": Reshaped((1, 1, width), (1, width))}
    return rules | {_QKV_BIAS: Stacked((True, False, True), masked=True)} if _without_key_bias(config) else rules


def _without_key_bias(config: ViTRegConfig) -> bool:
    return config.qkv_bias and config.key_bias is False


def _added(config: ViTRegConfig) -> dict[str, Tensor]:
    """What the reference implementation stores besides parameters that count."""
    width = config.hidden_size
    added = {"rope_embed.periods": _periods(config.rope_theta, config.attention_head_dim)}
    if not config.use_mask_token:
        added["mask_token"] = torch.zeros(1, width)
    if _without_key_bias(config):
        mask = torch.cat([torch.ones(width), torch.zeros(width), torch.ones(width)])
        added |= {f"blocks.{index}.attn.qkv.bias_mask": mask for index in range(config.num_hidden_layers)}
    return added


def _periods(theta: float, head_dim: int) -> Tensor:
    count = head_dim // 4
    return theta ** (torch.arange(count, dtype=torch.float32) / count)


def _theta(source: Source, head_dim: int) -> float:
    """The number that the stored periods follow from; raises ValueError if they follow from other ones."""
    if "rope_embed.periods" not in source.tensors:
        return 100.0
    periods = source.tensors["rope_embed.periods"].read().float()
    if len(periods) != head_dim // 4:
        raise ValueError(f"Expected {head_dim // 4} periods for heads of {head_dim} channels, got {len(periods)}")
    theta = round(float(periods[-1]) ** (len(periods) / (len(periods) - 1))) if len(periods) > 1 else 100
    # stored in half precision by some trainings
    if not torch.allclose(periods, _periods(theta, head_dim), rtol=1e-2):
        raise ValueError(f"Expected periods that follow from one base, got {[round(p, 4) for p in periods.tolist()]}")
    return float(theta)


def _check_mask(source: Source) -> None:
    mask = source.tensors["blocks.0.attn.qkv.bias_mask"].read().float()
    parts = [set(part.tolist()) for part in mask.chunk(3)]
    if parts != [{1.0}, {0.0}, {1.0}]:
        raise ValueError("Expected a mask that zeroes the bias of keys alone, got another one")
