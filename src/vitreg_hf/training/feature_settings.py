# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Settings of evaluations of frozen features: data, model, the linear probe and the nearest neighbours."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from vitreg_hf.training.classification_settings import DATA_SETTINGS, ImageDataSettings
from vitreg_hf.training.linear_probe import BLOCKS, LEARNING_RATES
from vitreg_hf.training.nearest_neighbours import NEIGHBOURS
from vitreg_hf.training.settings import SWITCH, expect, listed, option


@dataclass
class FeatureSettings(ImageDataSettings):
    """The defaults suit the digits; a setting that makes no sense raises `ValueError` when the object is made."""

    recipe: str | None = option(None, "start from the settings of a recipe, see training/recipes.py")

    # What is evaluated, and how
    model: str | None = option(None, "ViTReg checkpoint, a folder or an id, whose head is left out; required")
    task: Literal["linear", "knn"] = option("linear", "linear classifiers on frozen features, or nearest neighbours")
    image_size: int | None = option(None, "height and width in pixels; left out: that of the checkpoint")
    eval_crop_ratio: float = option(
        0.875, "share of an image's shorter edge that is evaluated; training on crops only"
    )

    # Linear probe
    max_steps: int = option(300, "updates of the classifiers")
    per_device_train_batch_size: int = option(128, "images per batch and process")
    learning_rates: list[float] = listed([*LEARNING_RATES], "of one classifier each, for batches of 256: scaled")
    last_blocks: list[int] = listed([*BLOCKS], "a classifier reads CLS of so many of the last blocks")
    random_resized_crop: bool | None = option(None, "crop and resize at random; left out: all but digits", **SWITCH)
    random_resized_crop_scale: list[float] = listed([0.08, 1.0], "area of such crops, as shares of the image")
    horizontal_flip: bool | None = option(None, "mirror half of the images; left out: all but digits", **SWITCH)

    # Nearest neighbours
    neighbours: list[int] = listed([*NEIGHBOURS], "numbers of neighbours that vote")
    temperature: float = option(0.07, "of the votes: small values let the nearest decide alone")

    per_device_eval_batch_size: int = option(64, "images per batch and process without training")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "of the model; left out: as accelerate is set"
    )
    seed: int = option(0, "seed of classifiers, order and augmentation; held-out images do not depend on it")
    dataloader_num_workers: int = option(0, "processes that load images, per process")
    output_dir: str | None = option(
        None, "folder for all that is written; left out: outputs/<name of the data>-<task>"
    )

    def __post_init__(self) -> None:
        self.check_sources()
        expect(self.model is not None, "a model", "none")
        for name in ("max_steps", "per_device_train_batch_size", "per_device_eval_batch_size"):
            expect(getattr(self, name) >= 1, f"{name} of 1 or more", getattr(self, name))
        expect(self.image_size is None or self.image_size >= 1, "image_size of 1 or more", self.image_size)
        for name in ("learning_rates", "last_blocks", "neighbours"):
            values = getattr(self, name)
            valid = values and min(values) > 0 and len(set(values)) == len(values)
            expect(valid, f"{name} above 0 that differ", values)
        expect(self.temperature > 0, "temperature above 0", self.temperature)
        expect(0 < self.eval_crop_ratio <= 1, "eval_crop_ratio in (0, 1]", self.eval_crop_ratio)
        scale = self.random_resized_crop_scale
        valid = len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1
        expect(valid, "random_resized_crop_scale with 0 < low <= high <= 1", scale)
        for name in ("seed", "dataloader_num_workers"):
            expect(getattr(self, name) >= 0, f"{name} of 0 or more", getattr(self, name))
        own_images = self.sources() != []
        self.output_dir = self.output_dir or f"outputs/{self.source_name()}-{self.task}"
        self.random_resized_crop = own_images if self.random_resized_crop is None else self.random_resized_crop
        self.horizontal_flip = own_images if self.horizontal_flip is None else self.horizontal_flip

    @property
    def output_folder(self) -> Path:
        """Where everything is written."""
        return Path(cast(str, self.output_dir))

    @property
    def crop_scale(self) -> tuple[float, float] | None:
        """Range of the area of random resized crops, or None if there are none."""
        low, high = self.random_resized_crop_scale
        return (low, high) if self.random_resized_crop else None

    def chosen(self) -> dict[str, Any]:
        """What the numbers depend on besides data and model."""
        of_linear = {"max_steps", "per_device_train_batch_size", "learning_rates", "last_blocks"}
        of_linear |= {"random_resized_crop_scale", "horizontal_flip", "seed"}
        elsewhere = {*DATA_SETTINGS, "recipe", "model", "output_dir", "per_device_eval_batch_size"}
        elsewhere |= {"neighbours", "temperature"} if self.task == "linear" else of_linear
        return {name: value for name, value in asdict(self).items() if name not in elsewhere}
