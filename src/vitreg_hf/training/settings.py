# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Settings that all trainings share: names, defaults, help texts and the checks that precede all work.

Names are those of Transformers' examples. An example reads them off its command line with `HfArgumentParser`. Settings
of a kind of training extend these in a file of their own.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

FILE_SETTINGS = (
    *("recipe", "output_dir", "save_steps", "save_every_epochs", "save_total_limit", "resume_from_checkpoint"),
    *("resume_with_changes", "logging_steps", "report_to", "loss_spike_factor", "replay"),
)
HUB_SETTINGS = ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "hub_license")

SWITCH = {"nargs": "?", "const": True}  # a bare --horizontal_flip means true


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of settings with its help text."""
    return field(default=default, metadata={"help": help, **metadata})


def listed(default: list[Any], help: str) -> Any:
    """The same for a list."""
    return field(default_factory=lambda: list(default), metadata={"help": help})


def expect(condition: bool, expected: str, got: Any) -> None:
    """Raise ValueError unless a condition holds."""
    if not condition:
        raise ValueError(f"Expected {expected}, got {got}")


@dataclass
class TrainingSettings:
    """How weights are updated, what is logged, and where files go, whatever is trained."""

    recipe: str | None = option(None, "start from the settings of a recipe, see training/recipes.py")

    # Optimisation
    num_train_epochs: int = option(18, "passes over the training images")
    max_steps: int | None = option(None, "stop after that many updates instead")
    steps_per_epoch: int | None = option(None, "updates that count as an epoch; left out: one pass over the images")
    per_device_train_batch_size: int = option(16, "images per batch and process")
    per_device_eval_batch_size: int = option(64, "images per evaluation batch and process")
    gradient_accumulation_steps: int = option(1, "batches per update of the weights")
    auto_find_batch_size: bool = option(False, "smaller batches, more of them per update, until they fit into memory")
    optimizer: Literal["adamw", "lamb"] = option("adamw", "optimizer; lamb is that of timm")
    learning_rate: float = option(2e-3, "highest learning rate; not scaled by batch size or processes")
    min_learning_rate: float = option(0.0, "learning rate at the end")
    warmup_ratio: float = option(0.1, "share of the updates in which the learning rate rises")
    warmup_steps: int | None = option(None, "number of these updates instead")
    warmup_learning_rate: float = option(0.0, "learning rate at the start")
    weight_decay: float = option(0.05, "weight decay, but for biases, norms and LayerScale")
    decay_tokens: bool = option(False, "weight decay also for CLS, registers and positions, as DINOv2 has it")
    adam_beta1: float = option(0.9, "decay of the first moment")
    adam_beta2: float = option(0.999, "decay of the second moment")
    layer_decay: float = option(1.0, "learning rate of a layer as a share of that of the layer above it")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: not clipped")
    gradient_checkpointing: bool = option(False, "compute activations again in the backward pass: slower, less memory")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "left out: what accelerate is set up for")
    seed: int = option(0, "seed of weights, order and augmentation; held-out images do not depend on it")
    dataloader_num_workers: int = option(0, "processes that load images, per training process")

    # Logging
    logging_steps: int = option(10, "updates between two records of loss, speed, memory, gradients and registers")
    report_to: list[str] = listed(["none"], "trackers: tensorboard, trackio, wandb, all (that are installed) or none")
    loss_spike_factor: float = option(10.0, "stop when the loss is that many times its median; 0: only if not finite")

    replay: str | None = option(None, "folder of the batches of a step that broke: look into it, and train nothing")

    # Files
    output_dir: str | None = option(None, "folder for all that is written; left out: outputs/<name of the data>")
    save_steps: int = option(0, "write a checkpoint into output_dir/checkpoints after that many updates; 0: do not")
    save_every_epochs: int = option(0, "the same after epochs")
    save_total_limit: int = option(2, "checkpoints kept")
    resume_from_checkpoint: str | None = option(
        None, "path of a checkpoint; latest: the newest good one of output_dir; auto: that, or a new training"
    )
    resume_with_changes: bool = option(False, "resume with other settings or processes, which is then not exact")

    def check_training(self) -> None:
        """Refuse settings that make no sense.

        Raises:
            ValueError: naming the setting, what was expected and what came.
        """
        self.expect_at_least(1, "num_train_epochs", "max_steps", "steps_per_epoch", "per_device_train_batch_size")
        self.expect_at_least(1, "per_device_eval_batch_size", "gradient_accumulation_steps", "save_total_limit")
        self.expect_at_least(1, "logging_steps")
        self.expect_at_least(0, "weight_decay", "max_grad_norm", "save_steps", "save_every_epochs", "seed")
        self.expect_at_least(0, "dataloader_num_workers", "warmup_steps", "warmup_learning_rate", "min_learning_rate")
        self.expect_share("warmup_ratio", "adam_beta1", "adam_beta2")
        expect(self.learning_rate > 0, "learning_rate above 0", self.learning_rate)
        expect(0 < self.layer_decay <= 1, "layer_decay in (0, 1]", self.layer_decay)
        factor = self.loss_spike_factor
        expect(factor == 0 or factor > 1, "loss_spike_factor of 0 or above 1", factor)
        for name in ("warmup_learning_rate", "min_learning_rate"):
            value, highest = getattr(self, name), self.learning_rate
            expect(value <= highest, f"{name} of learning_rate ({highest}) or less", value)

    def expect_at_least(self, least: int, *names: str) -> None:
        """Raise ValueError for a setting below `least`; None is no number."""
        for name in names:
            value = getattr(self, name)
            expect(value is None or value >= least, f"{name} of {least} or more", value)

    def expect_share(self, *names: str) -> None:
        """Raise ValueError for a setting outside [0, 1)."""
        for name in names:
            expect(0 <= getattr(self, name) < 1, f"{name} in [0, 1)", getattr(self, name))

    @property
    def output_folder(self) -> Path:
        """Where everything is written."""
        return Path(cast(str, self.output_dir))

    @property
    def checkpoint_folder(self) -> Path:
        """Where the checkpoints of this training are."""
        return self.output_folder / "checkpoints"

    def fixed(self, **more: Any) -> dict[str, Any]:
        """What a resumed training must have in common with its checkpoint to continue it exactly.

        Where files lie, how often they are written and what is shown of a training do not change what it computes.
        """
        free = {*FILE_SETTINGS, *HUB_SETTINGS, "early_stopping_patience", "auto_find_batch_size"}
        free |= {"dataloader_num_workers"}  # who loads a sample does not change it
        return {name: value for name, value in asdict(self).items() if name not in free} | more
