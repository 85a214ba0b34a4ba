# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""DINOv3's own files (facebookresearch/dinov3): rotary positions, registers under the name of storage tokens.

Keys have no bias: files keep one with a mask that zeroes it. Periods of the rotation are stored, though they follow
from one number. Trainings of large models normalise the CLS of local crops apart, which evaluation never does.
"""

import math
from collections.abc import Mapping
from pathlib import Path
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
_MASK = "blocks.{}.attn.qkv.bias_mask"
_PERIODS = "rope_embed.periods"
_DROPPED = {
    r"^rope_embed\.periods$": "follows from rope_theta",
    r"\.attn\.qkv\.bias_mask$": "zeroes the bias of keys, which this family leaves out",
    r"^local_cls_norm\.": "normalises CLS of local crops in training alone",
    r"^projectors\.": "projects to the widths of teachers in a distillation",  # EUPE's
}
_SATELLITE = ("statistics of SAT-493M, as the name says so",)
_MASK_TOKEN = {r"^mask_token$": "stands for masked patches in training alone (use_mask_token keeps it)"}


class Dinov3Layout:
    """The layout of DINOv3's own files."""

    name = "dinov3"
    title = "DINOv3's own .pth"
    reads = ("num_attention_heads", "layer_norm_eps", "use_mask_token")

    def recognise(self, source: Source) -> str | None:
        names = source.tensors
        if source.config is None and {"storage_tokens", "rope_embed.periods"} & names.keys():
            return "storage_tokens or rope_embed.periods beside blocks"
        return None

    def read(self, source: Source, told: Told) -> Reading:
        fields = common_fields(source, told)
        width, patch = fields["hidden_size"], fields["patch_size"]
        has_swiglu = "blocks.0.mlp.w1.weight" in source.tensors
        masked = _has_masks(source, fields["num_hidden_layers"], width)
        has_head = "linear_head.weight" in source.tensors
        head = head_fields(source, width) if has_head else {}
        config = ViTRegConfig(
            **fields,
            key_bias=False if masked else None,
            image_size=_IMAGE_SIZE // patch * patch,
            position_embedding_type="rotary",
            rope_theta=_theta(source, width // fields["num_attention_heads"]),
            num_register_tokens=shape_of(source, "storage_tokens", 3)[1] if "storage_tokens" in source.tensors else 0,
            separate_cls_norm="cls_norm.weight" in source.tensors,
            use_swiglu_ffn=has_swiglu,
            intermediate_size=shape_of(source, f"blocks.0.mlp.{'w3' if has_swiglu else 'fc2'}.weight", 2)[1],
            layer_norm_eps=1e-5,
            **(head | named_labels(head.pop("num_labels")) if has_head else {}),
        )
        # weights of satellite images and of photos look alike; the names of the files differ
        is_satellite = "sat493m" in Path(source.name).name.lower()
        return Reading(
            config,
            _table(config),
            has_head,
            rules=_rules(config),
            dropped={**_DROPPED, **({} if config.use_mask_token else _MASK_TOKEN)},
            facts={"local_cls_norm": True} if "local_cls_norm.weight" in source.tensors else {},
            processor=squashed(_IMAGE_SIZE, patch, **(SATELLITE_STATISTICS if is_satellite else {})),
            notes=(*(_SATELLITE if is_satellite else ()), *_rounded(source)),
        )

    def write(self, config: ViTRegConfig, has_head: bool, facts: Mapping[str, Any], processor: dict) -> Writing:
        if config.rope_coordinates != "centered":
            raise ValueError(f"Expected rope_coordinates='centered' for DINOv3, got {config.rope_coordinates!r}")
        added = _added(config, bool(facts.get("local_cls_norm")))
        return Writing(_table(config), "model.pth", _rules(config), added, apart={HEAD: "linear_head.pth"})


def _table(config: ViTRegConfig) -> Table:
    table = {**BLOCKS, **_TOKENS, **(_SWIGLU if config.use_swiglu_ffn else MLP)}
    return table | {_BIASES: _QKV_BIAS} if _without_key_bias(config) else table


def _rules(config: ViTRegConfig) -> dict[str, Rule]:
    width = config.hidden_size
    rules: dict[str, Rule] = {"mask_token": Reshaped((1, 1, width), (1, width))}
    return rules | {_QKV_BIAS: Stacked((True, False, True), masked=True)} if _without_key_bias(config) else rules


def _without_key_bias(config: ViTRegConfig) -> bool:
    return config.qkv_bias and config.key_bias is False


def _added(config: ViTRegConfig, has_local_norm: bool) -> dict[str, Tensor]:
    """What the reference implementation stores besides parameters that count."""
    width = config.hidden_size
    added = {_PERIODS: _periods(config.rope_theta, config.attention_head_dim)}
    if not config.use_mask_token:
        added["mask_token"] = torch.zeros(1, width)
    if has_local_norm:
        added |= {"local_cls_norm.weight": torch.ones(width), "local_cls_norm.bias": torch.zeros(width)}
    if _without_key_bias(config):
        added |= {_MASK.format(index): _mask(width) for index in range(config.num_hidden_layers)}
    return added


def _mask(width: int) -> Tensor:
    return torch.cat([torch.ones(width), torch.zeros(width), torch.ones(width)])


def _has_masks(source: Source, depth: int, width: int) -> bool:
    """Whether the bias of keys is masked; raises ValueError for blocks that differ, or a mask of anything else."""
    names = [_MASK.format(index) for index in range(depth)]
    absent = [name for name in names if name not in source.tensors]
    if len(absent) == depth:
        return False
    if absent:
        raise ValueError(f"Expected a mask of the bias of keys in every block or in none, got no {absent[0]}")
    for name in names:
        if not torch.equal(source.tensors[name].read().float(), _mask(width)):
            raise ValueError(f"Expected a mask that zeroes the bias of keys alone, got another one in {name}")
    return True


def _periods(theta: float, head_dim: int) -> Tensor:
    count = head_dim // 4
    return theta ** (torch.arange(count, dtype=torch.float32) / count)


def _theta(source: Source, head_dim: int) -> float:
    """The shortest number that the stored periods follow from, within the precision that they are stored in.

    Raises:
        ValueError: if they follow from no single number.
    """
    if _PERIODS not in source.tensors:
        return 100.0
    stored, count = source.tensors[_PERIODS], head_dim // 4
    if stored.shape != (count,) or not stored.dtype.is_floating_point:
        raise ValueError(f"Expected {count} periods for heads of {head_dim} channels, got {stored.shape}")
    periods = stored.read().float()
    last = float(periods[-1])
    if bool((periods > 0).all()) and math.isfinite(last):
        exact = last ** (count / (count - 1)) if count > 1 else 100.0
        tolerance = max(torch.finfo(stored.dtype).eps, 8 * torch.finfo(torch.float32).eps)
        for digits in range(1, 8):
            theta = float(f"{exact:.{digits}g}")
            if torch.allclose(periods, _periods(theta, head_dim), rtol=tolerance, atol=0):
                return theta
    raise ValueError(f"Expected periods that follow from one base, got {[round(p, 4) for p in periods.tolist()]}")


def _rounded(source: Source) -> tuple[str, ...]:
    """A note on positions that the reference implementation computes in the type that their periods are stored in."""
    stored = source.tensors.get(_PERIODS)
    if stored is None or stored.dtype.itemsize >= 4:
        return ()
    kind = str(stored.dtype).removeprefix("torch.")
    return (f"periods are in {kind}, in which the reference rotates; here they are those of rope_theta in float32",)
