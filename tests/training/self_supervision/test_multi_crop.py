# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Crops of one image: sizes, areas, colours, and normalisation as the image processor does it."""

import pytest
import torch

from vitreg_hf.model.image_processing_vitreg import ViTRegImageProcessor
from vitreg_hf.training.labelled_images import Example
from vitreg_hf.training.seeding import seeded
from vitreg_hf.training.self_supervision.multi_crop import MultiCrop, MultiCropCollate


@pytest.fixture
def image():
    return torch.randint(256, (3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def processor():
    return ViTRegImageProcessor(size={"height": 32, "width": 32}, resample=2, size_divisor=8)


def gradient_image():
    """Every pixel says where it is: red its column, green its row, both 0 to 255."""
    places = torch.arange(256, dtype=torch.uint8)
    columns, rows = places.expand(256, 256), places[:, None].expand(256, 256)
    return torch.stack([columns, rows, torch.zeros_like(rows)])


def areas(crops):
    """Share of the image that each crop of the gradient image shows."""
    spans = crops[:, :2].float().flatten(2)
    return ((spans.amax(dim=2) - spans.amin(dim=2) + 1) / 256).prod(dim=1)


def test_crops_have_the_sizes_asked_for_and_stay_bytes(processor, image):
    global_crops, local_crops = MultiCrop(processor, num_local_crops=3, local_crop_size=16)(image)
    assert (global_crops.shape, global_crops.dtype) == ((2, 3, 32, 32), torch.uint8)
    assert (local_crops.shape, local_crops.dtype) == ((3, 3, 16, 16), torch.uint8)


def test_global_crops_are_large_and_local_ones_small(processor):
    crop = MultiCrop(processor, 8, 16, (0.5, 0.8), (0.1, 0.2), horizontal_flip=False, colours=False)
    with seeded(0):
        drawn = [crop(gradient_image()) for _ in range(20)]
    of_global, of_local = (torch.cat([areas(crops) for crops in kind]) for kind in zip(*drawn, strict=True))
    assert 0.4 < of_global.min() < 0.6 < of_global.max() < 0.85  # antialiasing moves the edges by a few pixels
    assert 0.05 < of_local.min() < 0.15 < of_local.max() < 0.25


def test_crops_of_one_image_differ_and_a_seed_gives_them_again(processor, image):
    crop = MultiCrop(processor, num_local_crops=2, local_crop_size=16)
    with seeded(1):
        first = crop(image)
    with seeded(1):
        again = crop(image)
    with seeded(2):
        other = crop(image)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0][0], first[0][1])


def test_without_colours_and_flips_only_the_geometry_changes(processor):
    crop = MultiCrop(processor, 4, 16, horizontal_flip=False, colours=False)
    with seeded(0):
        for _ in range(10):
            for crops in crop(gradient_image()):
                assert crops[:, 2].eq(0).all()  # blue stays black
                assert crops[:, 0].float().diff(dim=2).ge(0).all()  # columns stay in order


def test_half_of_the_crops_are_mirrored(processor):
    crop = MultiCrop(processor, 20, 16, colours=False)
    with seeded(0):
        _, local_crops = crop(gradient_image())
    mirrored = local_crops[:, 0, 0, 0] > local_crops[:, 0, 0, -1]
    assert 4 <= mirrored.sum() <= 16


def test_only_the_first_global_crop_is_always_blurred(processor):
    """Noise loses most of its spread where it is blurred."""
    noise = torch.randint(256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    crop = MultiCrop(processor, 0, 16, global_scale=(0.3, 0.3), horizontal_flip=False)
    plain = MultiCrop(processor, 0, 16, global_scale=(0.3, 0.3), horizontal_flip=False, colours=False)
    with seeded(0):
        roughness = torch.stack([_roughness(crop(noise)[0]) for _ in range(40)])
        untouched = torch.stack([_roughness(plain(noise)[0]) for _ in range(40)])
    below = (roughness < 0.5 * untouched.mean()).float().mean(dim=0)
    assert below[0] > 0.5
    assert below[1] < 0.4


def _roughness(crops):
    return crops.float().diff(dim=3).abs().mean(dim=(1, 2, 3))


def test_a_batch_is_normalised_by_the_processor_and_ordered_crop_by_crop(processor, image):
    crop = MultiCrop(processor, num_local_crops=3, local_crop_size=16)
    with seeded(0):
        crops = [crop(image), crop(image.flip(2))]
    batch = MultiCropCollate(processor)([Example(crop, 0) for crop in crops])
    assert batch.global_crops.shape == (4, 3, 32, 32)
    assert batch.local_crops.shape == (6, 3, 16, 16)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    for number in range(2):
        for index in range(2):
            expected = (crops[index][0][number] / 255 - mean) / std
            torch.testing.assert_close(batch.global_crops[2 * number + index], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch.local_crops[5], (crops[1][1][2] / 255 - mean) / std, atol=1e-5, rtol=1e-5)


def test_there_may_be_no_local_crops(processor, image):
    crops = MultiCrop(processor, num_local_crops=0)(image)
    assert crops[1] is None
    assert MultiCropCollate(processor)([Example(crops, 0)]).local_crops is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_local_crops": -1}, "Expected local crops of 1 or more pixels, got -1 of 96"),
        ({"local_crop_size": 0}, "got 8 of 0"),
        ({"global_scale": (0.5, 1.5)}, r"Expected a scale with 0 < low <= high <= 1, got \(0.5, 1.5\)"),
        ({"local_scale": (0.5, 0.2)}, r"got \(0.5, 0.2\)"),
    ],
)
def test_settings_without_sense_are_refused(processor, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        MultiCrop(processor, **settings)
