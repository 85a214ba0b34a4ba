# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The files of weights in a folder: which they are, and whether they hold what the model needs, to their last byte."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from vitreg_hf.hub.json_files import read_object
from vitreg_hf.model.checkpoint_checks import check_header
from vitreg_hf.model.fingerprint import fingerprint

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_NAMED = 3  # tensors or files named in one message; a missing block has dozens
_ELEMENTS = 2**24  # looked at together, so that the check of a large tensor needs little memory


@dataclass(frozen=True)
class WeightFiles:
    """The files of weights of a model: one file, or an index and the files that it names."""

    files: tuple[Path, ...]
    index: Path | None = None

    @property
    def all(self) -> tuple[Path, ...]:
        """The files and the index, as they are published."""
        return self.files if self.index is None else (*self.files, self.index)


def find_weights(folder: Path) -> WeightFiles:
    """The files that `from_pretrained` would load, and no others lying about.

    Raises:
        ValueError: without weights, with two sets of them, with safetensors files that belong to neither, and for an
            index that is damaged or names files that are missing or elsewhere.
    """
    single, index = folder / WEIGHTS, folder / INDEX
    there = {path.name for path in folder.glob("*.safetensors") if path.is_file()}
    if single.is_file() and index.is_file():
        raise ValueError(f"Expected {WEIGHTS} or {INDEX}, got both: remove the one that is not of this model")
    if index.is_file():
        named = sorted(set(_weight_map(index).values()))
        if missing := [name for name in named if name not in there]:
            raise ValueError(f"Expected the files that {INDEX} names, got none of the name {_some(missing)}")
    elif single.is_file():
        named = [WEIGHTS]
    else:
        raise ValueError(f"Expected {WEIGHTS}, or {INDEX} and its files, got neither: save_pretrained writes them")
    if strays := sorted(there - set(named)):
        raise ValueError(f"Expected the files of one model, got also {_some(strays)}: move it elsewhere")
    return WeightFiles(tuple(folder / name for name in named), index if index.is_file() else None)


def weight_problems(weights: WeightFiles, model: PreTrainedModel) -> Iterator[str]:
    """Everything that is wrong with the weights of a model, a sentence each, with the name of the file.

    Every file is read to its end, one tensor at a time.

    Args:
        weights: of `find_weights`.
        model: what they are for, on the meta device.
    """
    prefix = f"{model.base_model_prefix}."  # a backbone may be saved as such, or as part of a model with a head
    expected = {key.removeprefix(prefix): tensor for key, tensor in model.state_dict().items()}
    kept = _kept_out(model)
    found: dict[str, str] = {}
    for file in weights.files:
        try:
            for key, problem in _tensor_problems(file, expected, prefix):
                name = key.removeprefix(prefix)
                if problem:
                    yield f"{file.name}: {problem}"
                if name in found:
                    yield f"{file.name}: {key} is also in {found[name]}"
                if name not in expected and not kept(key):
                    yield f"{file.name}: {key} is no parameter of {type(model).__name__}"
                found[name] = file.name
        except ValueError as error:
            yield f"{file.name}: {error}"
            return  # what it lacks is not known
    if missing := [key for key in expected if key not in found]:
        yield f"{weights.all[-1].name}: {type(model).__name__} needs {_some(missing)}, got none"
    if weights.index is not None:
        yield from _index_problems(weights.index, found, prefix)


def count_tensors(weights: WeightFiles) -> int:
    """How many tensors the files say they hold.

    Raises:
        ValueError: for a file whose table of contents cannot be read, with its name.
    """
    total = 0
    for file in weights.files:
        try:
            total += len(_keys_of(file))
        except ValueError as error:
            raise ValueError(f"{file.name}: {error}") from error
    return total


def weights_fingerprint(weights: WeightFiles, model: PreTrainedModel) -> str:
    """The fingerprint that the model would have with these weights, of files without problems, a tensor at a time."""
    prefix = f"{model.base_model_prefix}."
    places = {key.removeprefix(prefix): (file, key) for file in weights.files for key in _keys_of(file)}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in model.state_dict():
            file, key = places[name.removeprefix(prefix)]
            with safe_open(file, framework="pt") as opened:
                yield name, opened.get_tensor(key)

    return fingerprint(tensors())


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file, of an index whose files lie beside it."""
    mapped = read_object(index).get("weight_map")
    if not isinstance(mapped, dict) or not mapped:
        raise ValueError(f"Expected weight_map with the file of every tensor in {INDEX}, got none")
    for name in mapped.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"Expected names of safetensors files beside it in {INDEX}, got {name!r}")
    return mapped


def _keys_of(file: Path) -> list[str]:
    """Names of the tensors in a file, whose table of contents is not too large to be one."""
    check_header(file)
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise ValueError(f"Expected a complete safetensors file, got: {error}") from error


def _tensor_problems(file: Path, expected: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, str | None]]:
    """Every tensor of a file with what is wrong with its type, shape or values; None if nothing is."""
    keys = _keys_of(file)
    with safe_open(file, framework="pt") as opened:
        for key in keys:
            own, part = expected.get(key.removeprefix(prefix)), opened.get_slice(key)
            floating = own is None or own.is_floating_point()
            dtype, shape = part.get_dtype(), tuple(part.get_shape())
            if dtype not in (_FLOATS if floating else ("I64",)):
                kinds = ", ".join(_FLOATS) if floating else "I64"
                yield key, f"{key} is of type {dtype}, expected {kinds}"
            elif own is not None and shape != tuple(own.shape):
                yield key, f"{key} has the shape {shape}, expected {tuple(own.shape)}"
            elif floating and not _is_finite(opened.get_tensor(key)):
                yield key, f"{key} holds NaN or infinity: the training diverged, so the model is worth nothing"
            else:
                yield key, None


def _is_finite(tensor: Tensor) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in tensor.flatten().split(_ELEMENTS))


def _kept_out(model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether loading passes over a tensor without a word: the mask token and other heads are no loss."""
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    return lambda key: any(pattern.search(key) for pattern in patterns)


def _index_problems(index: Path, found: Mapping[str, str], prefix: str) -> Iterator[str]:
    """What an index says of tensors that lie elsewhere."""
    mapped = {key.removeprefix(prefix): name for key, name in _weight_map(index).items()}
    wrong = [key for key in mapped.keys() | found.keys() if mapped.get(key) != found.get(key)]
    if wrong:
        yield f"{index.name}: the file that it names for {_some(sorted(wrong))} is another than the one that holds it"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
