# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What a config refuses: values out of range, unknown choices, sizes and combinations that cannot be built."""

import re
import reprlib
import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers.activations import ACT2FN

POOLINGS = ("cls", "mean", "cls_mean", "cls_register_mean")
DROP_PATH_SCHEDULES = ("linear", "uniform")
DROP_PATH_KINDS = ("mask", "subset")
INTERPOLATION_MODES = ("bicubic", "bilinear")
POSITION_EMBEDDING_TYPES = ("learned", "rotary")
ROPE_COORDINATES = ("centered", "grid")
COORDINATE_AUGMENTATIONS = {"pos_embed_shift": 0, "pos_embed_jitter": 1, "pos_embed_rescale": 1}  # and their least

# Far above every published model (the largest, ViT-22B, has 48 layers, a width of 6144 and 22 billion parameters), and
# low enough that a config by itself costs seconds and megabytes. What weights may cost, `checkpoint_checks` says.
MOST = {
    "hidden_size": 2**16,
    "num_hidden_layers": 1024,
    "num_attention_heads": 4096,
    "intermediate_size": 2**20,
    "head_dim": 2**16,
    "num_channels": 4096,
    "num_register_tokens": 4096,
    "num_test_time_registers": 4096,
    "num_classifier_layers": 1024,
}
MOST_PIXELS_PER_SIDE = 2**16
MOST_POSITIONS = 2**20  # patches in the position table
MOST_LABELS = 1_000_000
MOST_PARAMETERS = 100_000_000_000
# Of a saved config; a million labels stand in it twice, as `id2label` and `label2id`.
MOST_BYTES = 2**27
MOST_ENTRIES = 100_000  # besides those of the labels
MOST_CHARACTERS = 10_000  # of one text
MOST_NESTING = 32

LABEL_MAPS = ("id2label", "label2id")
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


def check_values(config: Any) -> None:
    """Refuse values and combinations of a `ViTRegConfig` that cannot be built.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """
    _check_ranges(config)
    _check_choices(config)
    _check_sizes(config)
    _check_combinations(config)
    count = count_parameters(config)
    if count > MOST_PARAMETERS:
        raise ValueError(f"Expected a model of at most {MOST_PARAMETERS:,} parameters, got a config of {count:,}")


def check_counts(config: Any) -> None:
    """Refuse counts out of range; must come first, as what follows from an absurd count would take for ever.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """
    for name, most in MOST.items():
        count = getattr(config, name)
        if count is None:  # left out, so that it follows from the width
            continue
        least = 0 if name in ("num_register_tokens", "num_test_time_registers") else 1
        _expect(count >= least, name, "a positive integer" if least else "zero or more", count)
        _expect(count <= most, name, f"at most {most}", count)


def check_labels(config: Any, num_labels: Any = None) -> None:
    """Refuse counts of labels before Transformers makes their names; raises ValueError.

    Args:
        config: a config whose `id2label` and `label2id` are as they came.
        num_labels: the count that names are to be made for, if it was given.
    """
    valid = num_labels is None or (_is_whole(num_labels) and 0 <= num_labels <= MOST_LABELS)
    _expect(valid, "num_labels", f"an integer from 0 to {MOST_LABELS}", num_labels)
    for name in LABEL_MAPS:
        _check_label_map(name, getattr(config, name))


def _check_label_map(name: str, labels: Any) -> None:
    if labels is None:
        return
    _expect(isinstance(labels, dict), name, "a dictionary", labels)
    _expect(len(labels) <= MOST_LABELS, name, f"at most {MOST_LABELS} entries", len(labels))
    for key, value in labels.items():
        _expect(isinstance(key, (str, int)), name, "a dictionary of texts and integers", key)
        _expect(isinstance(value, (str, int)), name, "a dictionary of texts and integers", value)
        if name == "id2label" and isinstance(key, str):
            _expect(bool(_INTEGER.fullmatch(key)), name, "a dictionary whose keys are integers", key)


def check_dtype(name: str, dtype: Any) -> None:
    """Refuse a `dtype` that is not None, a floating point type of torch, or the name of one; raises ValueError."""
    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    valid = dtype is None or (isinstance(known, torch.dtype) and known.is_floating_point)
    _expect(valid, name, "None or a floating point type of torch, float32 for instance", dtype)


def check_switch(name: str, value: Any) -> None:
    """Refuse what is neither None, True nor False; raises ValueError."""
    _expect(value is None or isinstance(value, bool), name, "None, True or False", value)


def check_stages(config: Any, out_features: Any, out_indices: Any) -> None:
    """Refuse names or indices of stages that are no list of at most all stages; raises ValueError."""
    last = config.num_hidden_layers
    for name, asked in (("out_features", out_features), ("out_indices", out_indices)):
        listed = asked is None or (isinstance(asked, (list, tuple)) and len(asked) <= last + 1)
        _expect(listed, name, f"None or a list of at most {last + 1} stages", asked)
    for index in out_indices or ():
        inside = _is_whole(index) and -last - 1 <= index <= last
        _expect(inside, "out_indices", f"integers from {-last - 1} to {last}", index)


def check_saved(saved: Any) -> None:
    """Refuse what no config file holds: too much, too deep, or the choice of code that would be fetched and run.

    Raises:
        ValueError: with what was expected and what came.
    """
    if not isinstance(saved, dict):
        raise ValueError(f"Expected a saved config that is a dictionary, got {type(saved).__name__}")
    for name, value in saved.items():
        if "attn_implementation" in name:
            # Transformers fetches others from the Hub, also flash_attention_2 where it is not installed.
            local = value in (None, "eager", "sdpa", "flex_attention")
            _expect(local, name, "eager, sdpa or flex_attention, as a file may not choose code of the Hub", value)
    for name in LABEL_MAPS:
        _check_label_map(name, saved.get(name))
    labels = sum(2 * len(saved.get(name) or ()) for name in LABEL_MAPS)
    _check_extent(saved, MOST_ENTRIES + labels)


def _check_extent(saved: dict[str, Any], most_entries: int) -> None:
    """Walk a saved config level by level, as calls of itself would end in a RecursionError."""
    entries, level = 0, [saved]
    for _ in range(MOST_NESTING):
        level = [item for value in level for item in _content(value)]
        entries += len(level)
        if entries > most_entries:
            raise ValueError(f"Expected a saved config of at most {most_entries} entries, got {entries} or more")
        for text in level:
            if isinstance(text, str) and len(text) > MOST_CHARACTERS:
                got = f"got {len(text)}: {_shown(text)}"
                raise ValueError(f"Expected texts of at most {MOST_CHARACTERS} characters in a saved config, {got}")
    if level:
        raise ValueError(f"Expected a saved config nested at most {MOST_NESTING} deep, got a deeper one")


def _content(value: Any) -> Sequence[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, (list, tuple)) else ()


def count_parameters(config: Any) -> int:
    """Number of parameters of the model that a config describes, with a linear classifier if labels are known."""
    width, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.attention_head_dim
    projection_biases = [config.query_bias, config.key_bias, config.value_bias]
    biases = sum(config.qkv_bias if bias is None else bias for bias in projection_biases)
    attention = 4 * width * heads + biases * heads + config.proj_bias * width
    up = 2 if config.use_swiglu_ffn else 1
    mlp = (up + 1) * width * inner + config.mlp_bias * (up * inner + width)
    scales = 0 if config.layerscale_value is None else 2 * width
    patch_height, patch_width = config.patch_height_width
    tokens = config.num_cls_tokens + config.num_register_tokens + config.use_mask_token + config.num_positions
    patches = config.num_channels * patch_height * patch_width + config.patch_bias
    norms = 2 * (config.final_norm + config.embedding_norm + config.separate_cls_norm)
    classifier = (config.classifier_input_size + 1) * (config.num_labels or 0)
    head_norms = 4 * config.attention_head_dim if config.qk_norm else 0
    attention += 2 * heads * config.attention_bias_kv
    layers = config.num_hidden_layers * (attention + mlp + scales + 4 * width + head_norms)
    return layers + (tokens + patches + norms) * width + classifier


def _check_ranges(config: Any) -> None:
    check_counts(config)
    check_labels(config)
    probabilities = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "patch_dropout_rate")
    for name in probabilities:
        _expect(0 <= getattr(config, name) < 1, name, "a probability in [0, 1)", getattr(config, name))
    for name in ("initializer_range", "token_initializer_range", "layer_norm_eps", "rope_theta"):
        positive = 0 < getattr(config, name) <= sys.float_info.max
        _expect(positive, name, "a positive finite number", getattr(config, name))
    if config.layerscale_value is not None:
        finite = abs(config.layerscale_value) <= sys.float_info.max  # an integer may be too large for a float
        _expect(finite, "layerscale_value", "None or a finite number", config.layerscale_value)
    offset = config.position_interpolation_offset
    _expect(0 <= offset <= sys.float_info.max, "position_interpolation_offset", "zero or more", offset)
    for name, least in COORDINATE_AUGMENTATIONS.items():
        extent = getattr(config, name)
        right = extent is None or least <= extent <= sys.float_info.max
        _expect(right, name, f"None or a finite number of at least {least}", extent)


def _check_choices(config: Any) -> None:
    choices = {
        "pooling": POOLINGS,
        "drop_path_schedule": DROP_PATH_SCHEDULES,
        "drop_path_kind": DROP_PATH_KINDS,
        "position_interpolation_mode": INTERPOLATION_MODES,
        "test_time_register_init": ("zero", "mean", "random"),
        "test_time_register_cls": ("zero", "keep"),
        "register_neuron_reduction": ("max", "largest", "layer"),
        "position_embedding_type": POSITION_EMBEDDING_TYPES,
        "rope_coordinates": ROPE_COORDINATES,
    }
    for name, allowed in choices.items():
        _expect(getattr(config, name) in allowed, name, f"one of {', '.join(allowed)}", getattr(config, name))
    _expect(config.hidden_act in ACT2FN, "hidden_act", f"one of {', '.join(sorted(ACT2FN))}", config.hidden_act)


def _check_sizes(config: Any) -> None:
    for name in ("image_size", "patch_size"):
        size = pair(getattr(config, name))
        valid = len(size) == 2 and all(side > 0 for side in size)
        _expect(valid, name, "a positive integer or a pair (height, width)", getattr(config, name))
        small = max(size) <= MOST_PIXELS_PER_SIDE
        _expect(small, name, f"at most {MOST_PIXELS_PER_SIDE} on each side", getattr(config, name))
    for side, patch in zip(pair(config.image_size), config.patch_height_width, strict=True):
        multiple = f"a multiple of patch_size ({config.patch_size})"
        _expect(side % patch == 0, "image_size", multiple, config.image_size)
    rows, columns = config.position_grid
    _expect(rows * columns <= MOST_POSITIONS, "image_size", f"at most {MOST_POSITIONS} patches", rows * columns)


def _check_combinations(config: Any) -> None:
    if config.head_dim is None and config.hidden_size % cast(int, config.num_attention_heads):
        heads = f"a divisor of hidden_size ({config.hidden_size}), or a head_dim of your own"
        _expect(False, "num_attention_heads", heads, config.num_attention_heads)
    if not config.use_cls_token and config.pooling != "mean":
        _expect(False, "pooling", "mean, as use_cls_token=False leaves no CLS token to read", config.pooling)
    if config.pooling == "cls_register_mean" and config.num_register_tokens == 0:
        _expect(False, "num_register_tokens", "at least 1 for pooling='cls_register_mean'", 0)
    _check_positions(config)
    _check_final_norms(config)
    _check_register_neurons(config)
    asked = config.output_prefix_attentions
    if not isinstance(asked, bool):
        short = isinstance(asked, int) or len(asked) <= config.num_hidden_layers
        _expect(short, "output_prefix_attentions", f"at most {config.num_hidden_layers} layers", asked)
        for layer in [asked] if isinstance(asked, int) else asked:
            inside = -config.num_hidden_layers <= layer < config.num_hidden_layers
            _expect(inside, "output_prefix_attentions", f"layers of {config.num_hidden_layers}", layer)


def _check_positions(config: Any) -> None:
    if config.position_embedding_type == "rotary":
        quarters = "a multiple of 4 for rotary positions: sine and cosine of two axes (set head_dim or the heads)"
        _expect(config.attention_head_dim % 4 == 0, "channels per head", quarters, config.attention_head_dim)
        return
    for name in COORDINATE_AUGMENTATIONS:
        _expect(getattr(config, name) is None, name, "None without rotary positions", getattr(config, name))


def _check_final_norms(config: Any) -> None:
    layers, most = config.num_classifier_layers, config.num_hidden_layers
    _expect(layers <= most, "num_classifier_layers", f"at most num_hidden_layers ({most})", layers)
    if layers > 1:
        _expect(config.pooling == "cls_mean", "pooling", "cls_mean for num_classifier_layers > 1", config.pooling)
    for name in ("pooled_norm", "separate_cls_norm"):
        _expect(config.final_norm or not getattr(config, name), name, "False for final_norm=False", True)
    if config.separate_cls_norm:
        count = config.num_prefix_tokens
        _expect(count > 0, "CLS and registers", "at least one token for separate_cls_norm=True", count)
    if config.pooled_norm:
        pooled = "cls or mean for pooled_norm=True, which norms one pooled vector"
        _expect(config.pooling in ("cls", "mean"), "pooling", pooled, config.pooling)
        separate = config.separate_cls_norm
        _expect(not separate, "separate_cls_norm", "False for pooled_norm=True, which norms no token", separate)


def _check_register_neurons(config: Any) -> None:
    neurons = config.register_neurons or []
    layers, inner = config.num_hidden_layers, config.intermediate_size
    for pair_ in neurons:
        whole = len(pair_) == 2 and all(map(_is_whole, pair_))
        inside = whole and 0 <= pair_[0] < layers and 0 <= pair_[1] < inner
        _expect(inside, "register_neurons", f"pairs of a layer below {layers} and a neuron below {inner}", pair_)
    _expect(len({tuple(one) for one in neurons}) == len(neurons), "register_neurons", "without repetition", neurons)
    count, most = config.num_test_time_registers, len(neurons)
    _expect(count <= most, "num_test_time_registers", f"at most one per entry of register_neurons ({most})", count)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _expect(condition: bool, name: str, expected: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"Expected {name} to be {expected}, got {_shown(got)}")


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 100
_short.maxlong = 60


def _shown(value: Any) -> str:
    """A value as code, cut where it is long: messages stay readable, whatever a file holds."""
    if isinstance(value, int) and value.bit_length() > 10_000:  # Python itself refuses to write it out
        return f"an integer of {value.bit_length()} bits"
    return _short.repr(value)


def pair(size: int | list[int] | tuple[int, ...]) -> tuple[int, ...]:
    """Height and width of a size that is given as one number or as both."""
    return (size, size) if isinstance(size, int) else tuple(size)
