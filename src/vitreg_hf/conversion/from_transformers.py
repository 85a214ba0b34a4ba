# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Models of Transformers: DINOv2 with and without registers, DINOv3, ViT, and vision towers of CLIP.

Files on the Hub carry the names of Transformers 4, which newer versions rename while loading; files that newer
versions have saved may carry either. What is written carries the names of the Hub, which every version reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from vitreg_hf.conversion import transformers_names as names
from vitreg_hf.conversion.layout import Reading, Told, Writing
from vitreg_hf.conversion.processors import from_transformers, of_family
from vitreg_hf.conversion.rules import Reshaped, Rule, Table
from vitreg_hf.conversion.stored import Source
from vitreg_hf.conversion.transformers_configs import (
    head_fields,
    own_fields,
    processor_type,
    registers_of,
    written_fields,
)
from vitreg_hf.model.configuration_vitreg import ViTRegConfig

_MASK = {r"embeddings\.mask_token$": "stands for masked patches in training alone (use_mask_token keeps it)"}
_NO_REGISTERS = {r"embeddings\.register_tokens$": "empty: the model has no registers"}  # of DINOv3
_OF_VIT = {
    r"(^|\.)pooler\.": "a dense layer on CLS, which this family has not: pooler_output is CLS",
    r"^decoder\.": "predicts pixels of masked patches",
}
_OF_CLIP = {
    r"^text_model\.|^text_projection\.": "the text tower",
    r"^logit_scale$": "compares images with texts",
    r"^visual_projection\.": "projects to the space of texts, which this family has no place for",
    r"embeddings\.position_ids$": "counts positions",
}
_HIBOU = (
    "registers in a config of dinov2: taken for hibou, whose own repository (HistAI/hibou) resizes positions by size, "
    "antialiased; its code for Transformers, which is no part of Transformers, was not compared at other sizes"
)
_HAVE_REGISTERS = ("dinov2_with_registers", "dinov3_vit")
# What image processors have here alone
_OWN_OPTIONS = {"image_processor_type", "size_divisor", "do_reduce_labels", "auto_map"}


@dataclass(frozen=True)
class TransformersLayout:
    """One model type of Transformers.

    Attributes:
        name: of the layout.
        title: what it is.
        model_type: of its config; of the config of its vision tower where it is a model of images and texts.
        prefix: under which a model with a head keeps its backbone.
        generations: names, those of the Hub first.
        backbone: its class without a head.
        classifier: its class for image classification; None if this family cannot hold it, or there is none.
        pooling: what its classifier reads, as the config here names it.
        dropped: patterns of names that are left out, and why.
        around: model type of the model of images and texts around it.
        reads: what is read of that which is told.
    """

    name: str
    title: str
    model_type: str
    prefix: str
    generations: tuple[names.Generation, ...]
    backbone: str
    classifier: str | None = None
    pooling: str = "cls"
    dropped: Mapping[str, str] = field(default_factory=dict)
    around: str | None = None
    reads: tuple[str, ...] = ("use_mask_token",)

    def recognise(self, source: Source) -> str | None:
        found = (source.config or {}).get("model_type")
        return f"model_type {found!r} in config.json" if found and found in (self.model_type, self.around) else None

    def read(self, source: Source, told: Told) -> Reading:
        prefix = self.prefix if any(name.startswith(self.prefix) for name in source.tensors) else ""
        generation = self._generation(source, prefix)
        saved = self._saved_config(source)
        has_head = "classifier.weight" in source.tensors
        if has_head and self.classifier is None:
            raise ValueError(f"Expected no classifier for {self.title}, got one, which reads tokens of another kind")
        config = ViTRegConfig(
            **own_fields(saved, source),
            use_mask_token=told.use_mask_token and f"{prefix}embeddings.mask_token" in source.tensors,
            **(head_fields(saved, source, self.pooling) if has_head else {}),
        )
        options, notes = from_transformers(source.processor or {}, config.patch_size)
        if source.processor is None:
            options, note = of_family(self.model_type, config)
            notes.append(f"no image processor beside the weights: {note}")
        if self.model_type == "dinov2" and registers_of(source):
            notes.append(_HIBOU)
        return Reading(
            config,
            _prefixed(generation.names(config), prefix),
            has_head,
            rules={prefix + name: rule for name, rule in self._rules(config).items()},
            dropped={
                **self.dropped,
                **({} if config.use_mask_token else _MASK),
                **({} if config.num_register_tokens else _NO_REGISTERS),
            },
            processor=options,
            notes=tuple(notes),
        )

    def write(self, config: ViTRegConfig, has_head: bool, facts: Mapping[str, Any], processor: dict) -> Writing:
        if has_head and self.classifier is None:
            raise ValueError(f"Expected a backbone for {self.title}, got a classifier, which it does not have")
        if has_head and (config.pooling, config.num_classifier_layers) != (self.pooling, 1):
            raise ValueError(
                f"Expected pooling={self.pooling!r} of one layer, which is what {self.classifier} reads, got "
                f"{config.pooling!r} of {config.num_classifier_layers}"
            )
        if config.num_register_tokens and self.model_type not in _HAVE_REGISTERS:
            raise ValueError(
                f"Expected num_register_tokens=0, as {self.backbone} has none, got {config.num_register_tokens}: "
                "the layout dinov2_with_registers holds them"
            )
        expected = "rotary" if self.model_type == "dinov3_vit" else "learned"
        if config.position_embedding_type != expected:
            raise ValueError(
                f"Expected position_embedding_type={expected!r}, as {self.backbone} has it, "
                f"got {config.position_embedding_type!r}"
            )
        prefix = self.prefix if has_head else ""
        labels: dict[str, Any] = {"id2label": config.id2label, "label2id": config.label2id} if has_head else {}
        saved = CONFIG_MAPPING[self.model_type](**{**written_fields(self.model_type, config), **labels})
        content = {**saved.to_dict(), "architectures": [self.classifier if has_head else self.backbone]}
        kept = {name: value for name, value in processor.items() if name not in _OWN_OPTIONS}
        options = {**kept, "image_processor_type": processor_type(self.model_type)}
        return Writing(
            _prefixed(self.generations[0].names(config), prefix),
            rules={prefix + name: rule for name, rule in self._rules(config).items()},
            added={prefix + name: tensor for name, tensor in self._added(config).items()},
            configs={"config.json": content, **({"preprocessor_config.json": options} if processor else {})},
            cls_position=None if self.model_type == "dinov3_vit" else True,
        )

    def _generation(self, source: Source, prefix: str) -> names.Generation:
        for generation in self.generations:
            if prefix + generation.mark in source.tensors:
                return generation
        marks = " or ".join(prefix + generation.mark for generation in self.generations)
        raise ValueError(f"Expected a tensor {marks} in {source.name}, got none")

    def _saved_config(self, source: Source) -> Any:
        content = dict(source.config or {})
        if content.get("model_type") == self.around:
            content = dict(content.get("vision_config") or {})
        layers, most = content.get("num_hidden_layers", 1), len(source.tensors)
        if isinstance(layers, int) and not 0 < layers <= most:  # some configs make a list of their layers
            raise ValueError(f"Expected num_hidden_layers for the {most} tensors of {source.name}, got {layers}")
        return CONFIG_MAPPING[self.model_type].from_dict({**content, "model_type": self.model_type})

    def _rules(self, config: ViTRegConfig) -> dict[str, Rule]:
        width, (rows, columns) = config.hidden_size, config.position_grid
        if self.model_type == "clip_vision_model":
            positions = 1 + rows * columns
            return {
                "embeddings.class_embedding": Reshaped((1, 1, width), (width,)),
                "embeddings.position_embedding.weight": Reshaped((1, positions, width), (positions, width)),
            }
        if self.model_type in ("dinov3_vit", "vit"):
            return {}
        return {"embeddings.mask_token": Reshaped((1, 1, width), (1, width))}

    def _added(self, config: ViTRegConfig) -> dict[str, Tensor]:
        """Mask tokens and registers that these models have whether they are used or not."""
        width, added = config.hidden_size, {}
        masks = {"dinov2_with_registers": (1, width), "dinov3_vit": (1, 1, width)}
        if self.model_type in masks and not config.use_mask_token:
            added["embeddings.mask_token"] = torch.zeros(masks[self.model_type])
        if self.model_type in _HAVE_REGISTERS and not config.num_register_tokens:
            added["embeddings.register_tokens"] = torch.zeros(1, 0, width)
        return added


def _prefixed(table: Table, prefix: str) -> Table:
    """Names as they are in a model with a head."""
    return {own: foreign if own == "classifier" else prefix + foreign for own, foreign in table.items()}


LAYOUTS = (
    TransformersLayout(
        "dinov2_with_registers",
        "DINOv2 with registers of Transformers",
        "dinov2_with_registers",
        "dinov2_with_registers.",
        names.DINOV2,
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersForImageClassification",
        "cls_mean",
    ),
    TransformersLayout(
        "transformers_dinov2",
        "DINOv2 of Transformers, and hibou, which adds registers to it",
        "dinov2",
        "dinov2.",
        names.DINOV2,
        "Dinov2Model",
        "Dinov2ForImageClassification",
        "cls_mean",
    ),
    TransformersLayout(
        "dinov3_vit", "DINOv3 of Transformers", "dinov3_vit", "dinov3_vit.", names.DINOV3, "DINOv3ViTModel"
    ),
    TransformersLayout(
        "vit",
        "ViT of Transformers",
        "vit",
        "vit.",
        names.VIT,
        "ViTModel",
        "ViTForImageClassification",
        dropped=_OF_VIT,
    ),
    TransformersLayout(
        "clip",
        "vision tower of Transformers' CLIP",
        "clip_vision_model",
        "vision_model.",
        names.CLIP,
        "CLIPVisionModel",
        dropped=_OF_CLIP,
        around="clip",
    ),
)
