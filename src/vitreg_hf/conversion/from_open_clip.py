# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Vision towers of OpenCLIP in its own layout (which is OpenAI's); those that are models of timm go to `from_timm`."""

from collections.abc import Mapping, Sequence
from typing import Any

from vitreg_hf.conversion.layout import Reading, Told, Writing
from vitreg_hf.conversion.processors import from_timm, open_clip_settings
from vitreg_hf.conversion.reference_names import QKV, depth_of, grid_side, heads_of, shape_of
from vitreg_hf.conversion.rules import Reshaped, Rule, Table
from vitreg_hf.conversion.stored import Source
from vitreg_hf.model.configuration_checks import pair
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
# Settings of a tower that is built here, all that OpenCLIP has; None is its default
_NORMAL: Mapping[str, Any] = {
    **dict.fromkeys(("attentional_pool", "no_ln_pre", "input_patchnorm", "final_ln_after_pool"), False),
    **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn"), False),
    **dict.fromkeys(("scale_fc", "global_average_pool"), False),
    **{"pos_embed_type": "learnable", "pool_type": "tok", "block_type": "default"},
}
# Settings that are read, that shapes tell, or that training, the head for texts or towers of timm have
_WITHOUT_EFFECT = {
    *("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "ls_init_value", "norm_kwargs"),
    *("act_kwargs", "patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads", "n_queries"),
}
_FIRST = "visual.transformer.resblocks.0"


class OpenClipLayout:
    """The layout of OpenCLIP and OpenAI's CLIP."""

    name = "open_clip"
    title = "vision tower of OpenCLIP"
    reads = ("num_attention_heads", "layer_norm_eps")

    def recognise(self, source: Source) -> str | None:
        return "visual.class_embedding" if "visual.class_embedding" in source.tensors else None

    def read(self, source: Source, told: Told) -> Reading:
        settings = ((source.open_clip or {}).get("model_cfg") or {}).get("vision_cfg") or {}
        is_quick = bool(((source.open_clip or {}).get("model_cfg") or {}).get("quick_gelu"))
        _check_settings(settings)
        width, channels, *patch = shape_of(source, "visual.conv1.weight", 4)
        image_size = _image_size(source, settings, patch)
        config = ViTRegConfig(
            hidden_size=width,
            num_hidden_layers=depth_of(source, r"visual\.transformer\.resblocks\.(\d+)\."),
            num_attention_heads=_heads(width, settings, told),
            intermediate_size=shape_of(source, f"{_FIRST}.mlp.c_fc.weight", 2)[0],
            hidden_act=_activation(settings, is_quick),
            layer_norm_eps=_epsilon(settings, told),
            image_size=image_size[0] if image_size[0] == image_size[1] else image_size,
            patch_size=patch[0] if patch[0] == patch[1] else patch,
            num_channels=channels,
            num_register_tokens=0,
            layerscale_value=1e-5 if f"{_FIRST}.ls_1.gamma" in source.tensors else None,
            patch_bias=False,
            embedding_norm=True,
            position_interpolation_antialias=True,  # OpenCLIP resizes its table so when it loads another size
        )
        unsure = () if source.open_clip else ("no open_clip_config.json: GELU is taken, not OpenAI's QuickGELU",)
        options, notes = from_timm(open_clip_settings(source.open_clip or {}, image_size), patch)
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
    """Refuse towers that are computed in another way; raises ValueError with the first setting that says so."""
    for name, value in settings.items():
        if name in _WITHOUT_EFFECT or name.startswith("timm_"):
            continue
        if name not in _NORMAL:
            raise ValueError(f"Expected a vision tower of settings that are known here, got {name}={value!r}")
        if value != _NORMAL[name] and value is not None:
            raise ValueError(f"Expected {name}={_NORMAL[name]!r} in a vision tower, got {value!r}: not built here")


def _heads(width: int, settings: Mapping[str, Any], told: Told) -> int:
    """Attention heads: one per `head_width` channels where the config says so; raises ValueError for others told."""
    if not settings.get("head_width"):
        return heads_of(width, told)
    heads = width // settings["head_width"]
    if told.num_attention_heads not in (None, heads):
        raise ValueError(f"Expected {heads} attention heads, as head_width says, got {told.num_attention_heads}")
    return heads


def _activation(settings: Mapping[str, Any], is_quick: bool) -> str:
    options = settings.get("act_kwargs") or {}
    if not options:
        return "quick_gelu" if is_quick else "gelu"
    known = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}
    if is_quick or options.keys() != {"approximate"} or options["approximate"] not in known:
        raise ValueError(f"Expected GELU, by tanh or not, in a vision tower, got act_kwargs={options!r}")
    return known[options["approximate"]]


def _epsilon(settings: Mapping[str, Any], told: Told) -> float:
    """Epsilon of all norms: OpenCLIP's, or of the config; raises ValueError for another one that is told."""
    options = settings.get("norm_kwargs") or {}
    if options.keys() - {"eps"}:
        raise ValueError(f"Expected norms of another eps alone in a vision tower, got norm_kwargs={options!r}")
    if "eps" in options and told.layer_norm_eps not in (None, options["eps"]):
        raise ValueError(f"Expected layer_norm_eps={options['eps']}, as norm_kwargs says, got {told.layer_norm_eps}")
    return options.get("eps", 1e-5)


def _image_size(source: Source, settings: Mapping[str, Any], patch: Sequence[int]) -> list[int]:
    """Height and width that the table of positions is for: those of the config if they fit, else a square grid."""
    positions = shape_of(source, "visual.positional_embedding", 2)[0] - 1
    stated = pair(settings.get("image_size") or 0)
    rows, columns = (size // side for size, side in zip(stated, patch, strict=True))
    if rows * columns != positions:
        rows = columns = grid_side(positions, source)
    return [rows * patch[0], columns * patch[1]]


def _rules(config: ViTRegConfig) -> dict[str, Rule]:
    width, (rows, columns) = config.hidden_size, config.position_grid
    return {
        "visual.class_embedding": Reshaped((1, 1, width), (width,)),
        "visual.positional_embedding": Reshaped((1, 1 + rows * columns, width), (1 + rows * columns, width)),
    }
