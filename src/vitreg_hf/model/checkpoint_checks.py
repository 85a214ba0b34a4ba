# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint is refused for, before a model is allocated for it: files, sizes and types of its tensors."""

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

# What a file may leave to be initialized: new heads, new registers, and small models as a whole. 1 GiB in float32.
SPARE_PARAMETERS = 2**28
# Of the table of contents of a safetensors file; that of the deepest config has about two million.
MOST_HEADER_BYTES = 10_000_000


class StoredTensor(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    is_floating: bool


def check_checkpoint(
    model: PreTrainedModel,
    state_dict: dict[str, Tensor] | None,
    files: Sequence[str] | None,
    folder: str | os.PathLike | None,
    is_quantized: bool = False,
    ignore_mismatched_sizes: bool = False,
) -> None:
    """Refuse a checkpoint that does not fit a model whose parameters are not allocated yet.

    Args:
        model: the model to load, on the meta device.
        state_dict: tensors that are loaded instead of files.
        files: the files of weights, safetensors or such as `torch.save` writes.
        folder: what the model is loaded from; only if it is a folder, files have to be inside.
        is_quantized: several parameters are packed into one element, of any type and shape.
        ignore_mismatched_sizes: tensors of other shapes are left out rather than refused.

    Raises:
        ValueError: for files that are missing, unreadable, elsewhere or too small, and values of another type.
        RuntimeError: for another shape; Transformers' own class for this, with the name of the tensor.
    """
    if state_dict is not None:
        stored = {key: _described(tensor) for key, tensor in state_dict.items()}
    else:
        _check_places(files or (), folder)
        stored = {key: tensor for file in files or () for key, tensor in _stored_tensors(file).items()}
    expected = model.state_dict()
    if not is_quantized:
        _check_tensors(expected, model.base_model_prefix, stored, ignore_mismatched_sizes)
    held = sum(math.prod(tensor.shape) for tensor in stored.values())
    if files:  # a pickled tensor may repeat few values
        held = min(held, sum(os.path.getsize(file) for file in files))
    _check_extent(expected, held * (16 if is_quantized else 1))


def _check_places(files: Sequence[str], folder: str | os.PathLike | None) -> None:
    """An index names files; one that leads out of its folder would have others read."""
    if folder is None or not os.path.isdir(folder):
        return
    inside = os.path.abspath(folder)
    for file in files:
        if os.path.commonpath([inside, os.path.abspath(file)]) != inside:
            raise ValueError(f"Expected files of weights inside {inside}, got {os.path.abspath(file)}")


def _stored_tensors(file: str) -> dict[str, StoredTensor]:
    """What a file of weights holds, by key, without reading values."""
    if not os.path.isfile(file):
        raise ValueError(f"Expected the file of weights {file}, which an index names, got none")
    if file.endswith(".safetensors"):
        return _safetensors(file)
    try:
        tensors = torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:  # its own message advises weights_only=False, which runs whatever the file says
        raise ValueError(f"Expected a file of tensors alone, got {file}, which is damaged or holds code") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"Expected a dictionary of tensors in {file}, got {type(tensors).__name__}")
    return {key: _described(tensor) for key, tensor in tensors.items() if isinstance(tensor, Tensor)}


def check_header(file: str | os.PathLike[str]) -> None:
    """Refuse a safetensors file whose table of contents is too large to be one; raises ValueError."""
    with open(file, "rb") as start:
        header = int.from_bytes(start.read(8), "little")
    if MOST_HEADER_BYTES < header <= os.path.getsize(file):  # what lies beyond the file, the library describes better
        raise ValueError(f"Expected a header of at most {MOST_HEADER_BYTES} bytes, got {header} in {file}")


def _safetensors(file: str) -> dict[str, StoredTensor]:
    check_header(file)
    try:
        with safe_open(file, framework="pt") as opened:
            parts = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118  # it is no dictionary
            # floating point types are called F64, F32, F16, BF16, F8_E4M3 and so on
            return {
                key: StoredTensor(tuple(part.get_shape()), part.get_dtype().lstrip("B").startswith("F"))
                for key, part in parts.items()
            }
    except SafetensorError as error:
        raise ValueError(f"Expected a readable safetensors file, got {file}: {error}") from error


def _described(tensor: Tensor) -> StoredTensor:
    return StoredTensor(tuple(tensor.shape), tensor.is_floating_point())


def _check_tensors(
    expected: dict[str, Tensor], base_prefix: str, stored: dict[str, StoredTensor], ignore_mismatched_sizes: bool
) -> None:
    """Shapes, and types, which Transformers casts: labels or masks saved by mistake would become weights."""
    prefix = f"{base_prefix}."  # a backbone's file fits a model with a head, and the other way round
    own_tensors = {key.removeprefix(prefix): tensor for key, tensor in expected.items()}
    for key, tensor in stored.items():
        own = own_tensors.get(key.removeprefix(prefix))
        if own is None or own.numel() == 0:  # DeepSpeed leaves empty parameters where it has distributed them
            continue
        if own.is_floating_point() and not tensor.is_floating:
            raise ValueError(f"Expected floating point values for {key!r}, got integers, booleans or complex ones")
        if tuple(own.shape) != tensor.shape and not ignore_mismatched_sizes:
            hint = "with ignore_mismatched_sizes=True it is initialized anew"
            raise RuntimeError(f"Expected {key!r} of shape {tuple(own.shape)}, got {tensor.shape}; {hint}")


def _check_extent(expected: dict[str, Tensor], held: int) -> None:
    """What no file fills is allocated and initialized, so a small file must not ask for a giant."""
    needed, allowed = sum(tensor.numel() for tensor in expected.values()), 2 * held + SPARE_PARAMETERS
    if needed > allowed:
        raise ValueError(
            f"Expected a config of at most {allowed:,} parameters for weights of {held:,}, got one of {needed:,}"
        )
