# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Pipelines of Transformers that name tokens and bad images, and one for the attention of CLS and registers."""

from vitreg_hf.pipelines.attention_maps import AttentionMapsPipeline as AttentionMapsPipeline
from vitreg_hf.pipelines.registry import register_pipelines as register_pipelines
from vitreg_hf.pipelines.tasks import (
    TOKENS as TOKENS,
    CheckedImageClassificationPipeline as CheckedImageClassificationPipeline,
    CheckedImageSegmentationPipeline as CheckedImageSegmentationPipeline,
    TokenFeaturesPipeline as TokenFeaturesPipeline,
)
