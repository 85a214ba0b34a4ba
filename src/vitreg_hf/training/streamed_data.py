# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Data that is streamed: what to train on, what to evaluate on, and the loaders of both."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vitreg_hf.training.labelled_images import Collate
from vitreg_hf.training.running import outlive_stop
from vitreg_hf.training.shard_files import read_class_names
from vitreg_hf.training.shards import Shards, file_shards, hub_shards
from vitreg_hf.training.streaming import Batch, Decoder, StreamedEvaluation, StreamedImages


@dataclass(frozen=True)
class StreamedImageClassificationData:
    """As `ImageClassificationData`, but that both splits are shards.

    `num_images` of a split is None where nobody knows it: then `max_steps` or `steps_per_epoch` says how long a
    training is, and the bar of an evaluation has no end.
    """

    train: Shards
    evaluation: Shards
    source: str
    evaluation_split: str = "validation"
    held_out_by: str = "the validation split of the data"
    license: str | None = None
    hub_id: str | None = None

    @property
    def class_names(self) -> list[str]:
        """Name of each class, by index."""
        return self.train.class_names


def stream_hub(
    name: str,
    config_name: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    class_names: str | None = None,
) -> StreamedImageClassificationData:
    """A dataset of the Hub, or a local folder in its format, read while training; arguments as of `hub_shards`.

    Args:
        class_names: file with one name a line, where the dataset does not say them.

    Raises:
        ValueError: as `hub_shards` and `read_class_names`.
    """
    names = None if class_names is None else read_class_names(class_names)
    train, validation = hub_shards(name, config_name, image_column, label_column, names)
    return StreamedImageClassificationData(train, validation, name, hub_id=None if os.path.exists(name) else name)


def stream_files(
    train_shards: str,
    validation_shards: str,
    image_column: str = "image",
    label_column: str = "label",
    class_names: str | None = None,
) -> StreamedImageClassificationData:
    """WebDataset tars or parquet files, read while training; patterns and columns as of `file_shards`.

    Args:
        class_names: file with one name a line, where the files do not say them.

    Raises:
        ValueError: as `file_shards` and `read_class_names`.
    """
    names = None if class_names is None else read_class_names(class_names)
    train = file_shards(train_shards, image_column, label_column, names)
    validation = file_shards(validation_shards, image_column, label_column, train.class_names)
    return StreamedImageClassificationData(train, validation, train_shards)


@dataclass(frozen=True)
class StreamLoading:
    """How streams are loaded.

    Args:
        process_index: which training process this is.
        num_processes: of how many.
        num_workers: processes that load for each of them. A training that continues must have as many.
        pin_memory: for copies to a GPU that do not wait.
        buffer_size: encoded rows that each of them keeps to draw the next one from.
        decoder: how images are decoded.
    """

    process_index: int = 0
    num_processes: int = 1
    num_workers: int = 0
    pin_memory: bool = False
    buffer_size: int = 1000
    decoder: Decoder | None = None

    def training(
        self,
        shards: Shards,
        batch_size: int,
        augment: Callable[[Tensor], Tensor],
        collate: Collate,
        seed: int,
        position: int = 0,
    ) -> "DataLoader[Batch]":
        """Endless batches of this process from a position on: images that all processes together have had.

        Raises:
            ValueError: if the position is not between two batches of all processes.
        """
        start, inside = divmod(position, batch_size * self.num_processes)
        if inside:
            together = f"{self.num_processes} x {batch_size}"
            raise ValueError(f"Expected a position that is a multiple of {together} images, got {position}")
        processes = self.process_index, self.num_processes
        stream = StreamedImages(
            *(shards, batch_size, augment, collate, seed, *processes, start, self.buffer_size, self.decoder)
        )
        return self._loader(stream)

    def evaluation(self, shards: Shards, batch_size: int, collate: Collate) -> "DataLoader[Batch]":
        """The batches of one pass that are this process's."""
        processes = self.process_index, self.num_processes
        return self._loader(StreamedEvaluation(shards, batch_size, collate, *processes, self.decoder))

    def _loader(self, stream: torch.utils.data.IterableDataset[Batch]) -> "DataLoader[Batch]":
        # A generator of its own: a loader draws a seed for its workers, which would change what a step draws.
        generator = torch.Generator().manual_seed(0)
        return DataLoader(
            stream,
            batch_size=None,
            num_workers=self.num_workers,
            worker_init_fn=outlive_stop,
            pin_memory=self.pin_memory,
            generator=generator,
        )
