# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Options of image processors: of Transformers, of timm, and what reference implementations evaluate with."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    PILImageResampling,
)

from vitreg_hf.model.configuration_vitreg import ViTRegConfig
from vitreg_hf.model.image_processing_pil_vitreg import ViTRegImageProcessorPil

# SAT-493M of DINOv3, satellite images
SATELLITE_STATISTICS = {"image_mean": [0.430, 0.411, 0.296], "image_std": [0.213, 0.156, 0.143]}
_FILTERS = {
    "nearest": PILImageResampling.NEAREST,
    "bilinear": PILImageResampling.BILINEAR,
    "bicubic": PILImageResampling.BICUBIC,
    "lanczos": PILImageResampling.LANCZOS,
    "random": PILImageResampling.BICUBIC,  # of trainings; timm evaluates these with bicubic
}
# Options of Transformers' processors that change no pixel, or that follow from others here.
_WITHOUT_EFFECT = {
    *("image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "return_tensors"),
    *("data_format", "input_data_format", "device", "disable_grouping", "default_to_square", "backend"),
    *("image_seq_length", "crop_pct", "_valid_processor_keys"),
}


def evaluation(resize: int, crop: int, patch_size: int | Sequence[int], **statistics: list[float]) -> dict[str, Any]:
    """Resize the shortest edge by bicubic interpolation, crop the middle, normalise; ImageNet's statistics if none."""
    return {
        "size": {"shortest_edge": resize},
        "crop_size": {"height": crop, "width": crop},
        "resample": int(PILImageResampling.BICUBIC),
        "image_mean": list(IMAGENET_DEFAULT_MEAN),
        "image_std": list(IMAGENET_DEFAULT_STD),
        **statistics,
        **_divisor(patch_size),
    }


def squashed(side: int, patch_size: int | Sequence[int], **statistics: list[float]) -> dict[str, Any]:
    """Resize both edges to one length by bilinear interpolation, normalise; ImageNet's statistics if none."""
    return {
        "size": {"height": side, "width": side},
        "do_center_crop": False,
        "resample": int(PILImageResampling.BILINEAR),
        "image_mean": list(IMAGENET_DEFAULT_MEAN),
        "image_std": list(IMAGENET_DEFAULT_STD),
        **statistics,
        **_divisor(patch_size),
    }


def from_transformers(saved: Mapping[str, Any], patch_size: int | Sequence[int]) -> tuple[dict[str, Any], list[str]]:
    """Options of a saved processor of Transformers.

    Returns:
        The options that `ViTRegImageProcessor` has, and a note for each other that is set and may change pixels.
    """
    known = set(ViTRegImageProcessorPil.valid_kwargs.__annotations__)
    options = {name: value for name, value in saved.items() if name in known and name not in _WITHOUT_EFFECT}
    options = {name: value for name, value in options.items() if value is not None}
    others = sorted(name for name, value in saved.items() if name not in known | _WITHOUT_EFFECT and value)
    notes = [f"the image processor's option {name}={saved[name]!r} is not known here and left out" for name in others]
    return {**options, **_divisor(patch_size)}, notes


def of_family(model_type: str, config: ViTRegConfig) -> tuple[dict[str, Any], str]:
    """Options that models of a family of Transformers are usually published with, and a sentence that says so.

    DINOv2 is evaluated at 224 pixels whatever its table of positions is for; the others at the size of the config.
    """
    side = max(config.image_size) if isinstance(config.image_size, Sequence) else config.image_size
    halves = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    of_clip = {"image_mean": list(OPENAI_CLIP_MEAN), "image_std": list(OPENAI_CLIP_STD)}
    usual = {
        "vit": squashed(side, config.patch_size, **halves),
        "clip_vision_model": evaluation(side, side, config.patch_size, **of_clip),
        "dinov3_vit": squashed(side, config.patch_size),
    }
    options = usual.get(model_type) or evaluation(256, 224, config.patch_size)
    sizes = " ".join(str(number) for number in options["size"].values())
    mean = ", ".join(f"{value:.3g}" for value in options["image_mean"])
    return options, f"that of most models of this family is taken, resizing to {sizes} pixels, mean {mean}"


def from_timm(settings: Mapping[str, Any], patch_size: int | Sequence[int]) -> tuple[dict[str, Any], list[str]]:
    """Options that follow from `pretrained_cfg` of timm, as its evaluation transform reads it."""
    height, width = settings.get("input_size", (3, 224, 224))[-2:]
    share, mode = settings.get("crop_pct") or 1.0, settings.get("crop_mode") or "center"
    notes = []
    if mode == "border":
        notes.append("the source pads images to a square here; the image processor crops the middle")
    rows, columns = math.floor(height / share), math.floor(width / share)
    return {
        "size": {"height": rows, "width": columns} if mode == "squash" else {"shortest_edge": max(rows, columns)},
        "crop_size": {"height": height, "width": width},
        "do_center_crop": True,
        "resample": int(_FILTERS.get(settings.get("interpolation") or "bicubic", PILImageResampling.BICUBIC)),
        "image_mean": list(settings.get("mean") or IMAGENET_DEFAULT_MEAN),
        "image_std": list(settings.get("std") or IMAGENET_DEFAULT_STD),
        **_divisor(patch_size),
    }, notes


def open_clip_settings(saved: Mapping[str, Any], side: int | Sequence[int]) -> dict[str, Any]:
    """What `open_clip_config.json` says of images, in the words of timm, which `from_timm` reads.

    Args:
        saved: its content.
        side: of images, where it does not say it.
    """
    shown = saved.get("preprocess_cfg") or {}
    wanted = shown.get("size") or (saved.get("model_cfg") or {}).get("vision_cfg", {}).get("image_size") or side
    height, width = (wanted, wanted) if isinstance(wanted, int) else wanted
    modes = {"squash": "squash", "longest": "border"}
    return {
        "input_size": (3, height, width),
        "crop_pct": 1.0,
        "crop_mode": modes.get(shown.get("resize_mode") or "shortest", "center"),
        "interpolation": shown.get("interpolation") or "bicubic",
        "mean": shown.get("mean") or OPENAI_CLIP_MEAN,
        "std": shown.get("std") or OPENAI_CLIP_STD,
    }


def _divisor(patch_size: int | Sequence[int]) -> dict[str, int]:
    """What padding has to be a multiple of."""
    return {"size_divisor": patch_size if isinstance(patch_size, int) else math.lcm(*patch_size)}
