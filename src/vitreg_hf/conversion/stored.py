# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Files of weights, opened without reading values: safetensors, `torch.save`, folders, repositories of the Hub.

No pickle is loaded but by `weights_only=True`. Values are read tensor by tensor, from memory maps where the file
allows, so that a checkpoint of gigabytes is opened in milliseconds.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitreg_hf.model.checkpoint_checks import check_header
from vitreg_hf.model.configuration_checks import MOST_BYTES

CONFIGS = ("config.json", "open_clip_config.json")
CONVERSION = "conversion.json"  # of a checkpoint of this family that was another's: what became of it
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
# In the order in which they are preferred; those after the first are pickles, read as tensors alone.
_SINGLE_FILES = (
    *("model.safetensors", "open_clip_model.safetensors"),
    *("pytorch_model.bin", "open_clip_pytorch_model.bin"),
)
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WORDS_OF_CODE = ("GLOBAL", "TorchScript", "Unsupported class", "WeightsUnpickler")  # in messages of PyTorch
_PICKLES = (".pth", ".pt", ".bin", ".ckpt")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        shape: its shape.
        dtype: its type.
        read: gives the tensor itself, which may be a view of the file.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    def like(self) -> Tensor:
        """A tensor of this shape and type without values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class Source:
    """What a checkpoint is made of.

    Attributes:
        name: as it was given.
        tensors: its tensors by name.
        folder: where its files are; None for a single file.
        config: content of `config.json`, or None.
        open_clip: content of `open_clip_config.json`, or None.
        processor: content of the file of the image processor, or None.
        notes: what was done to get at the tensors, a sentence each.
        left_out: tensors that are no part of the model, by name, and why.
    """

    name: str
    tensors: Mapping[str, StoredTensor]
    folder: Path | None = None
    config: dict[str, Any] | None = None
    open_clip: dict[str, Any] | None = None
    processor: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

    def changed(
        self, tensors: Mapping[str, StoredTensor], note: str, left_out: Mapping[str, str] | None = None
    ) -> "Source":
        """The same source with other tensors or names, what was done, and what was left out meanwhile."""
        left = {**self.left_out, **(left_out or {})}
        return replace(self, tensors=tensors, notes=(*self.notes, note), left_out=left)


def open_source(source: str | os.PathLike[str], revision: str | None = None) -> Source:
    """Open a checkpoint.

    Args:
        source: a `.safetensors` file; a file of `torch.save`; a folder with one of these, an index, or the shards of
            `torch.distributed.checkpoint`; or the id of a repository on the Hub, of which only what is needed is
            fetched.
        revision: branch, tag or commit of the repository.

    Raises:
        ValueError: if there is no such thing, or it is damaged, holds code, or holds no tensors.
        ConnectionError: if the Hub refuses a repository, or is not reached and does not have it in its cache.
    """
    path = Path(source)
    if path.is_file():
        return Source(str(source), _checked(tensors_of(path), path))
    if path.is_dir():
        return _folder(path, str(source))
    looks_like_path = path.suffix in (".safetensors", *_PICKLES) or path.is_absolute() or str(source).count("/") > 1
    if looks_like_path:
        raise ValueError(f"Expected a file, a folder or the id of a repository, got {str(source)!r}, which is none")
    return _folder(_fetched(str(source), revision), str(source))


def read_json(path: Path) -> dict[str, Any] | None:
    """Content of a JSON file, None if there is none; raises ValueError for one that is damaged or holds no object."""
    if not path.is_file():
        return None
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"Expected a file of at most {MOST_BYTES} bytes, got {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected JSON that can be read in {path}, got: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected a JSON object in {path}, got {type(content).__name__}")
    return content


# Files


def tensors_of(path: Path) -> dict[str, StoredTensor]:
    """Tensors of one file by name; raises ValueError for a file that is damaged or holds anything else."""
    if path.suffix == ".safetensors":
        return _safetensors(path)
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in _flattened(load_tensors(path)):
        if name in tensors:
            raise ValueError(f"Expected one tensor of a name, got several called {name!r} in {path}")
        tensors[name] = tensor
    return tensors


def load_tensors(path: Path) -> Any:
    """What `torch.save` wrote, tensors as views of the file where its format allows.

    Raises:
        ValueError: for a file that is damaged, or holds anything but tensors, containers, texts and numbers.
    """
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # written by PyTorch before 1.6
    except Exception as error:  # of many kinds; its own message advises weights_only=False, which runs any code
        told = str(error)
        found = "code or objects" if any(word in told for word in _WORDS_OF_CODE) else "damage"
        raise ValueError(f"Expected a file of tensors alone, got {path}, in which there is {found}") from error


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    check_header(path)
    try:
        opened = safe_open(path, framework="pt")
        keys = list(opened.keys())
        return {key: _slice(opened, key) for key in keys}
    except SafetensorError as error:
        raise ValueError(f"Expected a complete safetensors file, got {path}: {error}") from error


_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool},
}


def _slice(opened: Any, key: str) -> StoredTensor:
    part = opened.get_slice(key)
    dtype = _DTYPES.get(part.get_dtype())
    if dtype is None:
        raise ValueError(f"Expected tensors of {', '.join(_DTYPES)}, got {key!r} of {part.get_dtype()}")
    return StoredTensor(tuple(part.get_shape()), dtype, lambda: opened.get_tensor(key))


def stored(tensor: Tensor) -> StoredTensor:
    """A tensor that is there already."""
    return StoredTensor(tuple(tensor.shape), tensor.dtype, lambda: _held(tensor))


def _held(tensor: Tensor) -> Tensor:
    """The tensor if it has a value of its own for every place; a file of some bytes can claim one of terabytes."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ValueError("a tensor that is sparse, empty or a view of fewer values than it has")
    return tensor


def _flattened(content: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, StoredTensor]]:
    """Tensors in nested dictionaries, as `model.blocks.0.norm1.weight`; anything else in them is no weight."""
    if isinstance(content, Tensor):
        yield prefix.removesuffix("."), stored(content)
    elif isinstance(content, Mapping) and depth < 8:
        for key, value in content.items():
            yield from _flattened(value, f"{prefix}{key}.", depth + 1)


def _checked(tensors: dict[str, StoredTensor], place: Path) -> dict[str, StoredTensor]:
    if not tensors:
        raise ValueError(f"Expected tensors by name in {place}, got none")
    return tensors


# Folders


def _folder(folder: Path, name: str) -> Source:
    processors = (read_json(folder / file) for file in PROCESSORS)
    saved = next((content for content in processors if content is not None), None)
    if saved is not None and isinstance(saved.get("image_processor"), dict):  # newer files hold all processors
        saved = saved["image_processor"]
    config, open_clip = (read_json(folder / file) for file in CONFIGS)
    return Source(name, _checked(_tensors_in(folder), folder), folder, config, open_clip, saved)


def _tensors_in(folder: Path) -> dict[str, StoredTensor]:
    if (folder / ".metadata").is_file():
        from vitreg_hf.conversion.training_shards import stored_shards

        return stored_shards(folder)
    for index in _INDICES:
        if (content := read_json(folder / index)) is not None:
            return _indexed(folder, index, content)
    for name in _SINGLE_FILES:
        if (folder / name).is_file():
            return tensors_of(folder / name)
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", *_PICKLES))
    if len(others) == 1:
        return tensors_of(folder / others[0])
    got = f"several: {', '.join(others[:5])}; name the file" if others else "none"
    raise ValueError(f"Expected one file of weights in {folder}, got {got}")


def _indexed(folder: Path, index: str, content: dict[str, Any]) -> dict[str, StoredTensor]:
    mapped = content.get("weight_map")
    if not isinstance(mapped, dict) or not mapped:
        raise ValueError(f"Expected weight_map with the file of every tensor in {folder / index}, got none")
    names = sorted({str(name) for name in mapped.values()})
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"Expected the file {name!r}, which {index} names, beside it, got none")
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        tensors |= {key: one for key, one in tensors_of(folder / name).items() if mapped.get(key, name) == name}
    if missing := sorted(mapped.keys() - tensors.keys()):
        raise ValueError(f"Expected the tensors that {index} names, got none called {missing[0]!r}")
    return tensors


def _fetched(repository: str, revision: str | None) -> Path:
    """Fetch what is needed of a repository; of its weights one form, safetensors if there are any.

    Raises:
        ValueError: if it has several files of weights, none of which is preferred.
        ConnectionError: if the Hub refuses it, or is not reached and the repository is not in its cache.
    """

    def fetch(names: list[str], **options: Any) -> Path:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=names, **options))

    try:
        # not list_repo_files, which waits half a minute for a Hub that does not answer
        siblings = HfApi().model_info(repository, revision=revision).siblings or []
        files = [file.rfilename for file in siblings if "/" not in file.rfilename]
        wanted = [name for name in files if name in (*CONFIGS, *PROCESSORS, CONVERSION)]
        weights = _weights_among(files, repository)
        if weights in _INDICES:
            wanted.append(weights)
            mapped = (read_json(fetch(wanted) / weights) or {}).get("weight_map")
            return fetch(wanted + [str(name) for name in set(mapped.values())] if isinstance(mapped, dict) else wanted)
        return fetch([*wanted, weights])
    except HfHubHTTPError as error:
        raise ConnectionError(f"Expected {repository} on the Hub, got: {' '.join(str(error).split())}") from error
    except (HTTPError, ConnectionError, LocalEntryNotFoundError) as error:
        try:
            return fetch(list(CONFIGS), local_files_only=True)
        except OSError:
            raise ConnectionError(
                f"Expected {repository} as a file or folder, or on the Hub or in its cache, got none: {error}"
            ) from error


def _weights_among(files: list[str], repository: str) -> str:
    for chosen in (_INDICES[:1], _SINGLE_FILES[:2], _INDICES[1:], _SINGLE_FILES[2:]):
        if found := [name for name in chosen if name in files]:
            return found[0]
    others = [name for name in files if name.endswith((".safetensors", *_PICKLES))]
    if len(others) != 1:
        got = f"several: {', '.join(others[:5])}; download one and name its path" if others else "none"
        raise ValueError(f"Expected one file of weights in {repository}, got {got}")
    return others[0]
