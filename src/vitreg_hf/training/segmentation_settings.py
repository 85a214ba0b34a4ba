# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Settings of a semantic-segmentation training: those of every training, and data, model, tuning and augmentation."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vitreg_hf.model.configuration_vitreg import ViTRegConfig
from vitreg_hf.training.classification_settings import DIGITS_SHAPE
from vitreg_hf.training.settings import (
    FILE_SETTINGS,
    HUB_SETTINGS,
    SWITCH,
    TrainingSettings,
    expect,
    listed,
    option,
)

DATA_SETTINGS = (
    *("dataset_name", "dataset_config_name", "train_dir", "validation_dir", "train_file", "validation_file"),
    *("image_column_name", "mask_column_name", "class_names", "reduce_labels", "max_train_samples"),
    "dataloader_num_workers",
)
_SHAPE = ("patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_register_tokens",
          "initializer_range")  # fmt: skip
_SCENES = 64  # height and width of the scenes of digits


@dataclass
class SegmentationDataSettings:
    """Where images with masks come from."""

    dataset_name: str | None = option(None, "dataset on the Hub, or a folder in its format; left out: digit scenes")
    dataset_config_name: str | None = option(None, "configuration of that dataset, if it has several")
    train_dir: str | None = option(None, "folder with subfolders images and annotations, whose files go in pairs")
    validation_dir: str | None = option(None, "the same to validate on; left out: 10 %% of the training images")
    train_file: str | None = option(None, "parquet file with images and masks")
    validation_file: str | None = option(None, "the same to validate on; left out: 10 %% of the training images")
    image_column_name: str = option("image", "column of images")
    mask_column_name: str = option("annotation", "column of masks")
    class_names: list[str] = listed([], "name of each class in the order of the labels, or a text file of one a line")
    reduce_labels: bool = option(False, "labels count from 1 and 0 is no class, as in ADE20K")
    max_train_samples: int | None = option(None, "train on that many images only")

    def source_name(self) -> str:
        """Name of the data: the last part of the id or path that is not just `train`."""
        path = Path(self.train_file or self.dataset_name or self.train_dir or "digit-scenes").resolve()
        name = path.stem if self.train_file is not None else path.name
        return path.parent.name if name in ("train", "training") else name

    def sources(self) -> list[str]:
        """Names of the settings that name a source."""
        return [name for name in ("dataset_name", "train_dir", "train_file") if getattr(self, name) is not None]

    def check_sources(self) -> None:
        """Refuse two sources, parts of a source without the source, and masks without names of their classes."""
        expect(len(self.sources()) <= 1, "one source of images", " and ".join(self.sources()))
        for wanted, given in (
            ("train_dir", "validation_dir"),
            ("train_file", "validation_file"),
            ("dataset_name", "dataset_config_name"),
        ):
            alone = getattr(self, given) is not None and getattr(self, wanted) is None
            expect(not alone, f"{wanted} with {given}", f"{given} alone")
        own = self.sources() != []
        expect(own == bool(self.class_names), "class_names with own images, and only with them",
               f"{len(self.class_names)} names for {'own images' if own else 'digit scenes'}")  # fmt: skip
        expect(own or not self.reduce_labels, "reduce_labels with own images", "reduce_labels for digit scenes")
        kept = self.max_train_samples
        expect(kept is None or kept >= 1, "max_train_samples of 1 or more", kept)

    def names_of_classes(self) -> list[str]:
        """The class names, read from a file if one is given.

        Raises:
            ValueError: if a name is there twice.
        """
        names = self.class_names
        if len(names) == 1 and Path(names[0]).is_file():
            names = [line.strip() for line in Path(names[0]).read_text().splitlines() if line.strip()]
        twice = sorted({name for name in names if names.count(name) > 1})
        expect(not twice, "class names that differ", f"{', '.join(twice)} twice")
        return list(names)


@dataclass
class SegmentationSettings(SegmentationDataSettings, TrainingSettings):
    """The defaults are scenes of digits; a setting that makes no sense raises `ValueError` when the object is made."""

    num_train_epochs: int = option(60, "passes over the training images")

    # Model
    init_from: str | None = option(
        None, "model whose patch tokens are read, a folder or an id; left out: random weights"
    )
    tuning: Literal["linear", "full"] | None = option(
        None, "what is trained: a linear layer on frozen tokens, or everything; left out: linear with init_from"
    )
    batch_norm: bool = option(True, "BatchNorm before the linear layer, as DINOv2 evaluates")
    image_size: int | None = option(
        None, "height and width in pixels; left out: that of the model, 64 for digit scenes"
    )
    patch_size: int | None = option(None, "height and width of a patch in pixels (8)")
    hidden_size: int | None = option(None, "width of the model (64)")
    num_hidden_layers: int | None = option(None, "number of blocks (4)")
    num_attention_heads: int | None = option(None, "attention heads per block (4)")
    num_register_tokens: int | None = option(None, "learned registers (4); 0 is a plain Vision Transformer")
    initializer_range: float | None = option(None, "std of initial weights (0.1); widths of several hundred want 0.02")
    drop_path_rate: float = option(0.0, "stochastic depth rate of the last block")

    # Augmentation
    random_scale: list[float] = listed(
        [0.7, 1.5], "range of the size before a crop of image_size is cut out; 1 1: none"
    )
    horizontal_flip: bool | None = option(None, "mirror half of the images; left out: all but digits", **SWITCH)

    def __post_init__(self) -> None:
        self.check_sources()
        self.check_training()
        self.expect_at_least(1, "image_size", *_SHAPE[:-2])
        self.expect_share("drop_path_rate")
        scale = self.random_scale
        expect(len(scale) == 2 and 0 < scale[0] <= scale[1], "random_scale with 0 < low <= high", scale)
        expect(self.optimizer == "adamw", "the optimizer adamw", self.optimizer)
        expect(not self.auto_find_batch_size, "a chosen batch size", "auto_find_batch_size")
        expect(self.replay is None, "a training of classification to replay", self.replay)
        self.tuning = self.tuning or ("full" if self.init_from is None else "linear")
        expect(self.init_from is not None or self.tuning == "full", "init_from with linear tuning", "random weights")
        shape = [name for name in _SHAPE if getattr(self, name) is not None]
        expect(self.init_from is None or not shape, f"the shape of the model {self.init_from}", ", ".join(shape))
        own_images = self.sources() != []
        self.output_dir = self.output_dir or f"outputs/{self.source_name()}"
        self.horizontal_flip = own_images if self.horizontal_flip is None else self.horizontal_flip

    @property
    def chosen_image_size(self) -> int | None:
        """Height and width of what is trained on; None for that of the model."""
        return self.image_size or (None if self.sources() and self.init_from else _SCENES)

    @property
    def scale(self) -> tuple[float, float]:
        """Range of the size before cropping."""
        low, high = self.random_scale
        return low, high

    def hyperparameters(self) -> dict[str, Any]:
        """How the model is optimised and the images are augmented, without the shape of the model, data and files."""
        elsewhere = {*_SHAPE, *DATA_SETTINGS, *FILE_SETTINGS, *HUB_SETTINGS, "image_size"}
        return {name: value for name, value in asdict(self).items() if name not in elsewhere}

    def model_config(self) -> ViTRegConfig:
        """The shape of a model from random weights.

        Raises:
            ValueError: if sizes do not fit together.
        """
        given = {name: getattr(self, name) for name in _SHAPE if getattr(self, name) is not None}
        shape: dict[str, Any] = {**DIGITS_SHAPE, **given, "image_size": self.chosen_image_size}
        return ViTRegConfig(**shape)
