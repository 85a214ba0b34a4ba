# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Images with the class of every pixel: folders, the Hub, parquet files, or scenes of digits that need no download.

All of them take one form: columns `image` and `mask`, both still encoded, and `row`, its number at the source. Labels
of masks index the class names; 255 is a pixel of no class.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import NamedTuple, cast

import datasets
import numpy as np
import torch
from torch import Tensor

from vitreg_hf.model.image_inputs import IGNORED_LABEL
from vitreg_hf.training.class_folders import images_below
from vitreg_hf.training.data import load_digits
from vitreg_hf.training.digit_scenes import SCENE_CLASSES, digit_scenes
from vitreg_hf.training.labelled_images import SPLIT_SEED, decode, decode_label_map, source_of
from vitreg_hf.training.sampling import SampleKey
from vitreg_hf.training.seeding import seeded
from vitreg_hf.training.shard_files import matching_files

VALIDATION_FRACTION = 0.1
TRAIN_SCENES, TEST_SCENES = 600, 150


class LabelledScenes(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """The images of one split and their masks, decoded one at a time.

    Args:
        rows: columns `image` and `mask` (`datasets.Image(decode=False)`) and `row`.
        class_names: name of each class, by index.
        reduce_labels: masks count from 1 and 0 is no class, as in ADE20K.
    """

    def __init__(self, rows: datasets.Dataset, class_names: Sequence[str], reduce_labels: bool = False) -> None:
        self.rows, self.class_names, self.reduce_labels = rows, list(class_names), reduce_labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One image as uint8 `(3, H, W)`, RGB whatever its mode, and its classes as int64 `(H, W)`.

        Raises:
            ValueError: naming the file (or the row, if it has no file) that cannot be decoded, whose labels are no
                integers or none of the classes, or which differ in size.
        """
        row = self.rows[int(index)]
        image_name, mask_name = (source_of(row[column], row["row"]) for column in ("image", "mask"))
        try:
            image = decode(row["image"])
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more
            raise ValueError(f"Expected a readable image, got {image_name}: {error}") from error
        try:
            mask = decode_label_map(row["mask"])
        except Exception as error:
            raise ValueError(f"Expected a readable mask, got {mask_name}: {error}") from error
        if mask.shape != image.shape[1:]:
            sizes = " and ".join(f"{height} x {width}" for height, width in (image.shape[1:], mask.shape))
            raise ValueError(f"Expected a mask as large as its image, got {sizes} pixels: {image_name}, {mask_name}")
        return image, self._classes(mask, mask_name)

    def _classes(self, mask: Tensor, name: str) -> Tensor:
        if self.reduce_labels:
            mask = torch.where((mask == 0) | (mask == IGNORED_LABEL), IGNORED_LABEL, mask - 1)
        unknown = (mask < 0) | (mask >= len(self.class_names)) & (mask != IGNORED_LABEL)
        if unknown.any():
            labels = ", ".join(str(label) for label in mask[unknown].unique()[:10].tolist())
            after = ", after one was taken off" if self.reduce_labels else ""
            last = len(self.class_names) - 1
            raise ValueError(f"Expected labels 0..{last} or {IGNORED_LABEL}{after}, got {labels} in {name}")
        return mask

    def sample(self, count: int) -> "LabelledScenes":
        """`count` images drawn once and for all, or all of them if there are no more.

        Raises:
            ValueError: if `count` is not positive.
        """
        if count < 1:
            raise ValueError(f"Expected at least 1 image to keep, got {count}")
        order = np.random.default_rng(SPLIT_SEED).permutation(len(self))
        return LabelledScenes(self.rows.select(sorted(order[:count])), self.class_names, self.reduce_labels)


@dataclass(frozen=True)
class SegmentationData:
    """A training split, the split it is evaluated on, and where both came from."""

    train: LabelledScenes
    evaluation: LabelledScenes
    source: str
    evaluation_split: str
    held_out_by: str
    license: str | None = None
    hub_id: str | None = None

    @property
    def class_names(self) -> list[str]:
        """Name of each class, by index."""
        return self.train.class_names


# Sources


def load_scenes() -> SegmentationData:
    """Scenes of scanned digits; those of the test split show digits that no training scene shows."""
    digits = load_digits()
    train = digit_scenes(digits.train, TRAIN_SCENES)
    test = digit_scenes(digits.evaluation, TEST_SCENES)
    return SegmentationData(
        LabelledScenes(train, SCENE_CLASSES),
        LabelledScenes(test, SCENE_CLASSES),
        source="digit scenes",
        evaluation_split="test",
        held_out_by="scenes of digits that no training scene shows, the same in every run",
        license=digits.license,
    )


def load_pairs(
    train_dir: str, validation_dir: str | None, class_names: Sequence[str], reduce_labels: bool = False
) -> SegmentationData:
    """Folders with `images` and `annotations`, whose files have the same names but for their endings.

    Raises:
        ValueError: if a folder does not exist or has no images, or an image or a mask has no counterpart.
    """
    validation = None if validation_dir is None else _read_pairs(validation_dir)
    return _assemble(_read_pairs(train_dir), validation, train_dir, class_names, reduce_labels)


def load_columns(
    source: str,
    class_names: Sequence[str],
    config_name: str | None = None,
    validation_file: str | None = None,
    image_column: str = "image",
    mask_column: str = "annotation",
    reduce_labels: bool = False,
) -> SegmentationData:
    """A dataset of the Hub, a local folder in its format, or local parquet files.

    Args:
        source: id, folder, or a pattern of parquet files.
        class_names: name of each class, by index.
        config_name: configuration of the dataset, if it has several.
        validation_file: pattern of parquet files to validate on, with parquet files alone.
        image_column: column of images.
        mask_column: column of masks.
        reduce_labels: see `LabelledScenes`.

    Raises:
        ValueError: if there is no split `train`, or a column is missing or of another kind.
    """
    if not source.endswith(".parquet"):
        splits = cast(datasets.DatasetDict, datasets.load_dataset(source, config_name))
        if "train" not in splits:
            raise ValueError(f"Expected a split 'train' in dataset {source!r}, got {sorted(splits)}")
        parts = splits["train"], splits.get("validation")
    else:
        parts = _read_parquet(source), None if validation_file is None else _read_parquet(validation_file)
    train, validation = (rows and _standard(rows, image_column, mask_column) for rows in parts)
    return _assemble(cast(datasets.Dataset, train), validation, source, class_names, reduce_labels)


def _read_pairs(folder: str) -> datasets.Dataset:
    found = []
    for part in ("images", "annotations"):
        below = os.path.join(folder, part)
        if not os.path.isdir(below):
            raise ValueError(f"Expected folders 'images' and 'annotations' in {folder!r}, got no {part!r}")
        found.append({str(Path(file).relative_to(below).with_suffix("")): file for file in images_below(below)})
    images, masks = found
    if not images:
        raise ValueError(f"Expected images below {os.path.join(folder, 'images')!r}, got none")
    if alone := sorted(set(images) ^ set(masks)):
        named = ", ".join((images | masks)[name] for name in alone[:10])
        raise ValueError(f"Expected a mask for every image and the reverse, got {len(alone)} files alone: {named}")
    names = sorted(images)
    pairs = {"image": [images[name] for name in names], "mask": [masks[name] for name in names]}
    rows = datasets.Dataset.from_dict(pairs)
    return _standard(rows, "image", "mask")


def _read_parquet(pattern: str) -> datasets.Dataset:
    files = [escape(file) for file in matching_files(pattern, (".parquet",))]
    return cast(datasets.Dataset, datasets.load_dataset("parquet", data_files={"train": files}, split="train"))


# One form for all of them


def _standard(rows: datasets.Dataset, image_column: str, mask_column: str) -> datasets.Dataset:
    for column in (image_column, mask_column):
        if column not in rows.features:
            raise ValueError(f"Expected a column {column!r}, got {', '.join(rows.features)}")
    if len(rows) == 0:
        raise ValueError("Expected at least one image, got an empty dataset")
    rows = rows.select_columns([image_column, mask_column])
    names = {old: new for old, new in ((image_column, "image"), (mask_column, "mask")) if old != new}
    rows = rows.rename_columns(names)
    for column in ("image", "mask"):
        try:
            rows = rows.cast_column(column, datasets.Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(f"Expected images in column {column!r}, got {rows.features[column]}") from error
    return rows.add_column("row", list(range(len(rows))))


def _assemble(
    train: datasets.Dataset,
    validation: datasets.Dataset | None,
    source: str,
    class_names: Sequence[str],
    reduce_labels: bool,
) -> SegmentationData:
    split, held_out_by = "validation", "the validation split of the data"
    if validation is None:
        held_out = max(round(VALIDATION_FRACTION * len(train)), 1)
        if len(train) < 2:
            raise ValueError("Expected at least 2 images to hold one out, got 1: pass a validation set")
        order = np.random.default_rng(SPLIT_SEED).permutation(len(train))
        train, validation = train.select(sorted(order[held_out:])), train.select(sorted(order[:held_out]))
        split, held_out_by = "train", "10 % of the training images, the same in every run"
    scenes = [LabelledScenes(rows, class_names, reduce_labels) for rows in (train, validation)]
    hub_id = source if not os.path.exists(source) and not source.endswith(".parquet") else None
    return SegmentationData(scenes[0], scenes[1], source, split, held_out_by, hub_id=hub_id)


# Training samples


class SceneExample(NamedTuple):
    """One image and its mask for a batch.

    Attributes:
        image: uint8 `(3, H, W)`.
        mask: int64 `(H, W)`.
        key: which sample of a training it is; None in evaluation.
    """

    image: Tensor
    mask: Tensor
    key: SampleKey | None = None


class TrainingScenes(torch.utils.data.Dataset[SceneExample]):
    """Images and masks of a split by `SampleKey`, augmented together as seed and key say, whoever loads them.

    Args:
        scenes: the split.
        augment: makes of an image and its mask a random variant; draws from the global generators.
        seed: of the training.
    """

    def __init__(
        self, scenes: LabelledScenes, augment: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], seed: int
    ) -> None:
        self.scenes, self.augment, self.seed = scenes, augment, seed

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, key: SampleKey) -> SceneExample:
        image, mask = self.scenes[key.index]
        with seeded(key.seed(self.seed)):
            return SceneExample(*self.augment(image, mask), key)
