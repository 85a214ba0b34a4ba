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

from vitreg_hf.training.class_folders import class_folders
from vitreg_hf.training.classification_settings import ImageDataSettings
from vitreg_hf.training.labelled_images import SPLIT_SEED, ImageClassificationData, LabelledImages
from vitreg_hf.training.shard_files import check_numbering, matching_files

VALIDATION_FRACTION = 0.1
DIGITS_TEST_FRACTION = 0.2

# Sources


def load_images(settings: ImageDataSettings) -> ImageClassificationData:
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
    if not os.path.exists(name):
        return replace(data, hub_id=name)
    _check_splits(datasets.load_dataset_builder(name, config_name), splits, label_column)
    return data


def load_folders(train_dir: str, validation_dir: str | None = None) -> ImageClassificationData:
    """Folders with one subfolder per class, images at any depth below it; see `class_folders`.

    The validation folder may lack some of the classes.

    Raises:
        ValueError: if a folder does not exist, images lie beside the classes, there are fewer than two classes, a
            class has no images to train on, or there is one to validate on that is not trained.
    """
    train = _load_folder(train_dir)
    if len(train.features["label"].names) < 2:
        raise ValueError(f"Expected two or more folders of classes below {train_dir!r}, got one")
    validation = None if validation_dir is None else _load_folder(validation_dir, may_lack_images=True)
    return _assemble(train, validation, train_dir, "image", "label")


def load_parquet(
    train_file: str, validation_file: str | None = None, image_column: str = "image", label_column: str = "label"
) -> ImageClassificationData:
    """Local parquet files, by patterns as of `matching_files`; columns as in `load_hub`, images as bytes or as paths.

    Raises:
        ValueError: if there is no such file, files number their classes differently, or a column is missing or of
            another kind.
    """
    train, validation = (_load_parquet(file, label_column) if file else None for file in (train_file, validation_file))
    return _assemble(cast(datasets.Dataset, train), validation, train_file, image_column, label_column)


def _check_splits(builder: datasets.DatasetBuilder, splits: datasets.DatasetDict, label_column: str) -> None:
    """Refuse parquet files of a folder that number their classes in ways of their own."""
    for split, files in (getattr(builder.config, "data_files", None) or {}).items():
        names = getattr(splits[str(split)].features.get(label_column), "names", None)
        check_numbering([file for file in map(str, files) if file.endswith(".parquet")], label_column, names)


def _load_folder(folder: str, may_lack_images: bool = False) -> datasets.Dataset:
    files = class_folders(folder)
    if not any(files.values()):
        raise ValueError(f"Expected images in folders of classes below {folder!r}, got none")
    empty = [name for name, images in files.items() if not images]
    if empty and not may_lack_images:
        raise ValueError(f"Expected images in every folder below {folder!r}, got none in {', '.join(empty[:10])}")
    names = [name for name, images in files.items() if images]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = [(image, label) for label, name in enumerate(names) for image in files[name]]
    images, labels = zip(*rows, strict=True)
    return datasets.Dataset.from_dict({"image": list(images), "label": list(labels)}, features=features)


def _load_parquet(pattern: str, label_column: str) -> datasets.Dataset:
    files = matching_files(pattern, (".parquet",))
    data_files = {"train": [escape(file) for file in files]}
    rows = cast(datasets.Dataset, datasets.load_dataset("parquet", data_files=data_files, split="train"))
    check_numbering(files, label_column, getattr(rows.features.get(label_column), "names", None))
    return rows


# One form for all of them


def _assemble(
    train: datasets.Dataset, validation: datasets.Dataset | None, source: str, image_column: str, label_column: str
) -> ImageClassificationData:
    standard = _standard(train, image_column, label_column)
    if validation is None:
        split, held_out_by = "train", "10 % of the training images, stratified by class, the same in every run"
        standard, evaluation = _stratified_split(standard, VALIDATION_FRACTION)
    else:
        evaluation = _standard(validation, image_column, label_column, standard.features["label"].names)
        split, held_out_by = "validation", "the validation split of the data" + _without_classes(evaluation)
    return ImageClassificationData(LabelledImages(standard), LabelledImages(evaluation), source, split, held_out_by)


def _without_classes(rows: datasets.Dataset) -> str:
    """Says which classes have no images, in words to put behind a noun; nothing if all have."""
    names = rows.features["label"].names
    counts = np.bincount(rows["label"], minlength=len(names))
    missing = [name for name, count in zip(names, counts, strict=True) if count == 0]
    more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
    return f", without images of {', '.join(missing[:10])}{more}" if missing else ""


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
            f"got {fewest} and {len(rows)}: pass a validation set (--validation_dir in the examples)"
        )
    parts = rows.train_test_split(test_size=fraction, seed=SPLIT_SEED, stratify_by_column="label")
    return parts["train"], parts["test"]
