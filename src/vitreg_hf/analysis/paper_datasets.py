# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The fourteen image classification datasets of Table 1 of "Vision Transformers Need Registers" (arXiv 2309.16588).

Each row says where a public copy lies on the Hub and what the paper reports on it, so that a report can print both.

No row could be loaded where this was written, hence `checked=False` in all: names of repositories come from public
code and dataset pages, most are copies made by third parties, and splits and columns may differ from what stands here.
A dataset without a copy that loads without a script of its own has no `hub_id`, and then no splits or columns either.
The paper names neither splits nor sizes; these are the customary ones. Values are data, there are no tensors here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ReportedAccuracy:
    """Table 1, DINOv2-g: accuracy in percent of a logistic regression on one token per image, as reported.

    Attributes:
        cls: on [CLS].
        normal: on a random patch token of ordinary norm.
        outlier: on a random patch token of high norm.
    """

    cls: float
    normal: float
    outlier: float


@dataclass(frozen=True)
class PaperDataset:
    """One column of Table 1, and where to load it.

    Attributes:
        short_name: heading of the column in Table 1.
        full_name: the usual name.
        classes: number of classes, of the copy on the Hub where there is one.
        reported: what the paper reports for DINOv2-g.
        hub_id: repository of a copy on the Hub; None where none is known that loads without a script of its own.
        config: name of the dataset's configuration; None for the only one.
        train_split: split to train on, as `datasets.load_dataset(split=...)` reads it: "a+b" joins two.
        test_split: split to score on.
        image_column: column of the images.
        label_column: column of the class indices.
        checked: whether someone loaded this row and found splits, columns and classes as stated.
    """

    short_name: str
    full_name: str
    classes: int
    reported: ReportedAccuracy
    hub_id: str | None = None
    config: str | None = None
    train_split: str | None = None
    test_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    checked: bool = False


def _on_hub(
    short_name: str,
    full_name: str,
    classes: int,
    reported: ReportedAccuracy,
    hub_id: str,
    train_split: str = "train",
    test_split: str = "test",
    image_column: str = "image",
    label_column: str = "label",
) -> PaperDataset:
    """A row with a copy on the Hub, none of which has more than one configuration; defaults are what most call it."""
    splits, columns = (train_split, test_split), (image_column, label_column)
    return PaperDataset(short_name, full_name, classes, reported, hub_id, None, *splits, *columns)


# SUN: one partition of the ten that its authors publish. DTD: the first of ten. Cal101: its copy counts the background
# as a class. VOC: an image has several labels, so a classifier of one label per image cannot score it as it stands.
PAPER_DATASETS: tuple[PaperDataset, ...] = (
    _on_hub(
        "IN1k",
        "ImageNet-1k",
        1000,
        ReportedAccuracy(86.0, 65.8, 69.0),
        "ILSVRC/imagenet-1k",  # gated: needs a login that accepted its terms
        test_split="validation",  # its test split has no labels
    ),
    PaperDataset("P205", "Places205", 205, ReportedAccuracy(66.4, 53.1, 55.1)),
    _on_hub(
        "Airc",
        "FGVC-Aircraft (variants)",
        100,
        ReportedAccuracy(87.3, 17.1, 79.1),
        "Donghyun99/FGVC-Aircraft",
        train_split="train+val",
    ),
    _on_hub("CF10", "CIFAR-10", 10, ReportedAccuracy(99.4, 97.1, 99.3), "uoft-cs/cifar10", image_column="img"),
    _on_hub(
        "CF100",
        "CIFAR-100",
        100,
        ReportedAccuracy(94.5, 81.3, 93.7),
        "uoft-cs/cifar100",
        image_column="img",
        label_column="fine_label",
    ),
    _on_hub("CUB", "CUB-200-2011", 200, ReportedAccuracy(91.3, 18.6, 84.9), "Donghyun99/CUB-200-2011"),
    _on_hub("Cal101", "Caltech-101", 102, ReportedAccuracy(96.9, 73.2, 97.6), "dpdl-benchmark/caltech101"),
    _on_hub("Cars", "Stanford Cars", 196, ReportedAccuracy(91.5, 10.8, 85.2), "tanganke/stanford_cars"),
    _on_hub("DTD", "Describable Textures", 47, ReportedAccuracy(85.2, 63.1, 84.9), "tanganke/dtd"),
    _on_hub(
        "Flow",
        "Oxford Flowers-102",
        102,
        ReportedAccuracy(99.7, 59.5, 99.6),
        "dpdl-benchmark/oxford_flowers102",
        train_split="train+validation",
    ),
    _on_hub(
        "Food",
        "Food-101",
        101,
        ReportedAccuracy(94.7, 74.2, 93.5),
        "ethz/food101",
        test_split="validation",  # its name on the Hub for the published test images
    ),
    _on_hub("Pets", "Oxford-IIIT Pet", 37, ReportedAccuracy(96.9, 47.8, 94.1), "timm/oxford-iiit-pet"),
    _on_hub("SUN", "SUN397", 397, ReportedAccuracy(78.6, 37.7, 78.5), "tanganke/sun397"),
    PaperDataset("VOC", "PASCAL VOC 2007", 20, ReportedAccuracy(89.1, 70.8, 89.7)),
)


@dataclass(frozen=True)
class DatasetPlace:
    """Where a set of the paper is found: all that `images.export_dataset` needs."""

    short_name: str
    hub_id: str
    config: str | None
    train_split: str
    test_split: str
    image_column: str
    label_column: str


def paper_dataset(short_name: str) -> DatasetPlace:
    """Where one of the fourteen sets is found, by the name that the paper's table gives it, in any case.

    Raises:
        ValueError: if there is none of that name, or its place on the Hub is not known.
    """
    found = [one for one in PAPER_DATASETS if one.short_name.lower() == short_name.lower()]
    if not found:
        raise ValueError(f"Expected one of {', '.join(one.short_name for one in PAPER_DATASETS)}, got {short_name!r}")
    one = found[0]
    place = (one.hub_id, one.train_split, one.test_split, one.image_column, one.label_column)
    if None in place:
        raise ValueError(f"Expected a set whose place on the Hub is known, got {short_name!r}: export it by its name")
    hub_id, train, test, image, label = (str(part) for part in place)
    return DatasetPlace(one.short_name, hub_id, one.config, train, test, image, label)
