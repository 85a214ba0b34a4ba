# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Labelled images in shards that are read in order: splits of the Hub, WebDataset tars, parquet files.

Everything is read by `datasets` in its streaming mode. Rows stay encoded here: whoever decodes them, usually a process
that loads images, has passed over all others without decoding them.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple, cast

import datasets

from vitreg_hf.training.shard_files import check_numbering, count_rows, matching_files

_ROWS_AT_ONCE = 16
# Where the label of a sample in a tar is looked for, first hit first, unless a column is named.
_TAR_LABELS = ("label", "cls", "json.label", "txt")


class EncodedRow(NamedTuple):
    """One image as it is stored.

    Attributes:
        image: `{"bytes": ..., "path": ...}`, see `labelled_images.decode_rgb`.
        label: class index.
        name: its shard and its key or row there.
    """

    image: dict[str, Any]
    label: int
    name: str


@dataclass(frozen=True)
class Labels:
    """How a column becomes class indices.

    Args:
        column: of class indices or names; `json.label` is the field `label` of column `json`.
        class_names: name of each class, by index.
        stored_names: names that the indices of the column stand for, where those are others or in another order.
    """

    column: str
    class_names: tuple[str, ...]
    stored_names: tuple[str, ...] | None = None

    def read(self, row: dict[str, Any]) -> int:
        """Class index of a row.

        Raises:
            ValueError: if there is none, or it is none of the classes.
        """
        value: Any = row
        for part in self.column.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None or (self.stored_names is not None and value == -1):
            raise ValueError(f"a label in {self.column!r}, got none")
        if isinstance(value, int):
            names = self.stored_names or self.class_names
            if not 0 <= value < len(names):
                raise ValueError(f"a label in 0..{len(names) - 1}, got {value}")
            if self.stored_names is None:
                return value
            value = names[value]
        if str(value).strip() not in self._indices:
            raise ValueError(f"one of {len(self.class_names)} class names, got {value!r}")
        return self._indices[str(value).strip()]

    @property
    def _indices(self) -> dict[str, int]:
        return _indices_of(self.class_names)


@lru_cache(maxsize=8)
def _indices_of(names: tuple[str, ...]) -> dict[str, int]:
    return {name: index for index, name in enumerate(names)}


@dataclass(frozen=True)
class Shards:
    """The images of one split, in shards.

    Args:
        rows: all of them, images not decoded.
        image_columns: columns of images; a row has one in the first of these that is not empty.
        labels: how the classes are read.
        files: of each shard, where a shard is a file.
        num_images: how many there are, where the source says so.
    """

    rows: datasets.IterableDataset
    image_columns: tuple[str, ...]
    labels: Labels
    files: tuple[str, ...] | None = None
    num_images: int | None = None

    @property
    def num_shards(self) -> int:
        """How many shards there are."""
        return int(self.rows.num_shards)

    @property
    def class_names(self) -> list[str]:
        """Name of each class, by index."""
        return list(self.labels.class_names)

    def read(self, shard: int, offset: int = 0, stride: int = 1) -> Iterator[EncodedRow]:
        """Rows `offset`, `offset + stride`, ... of a shard.

        Raises:
            ValueError: naming the shard that cannot be read, or the row whose label is none of the classes or which
                has no image.
        """
        for number, row in islice(enumerate(self._rows_of(shard)), offset, None, stride):
            name = f"{self.name_of(shard)}: {row.get('__key__') or f'row {number}'}"
            image = next((row[column] for column in self.image_columns if row[column] is not None), None)
            if image is None:
                raise ValueError(f"Expected an image in {' or '.join(self.image_columns)}, got none in {name}")
            try:
                yield EncodedRow(image, self.labels.read(row), name)
            except ValueError as error:
                raise ValueError(f"Expected {error} in {name}") from None

    def count(self, shard: int) -> int | None:
        """Number of rows of a shard where that can be had without reading them, else None."""
        return None if self.files is None else count_rows(self.files[shard])

    def name_of(self, shard: int) -> str:
        """File of a shard, or its number."""
        return f"shard {shard}" if self.files is None else self.files[shard]

    def _rows_of(self, shard: int) -> Iterator[dict[str, Any]]:
        rows = self.rows.shard(num_shards=self.num_shards, index=shard)
        # Batches, because a loop over rows would split them once more inside a loading process.
        batches = iter(rows.iter(batch_size=_ROWS_AT_ONCE))
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:  # of the network, the archive, a decoder of a field
                raise ValueError(f"Expected a readable shard, got {self.name_of(shard)}: {error}") from error
            if batch is None:
                return
            columns = [batch[name] for name in batch]
            yield from (dict(zip(batch, values, strict=True)) for values in zip(*columns, strict=True))


# Sources


def hub_shards(
    name: str,
    config_name: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    class_names: Sequence[str] | None = None,
) -> tuple[Shards, Shards]:
    """Splits `train` and `validation` of a dataset of the Hub, or of a local folder in its format, not downloaded.

    Args:
        name: id or folder.
        config_name: its configuration, if it has several.
        image_column: column of images.
        label_column: column of class indices or names.
        class_names: names by index, where the dataset does not say them.

    Raises:
        ValueError: if a split or a column is missing, or the names of the classes are.
    """
    builder = datasets.load_dataset_builder(name, config_name)
    splits = cast(datasets.IterableDatasetDict, builder.as_streaming_dataset())
    if missing := {"train", "validation"} - set(splits):
        raise ValueError(
            f"Expected splits 'train' and 'validation' in dataset {name!r}, got {', '.join(sorted(splits))}: "
            f"a stream holds out no images (missing: {', '.join(sorted(missing))})"
        )
    train = _hub_split(builder, splits["train"], "train", image_column, label_column, class_names)
    names = train.class_names
    return train, _hub_split(builder, splits["validation"], "validation", image_column, label_column, names)


def _hub_split(
    builder: datasets.DatasetBuilder,
    rows: datasets.IterableDataset,
    split: str,
    image_column: str,
    label_column: str,
    class_names: Sequence[str] | None,
) -> Shards:
    listed = (getattr(builder.config, "data_files", None) or {}).get(split, [])
    files = [str(file) for file in listed] if builder.name in ("parquet", "webdataset") else []
    if builder.name == "parquet":  # one file, because each may have to be asked for over the network
        check_numbering(files[:1], label_column, _names_of(rows, label_column))
    info = (builder.info.splits or {}).get(split)
    num_images = _total(files) if info is None else int(info.num_examples)
    return _shards(rows, files, (image_column,), (label_column,), class_names, num_images)


def file_shards(
    pattern: str,
    image_column: str = "image",
    label_column: str = "label",
    class_names: Sequence[str] | None = None,
) -> Shards:
    """WebDataset tars or parquet files, one shard each.

    Args:
        pattern: a file, a folder of them, or a pattern as of `matching_files`.
        image_column: column of images in parquet files; in a tar every file with the ending of an image is one.
        label_column: column of class indices or names; in a tar `label` also stands for `cls`, `json.label` and `txt`,
            and `json.kind` is the field `kind` of the JSON file.
        class_names: names by index; needed where the files do not say them.

    Raises:
        ValueError: if there are no such files or files of both kinds, or a column or the names are missing.
    """
    files = matching_files(pattern, (".tar", ".parquet"))
    kinds = {"webdataset" if ".tar" in os.path.basename(file) else "parquet" for file in files}
    if len(kinds) > 1:
        raise ValueError(f"Expected tars or parquet files, got both in {pattern!r}")
    kind = kinds.pop()
    try:
        rows = datasets.load_dataset(kind, data_files={"train": files}, split="train", streaming=True)
    except Exception as error:  # of the archive or the network: the first shard is read to know its columns
        raise ValueError(f"Expected readable {kind} files, got {files[0]}, ...: {error}") from error
    images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    in_tar = kind == "webdataset"
    if not in_tar:
        check_numbering(files, label_column, _names_of(rows, label_column))
    image_columns = tuple(images) if in_tar and image_column == "image" else (image_column,)
    label_columns = _TAR_LABELS if in_tar and label_column == "label" else (label_column,)
    return _shards(rows, files, image_columns, label_columns, class_names, _total(files))


# One form for all of them


def _shards(
    rows: datasets.IterableDataset,
    files: Sequence[str],
    image_columns: tuple[str, ...],
    label_columns: tuple[str, ...],
    class_names: Sequence[str] | None,
    num_images: int | None,
) -> Shards:
    features = rows.features
    if features is None:
        raise ValueError("Expected a dataset that names its columns, got one that does not")
    if not image_columns or not set(image_columns) <= set(features):
        raise ValueError(f"Expected images in column {', '.join(image_columns) or 'image'}, got {', '.join(features)}")
    label_column = next((name for name in label_columns if _has(features, name)), None)
    if label_column is None:
        raise ValueError(f"Expected labels in {' or '.join(label_columns)}, got columns {', '.join(features)}")
    labels = _labels(features, label_column, class_names)
    keys = [name for name in ("__key__",) if name in features]
    rows = rows.select_columns([*image_columns, label_column.split(".")[0], *keys])
    for column in image_columns:
        if not _can_be_images(features[column]):
            raise ValueError(f"Expected images in column {column!r}, got {features[column]}")
        rows = rows.cast_column(column, datasets.Image(decode=False))
    one_each = len(files) == rows.num_shards
    return Shards(rows, image_columns, labels, tuple(files) if one_each else None, num_images)


def _can_be_images(feature: Any) -> bool:
    """Images, encoded ones as other libraries store them, or paths."""
    encoded = isinstance(feature, dict) and {"bytes", "path"} <= set(feature)
    plain = isinstance(feature, datasets.Value) and feature.dtype in (
        "string",
        "large_string",
        "binary",
        "large_binary",
    )
    return isinstance(feature, datasets.Image) or encoded or plain


def _total(files: Sequence[str]) -> int | None:
    """Rows of local parquet files together; tars and files elsewhere take too long to ask one after the other."""
    cheap = files and all(file.endswith(".parquet") and os.path.isfile(file) for file in files)
    return sum(cast(int, count_rows(file)) for file in files) if cheap else None


def _names_of(rows: datasets.IterableDataset, column: str) -> tuple[str, ...] | None:
    feature = (rows.features or {}).get(column)
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _has(features: Any, column: str) -> bool:
    for part in column.split("."):
        if not isinstance(features, dict) or part not in features:
            return False
        features = features[part]
    return True


def _labels(features: datasets.Features, column: str, class_names: Sequence[str] | None) -> Labels:
    feature: Any = features
    for part in column.split("."):
        feature = feature[part]
    stored = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    if class_names is None and stored is None:
        raise ValueError(
            f"Expected the names of the classes (class_names): column {column!r} is {feature} without any"
        )
    names = tuple(class_names) if class_names is not None else cast(tuple[str, ...], stored)
    if stored is not None and (unknown := sorted(set(stored) - set(names))):
        raise ValueError(f"Expected the classes of the training images, got others: {', '.join(unknown[:10])}")
    return Labels(column, names, stored)
