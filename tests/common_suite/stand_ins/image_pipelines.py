"""Stand in for `tests/pipelines/test_pipelines_*.py`: what the pipeline mixin runs for the image tasks.

The mixin loads model and processor, asks for a pipeline with some examples, and hands both to `run_pipeline_test`.
"""

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import pipeline
from transformers.pipelines import Pipeline

WIDTH, HEIGHT = 64, 48


def _examples() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (2, HEIGHT, WIDTH, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in noise]


class _ImagePipelineTests:
    task: str

    def get_test_pipeline(
        self, model: Any, tokenizer: None = None, image_processor: Any = None, dtype: str = "float32", **_unused: Any
    ) -> tuple[Pipeline, list[Image.Image]]:
        model = model.to(getattr(torch, dtype))
        return pipeline(self.task, model=model, image_processor=image_processor, dtype=dtype), _examples()


class ImageClassificationPipelineTests(_ImagePipelineTests):
    task = "image-classification"

    def run_pipeline_test(self, classify: Pipeline, examples: list[Image.Image]) -> None:
        labels = set(classify.model.config.id2label.values())
        everything = classify(examples[0], top_k=len(labels))
        assert {answer["label"] for answer in everything} == labels
        scores = [answer["score"] for answer in everything]
        assert scores == sorted(scores, reverse=True)
        assert math.isclose(sum(scores), 1.0, abs_tol=1e-2), scores
        for answers in classify(examples, batch_size=len(examples)):
            assert len(answers) == min(5, len(labels))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "example.png")
            examples[0].save(path)
            assert classify(str(path)) == classify(examples[0])


class ImageFeatureExtractionPipelineTests(_ImagePipelineTests):
    task = "image-feature-extraction"

    def run_pipeline_test(self, extract: Pipeline, examples: list[Image.Image]) -> None:
        hidden_size = extract.model.config.hidden_size
        tokens = extract(examples[0], return_tensors=True)
        assert tokens.shape == (1, tokens.shape[1], hidden_size)
        assert extract(examples[0]) == tokens.tolist()
        pool = pipeline(self.task, model=extract.model, image_processor=extract.image_processor, pool=True)
        assert np.shape(pool(examples[0])) == (1, hidden_size)


class ImageSegmentationPipelineTests(_ImagePipelineTests):
    task = "image-segmentation"

    def run_pipeline_test(self, segment: Pipeline, examples: list[Image.Image]) -> None:
        for answers in [segment(examples[0]), *segment(examples, batch_size=len(examples))]:
            masks = np.stack([np.asarray(answer["mask"]) for answer in answers])
            assert masks.shape[1:] == (HEIGHT, WIDTH)
            assert ((masks == 255).sum(axis=0) == 1).all(), "the masks must cover each pixel once"
            assert {answer["label"] for answer in answers} <= set(segment.model.config.id2label.values())
