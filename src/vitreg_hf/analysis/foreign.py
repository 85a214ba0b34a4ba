# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Where models keep what analysis reads: the only place of this room that knows other projects' models.

A model is described, never changed: its blocks, the modules whose outputs the two branches of a block add to the
residual stream, its patch embedding, and how many tokens stand before the patches. One more family is one more row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

from torch import Tensor, nn

from vitreg_hf.model.token_layout import TokenLayout


@dataclass(frozen=True)
class Paths:
    """Attribute paths of one model family.

    Attributes:
        blocks: list of blocks, from the model without its head.
        attention, ffn: inside a block, the module whose output its attention, its FFN, adds to the residual stream.
        final_norm: norm that dense features are read after, a module or a method, or None where patches leave the
            model without one.
        patches: patch embedding, before positions; None for text models.
        cls_tokens: names of the tokens before registers and patches.
        neurons: inside a block, the projection whose input the neurons of its FFN are; None where they are not read.
    """

    blocks: str
    attention: str
    ffn: str
    final_norm: str | None
    patches: str | None = None
    cls_tokens: tuple[str, ...] = ("CLS",)
    neurons: str | None = None


_ENCODER_LAYER = ("encoder.layer", "attention.output.dense", "output.dense", None)
_LLAMA = Paths("layers", "self_attn", "mlp", "norm")
_SCALED = ("layer_scale1", "layer_scale2")

VISION_PATHS = {
    "vitreg": Paths("layers", *_SCALED, "normed", "embeddings.patch_embeddings", neurons="mlp.down_proj"),
    "vit": Paths("layers", "attention", "mlp", "layernorm", "embeddings.patch_embeddings"),
    "deit": Paths(
        "layers", "attention", "mlp", "layernorm", "embeddings.patch_embeddings", cls_tokens=("CLS", "distillation")
    ),
    "dinov2": Paths("encoder.layer", *_SCALED, "layernorm", "embeddings.patch_embeddings"),
    "dinov2_with_registers": Paths("encoder.layer", *_SCALED, "layernorm", "embeddings.patch_embeddings"),
    "dinov3_vit": Paths("model.layer", *_SCALED, "norm", "embeddings.patch_embeddings"),
    # CLIP norms nothing but CLS after the last block, so its patches are read as they leave that block.
    "clip_vision_model": Paths("encoder.layers", "self_attn", "mlp", None, "embeddings.patch_embedding"),
    "siglip_vision_model": Paths(
        "encoder.layers", "self_attn", "mlp", "post_layernorm", "embeddings.patch_embedding", cls_tokens=()
    ),
}
_TIMM = Paths("blocks", "drop_path1", "drop_path2", "norm", "patch_embed")

TEXT_PATHS = {
    "bert": Paths(*_ENCODER_LAYER),
    "roberta": Paths(*_ENCODER_LAYER),
    "xlm-roberta": Paths(*_ENCODER_LAYER),
    "electra": Paths(*_ENCODER_LAYER),
    "distilbert": Paths("transformer.layer", "attention.out_lin", "ffn", None),
    "gpt2": Paths("h", "attn", "mlp", "ln_f"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model that analysis reads.

    Attributes:
        family: model type, `timm` for models of timm.
        backbone: the model without its head.
        blocks: its blocks, first to last.
        attention_branches, ffn_branches: per block, the module whose output is added to the residual stream.
        final_norm: a function of tokens `(B, N, D)`, a module for most families; None for none.
        patch_embedding: module, None for text.
        layout: tokens before the patches; None for text.
        prefix_names: name of each token before the patches.
        causal: whether a token sees only those before it.
        neuron_projections: per block, the module whose input the neurons of its FFN are; empty where none are read.
    """

    family: str
    backbone: nn.Module
    blocks: Sequence[nn.Module]
    attention_branches: Sequence[nn.Module]
    ffn_branches: Sequence[nn.Module]
    final_norm: Callable[[Tensor], Tensor] | None
    patch_embedding: nn.Module | None
    layout: TokenLayout | None
    prefix_names: tuple[str, ...]
    causal: bool = False
    neuron_projections: Sequence[nn.Module] = ()


def anatomy_of(model: nn.Module) -> Anatomy:
    """Describe a vision or text model of Transformers, or a vision model of timm, with or without a head.

    Raises:
        ValueError: if its family is not known, or its blocks are of a kind that is not.
    """
    for backbone in _inside(model):
        if _is_timm(backbone):
            _check_timm(backbone)
            return _described("timm", backbone, _TIMM, _timm_layout(backbone))
        config: Any = getattr(backbone, "config", None)
        paths = {**VISION_PATHS, **TEXT_PATHS}.get(getattr(config, "model_type", ""))
        if paths is not None and _has(backbone, paths.blocks):
            return _described(config.model_type, backbone, paths, _layout(config, paths) if paths.patches else None)
    known = ", ".join([*VISION_PATHS, "timm ViTs", *TEXT_PATHS])
    found = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    raise ValueError(f"Expected a model of a known family ({known}), got {found!r}")


def token_names(layout: TokenLayout, cls_names: Sequence[str] = ("CLS",)) -> list[str]:
    """Names of the tokens before the patches, in their order."""
    registers = [f"register {i}" for i in range(1, layout.num_registers + 1)]
    test_time = [f"test-time register {i}" for i in range(1, layout.num_test_time_registers + 1)]
    return [*(name for name, _ in zip(cls_names, range(layout.num_cls))), *registers, *test_time]


def _inside(model: nn.Module) -> Iterator[nn.Module]:
    """The model, what is below its head, the vision tower of two, and what a wrapper of timm holds."""
    yield model
    for name in ("timm_model", "vision_model", "base_model"):
        part = getattr(model, name, model)
        if part is not model:
            yield from _inside(part)


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _is_timm(model: nn.Module) -> bool:
    return hasattr(model, "patch_embed") and hasattr(model, "num_prefix_tokens") and hasattr(model, "blocks")


def _check_timm(model: Any) -> None:
    block = type(model.blocks[0]).__name__
    attention: Any = getattr(model.blocks[0], "attn", None)
    if not hasattr(model.blocks[0], "drop_path2") or "Diff" in type(attention).__name__:
        raise ValueError(
            f"Expected timm blocks of attention, then MLP, got {block} with {type(attention).__name__}: parallel "
            "blocks and differential attention have no single attention map and no residual stream between the two"
        )
    if not attention.fused_attn:
        raise ValueError(
            "Expected fused attention in a timm model, got TIMM_FUSED_ATTN=0: unset it, it is the default"
        )


def _timm_layout(model: Any) -> TokenLayout:
    num_cls = int(model.cls_token is not None) + int(getattr(model, "dist_token", None) is not None)
    return TokenLayout(num_cls, model.num_prefix_tokens - num_cls, 0, _pair(model.patch_embed.patch_size))


def _layout(config: Any, paths: Paths) -> TokenLayout:
    if config.model_type == "vitreg":
        return TokenLayout.from_config(config)
    registers = getattr(config, "num_register_tokens", 0)
    return TokenLayout(len(paths.cls_tokens), registers, 0, _pair(config.patch_size))


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else cast(tuple[int, int], tuple(size))


def _described(family: str, backbone: nn.Module, paths: Paths, layout: TokenLayout | None) -> Anatomy:
    blocks = list(cast(nn.ModuleList, backbone.get_submodule(paths.blocks)))
    names = _TIMM_CLS_NAMES if family == "timm" else paths.cls_tokens
    config = getattr(backbone, "config", None)
    return Anatomy(
        family=family,
        backbone=backbone,
        blocks=blocks,
        attention_branches=[block.get_submodule(paths.attention) for block in blocks],
        ffn_branches=[block.get_submodule(paths.ffn) for block in blocks],
        final_norm=None if paths.final_norm is None else attrgetter(paths.final_norm)(backbone),
        patch_embedding=None if paths.patches is None else backbone.get_submodule(paths.patches),
        layout=layout,
        prefix_names=() if layout is None else tuple(token_names(layout, names)),
        causal=layout is None and (family in _DECODERS or bool(getattr(config, "is_decoder", False))),
        neuron_projections=[block.get_submodule(paths.neurons) for block in blocks] if paths.neurons else (),
    )


_TIMM_CLS_NAMES = ("CLS", "distillation")
_DECODERS = {"gpt2", "llama", "mistral", "qwen2", "qwen3"}
