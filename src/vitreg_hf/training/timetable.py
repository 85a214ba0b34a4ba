# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""How many updates of the weights a training makes, and after which of them an epoch ends."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Timetable:
    """Steps and epochs of a training.

    An epoch is one pass over the images where their number is known; it ends with the step that takes the last of
    them, which may already take some of the next pass, and has one step at least. Elsewhere it is a number of steps.

    Args:
        images_per_step: images in one update of the weights, of all processes and accumulated batches.
        num_images: how many there are, or None if nobody knows.
        num_epochs: how many epochs, unless `max_steps` says when to stop.
        steps_per_epoch: steps that count as an epoch; None: one pass.
        max_steps: stop after that many steps.

    Raises:
        ValueError: if the number of images is unknown and nothing else says how long a training is.
    """

    images_per_step: int
    num_images: int | None
    num_epochs: int
    steps_per_epoch: int | None = None
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if self.num_images is None and self.steps_per_epoch is None and self.max_steps is None:
            raise ValueError("Expected max_steps or steps_per_epoch for images of unknown number, got neither")

    @property
    def total_steps(self) -> int:
        """Updates of the weights in the whole training."""
        return self.max_steps if self.max_steps is not None else self._end(self.num_epochs)

    @property
    def total_epochs(self) -> int:
        """Epochs in the whole training; `max_steps` may cut the last one short."""
        epochs = 1
        while self._end(epochs) < self.total_steps:
            epochs += 1
        return epochs

    def end_of(self, epoch: int) -> int:
        """Steps after which an epoch, from 1, is over."""
        return min(self._end(epoch), self.total_steps)

    def _end(self, epoch: int) -> int:
        if self.steps_per_epoch is not None:
            return epoch * self.steps_per_epoch
        if self.num_images is None:
            return epoch * self.total_steps  # one epoch, evaluated at its end
        if self.num_images < self.images_per_step:
            return epoch
        return math.ceil(epoch * self.num_images / self.images_per_step)
