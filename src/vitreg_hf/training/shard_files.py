# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Names of shards from patterns, how many rows they hold, and files of class names."""

import os
import re
import tarfile
from collections.abc import Iterable, Sequence
from functools import cache
from glob import glob
from itertools import chain
from pathlib import Path

import datasets
import fsspec
import pyarrow.parquet as pq


def read_class_names(file: str) -> list[str]:
    """Class names from a text file: one a line, by index.

    Raises:
        ValueError: if there is no such file, or a name is there twice or there are fewer than two.
    """
    if not os.path.isfile(file):
        raise ValueError(f"Expected a file with one class name a line, got {file!r}")
    names = [line.strip() for line in Path(file).read_text().splitlines() if line.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"Expected two or more different class names in {file!r}, got {len(set(names))} different")
    return names


def matching_files(pattern: str, endings: tuple[str, ...]) -> list[str]:
    """Files of a pattern in order: `*`, `?` and `[...]`, `{a,b}` and `{000..146}`, or a folder.

    Of URLs only the braces are expanded.

    Raises:
        ValueError: if there is none.
    """
    if os.path.isdir(pattern):
        found = [os.path.join(pattern, name) for name in os.listdir(pattern) if name.endswith(endings)]
    elif os.path.isfile(pattern):
        found = [pattern]
    else:
        found = list(chain.from_iterable([one] if "://" in one else glob(one) for one in _expand_braces(pattern)))
    files = sorted({os.path.abspath(file) if "://" not in file else file for file in found})
    if not files:
        raise ValueError(f"Expected {' or '.join(endings)} files, got none for {pattern!r}")
    return files


def _expand_braces(pattern: str) -> list[str]:
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if brace is None:
        return [pattern]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", brace[1])
    if bounds:
        numbers = range(int(bounds[1]), int(bounds[2]) + 1)
        choices = [str(number).zfill(len(bounds[1])) for number in numbers]
    else:
        choices = brace[1].split(",")
    return [
        one for choice in choices for one in _expand_braces(pattern[: brace.start()] + choice + pattern[brace.end() :])
    ]


def check_numbering(files: Iterable[str], column: str, class_names: Sequence[str] | None) -> None:
    """Refuse parquet files that number their classes differently: `datasets` reads all of them as it reads the first.

    Raises:
        ValueError: naming the file.
    """
    for file in files:
        with fsspec.open(file, "rb") as opened:
            feature = datasets.Features.from_arrow_schema(pq.read_schema(opened)).get(column)
        if isinstance(feature, datasets.ClassLabel) and feature.names != list(class_names or ()):
            others = ", ".join(feature.names[:10])
            raise ValueError(f"Expected one numbering of the classes in all files, got another in {file}: {others}")


@cache  # a stream asks again for every pass that it skips
def count_rows(file: str) -> int | None:
    """Rows of a parquet file by its footer, samples of a local tar by its headers; None for what must be read."""
    if ".parquet" in os.path.basename(file):
        with fsspec.open(file, "rb") as opened:
            return int(pq.read_metadata(opened).num_rows)
    return _count_samples(file) if file.endswith(".tar") and os.path.isfile(file) else None


def _count_samples(tar: str) -> int:
    """As `datasets` groups files: neighbours of one name up to its first dot are a sample; hidden files are none."""
    samples, last = 0, None
    with tarfile.open(tar) as archive:
        for member in archive:
            folder, base = os.path.split(member.name)
            stem, dot, _ = base.partition(".")
            key = (folder, stem)
            if member.isreg() and not base.startswith((".", "__")) and dot and key != last:
                samples, last = samples + 1, key
    return samples
