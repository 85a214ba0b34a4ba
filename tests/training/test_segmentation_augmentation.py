# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Whatever happens to an image happens to its mask."""

import pytest
import torch
from torch import Tensor

from vitreg_hf import ViTRegImageProcessor
from vitreg_hf.training.segmentation_augmentation import CollateScenes, SceneEvaluation, SceneTransform


def processor(height: int = 32, width: int = 32) -> ViTRegImageProcessor:
    return ViTRegImageProcessor(size={"height": height, "width": width}, resample=2)


def blocks(height: int, width: int, edge: int = 16) -> tuple[Tensor, Tensor]:
    """Squares of labels 0..2, and an image in which 100 times the label is the level."""
    rows, columns = torch.arange(height)[:, None] // edge, torch.arange(width) // edge
    mask = (rows + 2 * columns) % 3
    return (100 * mask).to(torch.uint8).expand(3, -1, -1).contiguous(), mask


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.4, 0.7), (1.5, 2.5)])
@pytest.mark.parametrize("shape", [(48, 64), (90, 40), (32, 32)])
def test_labels_stay_with_their_pixels(scale: tuple[float, float], shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    transform = SceneTransform(processor(), scale, horizontal_flip=True)
    for _ in range(20):
        image, mask = transform.augment(*blocks(*shape))
        assert image.shape == (3, 32, 32)
        assert mask.shape == (32, 32)
        inside = mask != 255
        assert inside.any()
        right = (image[0].float() - 100 * mask).abs() < 50  # all but pixels that resizing blends at borders
        assert right[inside].float().mean() > 0.7
        assert (image[:, ~inside] == 128).all()


def test_crops_and_mirrors_are_drawn_over_the_whole_range() -> None:
    torch.manual_seed(0)
    image = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64).contiguous()
    transform = SceneTransform(processor(), (2.0, 2.0), horizontal_flip=True)
    crops = [transform.augment(image, torch.zeros(64, 64, dtype=torch.int64))[0][0, 0] for _ in range(300)]
    mirrored = [crop for crop in crops if crop[0] > crop[-1]]
    assert 110 < len(mirrored) < 190
    assert {int(min(crop[0], crop[-1])) for crop in crops} == set(range(33))


def test_a_small_image_is_padded_where_no_class_is() -> None:
    image, mask = SceneTransform(processor(), (0.5, 0.5)).augment(*blocks(32, 32))
    assert (mask[:16, :16] != 255).all()
    assert (mask[16:] == 255).all()
    assert (mask[:, 16:] == 255).all()
    assert (image[:, 16:] == 128).all()


def test_evaluation_is_what_the_processor_does() -> None:
    pairs = [blocks(48, 64), blocks(40, 40)]
    batch = CollateScenes(SceneEvaluation(processor()))(pairs)
    images, masks = zip(*pairs, strict=True)
    expected = processor()(list(images), segmentation_maps=list(masks), return_tensors="pt")
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert torch.equal(batch["labels"], expected["labels"])
    assert batch["labels"].shape == (2, 32, 32)


def test_without_randomness_training_sees_what_evaluation_sees() -> None:
    pairs = [blocks(64, 64)]
    transform = SceneTransform(processor())
    trained = CollateScenes(transform)([transform.augment(*pairs[0])])
    seen = CollateScenes(SceneEvaluation(processor()))(pairs)
    assert torch.equal(trained["pixel_values"], seen["pixel_values"])
    assert torch.equal(trained["labels"], seen["labels"])


def test_settings_out_of_range_are_refused() -> None:
    for scale in ((0.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="a scale with 0 < low <= high"):
            SceneTransform(processor(), scale)
    with pytest.raises(ValueError, match="a fixed height and width"):
        SceneTransform(ViTRegImageProcessor(size={"shortest_edge": 32}, do_center_crop=False))
