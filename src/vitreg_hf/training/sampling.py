# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Which image comes when: an endless stream of samples in which a position says everything.

Passes over the data follow one another without a gap, each in an order of its own. A batch is the next stretch of the
stream, also across the border of two passes, so that every batch is full and a data set may be smaller than a batch.
A training that continues starts its stream at a position; nothing before it is read.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from vitreg_hf.training.seeding import Purpose, derived_seed


class SampleKey(NamedTuple):
    """One use of one image: what a training data set is indexed by.

    Attributes:
        index: which image.
        epoch: in which pass over the data, from 0.
        repeat: which copy in this pass, where augmentation is repeated; else 0.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a key
    epoch: int
    repeat: int = 0

    def seed(self, seed: int) -> int:
        """Seed of this sample's augmentation in a training with a seed."""
        return derived_seed(seed, Purpose.SAMPLE, self.epoch, self.index, self.repeat)


class SampleStream:
    """Passes over `num_images` images, one after the other, each in an order of its own.

    Args:
        num_images: how many there are.
        seed: of the training.
        repeats: copies of an image that follow one another, each augmented on its own (repeated augmentation,
            Hoffer et al., arXiv 1901.09335). A pass has `num_images` samples all the same, as in DeiT: of three
            copies each, it sees a third of the images.

    Raises:
        ValueError: if there is no image or no copy.
    """

    def __init__(self, num_images: int, seed: int, repeats: int = 1) -> None:
        if num_images < 1 or repeats < 1:
            raise ValueError(f"Expected at least 1 image and 1 copy of each, got {num_images} and {repeats}")
        self.num_images, self.seed, self.repeats = num_images, seed, repeats
        self._order = lru_cache(maxsize=2)(self._permutation)  # a batch may span two passes

    def key(self, position: int) -> SampleKey:
        """The sample at a position of the stream, from 0."""
        epoch, place = divmod(position, self.num_images)
        number, repeat = divmod(place, self.repeats)
        return SampleKey(int(self._order(epoch)[number]), epoch, repeat)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        generator = np.random.default_rng(derived_seed(self.seed, Purpose.ORDER, epoch))
        return generator.permutation(self.num_images)


class BatchStream(Sampler[list[SampleKey]]):
    """The micro-batches of one process from a position on.

    The processes take the samples of a stretch in turns, so that all of them together see the same samples, whatever
    their number, and copies of one image go to different processes.

    Args:
        stream: where samples come from.
        batch_size: samples per micro-batch and process.
        num_batches: micro-batches to give.
        position: where in the stream the first of them starts.
        process_index: which process this is.
        num_processes: of how many.
    """

    def __init__(
        self,
        stream: SampleStream,
        batch_size: int,
        num_batches: int,
        position: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.stream, self.batch_size, self.num_batches, self.position = stream, batch_size, num_batches, position
        self.process_index, self.num_processes = process_index, num_processes

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[SampleKey]]:
        stretch = self.batch_size * self.num_processes
        for batch in range(self.num_batches):
            start = self.position + batch * stretch + self.process_index
            yield [self.stream.key(start + place) for place in range(0, stretch, self.num_processes)]
