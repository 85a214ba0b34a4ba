# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""A classification training as its loop sees it: its parts, where it is, and how it goes on from a checkpoint.

Shapes: B images of C channels and h x w pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel

from vitreg_hf.training.augmentation import Mixing
from vitreg_hf.training.checkpointing import Progress, no_totals
from vitreg_hf.training.classification_data import HeldOut
from vitreg_hf.training.classification_settings import ImageClassificationSettings
from vitreg_hf.training.curve import describe_epoch
from vitreg_hf.training.finetuning import train_mode
from vitreg_hf.training.losses import Loss
from vitreg_hf.training.replay import load_replay, replay
from vitreg_hf.training.running import Resumable, Saver
from vitreg_hf.training.seeding import seed_step
from vitreg_hf.training.sharding import bare_model
from vitreg_hf.training.timetable import Timetable
from vitreg_hf.training.training_log import TrainingLog


@dataclass
class Training(Resumable):
    """What the loop turns, and where it is. Every process calls its methods at the same time."""

    settings: ImageClassificationSettings
    accelerator: Accelerator
    timetable: Timetable
    model: torch.nn.Module
    ema: AveragedModel | None
    spare: PreTrainedModel | None  # what a sharded model is gathered into
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    loss: Loss
    mix: Mixing | None
    held_out: HeldOut
    saver: Saver
    log: TrainingLog
    fixed: dict[str, Any]  # what a run that continues this one must have in common with it
    skipped: set[str]  # images that this process has left out while training and evaluating
    step: int = 0  # updates of the weights so far
    position: int = 0  # training samples taken so far, by all processes
    curve: list[dict[str, Any]] = field(default_factory=list)
    totals: Tensor = field(init=False)  # of this epoch and process: loss, right answers, images, seconds

    def __post_init__(self) -> None:
        self.totals = no_totals(4, self.accelerator.device)

    def all_skipped(self) -> list[str]:
        """What all processes have left out."""
        return sorted(set(gather_object(sorted(self.skipped))))

    def resume(self, progress: Progress) -> None:
        """Go on from where another run of this training was."""
        super().resume(progress)
        self.skipped.update(progress.skipped)

    def entry_of_epoch(self, metrics: Mapping[str, Any], seconds_of_evaluation: float) -> dict[str, Any]:
        """The entry of the epoch that is over in the curve."""
        return describe_epoch(
            *(self.totals, self.accelerator, metrics),
            epoch=len(self.curve) + 1,
            step=self.step,
            seconds_of_evaluation=seconds_of_evaluation,
            labels_are_mixed=self.mix is not None,
        )

    def mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images `(B, C, h, w)` and their targets, mixed if the training mixes them."""
        return (images, labels) if self.mix is None else self.mix(images, labels)

    def replayed(self, folder: Path) -> str:
        """What happens in the batches of a step that broke, with the weights that are there now."""
        batches, facts = load_replay(folder)
        model = bare_model(self.accelerator, self.model)
        train_mode(model, self.settings.tuning)
        seed_step(self.settings.seed, *facts["seed_step"])

        def losses_of(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
            images, targets = self.mixed(batch["pixel_values"], batch["labels"])
            logits = model(pixel_values=images).logits
            return torch.stack(
                [self.loss(one[None], target[None]) for one, target in zip(logits, targets, strict=True)]
            )

        where = f"step {facts['step']} with the weights after step {self.step}: {facts['reason']}"
        return "\n\n".join([where, *(replay(model, batch, losses_of).table() for batch in batches)])
