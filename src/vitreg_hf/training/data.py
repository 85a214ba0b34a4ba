# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Where labelled images come from: the Hub, folders, parquet files, or the digits that scikit-learn ships.

All of them come through `datasets` and take one form: columns `image`, still encoded, and `label`, a class index.
"""

import math
import os
from dataclasses import replace
from glob import escape
from typing import cast

import datasets
import numpy as np
import PIL.Image

from vitreg_hf.training.classification_settings import ImageClassificationSettings
from vitreg_hf.training.labelled_images import SPLIT_SEED, ImageClassificationData, LabelledImages

VALIDATION_FRACTION = 0.1
DIGITS_TEST_FRACTION = 0.2

# Sources


def load_images(settings: ImageClassificationSettings) -> ImageClassificationData:
    """The images that the settings name.

    Raises:
        ValueError: as the functions below.
    """
    columns = (settings.image_column_name, settings.label_column_name)
    if settings.dataset_name is not None:
        data = load_hub(settings.dataset_name, settings.dataset_config_name, *columns)
    elif settings.train_dir is not None:
        data = load_folders(settings.train_dir, settings.validation_dir)
    elif settings.train_file is not None:
        data = load_parquet(settings.train_file, settings.validation_file, *columns)
    else:
        data = load_digits()
    if settings.max_train_samples is None:
        return data
    return replace(data, train=data.train.sample(settings.max_train_samples))


def load_digits() -> ImageClassificationData:
    """The 1,797 scanned digits of 8 x 8 pixels in scikit-learn, as RGB images; a stratified fifth is the test set."""
    from sklearn.datasets import load_digits as load_scans

    scans = load_scans()
    levels = np.rint(scans.images * (255 / 16)).astype(np.uint8)  # grey levels 0..16 to 0..255
    images = [PIL.Image.fromarray(image).convert("RGB") for image in levels]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    rows = datasets.Dataset.from_dict({"image": images, "label": scans.target.tolist()}, features=features)
    train, test = _stratified_split(_standard(rows, "image", "label"), DIGITS_TEST_FRACTION)
    return ImageClassificationData(
        LabelledImages(train),
        LabelledImages(test),
        source="digits",
        evaluation_split="test",
        held_out_by="20 % of the images, stratified by class, the same in every run; the default settings were chosen "
        "by their accuracy on these images",
        license="cc-by-4.0",
    )


def load_hub(
    name: str, config_name: str | None = None, image_column: str = "image", label_column: str = "label"
) -> ImageClassificationData:
    """A dataset of the Hub, or a local folder in its format.

    Args:
        name: id or folder.
        config_name: its configuration, if it has several.
        image_column: column of images.
        label_column: column of class indices or names.

    Raises:
        ValueError: if there is no split `train`, or a column is missing or of another kind.
    """
    splits = cast(datasets.DatasetDict, datasets.load_dataset(name, config_name))
    if "train" not in splits:
        raise ValueError(f"Expected a split 'train' in dataset {name!r}, got {sorted(splits)}")
    data = _assemble(splits["train"], splits.get("validation"), name, image_column, label_column)
    return data if os.path.exists(name) else replace(data, hub_id=name)


def load_folders(train_dir: str, validation_dir: str | None = None) -> ImageClassificationData:
    """Folders with one subfolder of images per class.

    Raises:
        ValueError: if a folder does not exist, or holds fewer than two subfolders with images.
    """
    train, validation = _load_folder(train_dir), None if validation_dir is None else _load_folder(validation_dir)
    return _assemble(train, validation, train_dir, "image", "label")


def load_parquet(
    train_file: str, validation_file: str | None = None, image_column: str = "image", label_column: str = "label"
) -> ImageClassificationData:
    """Local parquet files; columns as in `load_hub`, images as encoded bytes or as paths.

    Raises:
        ValueError: if a file does not exist, or a column is missing or of another kind.
    """
    train, validation = (_load_parquet(file) if file else None for file in (train_file, validation_file))
    return _assemble(cast(datasets.Dataset, train), validation, train_file, image_column, label_column)


def _load_folder(folder: str) -> datasets.Dataset:
    if not os.path.isdir(folder):
        raise ValueError(f"Expected a folder of images, got {folder!r}")
    # The pattern, unlike the folder's name, keeps classes called "train" or "test" from being taken for splits.
    files = {"train": os.path.join(escape(folder), "**")}
    try:
        rows = datasets.load_dataset("imagefolder", data_files=files, split="train")
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"Expected images below {folder!r}, got none: {error}") from error
    if "label" not in rows.features:
        raise ValueError(f"Expected one subfolder per class below {folder!r}, got images of a single folder")
    return cast(datasets.Dataset, rows)


def _load_parquet(file: str) -> datasets.Dataset:
    if not os.path.isfile(file):
        raise ValueError(f"Expected a parquet file, got {file!r}")
    return cast(datasets.Dataset, datasets.load_dataset("parquet", data_files={"train": escape(file)}, split="train"))


# One form for all of them


def _assemble(
    train: datasets.Dataset, validation: datasets.Dataset | None, source: str, image_column: str, label_column: str
) -> ImageClassificationData:
    standard = _standard(train, image_column, label_column)
    if validation is None:
        split, held_out_by = "train", "10 % of the training images, stratified by class, the same in every run"
        standard, evaluation = _stratified_split(standard, VALIDATION_FRACTION)
    else:
        split, held_out_by = "validation", "the validation split of the data"
        evaluation = _standard(validation, image_column, label_column, standard.features["label"].names)
    return ImageClassificationData(LabelledImages(standard), LabelledImages(evaluation), source, split, held_out_by)


def _standard(
    rows: datasets.Dataset, image_column: str, label_column: str, class_names: list[str] | None = None
) -> datasets.Dataset:
    """The columns of `LabelledImages`; labels index `class_names` or, without these, the classes found."""
    _check_columns(rows, image_column, label_column)
    names = _label_names(rows, label_column)
    class_names = _class_names(rows, label_column) if class_names is None else class_names
    index_of = {name: index for index, name in enumerate(class_names)}
    if unknown := sorted(set(names) - set(index_of)):
        raise ValueError(f"Expected the classes of the training images, got others: {', '.join(unknown[:10])}")
    images = rows.select_columns([image_column])
    images = images if image_column == "image" else images.rename_column(image_column, "image")
    try:
        images = images.cast_column("image", datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        kind = rows.features[image_column]
        raise ValueError(f"Expected images in column {image_column!r}, got {kind}") from error
    labels = [index_of[name] for name in names]
    images = images.add_column("label", labels, feature=datasets.ClassLabel(names=class_names))
    return images.add_column("row", list(range(len(images))))


def _check_columns(rows: datasets.Dataset, *columns: str) -> None:
    for column in columns:
        if column not in rows.features:
            raise ValueError(f"Expected a column {column!r}, got {', '.join(rows.features)}")
    if len(rows) == 0:
        raise ValueError("Expected at least one image, got an empty dataset")


def _label_names(rows: datasets.Dataset, column: str) -> list[str]:
    """The class of every row by name: two splits may number the same classes differently."""
    feature, values = rows.features[column], list(rows[column])
    is_class = isinstance(feature, datasets.ClassLabel)
    missing = sum(value is None or (is_class and value < 0) for value in values)
    if missing:
        raise ValueError(f"Expected a label for every image, got {missing} without one in column {column!r}")
    if is_class:
        return [feature.names[value] for value in values]
    if not isinstance(values[0], str | int):
        raise ValueError(f"Expected class indices or names in column {column!r}, got {feature}")
    return [str(value) for value in values]


def _class_names(rows: datasets.Dataset, column: str) -> list[str]:
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    return [str(value) for value in sorted(set(rows[column]))]  # sorted before naming: 2 comes before 10


def _stratified_split(rows: datasets.Dataset, fraction: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    counts = np.bincount(rows["label"], minlength=len(rows.features["label"].names))
    classes = int((counts > 0).sum())
    fewest, needed = counts[counts > 0].min(), math.ceil(classes / fraction)
    if fewest < 2 or len(rows) < needed:
        raise ValueError(
            f"Expected at least 2 images of every class and {needed} in all to hold out {fraction:.0%} of them, "
            f"got {fewest} and {len(rows)}: pass a validation set"
        )
    parts = rows.train_test_split(test_size=fraction, seed=SPLIT_SEED, stratify_by_column="label")
    return parts["train"], parts["test"]
