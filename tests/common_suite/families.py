"""What the common suite must know about a model family: where its classes live, and what does not apply to it.

This file is read twice: by `run.py`, and (copied into the assembled package as `tests.families`) by the test module.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# The sizes that Transformers' own vision model tests use; a family adds to them in `Family.tiny`.
TINY: Mapping[str, Any] = {
    "image_size": 30,
    "patch_size": 2,
    "num_channels": 3,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
}

# Shortest edge to 20 pixels, then the central 18 x 18.
RESIZE_AND_CROP: Mapping[str, Any] = {
    "do_resize": True,
    "size": {"shortest_edge": 20},
    "do_center_crop": True,
    "crop_size": {"height": 18, "width": 18},
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_convert_rgb": True,
}

# Tests whose subject a vision transformer lacks, with the reason printed as the skip.
NOT_FOR_VISION_TRANSFORMERS: Mapping[str, str] = {
    "test_feed_forward_chunking": "the MLP is not chunked",
    "test_inputs_embeds": "the input is pixels, not token embeddings",
    "test_fsdp2_plan_vs_ddp_1_tied": "no tied embeddings",
    "test_fsdp2_sharding_structure_1_tied": "no tied embeddings",
    "test_hsdp_grad_accumulation_vs_single_device_0_replicate_and_shard": "its loop feeds text",
    "test_hsdp_grad_accumulation_vs_single_device_1_replicate_only": "its loop feeds text",
    "test_tp_forward_1": "no tied embeddings",
    "test_tp_generation": "the model does not generate",
    "test_tp_generation_quantized": "the model does not generate",
}


@dataclass(frozen=True)
class Family:
    """One model family and the names of its classes.

    Attributes:
        model_type: the config's `model_type`; also the name of the folder its test module is put in, where the image
            processing mixin looks for it.
        module: importing it makes the classes available and registers them with the Auto classes.
        image_processors: backend name -> class name.
        tiny: config arguments added to `TINY`.
        config_for_test: test name -> config arguments that only this test needs.
        not_applicable: test name -> why it is skipped for this family.
        plan_names_every_block: whether the FSDP plan must wrap each transformer block on its own.
        minimum_run: a complete run has at least this many tests that are not skipped.
    """

    model_type: str
    module: str
    config: str
    model: str
    image_classification: str
    image_processors: Mapping[str, str]
    backbone: str
    masked_image_modeling: str | None = None
    semantic_segmentation: str | None = None
    tiny: Mapping[str, Any] = field(default_factory=dict)
    processor_arguments: Mapping[str, Any] = field(default_factory=lambda: RESIZE_AND_CROP)
    config_for_test: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    not_applicable: Mapping[str, str] = field(default_factory=lambda: NOT_FOR_VISION_TRANSFORMERS)
    plan_names_every_block: bool = True
    minimum_run: int = 125

    def load(self, name: str) -> Any:
        """The class called `name` in the family's module."""
        return getattr(importlib.import_module(self.module), name)

    def heads(self) -> dict[str, str]:
        """Auto class name -> class name, for each class the family has, base model first."""
        names = {
            "AutoModel": self.model,
            "AutoModelForImageClassification": self.image_classification,
            "AutoModelForMaskedImageModeling": self.masked_image_modeling,
            "AutoModelForSemanticSegmentation": self.semantic_segmentation,
            "AutoBackbone": self.backbone,
        }
        return {auto: name for auto, name in names.items() if name is not None}

    def pipelines(self) -> dict[str, str]:
        """Pipeline task -> class name."""
        tasks = {"image-feature-extraction": self.model, "image-classification": self.image_classification}
        if self.semantic_segmentation is not None:
            tasks["image-segmentation"] = self.semantic_segmentation
        return tasks


VITREG = Family(
    model_type="vitreg",
    module="vitreg_hf",
    config="ViTRegConfig",
    model="ViTRegModel",
    image_classification="ViTRegForImageClassification",
    masked_image_modeling="ViTRegForMaskedImageModeling",
    semantic_segmentation="ViTRegForSemanticSegmentation",
    backbone="ViTRegBackbone",
    image_processors={"torchvision": "ViTRegImageProcessor", "pil": "ViTRegImageProcessorPil"},
    tiny={"num_register_tokens": 2},
)

# Transformers' own register model: what ViTReg is measured against.
BASELINE = Family(
    model_type="dinov2_with_registers",
    module="transformers",
    config="Dinov2WithRegistersConfig",
    model="Dinov2WithRegistersModel",
    image_classification="Dinov2WithRegistersForImageClassification",
    backbone="Dinov2WithRegistersBackbone",
    image_processors={"torchvision": "BitImageProcessor", "pil": "BitImageProcessorPil"},
    tiny={"num_register_tokens": 2},
    # The registered key mapping also renames SwiGLU weights, and the test wants every rename to be used.
    config_for_test={"test_reverse_loading_mapping": {"use_swiglu_ffn": True}},
    not_applicable={
        **NOT_FOR_VISION_TRANSFORMERS,
        **dict.fromkeys(
            (
                "test_fsdp2_plan_vs_ddp_0_untied",
                "test_training_gradient_checkpointing",
                "test_training_gradient_checkpointing_use_reentrant_false",
                "test_training_gradient_checkpointing_use_reentrant_true",
            ),
            "the model always has a mask token, which gets no gradient unless patches are masked",
        ),
    },
    plan_names_every_block=False,
)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (VITREG, BASELINE)}
