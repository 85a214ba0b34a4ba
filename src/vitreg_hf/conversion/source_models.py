# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Sources in an implementation that is not ours, for comparing outputs: Transformers' or timm's, by their own loaders.

Files of DINOv2, DINOv3 and OpenCLIP are read by timm's converters, which share no line with ours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from vitreg_hf.conversion.convert import Conversion
from vitreg_hf.conversion.reference_names import HEAD
from vitreg_hf.conversion.timm_models import empty_timm_model
from vitreg_hf.model.configuration_vitreg import ViTRegConfig


@dataclass(frozen=True)
class Outputs:
    """What a model gives for images.

    Attributes:
        layers: tokens `(B, N, D)` after every block, before the final norm.
        tokens: tokens `(B, N, D)` as they leave the model.
        logits: `(B, labels)`, or None without a head.
    """

    layers: tuple[Tensor, ...]
    tokens: Tensor
    logits: Tensor | None = None


@dataclass(frozen=True)
class SourceModel:
    """A source in its own implementation.

    Attributes:
        name: the implementation.
        run: outputs of images `(B, C, H, W)`.
        any_size: whether other sizes than the model's own are computed by the source's rule.
    """

    name: str
    run: Callable[[Tensor], Outputs]
    any_size: bool = True


def source_model(conversion: Conversion) -> SourceModel:
    """The source of a conversion as its own implementation computes it, in float32 on the CPU.

    Raises:
        ValueError: if there is no implementation of it to be had.
        ModuleNotFoundError: without timm, where that is the implementation.
    """
    makers = {"timm": _of_timm, "dinov2": _of_dinov2, "dinov3": _of_dinov3, "open_clip": _of_open_clip}
    return makers.get(conversion.report.layout, _of_transformers)(conversion)


# Transformers


def _of_transformers(conversion: Conversion) -> SourceModel:
    source, has_head = conversion.source, conversion.reading.has_head
    if source.folder is None:
        raise ValueError(f"Expected a folder or repository of Transformers to compare with, got {source.name}")
    model_type = (source.config or {})["model_type"]
    if model_type == "dinov2" and conversion.config.num_register_tokens:
        raise ValueError(f"Expected a model that Transformers has, got {source.name}, whose code is its own")
    auto: Any = transformers.AutoModelForImageClassification if has_head else transformers.AutoModel
    if model_type in ("clip", "clip_vision_model"):
        auto = transformers.CLIPVisionModel
    model = auto.from_pretrained(source.folder, dtype=torch.float32).eval()
    sizes = {"interpolate_pos_encoding": True} if model_type in ("vit", "clip", "clip_vision_model") else {}
    norm = _final_norm(model)

    def run(pixel_values: Tensor) -> Outputs:
        outputs = model(pixel_values, output_hidden_states=True, **sizes)
        layers = tuple(outputs.hidden_states[1:])
        tokens = outputs.last_hidden_state if "last_hidden_state" in outputs else norm(layers[-1])
        return Outputs(layers, tokens, outputs.get("logits"))

    return SourceModel(f"transformers {transformers.__version__} {type(model).__name__}", run)


def _final_norm(model: Any) -> nn.Module:
    """The norm after the last block; a classifier hides the tokens behind it."""
    backbone = getattr(model, model.base_model_prefix, model)
    return next((getattr(backbone, name) for name in ("layernorm", "norm") if hasattr(backbone, name)), nn.Identity())


# timm


def _of_timm(conversion: Conversion) -> SourceModel:
    facts = conversion.reading.facts
    model = empty_timm_model(facts["architecture"], {**facts["arguments"], **_dynamic(facts["architecture"])})
    names = {row.foreign for row in conversion.report.rows}
    weights = {_without_trunk(name): conversion.source.tensors[name].read() for name in names}
    return _timm_source(_loaded(model, _new_names(weights, model)))


def _dynamic(architecture: str) -> dict[str, Any]:
    return {} if "naflex" in architecture else {"dynamic_img_size": True}


def _without_trunk(name: str) -> str:
    return name.removeprefix("visual.trunk.")


def _new_names(weights: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """DeiT-III's own files call LayerScale as timm did before it was a module."""
    own = model.state_dict().keys()
    return {
        name if name in own else name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): tensor
        for name, tensor in weights.items()
    }


def _of_dinov2(conversion: Conversion) -> SourceModel:
    from timm.models.vision_transformer import checkpoint_filter_fn

    config = conversion.config
    inner, width = config.intermediate_size or 0, config.hidden_size
    gated = {"mlp_layer": "SwiGLUPacked", "act_layer": nn.SiLU, "mlp_ratio": (2 * inner + 0.5) / width}
    arguments = {
        **_common_arguments(config),
        "init_values": 1e-5 if config.layerscale_value is not None else None,
        "reg_tokens": config.num_register_tokens,
        "no_embed_class": config.num_register_tokens > 0,
        **(gated if config.use_swiglu_ffn else {}),
    }
    model = empty_timm_model("vit_small_patch14_dinov2", arguments)
    # timm interpolates by size and with antialiasing, which is the rule of models with registers alone
    return _timm_source(_filtered(model, conversion, checkpoint_filter_fn), conversion, config.num_register_tokens > 0)


def _of_dinov3(conversion: Conversion) -> SourceModel:
    from timm.models.eva import checkpoint_filter_fn

    config = conversion.config
    if config.separate_cls_norm:
        raise ValueError("Expected one final norm to compare with timm, got one of its own for CLS and registers")
    gated = {"swiglu_mlp": True, "swiglu_align_to": 1}
    arguments = {
        **_common_arguments(config),
        "num_reg_tokens": config.num_register_tokens,
        "rope_temperature": config.rope_theta,
        "global_pool": "token",
        **(gated if config.use_swiglu_ffn else {}),
    }
    model = empty_timm_model("vit_small_patch16_dinov3_qkvb", arguments)
    return _timm_source(_filtered(model, conversion, checkpoint_filter_fn), conversion)


def _of_open_clip(conversion: Conversion) -> SourceModel:
    from timm.models.vision_transformer import checkpoint_filter_fn

    config = conversion.config
    quick = "quickgelu_" if config.hidden_act == "quick_gelu" else ""
    by_tanh = {"act_layer": "gelu_tanh"} if config.hidden_act == "gelu_pytorch_tanh" else {}
    norm = partial(nn.LayerNorm, eps=config.layer_norm_eps)
    arguments = {**_common_arguments(config), **by_tanh, "norm_layer": norm}
    model = empty_timm_model(f"vit_base_patch16_clip_{quick}224", arguments)
    return _timm_source(_filtered(model, conversion, checkpoint_filter_fn))


def _common_arguments(config: ViTRegConfig) -> dict[str, Any]:
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": ((config.intermediate_size or 0) + 0.5) / config.hidden_size,  # timm rounds down
        "num_classes": 0,
        "dynamic_img_size": True,
    }


def _filtered(model: Any, conversion: Conversion, converter: Callable[..., dict[str, Tensor]]) -> Any:
    """The model with weights that timm's own converter has read."""
    names = {row.foreign for row in conversion.report.rows if not row.foreign.startswith(HEAD)}
    marks = {name for name in conversion.source.tensors if name == "mask_token"}  # by which timm knows DINOv2
    return _loaded(model, converter({name: conversion.source.tensors[name].read() for name in names | marks}, model))


def _loaded(model: Any, weights: dict[str, Tensor]) -> Any:
    model = model.to_empty(device="cpu")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=True)
    for module in model.modules():  # frequencies of rotary positions are in no file
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    return model.eval()


def _timm_source(model: Any, conversion: Conversion | None = None, any_size: bool = True) -> SourceModel:
    import timm

    head = None if conversion is None else _linear_head(conversion)

    def run(pixel_values: Tensor) -> Outputs:
        _, found = model.forward_intermediates(pixel_values, return_prefix_tokens=True, output_fmt="NLC")
        layers = tuple(torch.cat([one[1], one[0]], dim=1) if isinstance(one, tuple) else one for one in found)
        tokens = model.forward_features(pixel_values)
        if head is not None:
            return Outputs(layers, tokens, head(model, layers))
        return Outputs(layers, tokens, model.forward_head(tokens) if isinstance(model.head, nn.Linear) else None)

    return SourceModel(f"timm {timm.__version__} {type(model).__name__}", run, any_size)


def _linear_head(conversion: Conversion) -> Callable[[Any, tuple[Tensor, ...]], Tensor] | None:
    """The linear head of DINOv2 and DINOv3, on CLS of the last layers and the mean of the last layer's patches."""
    if not conversion.reading.has_head:
        return None
    weight, bias = (conversion.source.tensors[f"{HEAD}{name}"].read().float() for name in ("weight", "bias"))
    count, prefix = conversion.config.num_classifier_layers, conversion.config.num_prefix_tokens

    def classify(model: Any, layers: tuple[Tensor, ...]) -> Tensor:
        normed = [model.norm(layer) for layer in layers[-count:]]
        read = [layer[:, 0] for layer in normed] + [normed[-1][:, prefix:].mean(dim=1)]
        return F.linear(torch.cat(read, dim=1), weight, bias)

    return classify
