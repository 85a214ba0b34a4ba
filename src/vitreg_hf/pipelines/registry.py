# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Tells Transformers' `pipeline` about the pipelines of this package."""

from transformers import AutoModel, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from vitreg_hf.pipelines.attention_maps import AttentionMapsPipeline
from vitreg_hf.pipelines.tasks import (
    CheckedImageClassificationPipeline,
    CheckedImageSegmentationPipeline,
    TokenFeaturesPipeline,
)

_TASKS: dict[str, type[Pipeline]] = {
    "image-classification": CheckedImageClassificationPipeline,
    "image-feature-extraction": TokenFeaturesPipeline,
    "image-segmentation": CheckedImageSegmentationPipeline,
}
ATTENTION_MAPS = "attention-maps"


def register_pipelines() -> None:
    """Put the pipelines into Transformers' registry, where tasks named and inferred are looked up.

    A task that another package has put its own pipeline in place of Transformers' stays as it is. Doing it again
    changes nothing.
    """
    tasks = PIPELINE_REGISTRY.supported_tasks
    for task, pipeline_class in _TASKS.items():
        if _is_of_transformers(tasks[task]["impl"]):
            tasks[task]["impl"] = pipeline_class
    # Not `register_pipeline`: what it registers is saved beside a model as code that others must trust.
    # AutoModel, because attention needs no head, and a model of this family takes any of its checkpoints silently.
    tasks.setdefault(ATTENTION_MAPS, {"impl": AttentionMapsPipeline, "pt": (AutoModel,), "type": "image"})
    PIPELINE_REGISTRY.task_aliases.setdefault("semantic-segmentation", "image-segmentation")


def _is_of_transformers(pipeline_class: type[Pipeline] | str) -> bool:
    """Whether a pipeline, a class or its dotted name depending on the version, is one of Transformers' own."""
    module = pipeline_class if isinstance(pipeline_class, str) else pipeline_class.__module__
    return module.startswith("transformers.pipelines.")
