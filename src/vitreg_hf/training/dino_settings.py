# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Settings of self-supervision: those of every training, and data, model, crops, masks, losses and the teacher."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from vitreg_hf.model.configuration_vitreg import ViTRegConfig
from vitreg_hf.training.classification_settings import (
    DATA_SETTINGS,
    DIGITS_SHAPE,
    ImageDataSettings,
)
from vitreg_hf.training.settings import FILE_SETTINGS, SWITCH, TrainingSettings, expect, listed, option

_SHAPE = tuple(name for name in DIGITS_SHAPE if name != "num_channels")  # crops are augmented as RGB
MODEL_SETTINGS = (*_SHAPE, "drop_path_rate", "drop_path_schedule", "drop_path_kind")


@dataclass
class DinoSettings(ImageDataSettings, TrainingSettings):
    """The defaults are the digits demo; a setting that makes no sense raises `ValueError` when the object is made.

    For photos, DINOv2 (arXiv 2304.07193) has crops of 0.32-1 and 0.05-0.32 of the area (224 px, and 8 of 96 px), heads
    of 2048, 256 and 65,536, a teacher of temperature 0.04-0.07 and momentum 0.992-1, and clips to 3.
    """

    # Model
    image_size: int = option(32, "height and width of global crops in pixels")
    patch_size: int = option(8, "height and width of a patch in pixels")
    hidden_size: int = option(64, "width of the model")
    num_hidden_layers: int = option(4, "number of blocks")
    num_attention_heads: int = option(4, "attention heads per block")
    num_register_tokens: int = option(4, "learned registers; 0 is a plain Vision Transformer")
    initializer_range: float = option(0.1, "std of initial weights; widths of several hundred want 0.02")
    layerscale_value: float = option(1.0, "initial value of LayerScale; 0: no LayerScale")
    pooling: str = option("cls", "what a classifier of the saved model reads: cls, cls_mean or cls_register_mean")
    drop_path_rate: float = option(0.0, "stochastic depth rate of the student")
    drop_path_schedule: Literal["linear", "uniform"] = option("uniform", "rising over depth, or the same everywhere")
    drop_path_kind: Literal["mask", "subset"] = option("subset", "subset computes nothing for what is dropped")

    # Crops
    num_local_crops: int = option(4, "small crops per image, besides two large ones")
    local_crop_size: int = option(16, "their height and width in pixels")
    global_crops_scale: list[float] = listed([0.6, 1.0], "area of large crops, as shares of the image")
    local_crops_scale: list[float] = listed([0.3, 0.6], "area of small crops, as shares of the image")
    horizontal_flip: bool | None = option(None, "mirror half of the crops; left out: all but digits", **SWITCH)
    color_augmentation: bool | None = option(None, "jitter, grey, blur, solarise; left out: all but digits", **SWITCH)

    # Masks
    mask_share: float = option(0.5, "share of the large crops that have masked patches")
    mask_ratio: list[float] = listed([0.1, 0.5], "smallest and largest part of their patches that is masked")

    # Heads
    num_prototypes: int = option(256, "outputs of the heads")
    head_hidden_size: int = option(256, "width of the two hidden layers of a head")
    head_bottleneck_size: int = option(64, "width of what is compared with prototypes")
    patch_head: Literal["shared", "separate"] = option("separate", "masked patches share the head of CLS, or have one")

    # Losses
    dino_weight: float = option(1.0, "weight of the loss on CLS")
    ibot_weight: float = option(1.0, "weight of the loss on masked patches; 0: no masks")
    koleo_weight: float = option(0.1, "weight of what spreads images out; 0: off")
    gram_weight: float = option(0.0, "weight of what keeps similarities of patches (DINOv3: 2); 0: off")
    gram_start_ratio: float = option(0.5, "share of the updates after which that begins")
    gram_refresh_steps: int = option(0, "take the teacher of then as the Gram teacher so often; 0: only once")
    student_temperature: float = option(0.1, "temperature of the student")
    teacher_temperature: float = option(0.04, "temperature of the teacher after its warm-up")
    warmup_teacher_temperature: float = option(0.02, "temperature of the teacher at the start")
    warmup_teacher_ratio: float = option(0.3, "share of the updates in which it rises")
    targets: Literal["sinkhorn", "centring"] = option("sinkhorn", "how collapse of the targets is prevented")

    # Teacher and optimisation; names that all trainings have, with the digits' values
    num_train_epochs: int = option(33, "passes over the training images")
    per_device_train_batch_size: int = option(32, "images per batch and process")
    learning_rate: float = option(1e-3, "highest learning rate; not scaled by batch size or processes")
    weight_decay: float = option(0.04, "weight decay at the start, but for tokens, biases, norms and prototypes")
    max_grad_norm: float = option(3.0, "gradients are clipped to this norm; 0: not clipped")
    teacher_momentum: float = option(0.95, "how much of the teacher stays per update at the start; 1 at the end")
    weight_decay_end: float = option(0.4, "weight decay at the end, to which it goes along a cosine")
    patch_embedding_factor: float = option(1.0, "multiplies the learning rate of the patch projection")
    freeze_last_layer_ratio: float = option(0.0, "share of the updates in which prototypes rest")

    # Evaluation
    eval_steps: int = option(150, "updates between two k-NN evaluations of the teacher; the last update has one, too")
    knn_neighbours: int = option(20, "neighbours that vote")

    def __post_init__(self) -> None:
        self.check_sources()
        self.check_training()
        self._check_ranges()
        self._check_crops()
        own_images = self.sources() != []
        self.output_dir = self.output_dir or f"outputs/{self.source_name()}-dino"
        self.horizontal_flip = own_images if self.horizontal_flip is None else self.horizontal_flip
        self.color_augmentation = own_images if self.color_augmentation is None else self.color_augmentation

    def hyperparameters(self) -> dict[str, Any]:
        """How the model is trained, without its shape, data and files."""
        elsewhere = {*MODEL_SETTINGS, *DATA_SETTINGS, *FILE_SETTINGS}
        return {name: value for name, value in asdict(self).items() if name not in elsewhere}

    def model_config(self) -> ViTRegConfig:
        """The shape of the backbone.

        Raises:
            ValueError: if sizes do not fit together.
        """
        shape = {name: getattr(self, name) for name in MODEL_SETTINGS}
        return ViTRegConfig(**{**shape, "layerscale_value": self.layerscale_value or None})

    def _check_ranges(self) -> None:
        self.expect_at_least(1, "num_prototypes", "head_hidden_size", "head_bottleneck_size", "eval_steps")
        self.expect_at_least(1, "local_crop_size", "knn_neighbours")
        self.expect_at_least(0, "num_local_crops", "dino_weight", "ibot_weight", "koleo_weight", "gram_weight")
        self.expect_at_least(0, "gram_refresh_steps", "weight_decay_end", "patch_embedding_factor")
        self.expect_share("drop_path_rate", "warmup_teacher_ratio", "freeze_last_layer_ratio", "gram_start_ratio")
        for name in ("student_temperature", "teacher_temperature", "warmup_teacher_temperature"):
            expect(getattr(self, name) > 0, f"{name} above 0", getattr(self, name))
        expect(0 < self.teacher_momentum <= 1, "teacher_momentum in (0, 1]", self.teacher_momentum)
        expect(self.optimizer == "adamw", "the optimizer adamw", self.optimizer)
        # Balanced targets and KoLeo look at the whole batch: more batches of fewer images are another training.
        expect(not self.auto_find_batch_size, "a chosen batch size", "auto_find_batch_size")
        expect(self.replay is None, "a training of classification to replay", self.replay)
        lowest = min(self.teacher_temperature, self.warmup_teacher_temperature)
        safe = self.targets != "sinkhorn" or lowest >= 0.02  # scores lie in [-1, 1]: below it, exponentials vanish
        expect(safe, "teacher temperatures of 0.02 or more with the targets sinkhorn", lowest)
        alone = self.koleo_weight > 0 and self.per_device_train_batch_size < 2
        expect(not alone, "2 images per batch or more for koleo_weight", self.per_device_train_batch_size)

    def _check_crops(self) -> None:
        for name in ("global_crops_scale", "local_crops_scale"):
            scale = getattr(self, name)
            valid = len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1
            expect(valid, f"{name} with 0 < low <= high <= 1", scale)
        expect(0 < self.mask_share <= 1, "mask_share in (0, 1]", self.mask_share)
        ratio = self.mask_ratio
        expect(len(ratio) == 2 and 0 < ratio[0] <= ratio[1] < 1, "mask_ratio with 0 < low <= high < 1", ratio)
        expect(self.pooling != "mean", "a model with CLS", f"pooling {self.pooling}")
        for name in ("image_size", "local_crop_size"):
            whole = getattr(self, name) % self.patch_size == 0
            expect(whole, f"{name} that patch_size ({self.patch_size}) divides", getattr(self, name))
