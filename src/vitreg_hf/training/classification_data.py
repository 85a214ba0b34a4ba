# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The images of a classification training, at once or streamed, and the batches that are made of them.

Shapes: B images of C channels and h x w pixels as the model gets them, K classes.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor
from torch.utils.data import DataLoader

from vitreg_hf.model.image_processing_vitreg import ViTRegImageProcessor
from vitreg_hf.training.augmentation import EvaluationTransform, TrainingTransform
from vitreg_hf.training.classification_settings import ImageClassificationSettings
from vitreg_hf.training.corrupt_images import SkipLimit, check_up_front
from vitreg_hf.training.data import load_images
from vitreg_hf.training.labelled_images import (
    Collate,
    ImageClassificationData,
    TrainingImages,
    find_unreadable,
    without_unreadable,
)
from vitreg_hf.training.lockstep import in_step
from vitreg_hf.training.running import outlive_stop
from vitreg_hf.training.sampling import BatchStream, SampleStream
from vitreg_hf.training.streamed_data import (
    StreamedImageClassificationData,
    StreamLoading,
    stream_files,
    stream_hub,
)
from vitreg_hf.training.streaming import Decoder

Batch = dict[str, Any]
Images = ImageClassificationData | StreamedImageClassificationData


def open_images(settings: ImageClassificationSettings) -> Images:
    """The images that the settings name.

    Raises:
        ValueError: as `load_images`, `stream_files` and `stream_hub`.
    """
    columns = settings.image_column_name, settings.label_column_name, settings.class_names_file
    if settings.train_shards is not None:
        assert settings.validation_shards is not None
        return stream_files(settings.train_shards, settings.validation_shards, *columns)
    if settings.streaming:
        assert settings.dataset_name is not None
        return stream_hub(settings.dataset_name, settings.dataset_config_name, *columns)
    return load_images(settings)


def checked(
    data: Images, settings: ImageClassificationSettings, accelerator: Accelerator, num_channels: int
) -> tuple[Images, list[str]]:
    """Data without images that cannot be decoded, and their names; nobody can know those of a stream beforehand.

    Args:
        data: of `open_images`.
        settings: of the training.
        accelerator: of the launch; to be called by every process.
        num_channels: of the model.

    Raises:
        ValueError: naming the files, if they are not to be left out.
    """
    if isinstance(data, StreamedImageClassificationData):
        return data, []
    data = data.with_channels(num_channels)
    check_train = check_up_front(len(data.train), settings.check_images)
    share = find_unreadable(data, accelerator.process_index, accelerator.num_processes, check_train)
    unreadable = gather_object(share)
    return without_unreadable(data, unreadable, settings.on_corrupt_image), sorted(str(one) for one in unreadable)


def describe_stream(data: Images) -> dict[str, Any]:
    """What a training that continues another one has in common with it, besides settings, if it reads a stream."""
    return {"shards": data.train.num_shards} if isinstance(data, StreamedImageClassificationData) else {}


def training_transform(settings: ImageClassificationSettings, processor: ViTRegImageProcessor) -> TrainingTransform:
    """The augmentation that the settings ask for."""
    return TrainingTransform(
        *(processor, settings.crop_scale, bool(settings.horizontal_flip), settings.rand_augment),
        *(settings.three_augment, settings.color_jitter),
    )


def least_edge(settings: ImageClassificationSettings, transform: TrainingTransform) -> int | None:
    """Pixels to which training images are decoded at least, see `labelled_images.decode`; None: to all they have."""
    return transform.least_edge if settings.fast_jpeg_decoding else None


def skip_limit(settings: ImageClassificationSettings) -> SkipLimit | None:
    """How many images may be left out while training; None: none."""
    return SkipLimit(settings.max_skipped_share) if settings.on_corrupt_image == "skip" else None


# Batches


def training_batches(
    data: Images,
    settings: ImageClassificationSettings,
    accelerator: Accelerator,
    transform: TrainingTransform,
    position: int,
    num_batches: int,
    skipped: set[str],
) -> Iterator[Batch]:
    """The training batches of this process.

    Args:
        data: of `checked`.
        settings: of the training.
        accelerator: of the launch.
        transform: of `training_transform`.
        position: samples that all processes together have had.
        num_batches: that this process is going to take.
        skipped: gets the names of images that are left out.

    Yields:
        `pixel_values` `(B, C, h, w)` and `labels` `(B,)`, on the CPU.
    """
    loader: Iterable[Batch]
    collate = Collate(transform)
    if isinstance(data, StreamedImageClassificationData):
        loading = _stream_loading(settings, accelerator, transform.processor, least_edge(settings, transform))
        sizes = settings.per_device_train_batch_size, transform.augment, collate, settings.seed, position
        loader = loading.training(data.train, *sizes)
    else:
        images = data.train.with_least_edge(least_edge(settings, transform))
        stream = SampleStream(len(images), settings.seed, settings.repeated_augmentation)
        processes = accelerator.process_index, accelerator.num_processes
        loader = DataLoader(
            TrainingImages(images, transform.augment, settings.seed, skip_limit(settings)),
            batch_sampler=BatchStream(stream, settings.per_device_train_batch_size, num_batches, position, *processes),
            collate_fn=collate,
            num_workers=settings.dataloader_num_workers,
            worker_init_fn=outlive_stop,
            pin_memory=accelerator.device.type == "cuda",
        )
    for batch in loader:
        skipped.update(f"train: {name}" for name in batch.pop("skipped", ()))
        yield batch


class HeldOut(Protocol):
    """Images to evaluate on: every iteration gives batches of this process, all processes equally many."""

    @property
    def num_images(self) -> int | None:
        """How many there are, or None if nobody knows."""

    def __iter__(self) -> Iterator[Batch]: ...

    def gather(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Those of all processes for the last batch, without what only fills it up; to be called for every batch."""


def held_out(
    data: Images,
    settings: ImageClassificationSettings,
    accelerator: Accelerator,
    processor: ViTRegImageProcessor,
    skipped: set[str],
) -> HeldOut:
    """The held-out images as the processor prepares them; `skipped` gets the names of those that are left out."""
    collate, batch_size = Collate(EvaluationTransform(processor)), settings.per_device_eval_batch_size
    if not isinstance(data, StreamedImageClassificationData):
        loader = DataLoader(
            data.evaluation,
            batch_size,
            collate_fn=collate,
            num_workers=settings.dataloader_num_workers,
            worker_init_fn=outlive_stop,
        )
        return _HeldOutAtOnce(accelerator.prepare_data_loader(loader), accelerator, len(data.evaluation))
    loading = _stream_loading(settings, accelerator, processor)
    return _HeldOutStream(data, loading, collate, batch_size, accelerator, skipped)


class _HeldOutAtOnce:
    def __init__(self, loader: Any, accelerator: Accelerator, num_images: int) -> None:
        self.loader, self.accelerator, self.num_images = loader, accelerator, num_images

    def __iter__(self) -> Iterator[Batch]:
        yield from self.loader

    def gather(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        gathered: tuple[Tensor, Tensor] = self.accelerator.gather_for_metrics((logits, labels))
        return gathered


class _HeldOutStream:
    def __init__(
        self,
        data: StreamedImageClassificationData,
        loading: StreamLoading,
        collate: Collate,
        batch_size: int,
        accelerator: Accelerator,
        skipped: set[str],
    ) -> None:
        self.data, self.loading, self.collate, self.batch_size = data, loading, collate, batch_size
        self.accelerator, self.skipped, self.num_images = accelerator, skipped, data.evaluation.num_images

    def __iter__(self) -> Iterator[Batch]:
        batches = self.loading.evaluation(self.data.evaluation, self.batch_size, self.collate)
        assert self.loading.decoder is not None
        channels = self.loading.decoder.num_channels
        for batch in in_step(batches, self.collate, self.batch_size, self._any_left, channels):
            self.skipped.update(f"evaluation: {name}" for name in batch.pop("skipped", ()))
            yield send_to_device(batch, self.accelerator.device)

    def gather(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits, labels = self.accelerator.gather((logits, labels))
        return logits[labels >= 0], labels[labels >= 0]

    def _any_left(self, own: bool) -> bool:
        flag = torch.tensor(float(own), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item())


def _stream_loading(
    settings: ImageClassificationSettings,
    accelerator: Accelerator,
    processor: ViTRegImageProcessor,
    least_edge: int | None = None,
) -> StreamLoading:
    return StreamLoading(
        accelerator.process_index,
        accelerator.num_processes,
        settings.dataloader_num_workers,
        accelerator.device.type == "cuda",
        settings.shuffle_buffer_size,
        Decoder(channels_of(processor), skip_limit(settings), least_edge),
    )


def channels_of(processor: ViTRegImageProcessor) -> int:
    """Channels of the images that a processor prepares."""
    return len(processor.image_mean)
