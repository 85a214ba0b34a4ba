"""The native aspect ratio up to a budget of patches, in both image processors, and what models make of it."""

import json
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, pipeline
from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

from vitreg_hf import ViTRegForImageClassification, ViTRegImageProcessor, ViTRegImageProcessorPil
from vitreg_hf.model.patch_budget import grid_within

BACKENDS = [ViTRegImageProcessor, ViTRegImageProcessorPil]
BUDGET = {"max_num_patches": 20, "patch_size": 8}
SIZES = [(30, 41), (64, 20), (8, 8), (100, 100), (3, 200)]  # height, width
GRIDS = [(4, 5), (7, 2), (1, 1), (4, 4), (1, 20)]


@pytest.fixture
def photos():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in SIZES]


def sizes_of(images):
    return [tuple(image.shape[-2:]) for image in images]


# The grid


@pytest.mark.parametrize(("size", "grid"), list(zip(SIZES, GRIDS, strict=True)))
def test_the_grid_of_an_image(size, grid):
    assert grid_within(*size, 8, 20) == grid


def test_within_the_budget_and_never_enlarged_beyond_the_last_patch():
    generator = random.Random(0)
    for _ in range(3000):
        height, width, most = generator.randint(1, 900), generator.randint(1, 900), generator.randint(1, 400)
        rows, columns = grid_within(height, width, 14, most)
        assert rows >= 1
        assert columns >= 1
        assert rows * columns <= most
        assert rows <= math.ceil(height / 14)
        assert columns <= math.ceil(width / 14)
        assert grid_within(width, height, 14, most) in {(columns, rows), (rows, columns)}


def test_an_image_of_whole_patches_stays_as_it_is():
    assert all(
        grid_within(14 * rows, 14 * columns, 14, 60) == (rows, columns)
        for rows in range(1, 8)
        for columns in range(1, 8)
    )


def test_aspect_ratios_stay_closer_than_by_the_rule_of_siglip2():
    generator = random.Random(0)
    ours, theirs, used = [], [], []
    for _ in range(500):
        height, width = generator.randint(256, 2000), generator.randint(256, 2000)
        rows, columns = grid_within(height, width, 16, 256)
        other = get_image_size_for_max_num_patches(height, width, 16, 256)
        for found, (high, wide) in ((ours, (rows, columns)), (theirs, other)):
            found.append(abs(math.log(high / wide * width / height)))
        used.append(rows * columns / 256)
    assert np.mean(ours) < 0.025 < 0.03 < np.mean(theirs)
    assert np.mean(used) > 0.94


# The processors


@pytest.mark.parametrize("processor", BACKENDS)
@pytest.mark.parametrize("how", ["constructor", "call"])
def test_images_of_many_sizes_are_a_list(processor, how, photos):
    if how == "constructor":
        batch = processor(**BUDGET)(photos, return_tensors="pt")
    else:
        batch = processor()(photos, **BUDGET, return_tensors="pt")
    assert sizes_of(batch.pixel_values) == [(8 * rows, 8 * columns) for rows, columns in GRIDS]
    assert all(type(image) is torch.Tensor and image.dtype == torch.float32 for image in batch.pixel_values)
    assert {image.dtype for image in batch.to(torch.bfloat16)["pixel_values"]} == {torch.bfloat16}


@pytest.mark.parametrize("processor", BACKENDS)
def test_images_of_one_size_are_a_batch(processor, photos):
    batch = processor(**BUDGET)([photos[0], photos[0]], return_tensors="pt")
    assert batch.pixel_values.shape == (2, 3, 32, 40)


def test_both_backends_give_the_same(photos):
    fast, slow = (backend(**BUDGET)(photos, return_tensors="pt").pixel_values for backend in BACKENDS)
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, atol=2.1 / 255 / 0.224, rtol=0)  # two grey levels


@pytest.mark.parametrize("processor", BACKENDS)
def test_pixels_are_those_of_an_image_resized_beforehand(processor, photos):
    own = processor(**BUDGET)(photos[0], return_tensors="pt").pixel_values
    fixed = processor(size={"height": 32, "width": 40})(photos[0], return_tensors="pt").pixel_values
    assert torch.equal(own, fixed)


@pytest.mark.parametrize("processor", BACKENDS)
def test_saved_and_loaded(processor, photos, tmp_path):
    made = processor(**BUDGET)
    made.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert {name: saved[name] for name in (*BUDGET, "size", "do_center_crop")} == {
        **BUDGET,
        "size": None,
        "do_center_crop": False,
    }
    backend = "torchvision" if processor is ViTRegImageProcessor else "pil"
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    assert type(loaded) is processor
    assert loaded.to_dict() == made.to_dict()
    for one, other in zip(loaded(photos)["pixel_values"], made(photos)["pixel_values"], strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("processor", BACKENDS)
def test_without_a_budget_nothing_of_it_is_saved(processor):
    assert not BUDGET.keys() & processor().to_dict().keys()


@pytest.mark.parametrize("processor", BACKENDS)
def test_a_call_may_do_without_the_budget(processor, photos):
    batch = processor(**BUDGET)(photos, max_num_patches=None, size={"height": 16, "width": 16}, return_tensors="pt")
    assert batch.pixel_values.shape == (5, 3, 16, 16)


@pytest.mark.parametrize("processor", BACKENDS)
def test_label_maps_take_the_same_way(processor, photos):
    maps = [np.full(size, number, dtype=np.uint8) for number, size in enumerate(SIZES)]
    batch = processor(**BUDGET)(photos, segmentation_maps=maps, return_tensors="pt")
    assert sizes_of(batch.labels) == sizes_of(batch.pixel_values)
    assert [int(labels.unique()) for labels in batch.labels] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("processor", BACKENDS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**BUDGET, "size": 224}, "expected size=None with max_num_patches, got 224"),
        ({**BUDGET, "do_center_crop": True}, "expected do_center_crop=False with max_num_patches, got True"),
        ({**BUDGET, "do_resize": False}, "expected do_resize=True with max_num_patches, got False"),
        ({"max_num_patches": 20}, "expected patch_size, that of the model's config, with max_num_patches, got None"),
        ({**BUDGET, "max_num_patches": 0}, "expected a positive max_num_patches, got 0"),
        ({**BUDGET, "patch_size": -1}, "expected a positive patch_size, got -1"),
    ],
)
def test_contradictions_are_refused(processor, options, message, photos):
    with pytest.raises(ValueError, match=message):
        processor(**options)
    with pytest.raises(ValueError, match=message):
        processor()(photos, **options)


@pytest.mark.parametrize("processor", BACKENDS)
def test_a_size_in_a_call_contradicts_the_budget_of_the_processor(processor, photos):
    with pytest.raises(ValueError, match="expected size=None with max_num_patches, got 32"):
        processor(**BUDGET)(photos, size=32)


# With a model


@torch.no_grad()
def test_packed_logits_are_those_of_padded_images(make_config, photos):
    model, processor = ViTRegForImageClassification(make_config()).eval(), ViTRegImageProcessor(**BUDGET)
    packed = model(**processor(photos, return_tensors="pt")).logits
    padded = processor(photos, do_pad=True, return_tensors="pt")
    assert padded.pixel_values.shape == (5, 3, 56, 160)
    torch.testing.assert_close(packed, model(**padded).logits, atol=1e-5, rtol=1e-5)


def test_a_pipeline_takes_images_of_many_sizes(make_config, photos):
    model = ViTRegForImageClassification(make_config()).eval()
    classify = pipeline("image-classification", model=model, image_processor=ViTRegImageProcessor(**BUDGET))
    found = [{row["label"]: row["score"] for row in rows} for rows in classify(photos, top_k=5)]
    with torch.no_grad():
        expected = model(**ViTRegImageProcessor(**BUDGET)(photos, return_tensors="pt")).logits.softmax(-1)
    for scores, own in zip(found, expected, strict=True):
        assert [scores[f"LABEL_{i}"] for i in range(5)] == pytest.approx(own.tolist(), abs=1e-5)


@pytest.mark.parametrize("processor_class", [ViTRegImageProcessor, ViTRegImageProcessorPil])
def test_a_budget_takes_the_place_of_a_saved_size_and_crop(processor_class, tmp_path):
    processor_class(size={"shortest_edge": 256}, crop_size=224, do_center_crop=True).save_pretrained(tmp_path)
    processor = processor_class.from_pretrained(tmp_path, max_num_patches=16, patch_size=16)
    assert processor(np.zeros((80, 160, 3), np.uint8))["pixel_values"][0].shape == (3, 48, 80)
    with pytest.raises(ValueError, match="max_num_patches"):
        processor_class.from_pretrained(tmp_path, max_num_patches=16, patch_size=16, do_center_crop=True)
