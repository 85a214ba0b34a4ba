# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Images and the boxes of their objects, from PASCAL VOC and COCO as their owners distribute them.

A box is `(x_min, y_min, x_max, y_max)` in whole pixels from 0, its maxima just outside, whatever its source writes:
VOC counts pixels from 1 and includes the last, COCO gives a corner and a size in fractions of pixels.

No image is dropped: one without a box comes with empty `boxes`, and `object_discovery.correct_localization` refuses
it, so that leaving it out is a line of the caller's (`[image for image in images if image.boxes]`).
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from vitreg_hf.analysis.object_discovery import Box

# The list of COCO20k names files of 2014. In 2017 the same images got other names and other splits.
COCO_NAME = re.compile(r"(?:train2014/)?(COCO_train2014_\d{12}\.jpg)")
VOC_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class AnnotatedImage:
    """One image and its objects.

    Attributes:
        path: of the image, which exists.
        boxes: one per object, in pixels.
        classes: name of each object's class, in the order of `boxes`.
    """

    path: Path
    boxes: tuple[Box, ...]
    classes: tuple[str, ...]


def read_voc(root: Path, split: str = "trainval", include_hard: bool = True) -> list[AnnotatedImage]:
    """Read one split of PASCAL VOC 2007 or 2012.

    An object at 1-based inclusive `xmin..xmax` covers `xmin - 1` up to but not including `xmax`; likewise for y.

    Args:
        root: the folder of the year (`VOCdevkit/VOC2007`), with `JPEGImages`, `Annotations` and `ImageSets/Main`.
        split: name of a list in `ImageSets/Main`; LOST is measured on "trainval" (arXiv 2109.14279, section 4).
        include_hard: whether objects marked difficult or truncated count. By default they do, as in LOST's tables;
            without them some images have no box left. An object without such a mark is not hard.

    Returns:
        The images in the order of the list.

    Raises:
        ValueError: naming the folder, list, image or annotation that is missing or not as it should be.
    """
    root = Path(root)
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        _check_folder(root / folder, "the folder of one year of VOC")
    names = _names(root / "ImageSets" / "Main" / f"{split}.txt", VOC_NAME, "a name such as 000005 and nothing else")
    images = [root / "JPEGImages" / f"{name}.jpg" for name in names]
    annotations = [root / "Annotations" / f"{name}.xml" for name in names]
    _check_files(images, f"images of {split}")
    _check_files(annotations, f"annotations of {split}")
    return [
        _annotated(image, _read_voc_objects(annotation, include_hard))
        for image, annotation in zip(images, annotations)
    ]


def read_coco20k(root: Path, ids_file: Path, annotations: Path | None = None) -> list[AnnotatedImage]:
    """Read the images of COCO **train2014** that a list names; COCO20k is LOST's list of 19,817 of them.

    Crowds (`iscrowd`) are left out: their box surrounds many objects, and LOST's authors leave them out too. As in
    their code, corners are rounded to whole pixels. An object of less than a pixel may keep an empty box, which
    nothing overlaps. The annotations of all of train2014 are one large file, which is read as a whole.

    Args:
        root: the folder of COCO, with `train2014`.
        ids_file: one image per line, `COCO_train2014_000000000009.jpg`, with or without `train2014/` before it.
        annotations: the instances of train2014; if not given, `annotations/instances_train2014.json` in `root`.

    Returns:
        The images in the order of the list, classes by their names.

    Raises:
        ValueError: naming the folder, list, image or annotation that is missing or not as it should be.
    """
    root = Path(root)
    _check_folder(root / "train2014", "the folder of COCO")
    names = _names(Path(ids_file), COCO_NAME, "a name such as COCO_train2014_000000000009.jpg")
    images = [root / "train2014" / name for name in names]
    _check_files(images, f"images of {Path(ids_file).name}")
    instances = root / "annotations" / "instances_train2014.json" if annotations is None else Path(annotations)
    _check_files([instances], "annotations of train2014")
    try:
        objects = _coco_objects(json.loads(instances.read_bytes()), names)
    except KeyError as error:
        raise ValueError(f"Expected instances as COCO writes them, got {instances} without {error}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"Expected instances as COCO writes them, got {instances}: {error}") from error
    return [_annotated(image, objects[name]) for image, name in zip(images, names)]


def _annotated(image: Path, objects: Sequence[tuple[Box, str]]) -> AnnotatedImage:
    return AnnotatedImage(image, tuple(box for box, _ in objects), tuple(name for _, name in objects))


def _read_voc_objects(path: Path, include_hard: bool) -> list[tuple[Box, str]]:
    """Box and class of the objects in one file of `Annotations`.

    ElementTree is safe for files of strangers here: its parser, Expat, reads no other file or address that an entity
    or a DTD names, but stops, and since 2.4.1 it also stops entities that grow when expanded.
    """
    try:
        annotation = ElementTree.parse(path).getroot()
        if annotation.tag != "annotation":
            raise ValueError(f"its root is <{annotation.tag}>, not <annotation>")
        objects = [item for item in annotation.iterfind("object") if include_hard or not _is_hard(item)]
        return [(_voc_box(item), _text(item, "name")) for item in objects]
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # LookupError: an encoding nobody knows
        raise ValueError(f"Expected an annotation as VOC writes them, got {path}: {error}") from error


def _is_hard(item: ElementTree.Element) -> bool:
    return any(item.findtext(mark, "0").strip() == "1" for mark in ("difficult", "truncated"))


def _voc_box(item: ElementTree.Element) -> Box:
    """The object's own box; those of its parts (head, hands) lie deeper and are not meant."""
    x_min, y_min, x_max, y_max = (_pixel(_text(item, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
    if x_max < x_min or y_max < y_min:
        raise ValueError(f"its box {x_min, y_min, x_max, y_max} has a maximum below its minimum")
    return (x_min - 1, y_min - 1, x_max, y_max)


def _text(item: ElementTree.Element, tag: str) -> str:
    text = (item.findtext(tag) or "").strip()
    if not text:
        raise ValueError(f"an object has no {tag}")
    return text


def _pixel(number: str | float) -> int:
    """The whole pixel nearest to a coordinate, which may be a fraction."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"a coordinate is {number}")
    return round(value)


def _coco_objects(instances: dict[str, Any], names: list[str]) -> dict[str, list[tuple[Box, str]]]:
    """Box and class of the objects of each image that is named."""
    name_of = {image["id"]: image["file_name"] for image in instances["images"]}
    unknown = sorted(set(names) - set(name_of.values()))
    if unknown:
        raise ValueError(f"it knows nothing of {len(unknown)} of {len(names)} images, the first is {unknown[0]}")
    class_of = {category["id"]: category["name"] for category in instances["categories"]}
    objects: dict[str, list[tuple[Box, str]]] = {name: [] for name in names}
    for instance in instances["annotations"]:
        name = name_of[instance["image_id"]]
        if name in objects and not instance["iscrowd"]:
            objects[name].append((_coco_box(instance["bbox"]), class_of[instance["category_id"]]))
    return objects


def _coco_box(bbox: list[float]) -> Box:
    x, y, width, height = bbox
    if width < 0 or height < 0:
        raise ValueError(f"its box {bbox} has a negative size")
    return (_pixel(x), _pixel(y), _pixel(x + width), _pixel(y + height))


def _names(path: Path, pattern: re.Pattern[str], expected: str) -> list[str]:
    """The lines of a list of images, or the part in parentheses of the pattern that each must match."""
    if not path.is_file():
        raise ValueError(f"Expected a list of images at {path}, got no such file")
    names = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        match = pattern.fullmatch(line.strip())
        if match is None and line.strip():
            raise ValueError(f"Expected {expected} in line {number} of {path}, got {line.strip()!r}")
        if match is not None:
            names.append(match.group(match.lastindex or 0))
    if not names:
        raise ValueError(f"Expected names of images in {path}, got an empty list")
    if len(set(names)) < len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise ValueError(f"Expected every image once in {path}, got {twice} again")
    return names


def _check_folder(path: Path, what: str) -> None:
    if not path.is_dir():
        raise ValueError(f"Expected {what} to hold {path.name}, got no folder {path}")


def _check_files(paths: list[Path], what: str) -> None:
    """All are looked for before any is read: the reader learns at once how many are missing."""
    absent = [path for path in paths if not path.is_file()]
    if absent:
        raise ValueError(f"Expected {len(paths)} {what}, got {len(absent)} that are absent, the first is {absent[0]}")
