# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Names of parameters in Transformers' DINOv2, DINOv3, ViT and CLIP, of the generations that files have."""

from dataclasses import dataclass

from vitreg_hf.conversion.reference_names import GATE_AND_VALUE, QKV
from vitreg_hf.conversion.rules import Table
from vitreg_hf.model.configuration_vitreg import ViTRegConfig

# Names of ViTReg are those of Transformers 5 where it has them, so these stand for themselves.
_TOKENS: Table = {
    "embeddings.cls_token": "embeddings.cls_token",
    "embeddings.position_embeddings": "embeddings.position_embeddings",
    "embeddings.register_tokens": "embeddings.register_tokens",
    "embeddings.mask_token": "embeddings.mask_token",
    "embeddings.patch_embeddings.projection": "embeddings.patch_embeddings.projection",
    "layernorm": "layernorm",
    "classifier": "classifier",
}


def _named_attention(block: str, query: str, key: str, value: str, output: str) -> Table:
    names = zip((*QKV, "layers.*.attention.o_proj"), (query, key, value, output), strict=True)
    return {own: f"{block}.{foreign}" for own, foreign in names}


_NEW_ATTENTION = tuple(f"attention.{name}_proj" for name in "qkvo")
_OLD_ATTENTION = (*(f"attention.attention.{name}" for name in ("query", "key", "value")), "attention.output.dense")


def _dinov2(block: str, attention: tuple[str, ...]) -> Table:
    mlp: Table = {"layers.*.mlp.up_proj": f"{block}.mlp.fc1", "layers.*.mlp.down_proj": f"{block}.mlp.fc2"}
    return {
        **_TOKENS,
        **_named_attention(block, *attention),
        **{f"layers.*.norm{i}": f"{block}.norm{i}" for i in (1, 2)},
        **{f"layers.*.layer_scale{i}.lambda1": f"{block}.layer_scale{i}.lambda1" for i in (1, 2)},
        **mlp,
    }


def _swiglu(table: Table, block: str, is_old: bool) -> Table:
    """The table for models with SwiGLU, whose gate and value old names stack."""
    others = {own: foreign for own, foreign in table.items() if ".mlp." not in str(own)}
    if is_old:
        out: Table = {"layers.*.mlp.down_proj": f"{block}.mlp.weights_out"}
        return {**others, GATE_AND_VALUE: f"{block}.mlp.weights_in", **out}
    return {**others, **{f"layers.*.mlp.{name}_proj": f"{block}.mlp.{name}_proj" for name in ("gate", "up", "down")}}


_VIT_NORMS = {"layers.*.norm1": "layernorm_before", "layers.*.norm2": "layernorm_after"}


def _vit(block: str, attention: tuple[str, ...], mlp: tuple[str, str]) -> Table:
    return {
        **_TOKENS,
        **_named_attention(block, *attention),
        **{own: f"{block}.{foreign}" for own, foreign in _VIT_NORMS.items()},
        "layers.*.mlp.up_proj": f"{block}.{mlp[0]}",
        "layers.*.mlp.down_proj": f"{block}.{mlp[1]}",
    }


def _dinov3(block: str) -> Table:
    return {
        **_TOKENS,
        "embeddings.patch_embeddings.projection": "embeddings.patch_embeddings",
        "layernorm": "norm",
        **_named_attention(block, *_NEW_ATTENTION),
        **{f"layers.*.norm{i}": f"{block}.norm{i}" for i in (1, 2)},
        **{f"layers.*.layer_scale{i}.lambda1": f"{block}.layer_scale{i}.lambda1" for i in (1, 2)},
        **{f"layers.*.mlp.{name}_proj": f"{block}.mlp.{name}_proj" for name in ("gate", "up", "down")},
    }


_CLIP_BLOCK = "encoder.layers.*"
_CLIP: Table = {
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding.weight",
    "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
    "embeddings.norm": "pre_layrnorm",  # spelt so in Transformers
    "layernorm": "post_layernorm",
    **_named_attention(_CLIP_BLOCK, *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out"))),
    **{f"layers.*.norm{i}": f"{_CLIP_BLOCK}.layer_norm{i}" for i in (1, 2)},
    "layers.*.mlp.up_proj": f"{_CLIP_BLOCK}.mlp.fc1",
    "layers.*.mlp.down_proj": f"{_CLIP_BLOCK}.mlp.fc2",
}


@dataclass(frozen=True)
class Generation:
    """Names of one generation of Transformers.

    Attributes:
        mark: a name that only this generation has, of the first block.
        block: name of a block, with a star for its number.
        table: names of models with an MLP.
        is_old: whether gate and value of SwiGLU are stacked.
    """

    mark: str
    block: str
    table: Table
    is_old: bool = False

    def names(self, config: ViTRegConfig) -> Table:
        """The table for a config."""
        stacks = config.use_swiglu_ffn and ".mlp.gate_proj" not in str(self.table)
        return _swiglu(self.table, self.block, self.is_old) if stacks else self.table


_ENCODER, _LAYERS = "encoder.layer.*", "layers.*"
DINOV2 = (
    Generation(
        "encoder.layer.0.attention.attention.query.weight",
        _ENCODER,
        _dinov2(_ENCODER, _OLD_ATTENTION),
        is_old=True,
    ),
    Generation("encoder.layer.0.attention.q_proj.weight", _ENCODER, _dinov2(_ENCODER, _NEW_ATTENTION)),
)
VIT = (
    Generation(
        "encoder.layer.0.attention.attention.query.weight",
        _ENCODER,
        _vit(_ENCODER, _OLD_ATTENTION, ("intermediate.dense", "output.dense")),
    ),
    Generation("layers.0.attention.q_proj.weight", _LAYERS, _vit(_LAYERS, _NEW_ATTENTION, ("mlp.fc1", "mlp.fc2"))),
)
DINOV3 = (
    Generation("layer.0.attention.q_proj.weight", "layer.*", _dinov3("layer.*")),
    Generation("model.layer.0.attention.q_proj.weight", "model.layer.*", _dinov3("model.layer.*")),
)
CLIP = (Generation("encoder.layers.0.self_attn.q_proj.weight", _CLIP_BLOCK, _CLIP),)
