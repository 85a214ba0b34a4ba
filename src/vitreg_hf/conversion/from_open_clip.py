# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Vision towers of OpenCLIP in its own layout (which is OpenAI's); those that are models of timm go to `from_timm`."""

from collections.abc import Mapping
from typing import Any

from vitreg_hf.conversion.layout import Reading, Told, Writing
from vitreg_hf.conversion.processors import from_timm, open_clip_settings
from vitreg_hf.conversion.reference_names import QKV, depth_of, grid_side, heads_of, shape_of
from vitreg_hf.conversion.rules import Reshaped, Rule, Table
from vitreg_hf.conversion.stored import Source
from vitreg_hf.model.configuration_vitreg import ViTRegConfig

_BLOCK = "visual.transformer.resblocks.*"
_TABLE: Table = {
    "embeddings.cls_token": "visual.class_embedding",
    "embeddings.position_embeddings": "visual.positional_embedding",
    "embeddings.patch_embeddings.projection": "visual.conv1",
    "embeddings.norm": "visual.ln_pre",
    "layers.*.norm1": f"{_BLOCK}.ln_1",
    "layers.*.norm2": f"{_BLOCK}.ln_2",
    tuple(f"{name}.weight" for name in QKV): f"{_BLOCK}.attn.in_proj_weight",
    tuple(f"{name}.bias" for name in QKV): f"{_BLOCK}.attn.in_proj_bias",
    "layers.*.attention.o_proj": f"{_BLOCK}.attn.out_proj",
    "layers.*.layer_scale1.lambda1": f"{_BLOCK}.ls_1.gamma",
    "layers.*.layer_scale2.lambda1": f"{_BLOCK}.ls_2.gamma",
    "layers.*.mlp.up_proj": f"{_BLOCK}.mlp.c_fc",
    "layers.*.mlp.down_proj": f"{_BLOCK}.mlp.c_proj",
    "layernorm": "visual.ln_post",
}
_DROPPED = {
    r"^(?!visual\.)": "the text tower, and what compares images with texts",
    r"^visual\.proj$": "projects to the space of texts, which this family has no place for",
}
_FIRST = "visual.transformer.resblocks.0"


class OpenClipLayout:
    """The layout of OpenCLIP and OpenAI's CLIP."""

    name = "open_clip"
    title = "vision tower of OpenCLIP"

    def recognise(self, source: Source) -> str | None:
        return "visual.class_embedding" if "visual.class_embedding" in source.tensors else None

    def read(self, source: Source, told: Told) -> Reading:
        settings = ((source.open_clip or {}).get("model_cfg") or {}).get("vision_cfg") or {}
        is_quick = bool(((source.open_clip or {}).get("model_cfg") or {}).get("quick_gelu"))
        _check_settings(settings)
        width, channels, patch, _ = shape_of(source, "visual.conv1.weight", 4)
        side = grid_side(shape_of(source, "visual.positional_embedding", 2)[0] - 1, source)
        heads = width // settings["head_width"] if settings.get("head_width") else heads_of(width, told)
        config = ViTRegConfig(
            hidden_size=width,
            num_hidden_layers=depth_of(source, r"visual\.transformer\.resblocks\.(\d+)\."),
            num_attention_heads=told.num_attention_heads or heads,
            intermediate_size=shape_of(source, f"{_FIRST}.mlp.c_fc.weight", 2)[0],
            hidden_act="quick_gelu" if is_quick else "gelu",
            layer_norm_eps=1e-5,
            image_size=side * patch,
            patch_size=patch,
            num_channels=channels,
            num_register_tokens=0,
            layerscale_value=1e-5 if f"{_FIRST}.ls_1.gamma" in source.tensors else None,
            patch_bias=False,
            embedding_norm=True,
            position_interpolation_antialias=True,  # OpenCLIP resizes its table so when it loads another size
        )
        unsure = () if source.open_clip else ("no open_clip_config.json: GELU is taken, not OpenAI's QuickGELU",)
        options, notes = from_timm(open_clip_settings(source.open_clip or {}, side * patch), patch)
        return Reading(
            config,
            _TABLE,
            rules=_rules(config),
            dropped=_DROPPED,
            processor=options,
            notes=(*unsure, *notes),
        )

    def write(self, config: ViTRegConfig, has_head: bool, facts: Mapping[str, Any], processor: dict) -> Writing:
        if has_head:
            raise ValueError("Expected a backbone for OpenCLIP's vision tower, got a classifier")
        return Writing(_TABLE, "visual.pth", _rules(config), cls_position=True)


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse towers that are computed in another way."""
    for name, normal in (
        ("attentional_pool", False),
        ("no_ln_pre", False),
        ("input_patchnorm", False),
        ("pos_embed_type", "learnable"),
        ("pool_type", "tok"),
        ("final_ln_after_pool", False),
    ):
        if name in settings and settings[name] != normal:
            raise ValueError(f"Expected {name}={normal!r} in a vision tower, got {settings[name]!r}: not built here")


def _rules(config: ViTRegConfig) -> dict[str, Rule]:
    width, (rows, columns) = config.hidden_size, config.position_grid
    return {
        "visual.class_embedding": Reshaped((1, 1, width), (width,)),
        "visual.positional_embedding": Reshaped((1, 1 + rows * columns, width), (1 + rows * columns, width)),
    }
