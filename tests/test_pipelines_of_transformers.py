"""Transformers' own pipelines take the family for one of theirs."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from vitreg_hf import (
    ViTRegForImageClassification,
    ViTRegForSemanticSegmentation,
    ViTRegImageProcessor,
    ViTRegModel,
)

TASKS = {
    "image-classification": ViTRegForImageClassification,
    "image-feature-extraction": ViTRegModel,
    "image-segmentation": ViTRegForSemanticSegmentation,
}


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))


@pytest.fixture
def make_pipeline(make_config, tmp_path, caplog):
    """A pipeline on a saved model; fails if making it logs that something is wrong."""

    def make(task):
        TASKS[task](make_config()).save_pretrained(tmp_path)
        size = {"height": 32, "width": 32}
        ViTRegImageProcessor(size=size, do_center_crop=False).save_pretrained(tmp_path)
        logger = logging.getLogger("transformers")
        logger.addHandler(caplog.handler)
        made = pipeline(task, model=str(tmp_path))
        logger.removeHandler(caplog.handler)
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        return made

    return make


def test_classification(make_pipeline, image):
    classify = make_pipeline("image-classification")
    answer = classify(image, top_k=5)
    assert sum(entry["score"] for entry in answer) == pytest.approx(1.0)
    with torch.no_grad():
        pixels = classify.image_processor(image, return_tensors="pt").pixel_values
        best = classify.model(pixels).logits.argmax().item()
    assert answer[0]["label"] == f"LABEL_{best}"


def test_features_and_pooled_features(make_pipeline, image):
    extract = make_pipeline("image-feature-extraction")
    assert np.array(extract(image)).shape == (1, 1 + 4 + 16, 32)
    pooled = pipeline(
        "image-feature-extraction", model=extract.model, image_processor=extract.image_processor, pool=True
    )
    assert np.array(pooled(image)).shape == (1, 32)


def test_segmentation_in_the_size_of_the_image(make_pipeline, image):
    masks = make_pipeline("image-segmentation")(image)
    assert {mask["mask"].size for mask in masks} == {image.size}
    covered = sum(np.array(mask["mask"]) > 0 for mask in masks)
    assert (covered == 1).all()
