# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""timm: `vision_transformer`, `eva` and `naflexvit`, with and without registers and CLS, by name of architecture."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from vitreg_hf.conversion.labels import label_fields, named_labels
from vitreg_hf.conversion.layout import Reading, Told, Writing
from vitreg_hf.conversion.processors import from_timm, open_clip_settings
from vitreg_hf.conversion.reference_names import BLOCKS, GATE_AND_VALUE, MLP, QKV
from vitreg_hf.conversion.rules import HalvesOfPairs, LinearPatches, Reshaped, Rule, Table
from vitreg_hf.conversion.stored import Source
from vitreg_hf.conversion.timm_fields import fields_of
from vitreg_hf.conversion.timm_models import CHANNELS_PER_HEAD, OLD_SCALE, empty_timm_model, fitting_model
from vitreg_hf.model.configuration_vitreg import ViTRegConfig

_TRUNK = "visual.trunk."  # of OpenCLIP, around a tower of timm
_QKV = "blocks.*.attn.qkv"
_NAFLEX: Table = {
    "embeddings.cls_token": "embeds.cls_token",
    "embeddings.register_tokens": "embeds.reg_token",
    "embeddings.position_embeddings": "embeds.pos_embed",
    "embeddings.patch_embeddings.projection": "embeds.proj",
    "embeddings.patch_embeddings.projection.weight": "embeds.proj.weight",
}
# What a model of timm is asked for that its weights do not tell
_ARGUMENTS = ("num_classes", "global_pool")
# What timm takes as a class alone, so that its users give it by hand and no file can hold it; shapes tell it
_CLASSES = ("mlp_layer",)
_DROPPED = {
    r"^mask_token$": "stands for masked patches in training alone",
    r"^(?!visual\.trunk\.)(text|visual\.head|logit_|transformer\.|positional_|token_|ln_final)": (
        "the text tower, and what compares images with texts"
    ),
}


class TimmLayout:
    """The layout of timm."""

    name = "timm"
    title = "timm"
    reads = ("architecture", "num_attention_heads", "layer_norm_eps")

    def recognise(self, source: Source) -> str | None:
        if architecture := (source.config or {}).get("architecture"):
            return f"architecture {architecture!r} in config.json"
        if trunk := _trunk_of(source):
            return f"timm_model_name {trunk!r} in open_clip_config.json"
        return None

    def read(self, source: Source, told: Told) -> Reading:
        saved = source.config or {}
        architecture = told.architecture or saved.get("architecture") or _trunk_of(source)
        if architecture is None:
            raise ValueError(
                f"Expected the architecture of {source.name}, which no file names, got none: name a model of timm"
            )
        prefix = _TRUNK if any(name.startswith(_TRUNK) for name in source.tensors) else ""
        weights = _bare(source, prefix)
        stated = _arguments(saved, source, prefix)
        _check_heads(stated, told)
        model, arguments = fitting_model(architecture, stated, weights, told.num_attention_heads)
        _set_pooling(model, source)
        settings = {**model.pretrained_cfg, **(saved.get("pretrained_cfg") or {})}
        fields, has_head = fields_of(model), isinstance(model.head, nn.Linear)
        if source.open_clip is not None:
            settings |= open_clip_settings(source.open_clip, fields["image_size"])
        config = ViTRegConfig(**fields, **(_labels(settings, saved, model.num_classes) if has_head else {}))
        options, notes = from_timm(settings, config.patch_size)
        return Reading(
            config,
            {own: prefix + foreign for own, foreign in names_of(model, config, source).items()},
            has_head,
            rules={prefix + name: rule for name, rule in rules_of(model, config).items()},
            dropped=_DROPPED,
            processor=options,
            facts={"architecture": architecture, "arguments": arguments, "settings": _plain(settings)},
            notes=(*notes, *_guessed(told, stated, arguments)),
        )

    def write(self, config: ViTRegConfig, has_head: bool, facts: Mapping[str, Any], processor: dict) -> Writing:
        if "architecture" not in facts:
            raise ValueError("Expected the architecture of a model of timm to write, got none: name it")
        arguments = {**facts.get("arguments", {}), "num_classes": config.num_labels if has_head else 0}
        model = empty_timm_model(facts["architecture"], arguments)
        content = {
            "architecture": facts["architecture"].split(".")[0],
            "num_classes": model.num_classes,
            "num_features": model.num_features,
            "global_pool": model.global_pool,
            "model_args": {name: value for name, value in arguments.items() if name not in (*_ARGUMENTS, *_CLASSES)},
            "pretrained_cfg": facts.get("settings", {}),
        }
        fields = fields_of(model)
        learned = fields.get("position_embedding_type") != "rotary" and fields["use_cls_token"]
        return Writing(
            names_of(model, config),
            rules=rules_of(model, config),
            configs={"config.json": content},
            cls_position=fields["cls_position_embedding"] if learned else None,
        )


def _trunk_of(source: Source) -> str | None:
    settings = ((source.open_clip or {}).get("model_cfg") or {}).get("vision_cfg") or {}
    return settings.get("timm_model_name")


def _bare(source: Source, prefix: str) -> Source:
    if not prefix:
        return source
    tensors = {name.removeprefix(prefix): t for name, t in source.tensors.items() if name.startswith(prefix)}
    return source.changed(tensors, f"the tower is what stands under {prefix!r}")


def _check_heads(stated: Mapping[str, Any], told: Told) -> None:
    """Refuse heads that are told against those that the source states; raises ValueError."""
    heads = stated.get("num_heads")
    if heads is not None and told.num_attention_heads not in (None, heads):
        raise ValueError(f"Expected num_attention_heads={heads}, as the config says, got {told.num_attention_heads}")


def _guessed(told: Told, stated: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[str]:
    if told.num_attention_heads is not None or "num_heads" not in arguments or "num_heads" in stated:
        return []
    return [f"nothing says how many heads there are: {arguments['num_heads']}, of {CHANNELS_PER_HEAD} channels each"]


def _set_pooling(model: Any, source: Source) -> None:
    """OpenCLIP pools the tower of its own accord."""
    pooling = ((source.open_clip or {}).get("model_cfg") or {}).get("vision_cfg", {}).get("timm_pool")
    if pooling in ("avg", "token"):
        model.reset_classifier(0, pooling)


def _arguments(saved: Mapping[str, Any], source: Source, prefix: str) -> dict[str, Any]:
    arguments = dict(saved.get("model_args") or {})
    arguments |= {name: saved[name] for name in _ARGUMENTS if name in saved}
    if f"{prefix}head.weight" not in source.tensors:
        arguments["num_classes"] = 0
    return arguments


def _labels(settings: Mapping[str, Any], saved: Mapping[str, Any], count: int) -> dict[str, Any]:
    names = saved.get("label_names") or settings.get("label_names")
    if isinstance(names, list) and len(names) == count and len(set(names)) == count:
        return label_fields([str(name) for name in names])
    return named_labels(count)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the weights as JSON holds them."""
    kinds = (str, int, float, bool, list, tuple)
    return {name: value for name, value in settings.items() if isinstance(value, kinds)}


def names_of(model: Any, config: ViTRegConfig, source: Source | None = None) -> Table:
    """Names in a model of timm."""
    block = model.blocks[0]
    table: dict[str | tuple[str, ...], str] = {
        **{own: foreign for own, foreign in BLOCKS.items() if own != QKV},
        "embeddings.register_tokens": "reg_token",
        "embeddings.norm": "norm_pre",
        "layernorm": "fc_norm" if config.pooled_norm else "norm",
        "classifier": "head",
        **_attention_names(block.attn),
        **_mlp_names(block.mlp),
    }
    if type(model).__name__ == "NaFlexVit":
        table |= _NAFLEX
    old_scale = source is not None and OLD_SCALE in source.tensors
    if hasattr(block, "gamma_1") or old_scale:
        table |= {f"layers.*.layer_scale{i}.lambda1": f"blocks.*.gamma_{i}" for i in (1, 2)}
    return table


def _attention_names(attention: Any) -> Table:
    norms: Table = {f"layers.*.attention.{name}_norm": f"blocks.*.attn.{name}_norm" for name in "qk"}
    if attention.qkv is None:
        return {**norms, **{f"layers.*.attention.{name}_proj": f"blocks.*.attn.{name}_proj" for name in "qkv"}}
    if getattr(attention, "q_bias", None) is not None:
        biases: Table = {f"layers.*.attention.{name}_proj.bias": f"blocks.*.attn.{name}_bias" for name in "qv"}
        return {**norms, **biases, QKV: _QKV}
    return {**norms, QKV: _QKV}


def _mlp_names(mlp: Any) -> Table:
    kind = type(mlp).__name__
    if kind == "GluMlp":
        return {GATE_AND_VALUE: "blocks.*.mlp.fc1", "layers.*.mlp.down_proj": "blocks.*.mlp.fc2"}
    if kind == "SwiGLU":
        parts = {"gate_proj": "fc1_g", "up_proj": "fc1_x", "down_proj": "fc2"}
        return {f"layers.*.mlp.{own}": f"blocks.*.mlp.{foreign}" for own, foreign in parts.items()}
    return MLP


def rules_of(model: Any, config: ViTRegConfig) -> dict[str, Rule]:
    """Rules for what is not the same tensor in a model of timm."""
    rules: dict[str, Rule] = {}
    rope, attention = getattr(model, "rope", None), model.blocks[0].attn
    if rope is not None and not rope.rotate_half:
        one = HalvesOfPairs(config.attention_head_dim, "q")
        rules |= {_QKV: HalvesOfPairs(config.attention_head_dim), "blocks.*.attn.q_bias": one}
        if attention.qkv is None:
            rules |= {f"blocks.*.attn.{name}_proj": one for name in "qk"}
    if type(model).__name__ == "NaFlexVit":
        width, (rows, columns) = config.hidden_size, config.position_grid
        rules["embeds.pos_embed"] = Reshaped((1, rows * columns, width), (1, rows, columns, width))
        if isinstance(model.embeds.proj, nn.Linear):
            rules["embeds.proj.weight"] = LinearPatches(config.patch_height_width)
    return rules
