# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Folders of converted checkpoints: complete or absent, written a shard at a time.

Everything goes to a folder of a temporary name beside the wanted one, which is renamed at the end. What an interrupted
conversion leaves is removed, by itself or by the next one.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
MOST_BYTES_PER_SHARD = 5 * 10**9  # of memory too: no more than a shard is held at a time
_UNFINISHED, _REPLACED = ".unfinished", ".replaced"
_OF_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")
_BESIDE_WEIGHTS = ("README.md", ".gitattributes")  # and any JSON


def check_new(final: Path, overwrite: bool = False, sources: Iterable[str | os.PathLike[str] | None] = ()) -> None:
    """Refuse to write where something is, unless it is a checkpoint alone and to be replaced.

    Args:
        final: the folder to write.
        overwrite: replace what is there.
        sources: what is read, which may be the folder itself, but is not lost with it.

    Raises:
        ValueError: with what is in the way.
    """
    if final.exists() and not final.is_dir():
        raise ValueError(f"Expected a new folder, got {final}, which is a file")
    held = list(final.iterdir()) if final.exists() else []
    if held and not overwrite:
        raise ValueError(
            f"Expected a new folder, got {final}, which is there (overwrite=True, or --overwrite, replaces it)"
        )
    if held and not any(file.name == "config.json" or file.suffix in _OF_WEIGHTS for file in held):
        raise ValueError(f"Expected a folder with a checkpoint to be replaced, got {final}, which holds none")
    for file in sorted(held):
        is_known = file.suffix in (".json", *_OF_WEIGHTS) or file.name in _BESIDE_WEIGHTS
        if file.is_dir() or not is_known:
            raise ValueError(f"Expected a checkpoint and nothing else to be replaced, got {file} beside it")
    for source in (Path(one) for one in sources if one is not None and held):
        if source.exists() and final.resolve() in source.resolve().parents:
            raise ValueError(f"Expected a source outside of {final}, which is to be replaced, got {source}")


@contextmanager
def new_folder(final: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write to, which gets its name when the block ends well and is removed when it does not.

    Args:
        final: the name.
        overwrite: replace a folder of this name.

    Raises:
        ValueError: before anything is written, if there is something of this name.
    """
    final = Path(os.path.abspath(final))  # a name of its own, also for "."
    made = final.with_name(f".{final.name}{_UNFINISHED}")
    aside = final.with_name(f".{final.name}{_REPLACED}")
    _tidy(made, aside, final)
    check_new(final, overwrite)
    made.mkdir(parents=True)
    try:
        yield made
        for file in made.iterdir():
            _flush(file)
        if final.exists():
            os.replace(final, aside)
        os.replace(made, final)
    finally:
        _tidy(made, aside, final)


def _tidy(made: Path, aside: Path, final: Path) -> None:
    """Remove what a conversion that was killed has left; of one killed between its two renames, take back the old."""
    shutil.rmtree(made, ignore_errors=True)
    if aside.exists() and not final.exists():
        os.replace(aside, final)
    shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write an object as JSON."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_safetensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], most_bytes: int = MOST_BYTES_PER_SHARD
) -> None:
    """Write tensors to `model.safetensors`, or to shards and an index where they are too many for one.

    Args:
        folder: where to.
        tensors: names and values, taken one by one; a shard is written before the next tensor is taken.
        most_bytes: of one shard, but for a tensor that is larger by itself.

    Raises:
        OSError: if the disk is full.
    """
    shards: list[list[str]] = []
    for shard in _shards(tensors, most_bytes):
        # metadata: without it Transformers does not take the file for one of PyTorch
        try:
            save_file(shard, folder / _numbered(len(shards)), metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder}: {error}") from error
        shards.append(list(shard))
        shard.clear()  # before the next one is put together
    if len(shards) == 1:
        os.replace(folder / _numbered(0), folder / WEIGHTS)
        return
    names = [f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))]
    for index, name in enumerate(names):
        os.replace(folder / _numbered(index), folder / name)
    total = sum((folder / name).stat().st_size for name in names)
    mapped = {key: name for keys, name in zip(shards, names, strict=True) for key in keys}
    write_json(folder / f"{WEIGHTS}.index.json", {"metadata": {"total_size": total}, "weight_map": mapped})


def write_torch(file: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors as `torch.save` does, all at once: the format of the reference implementations.

    Raises:
        OSError: if the disk is full.
    """
    try:
        torch.save({name: tensor.contiguous() for name, tensor in tensors}, file)
    except RuntimeError as error:
        raise OSError(f"{file}: {error}") from error


def _shards(tensors: Iterable[tuple[str, Tensor]], most_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > most_bytes:
            yield shard
            shard, size = {}, 0
        # a copy: of a view of the source's file, or of a part of a larger tensor
        shard[name] = tensor.clone(memory_format=torch.contiguous_format)
        size += tensor.nbytes
    yield shard


def _numbered(index: int) -> str:
    return f"shard-{index}"
