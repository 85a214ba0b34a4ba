# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Tells Transformers' Auto classes about the family."""

import transformers

from vitreg_hf.model.configuration_vitreg import ViTRegConfig
from vitreg_hf.model.image_processing_pil_vitreg import ViTRegImageProcessorPil
from vitreg_hf.model.image_processing_vitreg import ViTRegImageProcessor
from vitreg_hf.model.modeling_vitreg import AUTO_MODELS


def register() -> None:
    """Register config, models and image processors; doing it again changes nothing."""
    transformers.AutoConfig.register(ViTRegConfig.model_type, ViTRegConfig, exist_ok=True)
    for auto_class, model_class in AUTO_MODELS.items():
        getattr(transformers, auto_class).register(ViTRegConfig, model_class, exist_ok=True)
    processors = {"torchvision": ViTRegImageProcessor, "pil": ViTRegImageProcessorPil}
    transformers.AutoImageProcessor.register(ViTRegConfig, image_processor_classes=processors, exist_ok=True)
