# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""A few training images and what augmentation makes of them, to look at.

Shapes: H x W pixels of C channels as decoded, h x w pixels as the model gets them.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

from torch import Tensor

from vitreg_hf.training.augmentation import TrainingTransform
from vitreg_hf.training.classification_data import Images, channels_of, least_edge, skip_limit
from vitreg_hf.training.classification_settings import ImageClassificationSettings
from vitreg_hf.training.labelled_images import ImageClassificationData, LabelledImages, TrainingImages
from vitreg_hf.training.sampling import SampleKey, SampleStream
from vitreg_hf.training.seeding import seeded
from vitreg_hf.training.streaming import Decoder, Part


class AugmentedSample(NamedTuple):
    """A training image.

    Attributes:
        label: its class index.
        image: uint8 `(C, H, W)`, as decoded.
        versions: `(n, C, h, w)` as the model gets them, one for each of the first passes over the data.
    """

    label: int
    image: Tensor
    versions: Tensor


def augmented_samples(
    data: Images, settings: ImageClassificationSettings, transform: TrainingTransform, images: int = 5, passes: int = 5
) -> list[AugmentedSample]:
    """The first images of a training, augmented as in its first passes.

    Of a stream, whose order depends on who reads it, the first images of the first shard, augmented as they may be.
    Nobody's generators change.

    Args:
        data: of `classification_data.checked`.
        settings: of the training.
        transform: of `classification_data.training_transform`.
        images: how many, or all if there are no more.
        passes: n.
    """
    if isinstance(data, ImageClassificationData):
        train = data.train.with_least_edge(least_edge(settings, transform))
        samples = _first(train, settings, images, passes)
    else:
        rows = Part(data.train).rows(0)
        decoder = Decoder(channels_of(transform.processor), skip_limit(settings), least_edge(settings, transform))
        decoded = ((decoder.decode(row), row.label) for row in rows)
        readable = ((image, label) for image, label in decoded if image is not None)
        numbered = enumerate(islice(readable, images))
        samples = (
            (image, label, [SampleKey(place, epoch) for epoch in range(passes)]) for place, (image, label) in numbered
        )
    return [
        AugmentedSample(
            label, image, transform([_augmented(transform.augment, image, key.seed(settings.seed)) for key in keys])
        )
        for image, label, keys in samples
    ]


def _first(
    train: LabelledImages, settings: ImageClassificationSettings, images: int, passes: int
) -> Iterator[tuple[Tensor, int, list[SampleKey]]]:
    decoded = TrainingImages(train, lambda image: image, settings.seed, skip_limit(settings))
    order = SampleStream(len(train), settings.seed)
    for place in range(min(images, len(train))):
        keys = [SampleKey(order.key(place).index, epoch) for epoch in range(passes)]
        sample = decoded[keys[0]]
        yield sample.image, sample.label, keys


def _augmented(augment: Callable[[Tensor], Tensor], image: Tensor, seed: int) -> Tensor:
    with seeded(seed):
        return augment(image)
