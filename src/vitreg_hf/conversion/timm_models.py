# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Models of timm without memory for their weights, and their arguments: what a file states, then what shapes tell."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vitreg_hf.conversion.stored import Source

OLD_SCALE = "blocks.0.gamma_1"  # LayerScale in DeiT-III's own files, and in models of the class Eva
CHANNELS_PER_HEAD = 64  # of every published ViT but a few
# What the arguments of the three classes are called
_REGISTERS = {"VisionTransformer": "reg_tokens", "Eva": "num_reg_tokens", "NaFlexVit": "reg_tokens"}


def empty_timm_model(architecture: str, arguments: Mapping[str, Any]) -> Any:
    """A model of timm without memory for its weights.

    Args:
        architecture: its name in timm; what follows a dot, the name of the weights, does not matter.
        arguments: of `timm.create_model`; classes of layers by name.

    Raises:
        ValueError: if timm has no such architecture, or cannot build it so.
        ModuleNotFoundError: without timm.
    """
    import timm

    name = architecture.rsplit("/", 1)[-1]
    if not timm.is_model(name):
        raise ValueError(f"Expected an architecture of timm {timm.__version__}, got {architecture!r}")
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, **_resolved(arguments)).eval()
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        raise ValueError(f"Expected arguments of {architecture}, got {dict(arguments)}: {error}") from error


def _resolved(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with classes in place of their names."""
    from timm import layers

    classes = {"mlp_layer", "norm_layer", "embed_layer"}
    named = {name: value for name, value in arguments.items() if name in classes and isinstance(value, str)}
    if unknown := [value for value in named.values() if not hasattr(layers, value)]:
        raise ValueError(f"Expected layers of timm, got {unknown[0]!r}")
    return {**arguments, **{name: getattr(layers, value) for name, value in named.items()}}


def fitting_model(
    architecture: str, arguments: Mapping[str, Any], source: Source, heads: int | None = None
) -> tuple[Any, dict[str, Any]]:
    """The model that weights are of, and its arguments: those that the source states, then those that shapes tell.

    Args:
        architecture: its name in timm.
        arguments: what the source states.
        source: the weights.
        heads: attention heads, in place of what the source states or the width suggests.

    Raises:
        ValueError: if no arguments give the shapes of the weights, with what differs.
    """
    chosen = dict(arguments)
    _check_depth(chosen, source)
    model = empty_timm_model(architecture, chosen)
    shapes = _shapes(model, source)
    if _differences(model, shapes):
        told = _told_by_shapes(model, shapes)
        if "num_heads" in arguments:
            told.pop("num_heads", None)
        chosen |= told
    if heads is not None:
        chosen["num_heads"] = heads
    if chosen != dict(arguments):
        _check_depth(chosen, source)
        model = empty_timm_model(architecture, chosen)
    if differing := _differences(model, shapes):
        raise ValueError(f"Expected weights of timm's {architecture}, got others: {'; '.join(differing[:4])}")
    return model, chosen


def _check_depth(arguments: Mapping[str, Any], source: Source) -> None:
    """Refuse more blocks than there are tensors, before a model of so many is built."""
    depth, tensors = arguments.get("depth", 1), len(source.tensors)
    if isinstance(depth, int) and depth > tensors:
        raise ValueError(f"Expected weights of {depth} blocks in {source.name}, got {tensors} tensors")


def _shapes(model: nn.Module, source: Source) -> dict[str, tuple[int, ...]]:
    """Shapes of weights by the names of the model."""
    renamed = OLD_SCALE in source.tensors and OLD_SCALE not in model.state_dict()
    return {
        re.sub(r"\.gamma_(\d)$", r".ls\1.gamma", name) if renamed else name: tensor.shape
        for name, tensor in source.tensors.items()
    }


def _differences(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [f"no {name}" for name in own if name not in shapes]
    others = [f"{name} {shapes[name]}, not {shape}" for name, shape in own.items() if shapes.get(name, shape) != shape]
    unknown = [f"also {name}" for name in shapes if name not in own and name != "mask_token"]
    return [*others, *missing, *unknown]


def _told_by_shapes(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Arguments that follow from shapes: what people give to `create_model` by hand is in no file."""
    kind = type(model).__name__
    if kind not in ("VisionTransformer", "Eva") or "patch_embed.proj.weight" not in shapes:
        return {"num_classes": shapes.get("head.weight", (0,))[0]}
    width, channels, patch, _ = shapes["patch_embed.proj.weight"]
    told: dict[str, Any] = {"num_classes": shapes.get("head.weight", (0,))[0]}
    if channels != model.in_chans:
        told["in_chans"] = channels
    if width != model.embed_dim:  # the number of heads of an architecture is one for its own width
        told |= {"embed_dim": width, "num_heads": max(width // CHANNELS_PER_HEAD, 1)}
    depth = 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")), default=0)
    if depth != len(model.blocks):
        told["depth"] = depth
    registers = shapes.get("reg_token", (1, 0))[1]
    has_cls = "cls_token" in shapes
    if registers != model.num_prefix_tokens - has_cls:
        told[_REGISTERS[kind]] = registers
    if patch != model.patch_embed.patch_size[0]:
        told["patch_size"] = patch
    return told | _positions_told(model, shapes, patch, registers + has_cls) | _mlp_told(shapes, width)


def _positions_told(model: Any, shapes: Mapping[str, tuple[int, ...]], patch: int, prefix: int) -> dict[str, Any]:
    if "pos_embed" not in shapes:
        return {}
    length = shapes["pos_embed"][1]
    for of_patches, is_bare in ((length - prefix, False), (length, True)):
        side = round(of_patches**0.5)
        if side * side == of_patches:
            return {"img_size": side * patch, "no_embed_class": is_bare}
    return {}


def _mlp_told(shapes: Mapping[str, tuple[int, ...]], width: int) -> dict[str, Any]:
    up, down = shapes.get("blocks.0.mlp.fc1.weight"), shapes.get("blocks.0.mlp.fc2.weight")
    if up is None or down is None:
        return {}
    told: dict[str, Any] = {"mlp_ratio": (up[0] + 0.5) / width}  # half a channel more, as timm rounds down
    if up[0] == 2 * down[1]:
        told |= {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
    if "blocks.0.ls1.gamma" in shapes:
        told["init_values"] = 1e-5
    return told
