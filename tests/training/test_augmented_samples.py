# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures of augmentation show what the training is going to see."""

import pytest
import torch

from vitreg_hf.model.image_processing_vitreg import ViTRegImageProcessor
from vitreg_hf.training.augmented_samples import augmented_samples
from vitreg_hf.training.classification_data import training_transform
from vitreg_hf.training.classification_settings import ImageClassificationSettings
from vitreg_hf.training.data import load_digits
from vitreg_hf.training.labelled_images import TrainingImages
from vitreg_hf.training.sampling import SampleStream

PROCESSOR = ViTRegImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def test_samples_are_those_of_the_first_passes() -> None:
    settings = ImageClassificationSettings(random_resized_crop=True, rand_augment=True, seed=3)
    data, transform = load_digits(), training_transform(settings, PROCESSOR)
    state = torch.get_rng_state()
    samples = augmented_samples(data, settings, transform, images=3, passes=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(samples) == 3

    stream, images = SampleStream(len(data.train), 3), TrainingImages(data.train, transform.augment, 3)
    seen = [[stream.key(epoch * len(data.train) + place) for place in range(len(data.train))] for epoch in range(2)]
    for place, sample in enumerate(samples):
        index = seen[0][place].index
        assert torch.equal(sample.image, data.train[index][0])
        assert sample.label == data.train[index][1]
        for epoch, version in enumerate(sample.versions):
            key = next(key for key in seen[epoch] if key.index == index)
            assert torch.equal(version, transform([images[key].image])[0])


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, []),
        ({"random_resized_crop": True, "color_jitter": 0.3}, ["random crops", "colour jitter"]),
        ({"horizontal_flip": True, "rand_augment": True}, ["mirrored", "RandAugment"]),
        ({"three_augment": True}, ["grey, solarised or blurred"]),
    ],
)
def test_what_is_random_has_a_name(options: dict[str, object], names: list[str]) -> None:
    transform = training_transform(ImageClassificationSettings(**options), PROCESSOR)
    assert transform.names == names
    assert transform.is_random is bool(names)
