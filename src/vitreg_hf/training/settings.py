# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Settings of an image-classification training: names, defaults, help texts and the checks that precede all work.

Names are those of Transformers' examples. An example reads them off its command line with `HfArgumentParser`.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from vitreg_hf.model.configuration_vitreg import ViTRegConfig

MODEL_SETTINGS = (
    *("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_register_tokens"),
    *("initializer_range", "pooling", "drop_path_rate", "layerscale_value"),
)

DATA_SETTINGS = (
    *("dataset_name", "dataset_config_name", "train_dir", "validation_dir", "train_file", "validation_file"),
    *("image_column_name", "label_column_name", "max_train_samples", "on_corrupt_image", "dataloader_num_workers"),
)
HUB_SETTINGS = ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "hub_license")
FILE_SETTINGS = ("output_dir", "save_every_epochs", "save_total_limit", "resume_from_checkpoint", *HUB_SETTINGS)

_SWITCH = {"nargs": "?", "const": True}  # a bare --horizontal_flip means true


def _option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class ImageClassificationSettings:
    """The defaults are the digits demo; a setting that makes no sense raises `ValueError` when the object is made."""

    # Data
    dataset_name: str | None = _option(None, "dataset on the Hub, or a folder in its format; left out: digits")
    dataset_config_name: str | None = _option(None, "configuration of that dataset, if it has several")
    train_dir: str | None = _option(None, "folder with one subfolder of images per class")
    validation_dir: str | None = _option(None, "the same to validate on; left out: 10 %% of the training images")
    train_file: str | None = _option(None, "parquet file with images and labels")
    validation_file: str | None = _option(None, "the same to validate on; left out: 10 %% of the training images")
    image_column_name: str = _option("image", "column of images")
    label_column_name: str = _option("label", "column of class indices or names")
    max_train_samples: int | None = _option(None, "train on that many images only")
    on_corrupt_image: Literal["raise", "skip"] = _option("raise", "refuse or leave out files that cannot be decoded")
    dataloader_num_workers: int = _option(0, "processes that load images, per training process")

    # Model
    image_size: int = _option(32, "height and width in pixels")
    patch_size: int = _option(8, "height and width of a patch in pixels")
    hidden_size: int = _option(64, "width of the model")
    num_hidden_layers: int = _option(4, "number of blocks")
    num_attention_heads: int = _option(4, "attention heads per block")
    num_register_tokens: int = _option(4, "learned registers; 0 is a plain Vision Transformer")
    initializer_range: float = _option(0.1, "std of initial weights; widths of several hundred want 0.02")
    pooling: str = _option("cls", "what the classifier reads: cls, mean, cls_mean or cls_register_mean")
    drop_path_rate: float = _option(0.0, "stochastic depth rate of the last block")
    layerscale_value: float = _option(1.0, "initial value of LayerScale; 0: no LayerScale")

    # Optimisation
    num_train_epochs: int = _option(18, "passes over the training images")
    per_device_train_batch_size: int = _option(16, "images per batch and process")
    per_device_eval_batch_size: int = _option(64, "images per evaluation batch and process")
    gradient_accumulation_steps: int = _option(1, "batches per update of the weights")
    learning_rate: float = _option(2e-3, "highest learning rate; not scaled by batch size or processes")
    weight_decay: float = _option(0.05, "weight decay of AdamW, but for tokens, positions, biases and norms")
    warmup_ratio: float = _option(0.1, "share of the updates in which the learning rate rises")
    max_grad_norm: float = _option(1.0, "gradients are clipped to this norm; 0: not clipped")
    ema_decay: float | None = _option(None, "evaluate and save a moving average of the weights with this decay")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _option(None, "left out: what accelerate is set up for")
    seed: int = _option(0, "seed of weights, order and augmentation; held-out images do not depend on it")
    early_stopping_patience: int | None = _option(None, "stop after that many epochs without a better accuracy")

    # Augmentation
    random_resized_crop: bool | None = _option(None, "crop and resize at random; left out: all but digits", **_SWITCH)
    random_resized_crop_scale: list[float] = field(
        default_factory=lambda: [0.08, 1.0], metadata={"help": "area of such crops, as shares of the image"}
    )
    horizontal_flip: bool | None = _option(None, "mirror half of the images; left out: all but digits", **_SWITCH)
    rand_augment: bool = _option(False, "RandAugment")
    mixup_alpha: float = _option(0.0, "MixUp with this parameter; 0: none")
    cutmix_alpha: float = _option(0.0, "CutMix with this parameter; 0: none; with both, each batch has one of them")
    label_smoothing_factor: float = _option(0.1, "share of the target that is spread over all classes")

    # Files
    output_dir: str | None = _option(None, "folder for all that is written; left out: outputs/<name of the data>")
    save_every_epochs: int = _option(0, "write a checkpoint into output_dir/checkpoints that often; 0: none")
    save_total_limit: int = _option(2, "checkpoints kept")
    resume_from_checkpoint: str | None = _option(None, "path of a checkpoint, or latest: the newest of output_dir")

    # Publishing; the token is that of `hf auth login` or of HF_TOKEN, never an option that results would quote
    push_to_hub: bool = _option(False, "publish to the Hub at the end; access is checked before the training")
    hub_model_id: str | None = _option(None, "repository; left out: vitreg-<name of the data> under your own name")
    hub_private_repo: bool = _option(False, "make the repository a private one")
    hub_revision: str | None = _option(None, "branch to publish to, made if there is none; left out: main")
    hub_license: str | None = _option(None, "licence of the weights as the Hub spells it, for the card")

    def __post_init__(self) -> None:
        self._check_sources()
        self._check_ranges()
        self._check_hub()
        own_images = self._sources() != []
        if not own_images and self.hub_license is None:
            self.hub_license = "apache-2.0"  # weights that a demo of ours makes; those of other data are not ours
        self.output_dir = self.output_dir or f"outputs/{self.source_name()}"
        self.random_resized_crop = own_images if self.random_resized_crop is None else self.random_resized_crop
        self.horizontal_flip = own_images if self.horizontal_flip is None else self.horizontal_flip

    @property
    def crop_scale(self) -> tuple[float, float] | None:
        """Range of the area of random resized crops, or None if there are none."""
        low, high = self.random_resized_crop_scale
        return (low, high) if self.random_resized_crop else None

    @property
    def output_folder(self) -> Path:
        """Where everything is written."""
        return Path(cast(str, self.output_dir))

    def source_name(self) -> str:
        """Name of the data: the last part of the id or path that is not just `train`; `digits` by default."""
        path = Path(self.train_file or self.dataset_name or self.train_dir or "digits").resolve()
        name = path.stem if self.train_file is not None else path.name
        return path.parent.name if name in ("train", "training") else name

    def hyperparameters(self) -> dict[str, Any]:
        """How the model is optimised and the images are augmented, without the shape of the model, data and files."""
        elsewhere = {*MODEL_SETTINGS, *DATA_SETTINGS, *FILE_SETTINGS}
        chosen = {name: value for name, value in asdict(self).items() if name not in elsewhere}
        return chosen | {"random_resized_crop_scale": self.crop_scale}

    def model_config(self) -> ViTRegConfig:
        """The shape of the model.

        Raises:
            ValueError: if sizes do not fit together.
        """
        shape = {name: getattr(self, name) for name in MODEL_SETTINGS}
        return ViTRegConfig(**{**shape, "layerscale_value": self.layerscale_value or None})

    def _sources(self) -> list[str]:
        named = {"dataset_name": self.dataset_name, "train_dir": self.train_dir, "train_file": self.train_file}
        return [name for name, value in named.items() if value is not None]

    def _check_sources(self) -> None:
        _expect(len(self._sources()) <= 1, "one source of images", " and ".join(self._sources()))
        for wanted, given in (
            ("train_dir", "validation_dir"),
            ("train_file", "validation_file"),
            ("dataset_name", "dataset_config_name"),
        ):
            alone = getattr(self, given) is not None and getattr(self, wanted) is None
            _expect(not alone, f"{wanted} with {given}", f"{given} alone")

    def _check_hub(self) -> None:
        for name in ("hub_model_id", "hub_private_repo", "hub_revision"):
            alone = bool(getattr(self, name)) and not self.push_to_hub
            _expect(not alone, f"push_to_hub with {name}", f"{name} alone")

    def _check_ranges(self) -> None:
        for name in (
            *("num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size"),
            *("gradient_accumulation_steps", "save_total_limit", "early_stopping_patience", "max_train_samples"),
        ):
            value = getattr(self, name)
            _expect(value is None or value >= 1, f"{name} of 1 or more", value)
        for name in (
            *("weight_decay", "max_grad_norm", "mixup_alpha", "cutmix_alpha"),
            *("save_every_epochs", "dataloader_num_workers", "seed"),
        ):
            _expect(getattr(self, name) >= 0, f"{name} of 0 or more", getattr(self, name))
        for name in ("warmup_ratio", "label_smoothing_factor"):
            _expect(0 <= getattr(self, name) < 1, f"{name} in [0, 1)", getattr(self, name))
        _expect(self.learning_rate > 0, "learning_rate above 0", self.learning_rate)
        _expect(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay in (0, 1)", self.ema_decay)
        scale = self.random_resized_crop_scale
        valid = len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1
        _expect(valid, "random_resized_crop_scale with 0 < low <= high <= 1", scale)


def _expect(condition: bool, expected: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"Expected {expected}, got {got}")
