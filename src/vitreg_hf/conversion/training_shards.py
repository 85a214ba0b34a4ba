# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Shards of `torch.distributed.checkpoint`, as FSDP2 trainings (DINOv3's among them) write them, put together."""

import io
import math
import pickle
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from vitreg_hf.conversion.stored import StoredTensor

# The table of contents is a pickle, which PyTorch itself reads without restriction; these names are all that it needs.
_CHECKPOINT = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    (_CHECKPOINT, "Metadata"),
    (_CHECKPOINT, "TensorStorageMetadata"),
    (_CHECKPOINT, "BytesStorageMetadata"),
    (_CHECKPOINT, "ChunkStorageMetadata"),
    (_CHECKPOINT, "TensorProperties"),
    (_CHECKPOINT, "_MEM_FORMAT_ENCODING"),
    (_CHECKPOINT, "MetadataIndex"),
    (_CHECKPOINT, "StorageMeta"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
}


class _Contents(pickle.Unpickler):
    """Reads the table of contents, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


class _Reader(dcp.FileSystemReader):
    """Reads shards by a table of contents that was read before."""

    def __init__(self, folder: Path, contents: Metadata) -> None:
        super().__init__(folder)
        self.contents = contents

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.contents


def stored_shards(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint in shards, but those of optimizers; each is put together when it is read.

    Raises:
        ValueError: if the table of contents is damaged or names anything that could run code, or a shard is missing
            or shorter than it says.
    """
    contents = _contents(folder / ".metadata")
    try:
        tensors = {
            name: about
            for name, about in contents.state_dict_metadata.items()
            if isinstance(about, TensorStorageMetadata) and not name.startswith("optim")
        }
        for name, about in tensors.items():
            _check_parts(folder, name, about, contents.storage_data)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"Expected a table of contents of shards in {folder}, got a damaged one: {error}") from error
    return {
        name: StoredTensor(tuple(about.size), about.properties.dtype, partial(_read, folder, contents, name, about))
        for name, about in tensors.items()
    }


def _check_parts(folder: Path, name: str, about: TensorStorageMetadata, places: Mapping[Any, Any]) -> None:
    """Refuse a tensor of which a part is not there: it would be left as memory happened to be."""
    held = 0
    for part in about.chunks:
        place = places.get(MetadataIndex(name, part.offsets))
        if place is None or Path(place.relative_path).name != place.relative_path:
            raise ValueError(f"Expected a shard in {folder} with a part of {name!r}, got none")
        file, end = folder / place.relative_path, place.offset + place.length
        found = file.stat().st_size if file.is_file() else 0
        # a file of torch.save is larger than what is in it
        wanted = 0 if place.transform_descriptors else math.prod(part.sizes) * about.properties.dtype.itemsize
        if found < end or place.length < wanted:
            raise ValueError(f"Expected complete shards, got {file} without a part of {name!r}")
        inside = zip(part.offsets, part.sizes, about.size, strict=True)
        held += math.prod(part.sizes) if all(at >= 0 and at + size <= whole for at, size, whole in inside) else 0
    if held != math.prod(about.size):
        raise ValueError(f"Expected all parts of {name!r} in {folder}, got {held} of {math.prod(about.size)} values")


def _read(folder: Path, contents: Metadata, name: str, about: TensorStorageMetadata) -> Tensor:
    tensor = torch.empty(about.size, dtype=about.properties.dtype)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant by no_dist
            dcp.load({name: tensor}, storage_reader=_Reader(folder, contents), no_dist=True)
    except (Exception, dcp.api.CheckpointException) as error:  # of many kinds, around what went wrong
        causes = [cause for cause, _ in getattr(error, "failures", {}).values()] or [error]
        raise ValueError(f"Expected complete shards in {folder}, got: {causes[0]}") from error
    return tensor


def _contents(file: Path) -> Metadata:
    try:
        contents = _Contents(io.BytesIO(file.read_bytes())).load()
    except pickle.UnpicklingError as error:
        raise ValueError(f"Expected a table of contents of shards in {file}, got one that names {error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"Expected a table of contents of shards in {file}, got a damaged one") from error
    if not isinstance(contents, Metadata):
        raise ValueError(f"Expected a table of contents of shards in {file}, got {type(contents).__name__}")
    return contents
