# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Settings of a distillation into registers: those of every training, and data, model, views and evaluation."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitreg_hf.training.classification_settings import DATA_SETTINGS, ImageDataSettings
from vitreg_hf.training.settings import FILE_SETTINGS, SWITCH, TrainingSettings, expect, listed, option


@dataclass
class DistillationSettings(ImageDataSettings, TrainingSettings):
    """The defaults are for the digits; a setting that makes no sense raises `ValueError` when the object is made.

    For photos, the authors' code (arXiv 2505.21501) has 16 registers, batches of 4 images of 518 pixels, a learning
    rate of 3e-4 that falls to 1e-5, and weight decay 0.01.
    """

    # Model
    model: str | None = option(None, "ViTReg checkpoint, a folder or an id, whose head is left out; required")
    num_registers: int = option(4, "registers to add (PH-Reg: 16); 0: distil without, to see what registers add")
    num_tuned_layers: int = option(1, "last blocks that learn beside registers, positions and patch projection")

    # The teacher's views
    num_views: int = option(10, "views that the teacher's features are averaged over, the image itself included")
    max_shift: float = option(0.15, "farthest shift of a view as a share of the side; at least one patch; 0: none")
    mirror_views: bool | None = option(None, "mirror half of the views; left out: all but digits", **SWITCH)

    # Images
    random_resized_crop: bool | None = option(None, "crop and resize at random; left out: all but digits", **SWITCH)
    random_resized_crop_scale: list[float] = listed([0.3, 1.0], "area of such crops, as shares of the image")
    eval_crop_ratio: float = option(
        0.875, "share of an image's shorter edge that is evaluated; training on crops only"
    )

    # Optimisation; names that all trainings have, with the digits' values
    num_train_epochs: int = option(3, "passes over the training images")
    learning_rate: float = option(1e-3, "highest learning rate; not scaled by batch size or processes")
    weight_decay: float = option(0.01, "weight decay, but for tokens, positions, biases, norms and LayerScale")

    # Evaluation
    eval_steps: int = option(0, "updates between two evaluations; 0: only before and after the training")
    knn_neighbours: int = option(20, "neighbours that vote")

    def __post_init__(self) -> None:
        self.check_sources()
        self.check_training()
        self._check_ranges()
        own_images = self.sources() != []
        self.output_dir = self.output_dir or f"outputs/{Path(str(self.model)).resolve().name}-distilled"
        self.mirror_views = own_images if self.mirror_views is None else self.mirror_views
        self.random_resized_crop = own_images if self.random_resized_crop is None else self.random_resized_crop

    @property
    def crop_scale(self) -> tuple[float, float] | None:
        """Range of the area of random resized crops, or None if there are none."""
        low, high = self.random_resized_crop_scale
        return (low, high) if self.random_resized_crop else None

    def hyperparameters(self) -> dict[str, Any]:
        """How the student learns, without data and files."""
        elsewhere = {*DATA_SETTINGS, *FILE_SETTINGS, "model"}
        chosen = {name: value for name, value in asdict(self).items() if name not in elsewhere}
        return chosen | {"random_resized_crop_scale": self.crop_scale}

    def _check_ranges(self) -> None:
        expect(self.model is not None, "a model", "none")
        self.expect_at_least(0, "num_registers", "num_tuned_layers", "eval_steps")
        self.expect_at_least(1, "num_views", "knn_neighbours")
        expect(0 <= self.max_shift < 1, "max_shift in [0, 1)", self.max_shift)
        expect(0 < self.eval_crop_ratio <= 1, "eval_crop_ratio in (0, 1]", self.eval_crop_ratio)
        scale = self.random_resized_crop_scale
        valid = len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1
        expect(valid, "random_resized_crop_scale with 0 < low <= high <= 1", scale)
        expect(not self.auto_find_batch_size, "a chosen batch size", "auto_find_batch_size")
        expect(self.replay is None, "a training of classification to replay", self.replay)
