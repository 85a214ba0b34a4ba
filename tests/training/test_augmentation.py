# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Augmentation: the processor's own numbers, randomness where it is asked for and nowhere else."""

import pytest
import torch

from vitreg_hf import ViTRegImageProcessor
from vitreg_hf.training.augmentation import EvaluationTransform, TrainingTransform, mixing, model_size
from vitreg_hf.training.seeding import seeded

WHOLE = {"size": {"height": 32, "width": 32}, "do_center_crop": False, "resample": 2}
CROPPED = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}


@pytest.fixture
def images() -> list[torch.Tensor]:
    """Three uint8 images of different sizes."""
    torch.manual_seed(0)
    return [torch.randint(0, 256, (3, height, 50), dtype=torch.uint8) for height in (30, 40, 60)]


@pytest.mark.parametrize("options", [WHOLE, CROPPED])
def test_evaluation_is_the_image_processor(images: list[torch.Tensor], options: dict) -> None:
    processor = ViTRegImageProcessor(**options)
    expected = processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(EvaluationTransform(processor)(images), expected)


@pytest.mark.parametrize("options", [WHOLE, CROPPED])
def test_training_without_augmentation_is_evaluation(images: list[torch.Tensor], options: dict) -> None:
    processor = ViTRegImageProcessor(**options)
    assert torch.equal(TrainingTransform(processor)(images), EvaluationTransform(processor)(images))


def augmented(transform: TrainingTransform, images: list[torch.Tensor]) -> torch.Tensor:
    """A batch as a data set and a collator make it."""
    return transform([transform.augment(image) for image in images])


def test_mean_and_std_come_from_the_processor(images: list[torch.Tensor]) -> None:
    processor = ViTRegImageProcessor(**WHOLE, image_mean=[0.0] * 3, image_std=[0.5] * 3)
    transform = TrainingTransform(processor, crop_scale=(0.5, 1.0), horizontal_flip=True, rand_augment=True)
    batch = augmented(transform, images)
    assert batch.shape == (3, 3, 32, 32)
    assert batch.dtype == torch.float32
    assert 0 <= batch.min() < 0.5 < 1.5 < batch.max() <= 2


RANDOM_PARTS = {
    "crop": {"crop_scale": (0.2, 1.0)},
    "flip": {"horizontal_flip": True},
    "RandAugment": {"rand_augment": True},
    "3-Augment": {"three_augment": True},
    "jitter": {"color_jitter": 0.4},
}


@pytest.mark.parametrize("part", RANDOM_PARTS)
@pytest.mark.parametrize("options", [WHOLE, CROPPED])
def test_each_part_follows_from_the_seed_of_the_sample(images: list[torch.Tensor], part: str, options: dict) -> None:
    transform = TrainingTransform(ViTRegImageProcessor(**options), **RANDOM_PARTS[part])
    seen = []
    for seed in (*range(12), *range(12)):
        torch.rand(1)  # what was drawn before does not matter
        with seeded(seed):
            seen.append(transform.augment(images[0]))
    assert all(image.shape == (3, 32, 32) and image.dtype == torch.uint8 for image in seen)
    assert all(torch.equal(first, again) for first, again in zip(seen[:12], seen[12:], strict=True))
    assert not all(torch.equal(image, seen[0]) for image in seen)


def test_what_makes_a_batch_draws_nothing(images: list[torch.Tensor]) -> None:
    transform = TrainingTransform(ViTRegImageProcessor(**WHOLE), (0.2, 1.0), True, True, True, 0.4)
    sized = [transform.augment(image) for image in images]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    transform(sized)
    assert torch.equal(torch.rand(3), expected)


def test_three_augment_is_grey_or_solarised_or_blurred(images: list[torch.Tensor]) -> None:
    processor = ViTRegImageProcessor(**WHOLE)
    transform, kinds = TrainingTransform(processor, three_augment=True), []
    plain = processor([images[0]], do_rescale=False, do_normalize=False)["pixel_values"][0]
    solarised = torch.where(plain >= 128, 255 - plain, plain)
    for seed in range(60):
        with seeded(seed):
            image = transform.augment(images[0])
        grey = bool((image[0] == image[1]).all() and (image[1] == image[2]).all())
        kinds.append("grey" if grey else "solarised" if torch.equal(image, solarised) else "blurred")
    assert all(10 <= kinds.count(kind) <= 30 for kind in ("grey", "solarised", "blurred"))


def test_flips_mirror_about_half_of_the_images(images: list[torch.Tensor]) -> None:
    processor = ViTRegImageProcessor(**WHOLE)
    plain = EvaluationTransform(processor)(images[:1] * 40)
    torch.manual_seed(0)
    flipped = augmented(TrainingTransform(processor, horizontal_flip=True), images[:1] * 40)
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, plain, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(flipped, plain, strict=True)]
    assert 10 < sum(mirrored) < 30
    assert sum(mirrored) + sum(kept) == 40


def test_a_whole_image_as_crop_is_a_resize(images: list[torch.Tensor]) -> None:
    """The crop's resizing is the processor's, filter included; the crop itself is at most a whole square image."""
    square = [image[:, :30, :30] for image in images]
    processor = ViTRegImageProcessor(**WHOLE)
    transform = TrainingTransform(processor, crop_scale=(1.0, 1.0))
    assert transform.crop is not None
    transform.crop.ratio = (1.0, 1.0)
    difference = augmented(transform, square) - EvaluationTransform(processor)(square)
    assert difference.abs().max() <= 1.01 / 255 / min(processor.image_std)  # one grey level of rounding


def test_size_of_the_model_input() -> None:
    assert model_size(ViTRegImageProcessor(**WHOLE)) == (32, 32)
    assert model_size(ViTRegImageProcessor(**CROPPED)) == (32, 32)
    with pytest.raises(ValueError, match="fixed height and width"):
        model_size(ViTRegImageProcessor(size={"shortest_edge": 40}, do_center_crop=False))
    with pytest.raises(ValueError, match="got one that keeps the aspect ratio up to max_num_patches=20"):
        model_size(ViTRegImageProcessor(max_num_patches=20, patch_size=8))
    with pytest.raises(ValueError, match=r"0 < low <= high <= 1, got \(0\.9, 0\.1\)"):
        TrainingTransform(ViTRegImageProcessor(**WHOLE), crop_scale=(0.9, 0.1))


def test_mixing_keeps_the_weight_of_labels() -> None:
    pixels, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 4
    for alphas in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
        mix = mixing(4, *alphas)
        assert mix is not None
        torch.manual_seed(0)
        mixed, targets = mix(pixels, labels)
        assert mixed.shape == pixels.shape
        assert not torch.equal(mixed, pixels)
        assert targets.shape == (8, 4)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))
    assert mixing(4, 0.0, 0.0) is None
    with pytest.raises(ValueError, match=r"0 or more, got -1\.0 and 0\.0"):
        mixing(4, -1.0, 0.0)
