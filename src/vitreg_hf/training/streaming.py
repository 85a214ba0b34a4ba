# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Training and evaluation on images that are streamed from shards, with an exact position.

Every loading process of every training process has a part of its own: whole shards, or every so many rows of a shard
where there are fewer shards than parts. What a part gives is a function of the seed and the position alone. So a
training continues exactly where it was stopped: what came before is read again, encoded, but not decoded; passes whose
shards tell their number of rows are not even read.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, NamedTuple, TypeVar

import fsspec
import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from vitreg_hf.training.corrupt_images import SkipLimit
from vitreg_hf.training.labelled_images import Example, decode
from vitreg_hf.training.sampling import SampleKey
from vitreg_hf.training.seeding import Purpose, derived_seed, seeded
from vitreg_hf.training.shards import EncodedRow, Shards

Batch = dict[str, Any]
Row = TypeVar("Row")


class Piece(NamedTuple):
    """Rows `offset`, `offset + stride`, ... of a shard."""

    shard: int
    offset: int
    stride: int


@dataclass(frozen=True)
class Part:
    """What one loading process reads: number `index` of `count` disjoint parts of every pass over the shards.

    Args:
        shards: all of them.
        index: which part, from 0.
        count: of how many, over all processes.
        seed: of order and shuffling; None leaves everything in the order of the source.
        buffer_size: encoded rows among which the next one is drawn; 0 and 1 give the order of the shards.
    """

    shards: Shards
    index: int = 0
    count: int = 1
    seed: int | None = None
    buffer_size: int = 0

    def pieces(self, epoch: int) -> list[Piece]:
        """What is read in a pass, in order. Over the passes every part gets to see every shard."""
        number = self.shards.num_shards
        order = self._generator(epoch, 0).permutation(number) if self.seed is not None else np.arange(number)
        if number >= self.count:
            return [Piece(int(shard), 0, 1) for shard in order[self.index :: self.count]]
        place, turn = self.index % number, self.index // number
        sharing = len(range(place, self.count, number))
        return [Piece(int(order[place]), (turn + epoch) % sharing, sharing)]

    def rows(self, epoch: int) -> Iterator[EncodedRow]:
        """The rows of a pass, shuffled."""
        pieces = self.pieces(epoch)
        rows = (row for piece in pieces for row in self.shards.read(*piece))
        return rows if self.seed is None else shuffled(rows, self.buffer_size, self._generator(epoch, self.index + 1))

    def length(self, epoch: int) -> int | None:
        """Rows of a pass where the shards tell without being read, else None."""
        lengths = [(self.shards.count(piece.shard), piece) for piece in self.pieces(epoch)]
        known = [len(range(piece.offset, rows, piece.stride)) for rows, piece in lengths if rows is not None]
        return sum(known) if len(known) == len(lengths) else None

    def samples(self, position: int = 0) -> Iterator[tuple[SampleKey, EncodedRow]]:
        """All rows of all passes from a position on, without end; the keys of different parts differ.

        Raises:
            ValueError: if the part stays empty.
        """
        empty = 0
        for epoch in count():
            if position and (length := self.length(epoch)) is not None and length <= position:
                position -= length
                continue
            seen = 0
            for seen, row in enumerate(self.rows(epoch), start=1):
                if position:
                    position -= 1
                else:
                    yield SampleKey((seen - 1) * self.count + self.index, epoch), row
            empty = 0 if seen else empty + 1
            if empty > self.count + self.shards.num_shards:  # by then every part has had its turn at every shard
                raise ValueError(f"Expected images for each of {self.count} loading processes, got none for some")

    def _generator(self, epoch: int, use: int) -> np.random.Generator:
        assert self.seed is not None
        return np.random.default_rng(derived_seed(self.seed, Purpose.SHARDS, epoch, use))


def shuffled(rows: Iterator[Row], buffer_size: int, generator: np.random.Generator) -> Iterator[Row]:
    """Rows in an order in which the next one is always drawn from a buffer that is filled up again."""
    buffer = list(islice(rows, max(buffer_size, 1)))
    for row in rows:
        place = int(generator.integers(len(buffer)))
        yield buffer[place]
        buffer[place] = row
    yield from (buffer[place] for place in generator.permutation(len(buffer)))


# Decoding


@dataclass
class Decoder:
    """Decodes rows.

    Args:
        num_channels: as for `LabelledImages`.
        skip_limit: how many images that cannot be decoded may be left out; None: none.
        least_edge: as for `labelled_images.decode`.
    """

    num_channels: int = 3
    skip_limit: SkipLimit | None = None
    least_edge: int | None = None

    def decode(self, row: EncodedRow) -> Tensor | None:
        """The image, uint8 `(C, H, W)`, or None if it is left out.

        Raises:
            ValueError: naming the image, if it is refused or too many have been left out.
        """
        skipped = []
        try:
            image = decode(_fetched(row.image), self.num_channels, self.least_edge)
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more
            if self.skip_limit is None:
                raise ValueError(f"Expected a readable image, got {row.name}: {error}") from error
            image, skipped = None, [row.name]
        if self.skip_limit is not None:
            self.skip_limit.count(1, skipped)
        return image


def _fetched(image: dict[str, Any]) -> dict[str, Any]:
    """The image with its bytes, where all that is stored is where they are on another machine."""
    if image["bytes"] is not None or "://" not in image["path"]:
        return image
    with fsspec.open(image["path"], "rb") as file:
        return {**image, "bytes": file.read()}


# Data sets


class StreamedImages(IterableDataset[Batch]):
    """The micro-batches of one training process, without end; for a loader with `batch_size=None`.

    An image that cannot be decoded and is left out is replaced by the next one of its batch, so that a position stays
    a number of rows; the example that stands in for it names it.

    Args:
        shards: of the training split.
        batch_size: images per batch.
        augment: makes of an image, uint8 `(C, H, W)`, a random variant; draws from the global generators.
        collate: makes a batch of examples.
        seed: of the training.
        process_index: which training process this is.
        num_processes: of how many.
        start: batches that the process has had already, with as many workers.
        buffer_size: encoded rows that a worker keeps to draw the next one from.
        decoder: how images are decoded.

    Raises:
        ValueError: if sizes are out of range; while reading, as `Shards.read` and `Decoder.decode`.
    """

    def __init__(
        self,
        shards: Shards,
        batch_size: int,
        augment: Callable[[Tensor], Tensor],
        collate: Callable[[list[Example]], Batch],
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
        start: int = 0,
        buffer_size: int = 1000,
        decoder: Decoder | None = None,
    ) -> None:
        if batch_size < 1 or start < 0 or buffer_size < 0:
            sizes = f"{batch_size}, {start} and {buffer_size}"
            raise ValueError(f"Expected batch_size of 1 or more, start and buffer_size of 0 or more, got {sizes}")
        self.shards, self.batch_size, self.augment, self.collate, self.seed = (
            shards,
            batch_size,
            augment,
            collate,
            seed,
        )
        self.process_index, self.num_processes = process_index, num_processes
        self.start, self.buffer_size, self.decoder = start, buffer_size, decoder or Decoder()

    def __iter__(self) -> Iterator[Batch]:
        worker, workers = _worker()
        # A loader starts with its first worker, also where the one before it had stopped at another.
        role, had = (self.start + worker) % workers, (self.start + worker) // workers
        index, parts = self.process_index * workers + role, self.num_processes * workers
        part = Part(self.shards, index, parts, self.seed, self.buffer_size)
        decoder = deepcopy(self.decoder)  # counts anew
        for rows in _batches(part.samples(had * self.batch_size), self.batch_size):
            yield self._batch(rows, decoder)

    def _batch(self, samples: Sequence[tuple[SampleKey, EncodedRow]], decoder: Decoder) -> Batch:
        images = [decoder.decode(row) for _, row in samples]
        if all(image is None for image in images):
            raise ValueError(f"Expected a readable image in every batch, got one of {len(images)} without")
        examples = []
        for place, (key, row) in enumerate(samples):
            chosen = place
            while (image := images[chosen]) is None:
                chosen = (chosen + 1) % len(samples)
            skipped = () if chosen == place else (row.name,)
            with seeded(key.seed(self.seed)):
                examples.append(Example(self.augment(image), samples[chosen][1].label, key, skipped))
        return self.collate(examples)


class StreamedEvaluation(IterableDataset[Batch]):
    """One pass over a split, in batches, each image in one process once; for a loader with `batch_size=None`.

    Processes may have different numbers of batches. The first example of a batch names what was left out.

    Args:
        shards: of the split.
        batch_size: images per batch, but for the last of each worker.
        collate: makes a batch of examples.
        process_index: which process this is.
        num_processes: of how many.
        decoder: how images are decoded.
    """

    def __init__(
        self,
        shards: Shards,
        batch_size: int,
        collate: Callable[[list[Example]], Batch],
        process_index: int = 0,
        num_processes: int = 1,
        decoder: Decoder | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"Expected batch_size of 1 or more, got {batch_size}")
        self.shards, self.batch_size, self.collate = shards, batch_size, collate
        self.process_index, self.num_processes, self.decoder = process_index, num_processes, decoder or Decoder()

    def __iter__(self) -> Iterator[Batch]:
        worker, workers = _worker()
        part = Part(self.shards, self.process_index * workers + worker, self.num_processes * workers)
        decoder = deepcopy(self.decoder)
        examples: list[Example] = []
        skipped: list[str] = []
        for row in part.rows(0):
            image = decoder.decode(row)
            if image is None:
                skipped.append(row.name)
                continue
            if len(examples) == self.batch_size:  # not earlier: what is left out at the end is named in the last batch
                yield self._batch(examples, skipped)
                examples, skipped = [], []
            examples.append(Example(image, row.label))
        if examples:
            yield self._batch(examples, skipped)
        elif skipped:
            raise ValueError(f"Expected a readable image to evaluate on, got none: {', '.join(skipped[:10])}")

    def _batch(self, examples: list[Example], skipped: list[str]) -> Batch:
        return self.collate([examples[0]._replace(skipped=tuple(skipped)), *examples[1:]])


def _batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while batch := list(islice(rows, size)):
        yield batch


def _worker() -> tuple[int, int]:
    """Which worker of the loader this is, and of how many; the training process itself is the only one."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
