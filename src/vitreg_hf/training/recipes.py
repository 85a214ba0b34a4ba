# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Published ways to train, as data: where each comes from, what it costs, what to expect of it.

A recipe is chosen by name (`--recipe`), and any of its settings can be given another value beside it. None of them has
been run at full scale for this package: what each is expected to reach is what its source reports for its own code,
without registers unless it says so.
"""

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from transformers import HfArgumentParser
from transformers.hf_argparser import DataClassType

Settings = TypeVar("Settings")
Script = Literal["train_image_classification.py", "evaluate_features.py", "pretrain_dino.py"]


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    Attributes:
        name: what `--recipe` says.
        source: paper and table, or repository and file, that the numbers come from.
        script: the example that it is for.
        data: what it was published for.
        command: what starts it; the data has to be named.
        cost: what the source says that it takes.
        expected: metric, number and where that is reported.
        settings: values of the settings of its script.
        departures: where these settings differ from the source, and why.
        run_at_full_scale: whether this package has run it so.
    """

    name: str
    source: str
    script: Script
    data: str
    command: str
    cost: str
    expected: str
    settings: Mapping[str, Any]
    departures: str = "none"
    run_at_full_scale: bool = field(default=False)

    def describe(self) -> str:
        """All of it, to be printed."""
        settings = "\n".join(f"  --{name} {value}" for name, value in self.settings.items())
        run = "run at full scale" if self.run_at_full_scale else "not run at full scale by this package"
        return (
            f"{self.name}: {self.source}\n  for {self.data}; {run}\n  $ {self.command}\n  cost: {self.cost}\n"
            f"  expected: {self.expected}\n  departures from the source: {self.departures}\n{settings}"
        )


def _recipe(settings: dict[str, Any], **facts: Any) -> Recipe:
    return Recipe(settings=MappingProxyType(settings), **facts)


# DeiT III: Touvron et al., arXiv 2204.07118

_DEIT3: dict[str, Any] = {
    **{"loss": "bce", "label_smoothing_factor": 0.0, "optimizer": "lamb", "weight_decay": 0.05, "max_grad_norm": 1.0},
    **{"num_train_epochs": 800, "warmup_ratio": 5 / 800, "warmup_learning_rate": 1e-6, "min_learning_rate": 1e-5},
    **{"random_resized_crop": True, "horizontal_flip": True, "three_augment": True, "color_jitter": 0.3},
    **{"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "repeated_augmentation": 3, "eval_crop_ratio": 1.0},
    **{"drop_path_schedule": "uniform", "layerscale_value": 1e-4, "patch_size": 16, "initializer_range": 0.02},
    **{"num_register_tokens": 4, "pooling": "cls"},
}
_DEIT3_DEPARTURES = (
    "four registers; LAMB of timm for apex's; CLS has a position; no average of weights, which the source keeps but "
    "does not evaluate"
)


def _deit3(size: str, shape: dict[str, Any], batch: dict[str, Any], cost: str, expected: str) -> Recipe:
    return _recipe(
        {**_DEIT3, **shape, **batch},
        name=f"deit3_{size}",
        source="DeiT III (arXiv 2204.07118), README_revenge.md of facebookresearch/deit",
        script="train_image_classification.py",
        data="ImageNet-1k",
        command=f"accelerate launch examples/train_image_classification.py --recipe deit3_{size} --dataset_name ...",
        cost=cost,
        expected=expected,
        departures=_DEIT3_DEPARTURES,
    )


_SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}

# DINOv2: Oquab et al., arXiv 2304.07193

_DINOV2_CONFIG = "facebookresearch/dinov2, dinov2/configs/train/vitl16_short.yaml and ssl_default_config.yaml"

RECIPES: Mapping[str, Recipe] = {
    one.name: one
    for one in (
        _deit3(
            "small",
            {**_SMALL, "image_size": 224, "drop_path_rate": 0.05},
            {"per_device_train_batch_size": 256, "learning_rate": 4e-3},
            "8 GPUs, total batch 2048, 800 epochs",
            "top-1 81.4 % on ImageNet-1k (paper and its log)",
        ),
        _deit3(
            "base",
            {**_BASE, "image_size": 192, "drop_path_rate": 0.2},
            {"per_device_train_batch_size": 256, "learning_rate": 3e-3},
            "8 GPUs, total batch 2048, 800 epochs, then 20 epochs at 224",
            "top-1 82.8 % at 192 pixels (log), 83.8 % after tuning at 224 (paper)",
        ),
        _deit3(
            "large",
            {**_LARGE, "image_size": 192, "drop_path_rate": 0.45},
            {"per_device_train_batch_size": 64, "learning_rate": 3e-3},
            "32 GPUs, total batch 2048, 800 epochs, then 20 epochs at 224",
            "top-1 84.0 % at 192 pixels (log), 84.9 % after tuning at 224 (paper)",
        ),
        _recipe(
            {
                **{**_SMALL, "image_size": 224, "patch_size": 16, "num_register_tokens": 4, "pooling": "mean"},
                **{"initializer_range": 0.02, "layerscale_value": 0.0, "num_train_epochs": 90, "max_grad_norm": 1.0},
                **{"per_device_train_batch_size": 1024, "learning_rate": 1e-3, "weight_decay": 0.1},
                **{"warmup_steps": 10_000, "rand_augment": True, "mixup_alpha": 0.2},
                **{"random_resized_crop": True, "horizontal_flip": True},
                **{"label_smoothing_factor": 0.0, "eval_crop_ratio": 0.875},
            },
            name="vit_small_90ep",
            source="google-research/big_vision, config vit_s16_i1k (arXiv 2205.01580)",
            script="train_image_classification.py",
            data="ImageNet-1k",
            command="accelerate launch examples/train_image_classification.py --recipe vit_small_90ep "
            "--dataset_name ...",
            cost="6 to 7 hours on a TPU v3-8, total batch 1024, 90 epochs",
            expected="top-1 76.5 % on ImageNet-1k (source)",
            departures="four registers; learned positions for sine and cosine; torchvision's RandAugment (2 operations "
            "of magnitude 9) for (2, 10); a weight decay of 1e-4 that the rate does not multiply is 0.1 times 1e-3",
        ),
        _recipe(
            {
                **{"tuning": "full", "layer_decay": 0.65, "learning_rate": 5e-5, "weight_decay": 0.05},
                **{"warmup_ratio": 0.1, "num_train_epochs": 30, "drop_path_rate": 0.1, "max_grad_norm": 1.0},
                **{"per_device_train_batch_size": 64, "label_smoothing_factor": 0.1, "rand_augment": True},
                **{"random_resized_crop": True, "horizontal_flip": True, "pooling": "cls_mean"},
            },
            name="finetune_dinov2",
            source="none: a low learning rate that falls with depth is how self-supervised models are usually tuned, "
            "but these values are of no table",
            script="train_image_classification.py",
            data="a few thousand images of your own and more",
            command="accelerate launch examples/train_image_classification.py --recipe finetune_dinov2 "
            "--init_from MODEL --train_dir photos",
            cost="minutes to hours on one GPU",
            expected="nothing is published for it; compare with --tuning linear",
            departures="it has no source",
        ),
        _recipe(
            {
                **{"task": "linear", "per_device_train_batch_size": 128, "num_steps": 12_500},
                **{"random_resized_crop": True, "horizontal_flip": True},
            },
            name="linear_probe_dinov2",
            source="DINOv2 (arXiv 2304.07193), dinov2/eval/linear.py: 52 heads at once",
            script="evaluate_features.py",
            data="ImageNet-1k",
            command="accelerate launch examples/evaluate_features.py --recipe linear_probe_dinov2 --model MODEL "
            "--dataset_name ...",
            cost="12,500 steps of 1,024 images on 8 GPUs, one backbone pass for all heads",
            expected="top-1 86.7 % with DINOv2-L and four registers, 80.9 % with S (facebookresearch/dinov2, README)",
        ),
        _recipe(
            {"task": "knn", "neighbours": [10, 20, 100, 200], "temperature": 0.07},
            name="knn_dinov2",
            source="DINOv2 (arXiv 2304.07193), dinov2/eval/knn.py",
            script="evaluate_features.py",
            data="ImageNet-1k",
            command="python examples/evaluate_features.py --recipe knn_dinov2 --model MODEL --dataset_name ...",
            cost="one pass over the training images",
            expected="top-1 83.8 % (20 neighbours) with DINOv2-L and four registers, 79.1 % with S (the same README)",
        ),
        _recipe(
            {
                **{**_LARGE, "image_size": 224, "patch_size": 16, "num_register_tokens": 4, "initializer_range": 0.02},
                **{"layerscale_value": 1e-5, "drop_path_rate": 0.3, "drop_path_schedule": "uniform"},
                **{"num_local_crops": 8, "local_crop_size": 96, "horizontal_flip": True, "color_augmentation": True},
                **{"global_crops_scale": [0.32, 1.0], "local_crops_scale": [0.05, 0.32]},
                **{"mask_share": 0.5, "mask_ratio": [0.1, 0.5], "dino_weight": 1.0, "ibot_weight": 1.0},
                **{"koleo_weight": 0.1, "targets": "centring", "patch_head": "shared", "num_prototypes": 65_536},
                **{"head_hidden_size": 2048, "head_bottleneck_size": 256, "student_temperature": 0.1},
                **{"warmup_teacher_temperature": 0.04, "teacher_temperature": 0.07, "warmup_teacher_ratio": 0.3},
                **{"teacher_momentum": 0.992, "max_steps": 125_000, "steps_per_epoch": 1250, "warmup_ratio": 0.1},
                **{"per_device_train_batch_size": 64, "learning_rate": 5.66e-3, "min_learning_rate": 1e-6},
                **{"weight_decay": 0.04, "weight_decay_end": 0.4, "decay_tokens": True, "max_grad_norm": 3.0},
                **{"layer_decay": 0.9, "patch_embedding_factor": 0.2, "freeze_last_layer_ratio": 0.01},
            },
            name="dinov2_short",
            source=f"DINOv2 (arXiv 2304.07193), {_DINOV2_CONFIG}",
            script="pretrain_dino.py",
            data="ImageNet-1k without its labels",
            command="accelerate launch examples/pretrain_dino.py --recipe dinov2_short --dataset_name ...",
            cost="1 day on 32 A100 with 80 GB, total batch 2048, 125,000 steps",
            expected="ImageNet-1k: 81.6 % k-NN, 82.9 % linear (README of facebookresearch/dinov2)",
            departures="four registers",
        ),
    )
}


def recipe(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        ValueError: listing all names, if there is none of this one.
    """
    if name in RECIPES:
        return RECIPES[name]
    close = difflib.get_close_matches(name, RECIPES, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(f"Expected a recipe out of {', '.join(RECIPES)}, got {name!r}{hint}")


def parse_settings(kind: type[Settings], argv: Sequence[str] | None, script: Script | None = None) -> Settings:
    """Settings from a command line: what it says, else what the recipe says that it names, else the defaults.

    Args:
        kind: dataclass of the settings.
        argv: the command line without the name of the program; None: that of this program.
        script: refuse recipes for other scripts.

    Raises:
        ValueError: if there is no such recipe, or it is for another script, or the settings make no sense.
    """
    parser = HfArgumentParser(DataClassType(kind))
    words = sys.argv[1:] if argv is None else list(argv)
    chosen, _ = HfArgumentParser(DataClassType(_OfRecipe), add_help=False, allow_abbrev=False).parse_known_args(words)
    if chosen.recipe is not None:
        found = recipe(chosen.recipe)
        if script is not None and found.script != script:
            raise ValueError(f"Expected a recipe for {script}, got {found.name}, which is for {found.script}")
        parser.set_defaults(**found.settings)
    (settings,) = parser.parse_args_into_dataclasses(words)
    return settings


@dataclass
class _OfRecipe:
    recipe: str | None = None
