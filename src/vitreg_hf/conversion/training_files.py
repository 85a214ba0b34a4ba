# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of trainings: what wraps the model is taken off, so that its names are those of a released file."""

import re
from collections.abc import Mapping

from vitreg_hf.conversion.reference_names import HEAD
from vitreg_hf.conversion.stored import Source, StoredTensor

# What wrappers put into names: DataParallel, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# The model inside a training, by what it is for; those that have the first of these somewhere in their names are left.
_PREFERRED = ("teacher", "model_ema", "ema", "target_encoder", "model", "state_dict", "backbone", "", "student")
_PROJECTION = "patch_embed.proj.weight"  # every model of these layouts has one
_CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.(.+)$")


def unwrapped(source: Source) -> Source:
    """The model of a training file under the names of a released one.

    Prefixes of wrappers and of the dictionaries around a model are taken off, the teacher is preferred to the student,
    and blocks that were chunked for FSDP are numbered through.

    Raises:
        ValueError: for parameters that FSDP flattened, and for several models of which none is preferred.
    """
    _refuse_flat(source.tensors)
    return _unchunked(_inside(_without_wrappers(source)))


def _refuse_flat(tensors: Mapping[str, StoredTensor]) -> None:
    if flat := next((key for key in tensors if "flat_param" in key), None):
        raise ValueError(
            f"Expected parameters by name, got {flat!r}: FSDP1 has flattened and split them, and what is where is "
            "known to the training alone. Save them there with StateDictType.FULL_STATE_DICT, or convert the "
            "teacher_checkpoint.pth that DINOv2 writes for evaluation"
        )


def _without_wrappers(source: Source) -> Source:
    pattern = re.compile(r"(?:^|(?<=\.))(?:" + "|".join(map(re.escape, _WRAPPERS)) + ")")
    names = {key: pattern.sub("", key) for key in source.tensors}
    if all(key == name for key, name in names.items()):
        return source
    tensors = {name: source.tensors[key] for key, name in names.items()}
    if len(tensors) < len(names):
        raise ValueError("Expected one model, got several whose names are the same without their wrappers")
    return source.changed(tensors, "names of wrappers (module., _fsdp_wrapped_module., ...) taken off")


def _inside(source: Source) -> Source:
    prefixes = [key.removesuffix(_PROJECTION) for key in source.tensors if key.endswith(_PROJECTION)]
    if not prefixes or prefixes == [""]:
        return source
    chosen = _preferred(prefixes)
    around = chosen.removesuffix("backbone.") if chosen.endswith("backbone.") else chosen
    tensors, left_out = {}, {}
    for key, tensor in source.tensors.items():
        if key.startswith(chosen):
            tensors[key.removeprefix(chosen)] = tensor
        elif key.startswith(around + HEAD):
            tensors[key.removeprefix(around)] = tensor
        else:
            left_out[key] = _reason(key)
    return source.changed(tensors, f"the model is what stands under {chosen!r}", left_out)


def _preferred(prefixes: list[str]) -> str:
    """The prefix of the model that is for evaluation; raises ValueError if there are several of the same standing."""
    left = {prefix: prefix.removesuffix(".").split(".") for prefix in prefixes}
    for name in _PREFERRED:
        left = {prefix: names for prefix, names in left.items() if name in names} or left
        if len(left) == 1:
            return next(iter(left))
    raise ValueError(f"Expected one model, got several, under {', '.join(repr(prefix) for prefix in left)}")


def _reason(key: str) -> str:
    for part, reason in (
        ("optimizer", "state of the optimizer"),
        ("student", "the student: its average, the teacher, is what is evaluated"),
        ("head", "a head of the self-supervised training"),
        ("loss", "state of a loss"),
    ):
        if part in key:
            return reason
    return "no part of the model"


def _unchunked(source: Source) -> Source:
    """Blocks `blocks.<chunk>.<number>.` as `blocks.<number>.`: DINOv2 pads chunks so that numbers go through."""
    names = {key: _CHUNKED.sub(r"blocks.\1.\2", key) for key in source.tensors}
    if all(key == name for key, name in names.items()):
        return source
    tensors = {name: source.tensors[key] for key, name in names.items()}
    if len(tensors) < len(names):
        raise ValueError("Expected blocks that are numbered through their chunks, got numbers that start anew")
    return source.changed(tensors, "chunks of blocks taken apart")
