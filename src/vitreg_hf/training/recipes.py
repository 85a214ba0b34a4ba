# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Recipes: settings of trainings and evaluations from papers, as data.

`--recipe NAME` starts an example from one of them, and any setting on the command line replaces what it says
(`vitreg_hf.training.command_line`). Numbers stand as their sources have them; what differs here is in the notes.
Print one with `python -c "from vitreg_hf.training.recipes import recipe; print(recipe('deit3_small').describe())"`.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

Task = Literal["image-classification", "linear-probe", "knn", "self-supervision"]


class Expected(NamedTuple):
    """A result to compare with.

    Attributes:
        metric: what is measured, on which data.
        value: the number, or several in words; None if no source has one.
        source: who says so, and what was different there.
    """

    metric: str
    value: float | str | None
    source: str


@dataclass(frozen=True)
class Recipe:
    """Settings from a source, and what to expect of them.

    Attributes:
        name: by which it is chosen.
        paper: title, authors and arXiv number.
        table: where in the paper or its code the numbers stand.
        command: how it is run.
        cost: machines and time as the source has them.
        expected: the result to compare with.
        run_at_full_scale: whether this package has run it as it stands.
        task: what kind of script it is for.
        settings: replace the defaults of the script.
        required: settings that only the command line can give, besides data.
        notes: what differs from the source, and what no source says.
    """

    name: str
    paper: str
    table: str
    command: str
    cost: str
    expected: Expected
    run_at_full_scale: bool
    task: Task
    settings: Mapping[str, Any]
    required: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))

    def describe(self) -> str:
        """All of it as text."""
        metric, value, source = self.expected
        facts = {
            "task": self.task,
            "paper": self.paper,
            "numbers": self.table,
            "command": self.command,
            "cost": self.cost,
            "expected": f"{metric}: {'no number known' if value is None else value} ({source})",
            "run here": "at full scale" if self.run_at_full_scale else "not run here at full scale",
        }
        lines = [self.name, *(f"  {name:9} {text}" for name, text in facts.items())]
        lines += [f"  {'note':9} {note}" for note in self.notes]
        return "\n".join([*lines, "  settings", *(f"    {name} = {value}" for name, value in self.settings.items())])


def recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        ValueError: if there is none, with the names that there are.
    """
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"Expected a recipe of {', '.join(RECIPES)}, got {name!r}{hint}")
    return RECIPES[name]


_IMAGENET = "--train_dir imagenet/train --validation_dir imagenet/val"
_TOP_1 = "top-1 accuracy in % on ImageNet-1k"

# Classification from random weights

_SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}
_CROPS = {"random_resized_crop": True, "random_resized_crop_scale": [0.08, 1.0], "horizontal_flip": True}
_DEIT3 = {
    **{"patch_size": 16, "num_register_tokens": 4, "initializer_range": 0.02, "layerscale_value": 1e-4},
    **{"pooling": "cls", "drop_path_schedule": "uniform", "num_train_epochs": 800},
    **{"optimizer": "lamb", "weight_decay": 0.05, "min_learning_rate": 1e-5, "warmup_learning_rate": 1e-6},
    **{"warmup_ratio": 5 / 800, "max_grad_norm": 1.0, "loss": "bce", "label_smoothing_factor": 0.0},
    **{**_CROPS, "three_augment": True, "color_jitter": 0.3, "mixup_alpha": 0.8, "cutmix_alpha": 1.0},
    **{"repeated_augmentation": 3, "eval_crop_ratio": 1.0},
}


def _deit3(
    size: str,
    image_size: int,
    drop_path_rate: float,
    learning_rate: float,
    gpus: int,
    per_device: int,
    accuracy: float,
    fine_tuned: str,
) -> Recipe:
    name = f"deit3_{size}"
    own = {"image_size": image_size, "drop_path_rate": drop_path_rate, "learning_rate": learning_rate}
    return Recipe(
        name,
        "DeiT III: Revenge of the ViT, Touvron et al., arXiv 2204.07118",
        "training commands of README_revenge.md in facebookresearch/deit, ImageNet-1k, 800 epochs",
        f"accelerate launch --num_processes {gpus} examples/train_image_classification.py --recipe {name} {_IMAGENET}",
        f"800 epochs on {gpus} GPUs, {per_device} images each; the source states no hours",
        Expected(
            f"{_TOP_1} at {image_size} pixels",
            accuracy,
            f"log of the source{fine_tuned}; its models have no registers",
        ),
        run_at_full_scale=False,
        task="image-classification",
        settings={**_SIZES[size], **_DEIT3, **own, "per_device_train_batch_size": per_device},
        notes=(
            "Four registers, CLS with a position of its own, and LAMB of timm (extra `convert`) instead of apex.",
            "Images are resized bilinearly (there: bicubic).",
            "Gradients are clipped to 1.0, as the paper is remembered to say (unverified): its commands do not say.",
            "The source averages weights too, but evaluates those of the last step: so ema_decay is not set.",
            "A shorter training wants other settings: after 100 of the 800 epochs the small model has 63.1 %.",
        ),
    )


_VIT_SMALL = Recipe(
    "vit_small_90ep",
    "Better plain ViT baselines for ImageNet-1k, Beyer, Zhai, Kolesnikov, arXiv 2205.01580",
    "big_vision/configs/vit_s16_i1k.py in google-research/big_vision",
    "accelerate launch --num_processes 8 examples/train_image_classification.py "
    f"--recipe vit_small_90ep --dataloader_num_workers 8 {_IMAGENET}",
    "6 to 7 hours on a TPU v3-8",
    Expected(f"{_TOP_1} at 224 pixels", 76.5, "docstring of the source; its model has no registers and no CLS"),
    run_at_full_scale=False,
    task="image-classification",
    settings={
        **{**_SIZES["small"], "image_size": 224, "patch_size": 16, "num_register_tokens": 4},
        **{"initializer_range": 0.02, "layerscale_value": 0.0, "pooling": "mean"},
        **{"num_train_epochs": 90, "per_device_train_batch_size": 128, "learning_rate": 1e-3, "warmup_steps": 10_000},
        # The source does not multiply weight decay (1e-4) by the learning rate (1e-3), AdamW of torch does.
        **{"weight_decay": 0.1, "max_grad_norm": 1.0, "loss": "cross_entropy", "label_smoothing_factor": 0.0},
        **{**_CROPS, "rand_augment": True, "mixup_alpha": 0.2, "eval_crop_ratio": 0.875},
    },
    notes=(
        "Four registers, CLS beside the pooled patches, learned positions (there: fixed sines and cosines in 2D).",
        "RandAugment of torchvision with 2 operations of magnitude 9 (there: an implementation of its own, 2 of 10).",
        "The source trains on 99 % of the images.",
    ),
)

# From a checkpoint

_FINETUNE = Recipe(
    "finetune_dinov2",
    "of no single paper; batch, epochs, warm-up and smoothing of the fine-tuning in DeiT III, arXiv 2204.07118",
    "fine-tuning commands of README_revenge.md; the rest is customary",
    "accelerate launch --num_processes 8 examples/train_image_classification.py "
    f"--recipe finetune_dinov2 --init_from MODEL {_IMAGENET}",
    "20 epochs on 8 GPUs, 64 images each; hours not measured",
    Expected(f"{_TOP_1} at 224 pixels", None, "these settings are of no single source"),
    run_at_full_scale=False,
    task="image-classification",
    settings={
        **{"tuning": "full", "image_size": 224, "num_train_epochs": 20, "per_device_train_batch_size": 64},
        **{"learning_rate": 5e-5, "min_learning_rate": 1e-6, "warmup_learning_rate": 1e-6, "warmup_ratio": 0.25},
        **{"weight_decay": 0.05, "layer_decay": 0.75, "decay_tokens": True, "drop_path_rate": 0.1},
        **{"loss": "cross_entropy", "label_smoothing_factor": 0.1, **_CROPS, "rand_augment": True},
        **{"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "eval_crop_ratio": 1.0},
    },
    required=("init_from",),
    notes=(
        "Customary and from no paper: learning rate, layer decay, weight decay, drop path. DeiT III fine-tunes all "
        "layers with 1e-5 and weight decay 0.1.",
        "CLS, registers and positions decay because DINOv2 has trained them so.",
    ),
)
_DINOV2 = "DINOv2: Learning Robust Visual Features without Supervision, Oquab et al., arXiv 2304.07193"
_REGISTERS = "README of facebookresearch/dinov2, models with four registers"
_LINEAR = Recipe(
    "linear_probe_dinov2",
    _DINOV2,
    "dinov2/eval/linear.py in facebookresearch/dinov2; the paper's grid has learning rates of 1e-4 to 0.5",
    "accelerate launch --num_processes 8 examples/evaluate_features.py "
    f"--recipe linear_probe_dinov2 --model MODEL {_IMAGENET}",
    "12,500 steps of 1,024 images, forward passes of the frozen model alone, on 8 GPUs",
    Expected(_TOP_1, "ViT-S 80.9, B 84.6, L 86.7, g 87.1", _REGISTERS),
    run_at_full_scale=False,
    task="linear-probe",
    settings={
        **{"task": "linear", "image_size": 224, "max_steps": 12_500, "per_device_train_batch_size": 128},
        "learning_rates": [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1],
        **{"last_blocks": [1, 4], **_CROPS, "eval_crop_ratio": 0.875},
    },
    notes=("The head that is reported is chosen on the images that it is reported for, as in the source.",),
)
_KNN = Recipe(
    "knn_dinov2",
    _DINOV2,
    "dinov2/eval/knn.py in facebookresearch/dinov2",
    f"accelerate launch --num_processes 8 examples/evaluate_features.py --recipe knn_dinov2 --model MODEL {_IMAGENET}",
    "one forward pass over all images",
    Expected(f"{_TOP_1}, 20 neighbours", "ViT-S 79.1, B 82.0, L 83.8, g 83.7", _REGISTERS),
    run_at_full_scale=False,
    task="knn",
    settings={
        **{"task": "knn", "image_size": 224, "neighbours": [10, 20, 100, 200], "temperature": 0.07},
        **{"random_resized_crop": True, "eval_crop_ratio": 0.875},
    },
    notes=("All images are evaluated as those that are held out: resized to 256 pixels, the middle 224 of them.",),
)

# Self-supervision

_DINOV2_SHORT = Recipe(
    "dinov2_short",
    _DINOV2,
    "dinov2/configs/train/vitl16_short.yaml and the defaults below it in facebookresearch/dinov2",
    f"accelerate launch --num_processes 32 examples/pretrain_dino.py --recipe dinov2_short {_IMAGENET}",
    "1 day on 32 A100 of 80 GB",
    Expected(_TOP_1, "81.6 with 20 neighbours, 82.9 with a linear probe", "README of the source; without registers"),
    run_at_full_scale=False,
    task="self-supervision",
    settings={
        **{**_SIZES["large"], "image_size": 224, "patch_size": 16, "num_register_tokens": 4},
        **{"initializer_range": 0.02, "layerscale_value": 1e-5},
        **{"drop_path_rate": 0.3, "drop_path_schedule": "uniform", "drop_path_kind": "subset"},
        **{"num_train_epochs": 100, "steps_per_epoch": 1250, "per_device_train_batch_size": 64},
        # 4e-3 x the square root of the batch of 2,048 over 1,024
        **{"learning_rate": 5.66e-3, "min_learning_rate": 1e-6, "warmup_ratio": 0.1, "mixed_precision": "fp16"},
        **{"weight_decay": 0.04, "weight_decay_end": 0.4, "decay_tokens": True, "layer_decay": 0.9},
        **{"patch_embedding_factor": 0.2, "max_grad_norm": 3.0, "freeze_last_layer_ratio": 0.01},
        **{"num_local_crops": 8, "local_crop_size": 96},
        **{"global_crops_scale": [0.32, 1.0], "local_crops_scale": [0.05, 0.32]},
        **{"horizontal_flip": True, "color_augmentation": True, "mask_share": 0.5, "mask_ratio": [0.1, 0.5]},
        **{"num_prototypes": 65_536, "head_hidden_size": 2048, "head_bottleneck_size": 256, "patch_head": "shared"},
        **{"dino_weight": 1.0, "ibot_weight": 1.0, "koleo_weight": 0.1, "gram_weight": 0.0, "targets": "centring"},
        **{"student_temperature": 0.1, "teacher_temperature": 0.07, "warmup_teacher_temperature": 0.04},
        **{"warmup_teacher_ratio": 0.3, "teacher_momentum": 0.992, "eval_steps": 12_500, "knn_neighbours": 20},
    },
    notes=(
        "Four registers.",
        "Prototypes do not decay, and crops are resized bilinearly; not compared with the source.",
    ),
)

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        one.name: one
        for one in (
            _deit3("small", 224, 0.05, 4e-3, 8, 256, 81.4, ""),
            _deit3("base", 192, 0.2, 3e-3, 8, 256, 82.8, ", 83.8 after fine-tuning at 224"),
            _deit3("large", 192, 0.45, 3e-3, 32, 64, 84.0, ", 84.9 after fine-tuning at 224"),
            _VIT_SMALL,
            _FINETUNE,
            _LINEAR,
            _KNN,
            _DINOV2_SHORT,
        )
    }
)
