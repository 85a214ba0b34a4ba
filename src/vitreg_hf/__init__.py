# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Vision Transformers with register tokens for Hugging Face Transformers.

Importing this package registers the ViTReg family with Transformers' Auto classes, and pipelines that know
its tokens.
"""

from vitreg_hf.conversion.back import export_checkpoint as export_checkpoint
from vitreg_hf.conversion.convert import convert_checkpoint as convert_checkpoint
from vitreg_hf.model.configuration_vitreg import ViTRegConfig as ViTRegConfig
from vitreg_hf.model.image_processing_pil_vitreg import ViTRegImageProcessorPil as ViTRegImageProcessorPil
from vitreg_hf.model.image_processing_vitreg import ViTRegImageProcessor as ViTRegImageProcessor
from vitreg_hf.model.modeling_vitreg import (
    ViTRegBackbone as ViTRegBackbone,
    ViTRegForImageClassification as ViTRegForImageClassification,
    ViTRegForMaskedImageModeling as ViTRegForMaskedImageModeling,
    ViTRegForSemanticSegmentation as ViTRegForSemanticSegmentation,
    ViTRegModel as ViTRegModel,
    ViTRegPreTrainedModel as ViTRegPreTrainedModel,
)
from vitreg_hf.pipelines.registry import register_pipelines
from vitreg_hf.register_neurons.adding import (
    add_registers as add_registers,
    add_test_time_registers as add_test_time_registers,
)
from vitreg_hf.register_neurons.averages import bias_from_images as bias_from_images, mean_patch as mean_patch
from vitreg_hf.register_neurons.finding import find_register_neurons as find_register_neurons
from vitreg_hf.register_neurons.ranking import RegisterNeurons as RegisterNeurons
from vitreg_hf.registration import register
from vitreg_hf.version import __version__ as __version__

register()
register_pipelines()
