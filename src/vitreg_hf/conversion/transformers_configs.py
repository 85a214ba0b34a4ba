# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Configs of Transformers' DINOv2, DINOv3, ViT and CLIP, and fields of this family's config, in both directions."""

from typing import Any

from vitreg_hf.conversion.reference_names import shape_of
from vitreg_hf.conversion.stored import Source
from vitreg_hf.model.configuration_vitreg import ViTRegConfig

# Fields of the same name and meaning in all of these configs and here
_SHARED = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "num_channels"),
    *("hidden_act", "layer_norm_eps", "initializer_range"),
)
_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")
_DINOV2 = (*_DROPOUT, "drop_path_rate", "qkv_bias", "layerscale_value", "use_swiglu_ffn")
_DINOV3 = (
    *("rope_theta", "query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias", "layerscale_value"),
    *("intermediate_size", "drop_path_rate"),
)
_VIT = (*_DROPOUT, "intermediate_size", "qkv_bias")
_CLIP = ("intermediate_size",)
_PROCESSORS = {
    "dinov2": "BitImageProcessor",
    "dinov2_with_registers": "BitImageProcessor",
    "dinov3_vit": "DINOv3ViTImageProcessor",
    "vit": "ViTImageProcessor",
    "clip_vision_model": "CLIPImageProcessor",
}


def processor_type(model_type: str) -> str:
    """Class of the image processor that the published checkpoints of a model type name."""
    return _PROCESSORS[model_type]


# Reading


def own_fields(saved: Any, source: Source) -> dict[str, Any]:
    """Fields here from a config of Transformers, and from shapes where it says nothing."""
    registers = registers_of(source)
    fields = {**_taken(saved, _SHARED), "num_register_tokens": registers}
    if saved.model_type == "dinov3_vit":
        return {**fields, **_dinov3_fields(saved)}
    if saved.model_type == "vit":
        return {**fields, **_taken(saved, _VIT), "position_interpolation_antialias": False}
    if saved.model_type == "clip_vision_model":
        return {**fields, **_clip_fields(saved)}
    return {
        **fields,
        **_taken(saved, _DINOV2),
        "intermediate_size": _inner(source, "mlp.weights_out", "mlp.down_proj", "mlp.fc2"),
        "position_interpolation_antialias": registers > 0,
    }


def head_fields(saved: Any, source: Source, pooling: str) -> dict[str, Any]:
    """Fields that follow from a classifier that reads what a pooling gives.

    Raises:
        ValueError: if it has another width.
    """
    labels, inputs = shape_of(source, "classifier.weight", 2)
    told, expected = {
        "cls": ("CLS", saved.hidden_size),
        "cls_mean": ("CLS and the mean of patches", 2 * saved.hidden_size),
    }[pooling]
    if inputs != expected:
        raise ValueError(f"Expected a classifier on {told}, of {expected} inputs, got one of {inputs}")
    names = {index: saved.id2label.get(index, f"LABEL_{index}") for index in range(labels)}
    turned = {name: index for index, name in names.items()}
    return {"pooling": pooling, "id2label": names, "label2id": turned, "problem_type": saved.problem_type}


def _taken(saved: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(saved, name) for name in names if hasattr(saved, name)}


def _dinov3_fields(saved: Any) -> dict[str, Any]:
    gated = {"hidden_act": "gelu", "use_swiglu_ffn": True} if saved.use_gated_mlp else {}
    if saved.use_gated_mlp and saved.hidden_act != "silu":
        raise ValueError(f"Expected SiLU in a gated MLP, got {saved.hidden_act!r}")
    dropout = {"attention_probs_dropout_prob": saved.attention_dropout}
    return {**_taken(saved, _DINOV3), **gated, **dropout, "position_embedding_type": "rotary"}


def _clip_fields(saved: Any) -> dict[str, Any]:
    return {
        **_taken(saved, _CLIP),
        "attention_probs_dropout_prob": saved.attention_dropout or 0.0,
        "position_interpolation_antialias": False,
        "patch_bias": False,
        "embedding_norm": True,
        "pooled_norm": True,
    }


def _named(source: Source, ending: str) -> str | None:
    return next((name for name in source.tensors if name.endswith(ending)), None)


def registers_of(source: Source) -> int:
    """How many registers the weights have, whatever the config says."""
    name = _named(source, "embeddings.register_tokens")
    return 0 if name is None else shape_of(source, name, 3)[1]


def _inner(source: Source, *names: str) -> int:
    """Width inside the MLP, from the projection out of it."""
    for name in names:
        if (found := _named(source, f".0.{name}.weight")) is not None:
            return shape_of(source, found, 2)[1]
    raise ValueError(f"Expected an MLP ({' or '.join(names)}) in {source.name}, got none")


# Writing


def written_fields(model_type: str, config: ViTRegConfig) -> dict[str, Any]:
    """Fields of a config of Transformers from one here; what it cannot say is found when it is read again.

    Raises:
        ValueError: for DINOv2, if no whole `mlp_ratio` gives the inner width of the MLP.
    """
    fields = _taken(config, _SHARED)
    if model_type == "dinov3_vit":
        return {**fields, **_written_dinov3(config)}
    if model_type == "vit":
        return {**fields, **_taken(config, _VIT)}
    if model_type == "clip_vision_model":
        return {**fields, **_taken(config, _CLIP), "attention_dropout": config.attention_probs_dropout_prob}
    own = {"num_register_tokens": config.num_register_tokens}
    if model_type == "dinov2":
        own = {"use_mask_token": config.use_mask_token}
    return {**fields, **_taken(config, _DINOV2), "mlp_ratio": _whole_ratio(config), **own}


def _written_dinov3(config: ViTRegConfig) -> dict[str, Any]:
    biases = {name: _bias(config, name) for name in ("query_bias", "key_bias", "value_bias")}
    gated = {"use_gated_mlp": True, "hidden_act": "silu"} if config.use_swiglu_ffn else {}
    own = {"num_register_tokens": config.num_register_tokens, "attention_dropout": config.attention_probs_dropout_prob}
    return {**_taken(config, _DINOV3), **biases, **gated, **own}


def _bias(config: ViTRegConfig, name: str) -> bool:
    own = getattr(config, name)
    return config.qkv_bias if own is None else own


def _whole_ratio(config: ViTRegConfig) -> int:
    """The whole number of widths that DINOv2's configs state the inner width of the MLP by."""
    width, inner = config.hidden_size, config.intermediate_size
    for ratio in range(1, 17):
        given = width * ratio
        if (((given * 2 // 3) + 7) // 8 * 8 if config.use_swiglu_ffn else given) == inner:
            return ratio
    raise ValueError(f"Expected an intermediate_size that follows from a whole mlp_ratio, got {inner} for {width}")
