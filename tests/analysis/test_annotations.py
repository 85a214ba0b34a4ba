# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Small folders in the layouts of VOC and COCO, read back; every mistake names its file."""

import json
import pyexpat
from pathlib import Path

import pytest

from vitreg_hf.analysis.annotations import AnnotatedImage, read_coco20k, read_voc

COCO_NAMES = [f"COCO_train2014_{number:012d}.jpg" for number in (9, 25, 30)]


def voc_object(name, box, difficult="0", truncated="0", inner=""):
    sides = "".join(f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
    marks = f"<truncated>{truncated}</truncated><difficult>{difficult}</difficult>"
    return f"<object>{inner}<name>{name}</name>{marks}<bndbox>{sides}</bndbox></object>"


def write_voc(root, objects_by_name):
    """A folder of one year with the split "trainval"; its images are files without pixels, which nobody reads."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for name, objects in objects_by_name.items():
        (root / "JPEGImages" / f"{name}.jpg").touch()
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>\n{''.join(objects)}\n</annotation>\n")
    (root / "ImageSets" / "Main" / "trainval.txt").write_text("".join(f"{name}\n" for name in objects_by_name))
    return root


def instances(**changes):
    """Annotations of three images: 9 with a dog and a crowd, 25 with a small cat, 30 with nothing."""
    annotations = [
        {"image_id": 25, "category_id": 17, "bbox": [10.4, 20.6, 5.2, 4.0], "iscrowd": 0},
        {"image_id": 9, "category_id": 18, "bbox": [0, 0, 640.0, 479.6], "iscrowd": 0},
        {"image_id": 9, "category_id": 1, "bbox": [0, 0, 100, 100], "iscrowd": 1},
        {"image_id": 77, "category_id": 18, "bbox": [1, 2, 3, 4], "iscrowd": 0},
    ]
    numbers = {9: COCO_NAMES[0], 25: COCO_NAMES[1], 30: COCO_NAMES[2], 77: "COCO_train2014_000000000077.jpg"}
    return {
        "images": [{"id": number, "file_name": name} for number, name in numbers.items()],
        "categories": [{"id": 1, "name": "person"}, {"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}],
        "annotations": annotations,
        **changes,
    }


def write_coco(root, lines=COCO_NAMES, content=None):
    """A folder of COCO with three images, their annotations, and a list of names beside it."""
    (root / "train2014").mkdir(parents=True)
    (root / "annotations").mkdir()
    for name in COCO_NAMES:
        (root / "train2014" / name).touch()
    (root / "annotations" / "instances_train2014.json").write_text(
        json.dumps(instances() if content is None else content)
    )
    (root / "list.txt").write_text("\n".join(lines) + "\n")
    return root, root / "list.txt"


def test_voc_boxes_become_half_open_pixels_from_0(tmp_path):
    root = write_voc(
        tmp_path / "VOC2007",
        {
            "000007": [voc_object("car", (1, 1, 500, 375)), voc_object("dog", (48, 240, 48, 371))],
            "000005": [voc_object("cat", (8, 12, 352, 498))],
        },
    )
    assert read_voc(root) == [
        AnnotatedImage(root / "JPEGImages" / "000007.jpg", ((0, 0, 500, 375), (47, 239, 48, 371)), ("car", "dog")),
        AnnotatedImage(root / "JPEGImages" / "000005.jpg", ((7, 11, 352, 498),), ("cat",)),
    ]


def test_voc_hard_objects_can_be_left_out_but_no_image_is(tmp_path):
    easy, hard = voc_object("car", (1, 1, 9, 9)), voc_object("dog", (1, 1, 5, 5), difficult="1")
    cut = voc_object("cat", (3, 3, 7, 7), truncated=" 1 ")
    root = write_voc(tmp_path, {"a": [hard, easy, cut], "b": [hard], "c": [cut]})
    assert [image.classes for image in read_voc(root)] == [("dog", "car", "cat"), ("dog",), ("cat",)]
    without = read_voc(root, include_hard=False)
    assert [image.classes for image in without] == [("car",), (), ()]
    assert [image.boxes for image in without] == [((0, 0, 9, 9),), (), ()]
    assert [image.path.stem for image in without] == ["a", "b", "c"]


def test_voc_objects_without_marks_are_not_hard_and_parts_are_no_objects(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"
    plain = voc_object("person", (1, 2, 30, 40), inner=part).replace("<truncated>0</truncated>", "")
    root = write_voc(tmp_path, {"a": [plain.replace("<difficult>0</difficult>", "")]})
    (image,) = read_voc(root, include_hard=False)
    assert image.boxes == ((0, 1, 30, 40),)
    assert image.classes == ("person",)


def test_voc_fractions_go_to_the_nearest_pixel(tmp_path):
    root = write_voc(tmp_path, {"a": [voc_object("dog", ("45.7", "1.2", "99.9999", "80"))]})
    assert read_voc(root)[0].boxes == ((45, 0, 100, 80),)


def test_voc_reads_the_split_that_is_asked_for(tmp_path):
    root = write_voc(tmp_path, {"a": [], "b": []})
    (root / "ImageSets" / "Main" / "val.txt").write_text("\n b \r\n\n")
    assert [image.path.stem for image in read_voc(root, "val")] == ["b"]
    with pytest.raises(ValueError, match=r"list of images at .*test\.txt, got no such file"):
        read_voc(root, "test")


@pytest.mark.parametrize("folder", ["JPEGImages", "Annotations", "ImageSets/Main"])
def test_voc_names_the_missing_folder(tmp_path, folder):
    root = write_voc(tmp_path / "VOC2007", {"a": []})
    (root / folder).rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"one year of VOC to hold .*{folder}"):
        read_voc(root)


def test_voc_counts_the_files_that_are_absent(tmp_path):
    root = write_voc(tmp_path, {"a": [], "b": [], "c": []})
    for name in ("b", "c"):
        (root / "Annotations" / f"{name}.xml").unlink()
    with pytest.raises(ValueError, match=r"3 annotations of trainval, got 2 that are absent, the first is .*b\.xml"):
        read_voc(root)
    (root / "JPEGImages" / "c.jpg").unlink()
    with pytest.raises(ValueError, match=r"3 images of trainval, got 1 that are absent, the first is .*c\.jpg"):
        read_voc(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><object>", "no element found"),
        ("", "no element found"),
        ("<html></html>", "its root is <html>, not <annotation>"),
        ('<?xml version="1.0" encoding="nonsense"?><annotation/>', "encoding"),
        ("<annotation><object><name>dog</name></object></annotation>", "an object has no bndbox/xmin"),
        (voc_object("", (1, 1, 2, 2)), "an object has no name"),
        (voc_object("dog", (1, 1, 2, "")), "an object has no bndbox/ymax"),
        (voc_object("dog", (1, "one", 2, 2)), "could not convert string to float: 'one'"),
        (voc_object("dog", (1, 1, "nan", 2)), "a coordinate is nan"),
        (voc_object("dog", (5, 1, 4, 2)), r"its box \(5, 1, 4, 2\) has a maximum below its minimum"),
    ],
)
def test_a_broken_voc_annotation_is_named(tmp_path, text, message):
    root = write_voc(tmp_path, {"fine": [], "broken": []})
    text = f"<annotation>{text}</annotation>" if text.startswith("<object>") else text
    (root / "Annotations" / "broken.xml").write_text(text)
    with pytest.raises(ValueError, match=f"as VOC writes them, got .*broken.xml: .*{message}"):
        read_voc(root)


def test_a_voc_annotation_cannot_read_other_files(tmp_path):
    root = write_voc(tmp_path, {"a": []})
    (tmp_path / "secret.txt").write_text("secret")
    entity = f'<!DOCTYPE annotation [<!ENTITY leak SYSTEM "{(tmp_path / "secret.txt").as_uri()}">]>'
    content = voc_object("&leak;", (1, 1, 2, 2))
    (root / "Annotations" / "a.xml").write_text(f"{entity}<annotation>{content}</annotation>")
    with pytest.raises(ValueError, match=r"a\.xml: undefined entity"):
        read_voc(root)


@pytest.mark.skipif(pyexpat.version_info < (2, 4, 1), reason="Expat limits what entities grow to since 2.4.1")
def test_a_voc_annotation_cannot_fill_the_memory(tmp_path):
    root = write_voc(tmp_path, {"a": []})
    grow = "".join(f'<!ENTITY e{level} "{f"&e{level - 1};" * 10}">' for level in range(1, 10))
    bomb = f'<!DOCTYPE annotation [<!ENTITY e0 "0123456789">{grow}]>'
    (root / "Annotations" / "a.xml").write_text(f"{bomb}<annotation>{voc_object('&e9;', (1, 1, 2, 2))}</annotation>")
    with pytest.raises(ValueError, match=r"a\.xml: .*amplification"):
        read_voc(root)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "got an empty list"),
        ("a\nb -1\n", r"nothing else in line 2 of .*trainval\.txt, got 'b -1'"),  # a list of one class
        ("../a\n", r"in line 1 of .*, got '\.\./a'"),
        ("a\nb\na\n", r"every image once in .*trainval\.txt, got a again"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path, lines, message):
    root = write_voc(tmp_path, {"a": [], "b": []})
    (root / "ImageSets" / "Main" / "trainval.txt").write_text(lines)
    with pytest.raises(ValueError, match=message):
        read_voc(root)


def test_coco_boxes_are_rounded_corners_in_the_order_of_the_list(tmp_path):
    root, names = write_coco(tmp_path, lines=[COCO_NAMES[2], f"train2014/{COCO_NAMES[1]}", COCO_NAMES[0]])
    assert read_coco20k(root, names) == [
        AnnotatedImage(root / "train2014" / COCO_NAMES[2], (), ()),  # kept without a box
        AnnotatedImage(root / "train2014" / COCO_NAMES[1], ((10, 21, 16, 25),), ("cat",)),
        AnnotatedImage(root / "train2014" / COCO_NAMES[0], ((0, 0, 640, 480),), ("dog",)),  # the crowd is left out
    ]


def test_coco_reads_only_the_images_of_the_list(tmp_path):
    root, names = write_coco(tmp_path, lines=[COCO_NAMES[1]])
    (root / "train2014" / COCO_NAMES[0]).unlink()
    assert [image.path.name for image in read_coco20k(root, names)] == [COCO_NAMES[1]]


def test_coco_annotations_may_lie_elsewhere(tmp_path):
    root, names = write_coco(tmp_path / "coco")
    there = root / "annotations" / "instances_train2014.json"
    elsewhere = there.rename(tmp_path / "mine.json")
    assert len(read_coco20k(root, names, elsewhere)) == 3
    with pytest.raises(
        ValueError, match=r"annotations of train2014, got 1 that are absent, .*instances_train2014\.json"
    ):
        read_coco20k(root, names)


def test_coco_names_what_is_missing(tmp_path):
    root, names = write_coco(tmp_path / "coco")
    with pytest.raises(ValueError, match=r"list of images at .*none\.txt, got no such file"):
        read_coco20k(root, tmp_path / "none.txt")
    (root / "train2014" / COCO_NAMES[1]).unlink()
    with pytest.raises(ValueError, match=rf"3 images of list\.txt, got 1 that are absent, .*{COCO_NAMES[1]}"):
        read_coco20k(root, names)
    (root / "train2014").rename(tmp_path / "train2017")
    with pytest.raises(ValueError, match="folder of COCO to hold train2014, got no folder"):
        read_coco20k(root, names)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("000000000139.jpg", "such as COCO_train2014_000000000009.jpg in line 2 of .*, got '000000000139.jpg'"),
        ("val2014/COCO_val2014_000000000042.jpg", "in line 2 of .*, got 'val2014/"),
        ("train2014/../COCO_train2014_000000000009.jpg", "in line 2"),
        (f"train2014/{COCO_NAMES[0]}", f"every image once in .*, got {COCO_NAMES[0]} again"),
    ],
)
def test_coco_lists_of_other_names_are_refused(tmp_path, line, message):
    root, names = write_coco(tmp_path, lines=[COCO_NAMES[0], line])
    with pytest.raises(ValueError, match=message):
        read_coco20k(root, names)


def one(**changes):
    return instances(annotations=[{"image_id": 9, "category_id": 18, "bbox": [0, 0, 1, 1], "iscrowd": 0, **changes}])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "indices must be integers"),
        ({"images": []}, "knows nothing of 3 of 3 images, the first is COCO_train2014_000000000009.jpg"),
        ({"annotations": []}, "without 'images'"),
        (one(category_id=999), "without 999"),
        (one(image_id=123), "without 123"),
        (one(bbox=[0, 0, 1]), "not enough values"),
        (one(bbox=[0, 0, -1, 1]), r"its box \[0, 0, -1, 1\] has a negative size"),
        (one(bbox=[0, float("nan"), 1, 1]), "a coordinate is nan"),
        (one(bbox=None), "NoneType"),
    ],
)
def test_broken_coco_instances_are_named(tmp_path, content, message):
    root, names = write_coco(tmp_path, content=content)
    with pytest.raises(ValueError, match=f"as COCO writes them, got .*instances_train2014.json:? .*{message}"):
        read_coco20k(root, names)


def test_instances_that_are_no_json_are_named(tmp_path):
    root, names = write_coco(tmp_path)
    (root / "annotations" / "instances_train2014.json").write_text("{")
    with pytest.raises(ValueError, match=r"instances_train2014\.json: Expecting property name"):
        read_coco20k(root, names)


def test_paths_may_be_strings(tmp_path):
    root, names = write_coco(tmp_path / "coco")
    assert read_coco20k(str(root), str(names))[0].path == Path(root) / "train2014" / COCO_NAMES[0]
    voc = write_voc(tmp_path / "voc", {"a": []})
    assert read_voc(str(voc))[0].path == voc / "JPEGImages" / "a.jpg"
