# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Tells Transformers' Auto classes about the family."""

import contextlib

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

from vitreg_hf.model.configuration_vitreg import ViTRegConfig
from vitreg_hf.model.image_processing_pil_vitreg import ViTRegImageProcessorPil
from vitreg_hf.model.image_processing_vitreg import ViTRegImageProcessor
from vitreg_hf.model.modeling_vitreg import AUTO_MODELS, ViTRegForSemanticSegmentation


def register() -> None:
    """Register config, models and image processors; doing it again changes nothing."""
    model_type = ViTRegConfig.model_type
    transformers.AutoConfig.register(model_type, ViTRegConfig, exist_ok=True)
    for auto_class, model_class in AUTO_MODELS.items():
        getattr(transformers, auto_class).register(ViTRegConfig, model_class, exist_ok=True)
    # The segmentation pipeline looks in this table alone, and reports every class that is not in it as unsupported.
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[model_type] = ViTRegForSemanticSegmentation.__name__
    processors = {"torchvision": ViTRegImageProcessor, "pil": ViTRegImageProcessorPil}
    with contextlib.suppress(ImportError):  # the oldest supported Transformers has no such class without torchvision
        transformers.AutoImageProcessor.register(ViTRegConfig, image_processor_classes=processors, exist_ok=True)
