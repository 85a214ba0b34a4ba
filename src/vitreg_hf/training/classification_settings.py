# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Settings of an image-classification training: those of every training, and data, model, tuning and augmentation."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vitreg_hf.model.configuration_vitreg import ViTRegConfig
from vitreg_hf.training.settings import (
    FILE_SETTINGS,
    HUB_SETTINGS,
    SWITCH,
    TrainingSettings,
    expect,
    listed,
    option,
)

# The shape of a model from random weights, for the digits; a model that is loaded has its own.
DIGITS_SHAPE: dict[str, Any] = {
    **{"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4},
    **{"num_register_tokens": 4, "initializer_range": 0.1, "layerscale_value": 1.0, "pooling": "cls"},
    "num_channels": 3,
}
# What may be set of a loaded model too: it changes training alone, or the loader sees to it.
_OF_ANY_MODEL = ("image_size", "num_channels", "pooling")
MODEL_SETTINGS = (
    *DIGITS_SHAPE,
    *("drop_path_rate", "drop_path_schedule", "drop_path_kind", "patch_dropout_rate"),
)

DATA_SETTINGS = (
    *("dataset_name", "dataset_config_name", "train_dir", "validation_dir", "train_file", "validation_file"),
    *("image_column_name", "label_column_name", "max_train_samples", "on_corrupt_image", "dataloader_num_workers"),
    *("streaming", "train_shards", "validation_shards", "class_names_file", "shuffle_buffer_size"),
    *("check_images", "max_skipped_share"),
)
TUNING_SETTINGS = (
    *("init_from", "tuning", "num_tuned_layers", "add_registers"),
    *("lora_rank", "lora_alpha", "lora_dropout", "lora_mlp", "lora_registers"),
)


@dataclass
class ImageDataSettings:
    """Where labelled images come from."""

    dataset_name: str | None = option(None, "dataset on the Hub, or a folder in its format; left out: digits")
    dataset_config_name: str | None = option(None, "configuration of that dataset, if it has several")
    train_dir: str | None = option(None, "folder with one subfolder of images per class")
    validation_dir: str | None = option(None, "the same to validate on; left out: 10 %% of the training images")
    train_file: str | None = option(None, "parquet files with images and labels, a pattern")
    validation_file: str | None = option(None, "the same to validate on; left out: 10 %% of the training images")
    image_column_name: str = option("image", "column of images")
    label_column_name: str = option("label", "column of class indices or names")
    max_train_samples: int | None = option(None, "train on that many images only")
    on_corrupt_image: Literal["raise", "skip"] = option("raise", "refuse or leave out files that cannot be decoded")

    def source_name(self) -> str:
        """Name of the data: the last part of the id or path that is not just `train`; `digits` by default."""
        path = Path(self.train_file or self.dataset_name or self.train_dir or "digits").resolve()
        name = path.stem if self.train_file is not None else path.name
        return path.parent.name if name in ("train", "training") else name

    def sources(self) -> list[str]:
        """Names of the settings that name a source."""
        named = {"dataset_name": self.dataset_name, "train_dir": self.train_dir, "train_file": self.train_file}
        return [name for name, value in named.items() if value is not None]

    def check_sources(self) -> None:
        """Refuse two sources, and parts of a source without the source."""
        expect(len(self.sources()) <= 1, "one source of images", " and ".join(self.sources()))
        for wanted, given in (
            ("train_dir", "validation_dir"),
            ("train_file", "validation_file"),
            ("dataset_name", "dataset_config_name"),
        ):
            alone = getattr(self, given) is not None and getattr(self, wanted) is None
            expect(not alone, f"{wanted} with {given}", f"{given} alone")
        expect(self.max_train_samples is None or self.max_train_samples >= 1, "max_train_samples of 1 or more",
               self.max_train_samples)  # fmt: skip


@dataclass
class StreamSettings(ImageDataSettings):
    """The same, and data that is read while training."""

    streaming: bool = option(False, "read dataset_name while training, undownloaded; needs a validation split")
    train_shards: str | None = option(
        None, "WebDataset tars or parquet files to stream: a folder, or a pattern such as train-{000..146}.tar"
    )
    validation_shards: str | None = option(None, "the same to validate on")
    class_names_file: str | None = option(None, "file with one class name a line, where a stream does not say them")
    shuffle_buffer_size: int = option(1000, "images of a stream among which each process draws the next one")
    check_images: bool | None = option(
        None, "decode all training images before the training; left out: up to 50,000 of them", **SWITCH
    )
    max_skipped_share: float = option(0.01, "end when more of what is met while training cannot be decoded")

    @property
    def is_stream(self) -> bool:
        """Whether images are read while training."""
        return self.streaming or self.train_shards is not None

    def source_name(self) -> str:
        """Name of the data; of shards it is that of their folder."""
        if self.train_shards is None:
            return super().source_name()
        path = Path(self.train_shards).resolve()
        is_folder = path.suffix not in (".tar", ".parquet") and not set("*?[{") & set(path.name)
        folder = path if is_folder else path.parent
        return folder.parent.name if folder.name in ("train", "training") else folder.name

    def sources(self) -> list[str]:
        """Names of the settings that name a source."""
        return super().sources() + ([] if self.train_shards is None else ["train_shards"])

    def check_sources(self) -> None:
        """Also refuse streams without images to validate on, and what no stream can do."""
        super().check_sources()
        shards, held_out = self.train_shards is not None, self.validation_shards is not None
        expect(shards or not held_out, "train_shards with validation_shards", "validation_shards alone")
        expect(held_out or not shards, "validation_shards with train_shards: a stream holds out no images", "none")
        expect(self.dataset_name is not None or not self.streaming, "dataset_name with streaming", "none")
        alone = self.class_names_file is not None and not self.is_stream
        expect(not alone, "streaming or train_shards with class_names_file", "class_names_file alone")
        counted = self.is_stream and self.max_train_samples is not None
        expect(not counted, "all images of a stream", f"max_train_samples {self.max_train_samples}")
        checked = self.is_stream and bool(self.check_images)
        expect(not checked, "images that are there before the training to check_images", "a stream")
        expect(self.shuffle_buffer_size >= 0, "shuffle_buffer_size of 0 or more", self.shuffle_buffer_size)
        expect(0 <= self.max_skipped_share <= 1, "max_skipped_share in [0, 1]", self.max_skipped_share)


@dataclass
class ImageClassificationSettings(StreamSettings, TrainingSettings):
    """The defaults are the digits demo; a setting that makes no sense raises `ValueError` when the object is made."""

    # Model from random weights; with init_from, that of the checkpoint
    init_from: str | None = option(None, "checkpoint to fine-tune, a folder or an id; left out: random weights")
    image_size: int | None = option(None, "height and width in pixels; left out: 32, or that of the checkpoint")
    patch_size: int | None = option(None, "height and width of a patch in pixels (8)")
    hidden_size: int | None = option(None, "width of the model (64)")
    num_hidden_layers: int | None = option(None, "number of blocks (4)")
    num_attention_heads: int | None = option(None, "attention heads per block (4)")
    num_register_tokens: int | None = option(None, "learned registers (4); 0 is a plain Vision Transformer")
    initializer_range: float | None = option(None, "std of initial weights (0.1); widths of several hundred want 0.02")
    layerscale_value: float | None = option(None, "initial value of LayerScale (1.0); 0: no LayerScale")
    pooling: str | None = option(None, "what the classifier reads (cls): cls, mean, cls_mean or cls_register_mean")
    num_channels: int | None = option(None, "image channels: RGB (3), 1 for grey, or those of the images")
    drop_path_rate: float = option(0.0, "stochastic depth rate (of the last block, if it rises over depth)")
    drop_path_schedule: Literal["linear", "uniform"] = option("linear", "rising over depth, or the same everywhere")
    drop_path_kind: Literal["mask", "subset"] = option("mask", "subset computes nothing for what is dropped")
    patch_dropout_rate: float = option(0.0, "share of patches that are left out in training; CLS and registers stay")

    # Fine-tuning
    tuning: Literal["full", "partial", "linear", "registers", "registers_partial", "lora"] = option(
        "full", "what is trained"
    )
    num_tuned_layers: int = option(2, "last blocks that the partial tunings train, with norm and head")
    add_registers: int = option(0, "new registers, beside those of the checkpoint, that start as its mean patch")
    lora_rank: int = option(8, "rank of LoRA's matrices")
    lora_alpha: float = option(16.0, "LoRA's scale is this number divided by the rank")
    lora_dropout: float = option(0.0, "dropout before LoRA's matrices")
    lora_mlp: bool = option(False, "LoRA also on the projections of MLPs")
    lora_registers: bool = option(False, "train the registers beside LoRA's matrices")

    # Loss and weights that are kept
    loss: Literal["cross_entropy", "bce"] = option("cross_entropy", "bce: every class on its own, targets of 0 and 1")
    label_smoothing_factor: float = option(0.1, "share of the target that is spread over all classes")
    ema_decay: float | None = option(None, "evaluate and save a moving average of the weights with this decay")
    early_stopping_patience: int | None = option(None, "stop after that many epochs without a better accuracy")

    # Augmentation
    random_resized_crop: bool | None = option(None, "crop and resize at random; left out: all but digits", **SWITCH)
    random_resized_crop_scale: list[float] = listed([0.08, 1.0], "area of such crops, as shares of the image")
    horizontal_flip: bool | None = option(None, "mirror half of the images; left out: all but digits", **SWITCH)
    rand_augment: bool = option(False, "RandAugment")
    three_augment: bool = option(False, "grey, solarise or blur, as DeiT III")
    color_jitter: float = option(0.0, "strength of random brightness, contrast and saturation")
    mixup_alpha: float = option(0.0, "MixUp with this parameter; 0: none")
    cutmix_alpha: float = option(0.0, "CutMix with this parameter; 0: none; with both, each batch has one of them")
    repeated_augmentation: int = option(1, "copies of an image per pass, each augmented on its own, of fewer images")
    fast_jpeg_decoding: bool = option(
        False, "decode large JPEGs to a half, quarter or eighth where no crop needs more; of training images only"
    )
    eval_crop_ratio: float = option(
        0.875, "share of an image's shorter edge that is evaluated; training on crops only"
    )

    # Publishing; the token is that of `hf auth login` or of HF_TOKEN, never an option that results would quote
    push_to_hub: bool = option(False, "publish to the Hub at the end; access is checked before the training")
    hub_model_id: str | None = option(None, "repository; left out: vitreg-<name of the data> under your own name")
    hub_private_repo: bool = option(False, "make the repository a private one")
    hub_revision: str | None = option(None, "branch to publish to, made if there is none; left out: main")
    hub_license: str | None = option(None, "licence of the weights as the Hub spells it, for the card")

    def __post_init__(self) -> None:
        self.check_sources()
        self.check_training()
        self._check_ranges()
        self._check_model()
        self._check_hub()
        own_images = self.sources() != []
        if not own_images and self.init_from is None and self.hub_license is None:
            self.hub_license = "apache-2.0"  # weights that a demo of ours makes; those of other data are not ours
        self.output_dir = self.output_dir or f"outputs/{self.source_name()}"
        self.random_resized_crop = own_images if self.random_resized_crop is None else self.random_resized_crop
        self.horizontal_flip = own_images if self.horizontal_flip is None else self.horizontal_flip

    @property
    def crop_scale(self) -> tuple[float, float] | None:
        """Range of the area of random resized crops, or None if there are none."""
        low, high = self.random_resized_crop_scale
        return (low, high) if self.random_resized_crop else None

    def fixed(self, **more: Any) -> dict[str, Any]:
        """As of every training; who loads a stream decides what comes when."""
        shared = super().fixed(**more)
        del shared["max_skipped_share"]  # a training that ended there may go on with a higher one
        return shared | ({"dataloader_num_workers": self.dataloader_num_workers} if self.is_stream else {})

    def hyperparameters(self) -> dict[str, Any]:
        """How the model is optimised and the images are augmented, without the shape of the model, data and files."""
        elsewhere = {*MODEL_SETTINGS, *DATA_SETTINGS, *FILE_SETTINGS, *HUB_SETTINGS}
        elsewhere |= set() if self.init_from else {*TUNING_SETTINGS}
        chosen = {name: value for name, value in asdict(self).items() if name not in elsewhere}
        return chosen | {"random_resized_crop_scale": self.crop_scale}

    def model_config(self) -> ViTRegConfig:
        """The shape of a model from random weights.

        Raises:
            ValueError: if sizes do not fit together.
        """
        given = {name: getattr(self, name) for name in MODEL_SETTINGS if getattr(self, name) is not None}
        shape: dict[str, Any] = {**DIGITS_SHAPE, **given}
        return ViTRegConfig(**{**shape, "layerscale_value": shape["layerscale_value"] or None})

    def model_changes(self) -> dict[str, Any]:
        """What of the config of a model that is loaded may change: what training alone reads, and the pooling."""
        names = ("drop_path_rate", "drop_path_schedule", "drop_path_kind", "patch_dropout_rate", "pooling")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def check_colours(self, num_channels: int) -> None:
        """Refuse random colours of images that have none.

        Raises:
            ValueError: with the number of channels.
        """
        coloured = self.rand_augment or self.three_augment or self.color_jitter
        expect(
            num_channels == 3 or not coloured, "3 channels for RandAugment, 3-Augment and colour jitter", num_channels
        )

    def _check_model(self) -> None:
        added = self.add_registers
        expect(added == 0 or self.init_from is not None, "init_from with add_registers", "none: num_register_tokens")
        learning = self.lora_registers if self.tuning == "lora" else self.tuning not in ("linear", "partial")
        expect(added == 0 or learning, "a tuning that trains registers with add_registers", self.tuning)
        if self.init_from is None:
            expect(
                self.tuning == "full", "init_from with a tuning other than full", f"{self.tuning} of random weights"
            )
            return
        shape = [name for name in DIGITS_SHAPE if name not in _OF_ANY_MODEL and getattr(self, name) is not None]
        expect(not shape, f"the shape of the model {self.init_from}", f"{', '.join(shape)} with init_from")

    def _check_hub(self) -> None:
        for name in ("hub_model_id", "hub_private_repo", "hub_revision"):
            alone = bool(getattr(self, name)) and not self.push_to_hub
            expect(not alone, f"push_to_hub with {name}", f"{name} alone")

    def _check_ranges(self) -> None:
        self.expect_at_least(1, "early_stopping_patience", "num_channels", "num_tuned_layers", "lora_rank")
        self.expect_at_least(1, "repeated_augmentation")
        copies = self.repeated_augmentation
        expect(copies == 1 or not self.is_stream, "repeated_augmentation of 1 with a stream", copies)
        self.expect_at_least(0, "mixup_alpha", "cutmix_alpha", "color_jitter", "add_registers")
        self.expect_share("label_smoothing_factor", "drop_path_rate", "patch_dropout_rate", "lora_dropout")
        expect(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay in (0, 1)", self.ema_decay)
        expect(0 < self.eval_crop_ratio <= 1, "eval_crop_ratio in (0, 1]", self.eval_crop_ratio)
        scale = self.random_resized_crop_scale
        valid = len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1
        expect(valid, "random_resized_crop_scale with 0 < low <= high <= 1", scale)
        softened = bool(self.label_smoothing_factor) and self.loss == "bce"
        self.check_colours(self.num_channels or 3)
        expect(not softened, "label_smoothing_factor of 0 with the loss bce", self.label_smoothing_factor)
