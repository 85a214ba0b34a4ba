# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Shards of `torch.distributed.checkpoint`, as FSDP2 trainings (DINOv3's among them) write them, put together."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

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


def read_shards(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint in shards, but those of optimizers, whole and in memory.

    Raises:
        ValueError: if the table of contents is damaged or names anything that could run code, or a shard is missing
            or damaged.
    """
    contents = _contents(folder / ".metadata")
    tensors = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in contents.state_dict_metadata.items()
        if isinstance(about, TensorStorageMetadata) and not name.startswith("optim")
    }
    try:
        dcp.load(tensors, storage_reader=_Reader(folder, contents), no_dist=True)
    except Exception as error:  # of many kinds, around what went wrong in a thread of its own
        raise ValueError(f"Expected complete shards in {folder}, got: {error}") from error
    return tensors


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
