# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Names that the reference implementations of DINOv2 and DINOv3 share with timm, and what their shapes tell."""

import math
import re
from typing import Any

from vitreg_hf.conversion.layout import Told
from vitreg_hf.conversion.rules import Table
from vitreg_hf.conversion.stored import Source

QKV = ("layers.*.attention.q_proj", "layers.*.attention.k_proj", "layers.*.attention.v_proj")
HEAD = "linear_head."  # what the wrapper of backbone and head calls the head, which has a file of its own
GATE_AND_VALUE = ("layers.*.mlp.gate_proj", "layers.*.mlp.up_proj")

BLOCKS: Table = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layers.*.norm1": "blocks.*.norm1",
    "layers.*.norm2": "blocks.*.norm2",
    QKV: "blocks.*.attn.qkv",
    "layers.*.attention.o_proj": "blocks.*.attn.proj",
    "layers.*.layer_scale1.lambda1": "blocks.*.ls1.gamma",
    "layers.*.layer_scale2.lambda1": "blocks.*.ls2.gamma",
    "layernorm": "norm",
}
MLP: Table = {"layers.*.mlp.up_proj": "blocks.*.mlp.fc1", "layers.*.mlp.down_proj": "blocks.*.mlp.fc2"}

_CHANNELS_PER_HEAD = 64  # of every published model of these sources but ViT-7B, which is listed
_HEADS = {4096: 32}


def shape_of(source: Source, name: str, dimensions: int) -> tuple[int, ...]:
    """Shape of a tensor; raises ValueError if the source has none of this name, or of other dimensions."""
    if name not in source.tensors:
        raise ValueError(f"Expected a tensor {name!r} in {source.name}, got none")
    shape = source.tensors[name].shape
    if len(shape) != dimensions:
        raise ValueError(f"Expected {name!r} of {dimensions} dimensions in {source.name}, got the shape {shape}")
    return shape


def depth_of(source: Source, pattern: str = r"blocks\.(\d+)\.") -> int:
    """Number of blocks; raises ValueError if there is none, or they are not numbered through."""
    numbers = {int(match[1]) for match in map(re.compile(pattern).match, source.tensors) if match}
    if not numbers or numbers != set(range(len(numbers))):
        got = f"{len(numbers)} between {min(numbers)} and {max(numbers)}" if numbers else "none"
        raise ValueError(f"Expected blocks that are numbered through in {source.name}, got {got}")
    return len(numbers)


def heads_of(width: int, told: Told) -> int:
    """Attention heads, which no shape tells: as told, else as in every published model of this width."""
    heads = told.num_attention_heads or _HEADS.get(width) or width // _CHANNELS_PER_HEAD
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(f"Expected num_attention_heads for a width of {width}, got none that divides it ({heads})")
    return heads


def grid_side(positions: int, source: Source) -> int:
    """Rows of a square table; raises ValueError if it is none."""
    side = math.isqrt(max(positions, 0))
    if side * side != positions:
        raise ValueError(f"Expected a square table of positions in {source.name}, got {positions} patches")
    return side


def common_fields(source: Source, told: Told) -> dict[str, Any]:
    """Fields of the config that follow from shapes of the names above.

    Raises:
        ValueError: if a tensor of the first block is missing, or heads cannot be told.
    """
    width, channels, *patch = shape_of(source, "patch_embed.proj.weight", 4)
    first = "blocks.0."
    scaled = f"{first}ls1.gamma" in source.tensors
    return {
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": patch[0] if patch[0] == patch[1] else patch,
        "num_hidden_layers": depth_of(source),
        "num_attention_heads": heads_of(width, told),
        "qkv_bias": f"{first}attn.qkv.bias" in source.tensors,
        "proj_bias": f"{first}attn.proj.bias" in source.tensors,
        "mlp_bias": any(f"{first}mlp.{name}.bias" in source.tensors for name in ("fc1", "w12", "w1")),
        "layerscale_value": 1e-5 if scaled else None,
        "use_mask_token": told.use_mask_token,
    }


def head_fields(source: Source, width: int, name: str = f"{HEAD}weight") -> dict[str, Any]:
    """Fields that follow from a linear head on CLS of some layers and the mean of the last layer's patches."""
    labels, inputs = shape_of(source, name, 2)
    if inputs % width or not inputs // width >= 2:
        raise ValueError(
            f"Expected a linear head on the CLS of one or more layers and the mean of patches, of {2 * width} or more "
            f"inputs, a multiple of {width}, got one of {inputs}"
        )
    return {"num_labels": labels, "pooling": "cls_mean", "num_classifier_layers": inputs // width - 1}
