# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Sources of labelled images, and the one form they take."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from vitreg_hf.training.classification_settings import ImageClassificationSettings
from vitreg_hf.training.data import load_digits, load_folders, load_hub, load_images, load_parquet

from .conftest import image_of_mode


def labels_of(images: Any) -> list[int]:
    return list(images.rows["label"])


def test_digits_are_split_once_and_for_all_by_class() -> None:
    data, again = load_digits(), load_digits()
    assert (len(data.train), len(data.evaluation)) == (1437, 360)
    assert data.class_names == [str(digit) for digit in range(10)]
    assert labels_of(data.evaluation) == labels_of(again.evaluation)
    shares = np.bincount(labels_of(data.evaluation)) / np.bincount(labels_of(data.train) + labels_of(data.evaluation))
    assert np.allclose(shares, 0.2, atol=0.005)


def test_digits_are_grey_levels_over_the_whole_range() -> None:
    from sklearn.datasets import load_digits as load_scans

    data = load_digits()
    pixels = torch.stack([data.train[index][0] for index in range(len(data.train))])
    assert pixels.dtype == torch.uint8
    assert pixels.shape[1:] == (3, 8, 8)
    assert torch.equal(pixels[:, 0], pixels[:, 2])
    assert (pixels.min(), pixels.max()) == (0, 255)
    scans = {tuple(np.rint(scan.flatten() * 255 / 16).astype(int)) for scan in load_scans().images}
    assert {tuple(image[0].flatten().tolist()) for image in pixels} <= scans


def test_no_image_is_in_both_splits() -> None:
    data = load_digits()
    train = {data.train.rows[index]["image"]["bytes"] for index in range(len(data.train))}
    held_out = {data.evaluation.rows[index]["image"]["bytes"] for index in range(len(data.evaluation))}
    assert len(train) + len(held_out) > 1790  # two scans or so are the same picture
    assert len(train & held_out) <= 1


def test_a_folder_without_validation_holds_out_a_tenth(image_folder: Path) -> None:
    data = load_folders(str(image_folder))
    assert data.class_names == ["cat", "dog"]
    assert (len(data.train), len(data.evaluation)) == (21, 3)
    assert set(labels_of(data.evaluation)) == {0, 1}
    assert "10 %" in data.held_out_by


def test_classes_are_matched_by_name_not_by_number(image_folder: Path, tmp_path: Path) -> None:
    validation = tmp_path / "validation"
    (validation / "dog").mkdir(parents=True)
    (validation / "cat").mkdir()
    image_of_mode("RGB").save(validation / "dog" / "a.png")
    image_of_mode("RGB").save(validation / "cat" / "b.png")
    (image_folder / "ant").mkdir()
    image_of_mode("RGB").save(image_folder / "ant" / "c.png")
    data = load_folders(str(image_folder), str(validation))
    assert data.class_names == ["ant", "cat", "dog"]
    assert sorted(labels_of(data.evaluation)) == [1, 2]


def test_classes_named_like_splits_and_odd_paths(tmp_path: Path) -> None:
    folder = tmp_path / "my [photos]*"
    for name in ("test", "train"):
        (folder / name).mkdir(parents=True)
        for index in range(10):
            image_of_mode("RGB", index).save(folder / name / f"{index}.png")
    data = load_folders(str(folder))
    assert data.class_names == ["test", "train"]
    assert len(data.train) + len(data.evaluation) == 20


def test_folders_that_cannot_be_trained_on_are_refused(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected a folder of images, got '/no/such"):
        load_folders("/no/such")
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="Expected images in folders of classes below"):
        load_folders(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="one subfolder per class"):
        load_folders(str(image_folder / "cat"))
    with pytest.raises(ValueError, match=r"two or more folders of classes below .*, got one"):
        load_folders(str(one_class(image_folder, tmp_path)))
    (image_folder / "bird").mkdir()
    image_of_mode("RGB").save(image_folder / "bird" / "only.png")
    with pytest.raises(ValueError, match="at least 2 images of every class and 30 in all to hold out 10%"):
        load_folders(str(image_folder))


def one_class(image_folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "cat").symlink_to(image_folder / "cat")
    return tmp_path / "one"


def test_classes_without_images_are_named(image_folder: Path, tmp_path: Path) -> None:
    for name in ("ant", "bird"):
        (image_folder / name).mkdir()
    (image_folder / "bird" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"images in every folder below .*, got none in ant, bird"):
        load_folders(str(image_folder))


def test_a_validation_folder_may_lack_classes_but_has_no_others(image_folder: Path, tmp_path: Path) -> None:
    validation = one_class(image_folder, tmp_path)
    data = load_folders(str(image_folder), str(validation))
    assert data.held_out_by == "the validation split of the data, without images of dog"
    assert set(labels_of(data.evaluation)) == {0}
    (validation / "dog").mkdir()  # the same without images
    assert load_folders(str(image_folder), str(validation)).held_out_by == data.held_out_by
    (validation / "cow").symlink_to(image_folder / "dog")
    with pytest.raises(ValueError, match="the classes of the training images, got others: cow"):
        load_folders(str(image_folder), str(validation))


def test_images_of_any_size_and_depth_are_read(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = image_folder / "dog" / "2024" / "may"
    deep.mkdir(parents=True)
    image_of_mode("RGB", height=1, width=1).save(deep / "tiny.png")
    image_of_mode("RGB", height=60, width=50).save(deep / "wide.png")
    data = load_folders(str(image_folder), str(image_folder))
    names = [Path(data.train.source_of(index)).name for index in range(len(data.train))]
    assert data.train[names.index("tiny.png")][0].shape == (3, 1, 1)
    assert data.train[names.index("tiny.png")][1] == 1
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 2000)
    monkeypatch.setattr(PIL.Image, "_decompression_bomb_check", lambda size: None)  # it only warns of such a size
    with pytest.raises(ValueError, match=r"Expected a readable image, got .*wide.png: .*2000"):
        data.train[names.index("wide.png")]


def write_parquet(path: Path, labels: list[Any], label_feature: Any) -> str:
    images = [image_of_mode(("L", "RGBA", "P", "I;16", "CMYK")[index % 5], index) for index in range(len(labels))]
    features = datasets.Features({"picture": datasets.Image(), "kind": label_feature})
    encoded = [image if image.mode != "CMYK" else image.convert("RGB") for image in images]
    datasets.Dataset.from_dict({"picture": encoded, "kind": labels}, features=features).to_parquet(path)
    return str(path)


@pytest.mark.parametrize(
    ("labels", "feature", "names"),
    [
        ([2, 10, 10, 2] * 6, datasets.Value("int64"), ["2", "10"]),
        (["b", "a"] * 12, datasets.Value("string"), ["a", "b"]),
        ([0, 1] * 12, datasets.ClassLabel(names=["zebra", "ant"]), ["zebra", "ant"]),
    ],
)
def test_parquet_with_any_kind_of_label(tmp_path: Path, labels: list[Any], feature: Any, names: list[str]) -> None:
    file = write_parquet(tmp_path / "train.parquet", labels, feature)
    data = load_parquet(file, file, image_column="picture", label_column="kind")
    assert data.class_names == names
    expected = [names[label] if isinstance(feature, datasets.ClassLabel) else str(label) for label in labels]
    assert [names[label] for label in labels_of(data.train)] == expected
    assert data.train[0][0].shape == (3, 20, 30)


def test_parquet_of_another_library(tmp_path: Path, image_folder: Path) -> None:
    """Plain columns of paths or bytes, without the metadata that `datasets` writes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(image_folder.glob("*/*.png"))[:4]
    for name, column in (("paths", [str(f) for f in files]), ("bytes", [f.read_bytes() for f in files])):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"image": column, "label": ["x", "y", "x", "y"]}), path)
        data = load_parquet(str(path), str(path))
        assert data.train[3][0].shape == (3, 20, 30)
        assert data.class_names == ["x", "y"]


def test_several_parquet_files(tmp_path: Path) -> None:
    for number in range(3):
        write_parquet(tmp_path / f"part-{number}.parquet", ["a", "b"] * 8, datasets.Value("string"))
    data = load_parquet(f"{tmp_path}/part-*.parquet", image_column="picture", label_column="kind")
    assert len(data.train) + len(data.evaluation) == 48
    assert data.source == f"{tmp_path}/part-*.parquet"
    for number, names in enumerate((["x", "y"], ["y", "x"])):
        write_parquet(tmp_path / f"class-{number}.parquet", [0, 1] * 8, datasets.ClassLabel(names=names))
    with pytest.raises(
        ValueError, match=r"one numbering of the classes in all files, .* another in .*class-1.parquet"
    ):
        load_parquet(f"{tmp_path}/class-{{0,1}}.parquet", image_column="picture", label_column="kind")
    split = {name: f"{tmp_path}/class-{number}.parquet" for number, name in enumerate(("train", "validation"))}
    data = load_parquet(split["train"], split["validation"], image_column="picture", label_column="kind")
    assert labels_of(data.train) == [0, 1] * 8
    assert labels_of(data.evaluation) == [1, 0] * 8  # of one split they are the same by name, not by number


def test_columns_and_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", [0, 1] * 12, datasets.Value("int64"))
    with pytest.raises(ValueError, match="Expected a column 'image', got picture, kind"):
        load_parquet(file)
    with pytest.raises(ValueError, match="Expected images in column 'kind'"):
        load_parquet(file, image_column="kind", label_column="kind")
    missing = write_parquet(tmp_path / "b.parquet", [0, None], datasets.Value("int64"))
    with pytest.raises(ValueError, match="a label for every image, got 1 without"):
        load_parquet(missing, image_column="picture", label_column="kind")
    hidden = write_parquet(tmp_path / "c.parquet", [0, -1], datasets.ClassLabel(names=["a"]))
    with pytest.raises(ValueError, match="a label for every image, got 1 without"):
        load_parquet(hidden, image_column="picture", label_column="kind")
    floats = write_parquet(tmp_path / "d.parquet", [0.5, 1.0], datasets.Value("float32"))
    with pytest.raises(ValueError, match="class indices or names in column 'kind'"):
        load_parquet(floats, image_column="picture", label_column="kind")
    other = write_parquet(tmp_path / "e.parquet", [0, 7], datasets.Value("int64"))
    with pytest.raises(ValueError, match="the classes of the training images, got others: 7"):
        load_parquet(file, other, image_column="picture", label_column="kind")
    with pytest.raises(ValueError, match=r"Expected .parquet files, got none for '/no/such'"):
        load_parquet("/no/such")


def test_a_dataset_in_the_format_of_the_hub(image_folder: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    rows = datasets.load_dataset("imagefolder", data_files={"train": f"{image_folder}/**"}, split="train")
    (hub / "data").mkdir(parents=True)
    rows.to_parquet(hub / "data" / "train-00000.parquet")
    rows.to_parquet(hub / "data" / "validation-00000.parquet")
    data = load_hub(str(hub))
    assert (len(data.train), len(data.evaluation)) == (24, 24)
    assert data.hub_id is None  # a local folder is not on the Hub
    renamed = rows.cast_column("label", datasets.ClassLabel(names=["dog", "cat"]))
    renamed.to_parquet(hub / "data" / "validation-00000.parquet")
    with pytest.raises(ValueError, match=r"numbering of the classes in all files, got another in .*validation-00000"):
        load_hub(str(hub))
    (hub / "data" / "train-00000.parquet").unlink()
    with pytest.raises(ValueError, match="Expected a split 'train'"):
        load_hub(str(hub))


def test_settings_choose_the_source(image_folder: Path) -> None:
    assert load_images(ImageClassificationSettings()).source == "digits"
    data = load_images(ImageClassificationSettings(train_dir=str(image_folder), max_train_samples=6))
    assert len(data.train) == 6
    assert set(labels_of(data.train)) == {0, 1}  # drawn, not the first six of one class
