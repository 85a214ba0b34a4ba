# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What a config refuses: values out of range, unknown choices, sizes and combinations that cannot be built."""

import math
from typing import Any, cast

from transformers.activations import ACT2FN

POOLINGS = ("cls", "mean", "cls_mean", "cls_register_mean")
DROP_PATH_SCHEDULES = ("linear", "uniform")
INTERPOLATION_MODES = ("bicubic", "bilinear")

# Room kept for checkpoints of other sources: field -> (the one value that is built so far, who has another one).
_RESERVED: dict[str, tuple[Any, str]] = {
    "position_embedding_type": ("learned", "rotary positions are what DINOv3 has"),
    "cls_position_embedding": (True, "a CLS token without a position is what DeiT-III has"),
    "register_position_embeddings": (False, "registers with positions are what Virchow2 and timm's so150m have"),
    "embedding_norm": (False, "a norm before the first block is what CLIP has"),
    "pooled_norm": (False, "a norm on pooled features is what timm's average-pooled models have"),
    "separate_cls_norm": (False, "a final norm of its own for CLS is what some DINOv3 models have"),
    "qk_norm": (False, "normalised queries and keys are what some timm models have"),
    "num_test_time_registers": (0, "registers added after training are a later step of this package"),
    "register_neurons": (None, "registers added after training are a later step of this package"),
}


def check_values(config: Any) -> None:
    """Refuse values and combinations of a `ViTRegConfig` that cannot be built.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """
    _check_ranges(config)
    _check_choices(config)
    _check_sizes(config)
    _check_combinations(config)
    for name, (built, reason) in _RESERVED.items():
        if getattr(config, name) != built:
            raise ValueError(f"Expected {name}={built!r}, got {getattr(config, name)!r}: {reason}; not built yet")


def _check_ranges(config: Any) -> None:
    counts = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels"]
    for name in counts + (["head_dim"] if config.head_dim is not None else []):
        _expect(getattr(config, name) > 0, name, "a positive integer", getattr(config, name))
    _expect(config.num_register_tokens >= 0, "num_register_tokens", "zero or more", config.num_register_tokens)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
        _expect(0 <= getattr(config, name) < 1, name, "a probability in [0, 1)", getattr(config, name))
    for name in ("initializer_range", "token_initializer_range", "layer_norm_eps"):
        positive = 0 < getattr(config, name) < math.inf
        _expect(positive, name, "a positive finite number", getattr(config, name))
    if config.layerscale_value is not None:
        finite = math.isfinite(config.layerscale_value)
        _expect(finite, "layerscale_value", "None or a finite number", config.layerscale_value)
    offset = config.position_interpolation_offset
    _expect(0 <= offset < math.inf, "position_interpolation_offset", "zero or more", offset)


def _check_choices(config: Any) -> None:
    choices = {
        "pooling": POOLINGS,
        "drop_path_schedule": DROP_PATH_SCHEDULES,
        "position_interpolation_mode": INTERPOLATION_MODES,
    }
    for name, allowed in choices.items():
        _expect(getattr(config, name) in allowed, name, f"one of {', '.join(allowed)}", getattr(config, name))
    _expect(config.hidden_act in ACT2FN, "hidden_act", f"one of {', '.join(sorted(ACT2FN))}", config.hidden_act)


def _check_sizes(config: Any) -> None:
    for name in ("image_size", "patch_size"):
        size = pair(getattr(config, name))
        valid = len(size) == 2 and all(side > 0 for side in size)
        _expect(valid, name, "a positive integer or a pair (height, width)", getattr(config, name))
    for side, patch in zip(pair(config.image_size), config.patch_height_width, strict=True):
        multiple = f"a multiple of patch_size ({config.patch_size})"
        _expect(side % patch == 0, "image_size", multiple, config.image_size)


def _check_combinations(config: Any) -> None:
    if config.head_dim is None and config.hidden_size % cast(int, config.num_attention_heads):
        heads = f"a divisor of hidden_size ({config.hidden_size}), or a head_dim of your own"
        _expect(False, "num_attention_heads", heads, config.num_attention_heads)
    if not config.use_cls_token and config.pooling != "mean":
        _expect(False, "pooling", "mean, as use_cls_token=False leaves no CLS token to read", config.pooling)
    if config.pooling == "cls_register_mean" and config.num_register_tokens == 0:
        _expect(False, "num_register_tokens", "at least 1 for pooling='cls_register_mean'", 0)
    asked = config.output_prefix_attentions
    if not isinstance(asked, bool):
        for layer in [asked] if isinstance(asked, int) else asked:
            inside = -config.num_hidden_layers <= layer < config.num_hidden_layers
            _expect(inside, "output_prefix_attentions", f"layers of {config.num_hidden_layers}", layer)


def _expect(condition: bool, name: str, expected: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"Expected {name} to be {expected}, got {got!r}")


def pair(size: int | list[int] | tuple[int, ...]) -> tuple[int, ...]:
    """Height and width of a size that is given as one number or as both."""
    return (size, size) if isinstance(size, int) else tuple(size)
