# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""From ViTReg back to a source's own layout, so that nobody is locked in."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitreg_hf.conversion.convert import plan_conversion
from vitreg_hf.conversion.layout import Told, Writing, check_depth, own_shapes
from vitreg_hf.conversion.layouts import named_layout
from vitreg_hf.conversion.rules import Row, rows_of
from vitreg_hf.conversion.stored import CONVERSION, Source, StoredTensor, open_source, read_json, stored
from vitreg_hf.conversion.writing import check_new, new_folder, write_json, write_safetensors, write_torch
from vitreg_hf.model.configuration_vitreg import ViTRegConfig

_CLS, _POSITIONS = "embeddings.cls_token", "embeddings.position_embeddings"
_PREFIX = "vitreg."
_BIASES = ("query_bias", "key_bias", "value_bias")


@dataclass(frozen=True)
class _Own:
    """A checkpoint of this family: config, tensors by name without prefix, and what is known of its source."""

    config: ViTRegConfig
    tensors: Mapping[str, StoredTensor]
    processor: dict[str, Any]
    conversion: dict[str, Any]

    @property
    def has_head(self) -> bool:
        return any(name.startswith("classifier.") for name in self.tensors)


def export_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    layout: str | None = None,
    architecture: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint of this family in the layout of another one, with the same outputs.

    What was written is read again, and refused if it would be another model. A position of CLS is added to CLS where
    the layout has none for it, and is zero where it needs one.

    Args:
        source: folder or Hub id of a ViTReg model.
        output: folder to write.
        layout: name of the layout; left out, that which the model was converted from.
        architecture: of timm; left out, that which the model was converted from.
        revision: branch, tag or commit of the repository.
        overwrite: replace the output folder.

    Returns:
        The file of weights.

    Raises:
        ValueError: if the layout cannot hold the model, with what differs, or the source is damaged.
    """
    final = Path(output)
    check_new(final, overwrite, [source])
    own = _opened(open_source(source, revision))
    name = layout or own.conversion.get("layout")
    if name is None:
        raise ValueError(f"Expected the name of a layout, as {source} was not converted from one, got none")
    facts = dict(own.conversion.get("facts") or {})
    if architecture is not None:
        if "architecture" not in named_layout(name).reads:
            raise ValueError(
                f"Expected no architecture to be told for {name}, which does not read it, got {architecture!r}"
            )
        facts = {"architecture": architecture}
    writing = named_layout(name).write(own.config, own.has_head, facts, own.processor)
    own = _with_cls_position(own, writing)
    rows = rows_of(writing.table, own.tensors, writing.rules)
    with new_folder(final, overwrite) as folder:
        _write(folder, writing, _foreign_tensors(own, rows, writing))
        _check_again(folder, name, own, facts, writing)
    return final / writing.weights


def _opened(source: Source) -> _Own:
    if source.config is None or source.config.get("model_type") != ViTRegConfig.model_type:
        raise ValueError(f"Expected a checkpoint of ViTReg, got {source.name}")
    config = ViTRegConfig.from_dict(source.config)
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in source.tensors.items()}
    if others := [name for name in tensors if name.startswith(("decoder.", "decode_head.", "batch_norm."))]:
        raise ValueError(f"Expected a backbone or an image classifier, got a model with {others[0]}")
    check_depth(config, source)
    expected = own_shapes(config, "classifier.weight" in tensors)
    got = {name: tensor.shape for name, tensor in tensors.items()}
    if expected != got:
        differing = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        raise ValueError(
            f"Expected the weights that the config of {source.name} describes, got others: {differing[:3]}"
        )
    conversion = {} if source.folder is None else read_json(source.folder / CONVERSION) or {}
    return _Own(config, tensors, source.processor or {}, conversion)


def _with_cls_position(own: _Own, writing: Writing) -> _Own:
    """The same model with or without a position of CLS, as a layout wants it; the outputs do not change."""
    config, wanted = own.config, writing.cls_position
    if wanted is None or wanted == config.cls_position_embedding or {_CLS, _POSITIONS} - own.tensors.keys():
        return own
    cls, table = own.tensors[_CLS].read(), own.tensors[_POSITIONS].read()
    if wanted:
        table = torch.cat([torch.zeros_like(cls), table], dim=1)
    else:
        cls, table = cls + table[:, :1], table[:, 1:]
    changed = ViTRegConfig.from_dict({**config.to_dict(), "cls_position_embedding": wanted})
    tensors = {**own.tensors, _CLS: stored(cls), _POSITIONS: stored(table)}
    return _Own(changed, tensors, own.processor, own.conversion)


def _foreign_tensors(own: _Own, rows: list[Row], writing: Writing) -> Iterator[tuple[str, Tensor]]:
    for row in rows:
        yield row.foreign, row.rule.write([own.tensors[name].read() for name in row.own])
    yield from writing.added.items()


def _write(folder: Path, writing: Writing, tensors: Iterator[tuple[str, Tensor]]) -> None:
    for name, content in writing.configs.items():
        write_json(folder / name, content)
    if not writing.weights.endswith(".pth"):
        write_safetensors(folder, tensors)
        return
    whole = dict(tensors)
    for prefix, name in writing.apart.items():
        part = {key.removeprefix(prefix): whole.pop(key) for key in list(whole) if key.startswith(prefix)}
        if part:
            write_torch(folder / name, part.items())
    write_torch(folder / writing.weights, whole.items())


def _check_again(folder: Path, layout: str, own: _Own, facts: Mapping[str, Any], writing: Writing) -> None:
    """Refuse what would be read as another model than was written."""
    architecture = facts.get("architecture") if "architecture" in named_layout(layout).reads else None
    told = Told(architecture, own.config.num_attention_heads, use_mask_token=own.config.use_mask_token)
    place = folder / writing.weights if writing.weights.endswith(".pth") else folder
    heads = [folder / name for name in writing.apart.values() if (folder / name).is_file()]
    try:
        again = plan_conversion(place, layout, head=heads[0] if heads else None, told=told).config
    except ValueError as error:
        reason = str(error).replace(str(place), "what would be written")
        raise ValueError(
            f"Expected a model that the layout {layout} can hold, got one that it cannot: {reason}"
        ) from error
    wanted, read = computing(own.config, own.has_head), computing(again, own.has_head)
    differing = [
        f"{name}={value!r}, which would be {read[name]!r}"
        for name, value in wanted.items()
        if name in read and read[name] != value  # a name that is in one alone follows from one that differs
    ]
    if differing:
        raise ValueError(f"Expected a model that the layout {layout} can hold, got {'; '.join(differing[:4])}")


def computing(config: ViTRegConfig, has_head: bool) -> dict[str, Any]:
    """What of a config the outputs in evaluation depend on, so that two that agree in it compute the same.

    Fields that others leave without effect are left out: the rule of interpolation beside rotary positions, for
    instance, or what a backbone without a head is pooled by.
    """
    names = [
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "attention_head_dim", "intermediate_size"),
        *("layer_norm_eps", "patch_size", "num_channels", "num_register_tokens", "use_cls_token", "use_swiglu_ffn"),
        *("proj_bias", "mlp_bias", "patch_bias", "position_embedding_type", "embedding_norm", "pooled_norm"),
        *("final_norm", "separate_cls_norm", "qk_norm", "num_test_time_registers", "register_neurons"),
    ]
    if has_head or config.pooled_norm:
        names += ["pooling", "num_classifier_layers"]
    if not config.use_swiglu_ffn:
        names += ["hidden_act"]
    if config.position_embedding_type == "rotary":
        names += ["rope_theta", "rope_coordinates", *(["image_size"] if config.rope_coordinates == "grid" else [])]
    else:
        names += [f"position_interpolation_{name}" for name in ("mode", "antialias", "offset")]
        names += ["image_size", "cls_position_embedding", "register_position_embeddings"]
    biases = {name: config.qkv_bias if getattr(config, name) is None else getattr(config, name) for name in _BIASES}
    return {**{name: getattr(config, name) for name in names}, **biases}
