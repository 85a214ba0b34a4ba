# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What a config here says of a model of timm, or why this family cannot hold it.

timm states an architecture by code, so its own modules are asked, not a table of ours.
"""

from typing import Any

from torch import nn

_CLASSES = ("VisionTransformer", "Eva", "NaFlexVit")
_ACTIVATIONS = {
    "GELU": "gelu",
    "GELUTanh": "gelu_pytorch_tanh",
    "QuickGELU": "quick_gelu",
    "SiLU": "silu",
    "ReLU": "relu",
}


class Refused(ValueError):
    """A model whose blocks, positions or pooling this family does not have."""


def fields_of(model: Any) -> dict[str, Any]:
    """Fields of a `ViTRegConfig` that compute what a model of timm computes.

    Raises:
        Refused: for a model that the family cannot hold, with the reason.
    """
    if type(model).__name__ not in _CLASSES:
        raise Refused(
            f"Expected a model of {', '.join(_CLASSES)}, got {type(model).__name__}, which is built otherwise"
        )
    block = model.blocks[0]
    _check_block(block)
    embeds, registers = _embeds(model), _registers(model)
    patch = tuple(_patch_projection(model).kernel_size) if not _is_linear(model) else tuple(embeds.patch_size)
    return {
        "hidden_size": model.embed_dim,
        "num_channels": model.in_chans,
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        "patch_bias": _patch_projection(model).bias is not None,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "head_dim": _head_dim(model.embed_dim, block.attn),
        "num_register_tokens": registers,
        "use_cls_token": embeds.cls_token is not None,
        **_attention_fields(block.attn),
        **_mlp_fields(block.mlp),
        **_norm_fields(model, block),
        **_position_fields(model, registers),
        "layerscale_value": 1e-5 if _is_scaled(block) else None,
        "embedding_norm": not isinstance(model.norm_pre, nn.Identity),
        "pooling": _pooling(model),
        "token_initializer_range": 1e-6,
    }


def _check_block(block: Any) -> None:
    kind = type(block).__name__
    if "Parallel" in kind:
        raise Refused(f"Expected blocks that attend, then transform, got {kind}: attention and MLP run side by side")
    if kind not in ("Block", "EvaBlock"):
        raise Refused(f"Expected pre-norm blocks, got {kind}")
    attention = type(block.attn).__name__
    if attention == "DiffAttention":
        raise Refused("Expected one softmax per head, got differential attention, the difference of two")
    if attention not in ("Attention", "EvaAttention", "AttentionRope"):
        raise Refused(f"Expected plain attention, got {attention}")
    for part in ("norm", "gate"):
        there = getattr(block.attn, part, None)
        if there is not None and not isinstance(there, nn.Identity):
            raise Refused(f"Expected attention whose output is projected at once, got a {part} before that")


def _attention_fields(attention: Any) -> dict[str, Any]:
    if attention.qkv is not None:
        biased = attention.qkv.bias is not None
        query = value = biased or getattr(attention, "q_bias", None) is not None
        key = biased
    else:
        query, key, value = (getattr(attention, f"{n}_proj").bias is not None for n in "qkv")
    uniform = query == key == value
    own = {} if uniform else {"query_bias": query, "key_bias": key, "value_bias": value}
    qk_norm = not isinstance(attention.q_norm, nn.Identity)
    if qk_norm and not isinstance(attention.q_norm, nn.LayerNorm):
        raise Refused(f"Expected LayerNorm on queries and keys, got {type(attention.q_norm).__name__}")
    return {"qkv_bias": query, **own, "proj_bias": attention.proj.bias is not None, "qk_norm": qk_norm}


def _head_dim(width: int, attention: Any) -> int | None:
    return None if attention.head_dim * attention.num_heads == width else attention.head_dim


def _mlp_fields(mlp: Any) -> dict[str, Any]:
    kind, activation = type(mlp).__name__, type(mlp.act).__name__
    if not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity):
        raise Refused("Expected an MLP without a norm inside, got one with it")
    gated = kind in ("GluMlp", "SwiGLU")
    if kind not in ("Mlp", "GluMlp", "SwiGLU") or activation not in _ACTIVATIONS:
        raise Refused(f"Expected an MLP or SwiGLU, got {kind} with {activation}")
    if gated and (activation != "SiLU" or getattr(mlp, "gate_last", False)):
        raise Refused(f"Expected SwiGLU, SiLU of the first half, got {kind} with {activation}")
    first = mlp.fc1_g if kind == "SwiGLU" else mlp.fc1
    return {
        "use_swiglu_ffn": gated,
        "hidden_act": "gelu" if gated else _ACTIVATIONS[activation],
        "intermediate_size": mlp.fc2.in_features,
        "mlp_bias": first.bias is not None,
    }


def _norm_fields(model: Any, block: Any) -> dict[str, Any]:
    norms = {"after blocks": model.norm, "after pooling": model.fc_norm}
    there = {place: norm for place, norm in norms.items() if not isinstance(norm, nn.Identity)}
    for norm in (block.norm1, *there.values()):
        if not isinstance(norm, nn.LayerNorm):
            raise Refused(f"Expected LayerNorm, got {type(norm).__name__}")
        if norm.eps != block.norm1.eps:
            raise Refused(f"Expected one epsilon in all norms, got {norm.eps} and {block.norm1.eps}")
    if len(there) == 2:
        raise Refused("Expected one final norm, got one before and one after pooling")
    return {
        "layer_norm_eps": block.norm1.eps,
        "pooled_norm": "after pooling" in there,
        "final_norm": bool(there),
    }


def _pooling(model: Any) -> str:
    pooling = model.global_pool
    if getattr(model, "attn_pool", None) is not None:
        raise Refused(f"Expected pooling of CLS or mean patch, got attention pooling ({pooling!r})")
    if getattr(model, "pool_include_prefix", False) and pooling == "avg":
        raise Refused("Expected the mean of patches alone, got one that includes CLS and registers")
    if pooling == "avg":
        return "mean"
    if pooling in ("token", ""):
        return "cls" if _embeds(model).cls_token is not None else "mean"
    raise Refused(f"Expected pooling of CLS or mean patch, got {pooling!r}")


# Positions


def _position_fields(model: Any, registers: int) -> dict[str, Any]:
    rope, table = getattr(model, "rope", None), _embeds(model).pos_embed
    if rope is not None and table is not None:
        raise Refused("Expected learned or rotary positions, got both")
    if rope is not None:
        return {**_rope_fields(rope), "image_size": _image_size(model)}
    if table is None:
        raise Refused("Expected learned or rotary positions, got none or factorised ones")
    if type(model).__name__ == "NaFlexVit":
        return _naflex_fields(model)
    has_cls, bare = model.cls_token is not None, model.no_embed_class
    return {
        "image_size": _image_size(model),
        "cls_position_embedding": has_cls and not bare,
        "register_position_embeddings": registers > 0 and not bare,
        "position_interpolation_antialias": True,
    }


def _rope_fields(rope: Any) -> dict[str, Any]:
    kind = type(rope).__name__
    if kind == "RotaryEmbeddingDinoV3" and rope.min_period is None and rope.normalize_coords == "separate":
        coordinates = "centered"
    elif kind == "RotaryEmbeddingCat" and not rope.in_pixels and rope.ref_feat_shape is not None:
        coordinates = "grid"
    else:
        raise Refused(f"Expected rotary positions of fixed frequencies, by patch, got {kind}")
    if rope.grid_offset or rope.grid_indexing != "ij":
        raise Refused("Expected rotary positions from the first row and column, got an offset or another order")
    fields = {"rope_theta": float(rope.temperature), "rope_coordinates": coordinates}
    return {"position_embedding_type": "rotary", **fields}


def _naflex_fields(model: Any) -> dict[str, Any]:
    embeds = model.embeds
    for name, what in (
        ("pos_embed_ar_preserving", "positions that keep the aspect ratio of the image"),
        ("pos_embed_align_corners", "positions with aligned corners"),
        ("pos_embed_use_grid_sample", "positions by grid_sample"),
    ):
        if getattr(embeds, name):
            raise Refused(f"Expected a table of positions that is resized to the grid, got {what}")
    if not isinstance(embeds.norm, nn.Identity) or embeds.norm_input is not None:
        raise Refused("Expected a plain projection of patches, got one with a norm")
    return {
        "image_size": _image_size(model),
        "cls_position_embedding": False,
        "register_position_embeddings": False,
        "position_interpolation_mode": embeds.pos_embed_interp_mode,
        "position_interpolation_antialias": embeds.pos_embed_antialias,
    }


def _image_size(model: Any) -> int | list[int]:
    if type(model).__name__ == "NaFlexVit":
        grid, patch = model.embeds.pos_embed_grid_size, model.embeds.patch_size
        size = [rows * height for rows, height in zip(grid, patch, strict=True)]
    else:
        size = list(model.patch_embed.img_size)
    rope = getattr(model, "rope", None)
    if rope is not None and getattr(rope, "ref_feat_shape", None) is not None:
        patch = model.patch_embed.patch_size  # coordinates are counted on this grid, whatever the image
        size = [rows * height for rows, height in zip(rope.ref_feat_shape, patch, strict=True)]
    return size[0] if size[0] == size[1] else size


# Parts by class


def _embeds(model: Any) -> Any:
    return model.embeds if type(model).__name__ == "NaFlexVit" else model


def _patch_projection(model: Any) -> Any:
    return model.embeds.proj if type(model).__name__ == "NaFlexVit" else model.patch_embed.proj


def _is_linear(model: Any) -> bool:
    return isinstance(_patch_projection(model), nn.Linear)


def _registers(model: Any) -> int:
    token = _embeds(model).reg_token
    return 0 if token is None else token.shape[1]


def _is_scaled(block: Any) -> bool:
    first = getattr(block, "gamma_1", None) if hasattr(block, "gamma_1") else getattr(block, "ls1", None)
    return first is not None and not isinstance(first, nn.Identity)
