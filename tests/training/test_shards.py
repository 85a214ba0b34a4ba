# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Shards of tars, parquet files and datasets in the format of the Hub."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from vitreg_hf.training.shards import Shards, file_shards, hub_shards
from vitreg_hf.training.streaming import StreamedEvaluation, StreamedImages

from .conftest import image_of_mode
from .encoded import png, write_table, write_tar

NAMES = ["cat", "dog"]


def sample(name: str, label: Any, ending: str = "cls", seed: int = 0) -> dict[str, bytes]:
    return {f"{name}.png": png(image_of_mode("RGB", seed)), f"{name}.{ending}": str(label).encode()}


def tars(folder: Path, *sizes: int) -> str:
    """Tars of images with labels 0, 1, 0, ... in `cls`."""
    for shard, size in enumerate(sizes):
        samples = [sample(f"s{shard}/{row}", row % 2, seed=100 * shard + row) for row in range(size)]
        files = {name: content for one in samples for name, content in one.items()}
        write_tar(folder / f"train-{shard:03d}.tar", files)
    return str(folder)


def labels(shards: Shards) -> list[int]:
    return [row.label for shard in range(shards.num_shards) for row in shards.read(shard)]


def test_tars_are_read_in_order_with_names(tmp_path: Path) -> None:
    shards = file_shards(tars(tmp_path, 3, 2), class_names=NAMES)
    assert (shards.num_shards, shards.num_images, shards.class_names) == (2, None, NAMES)
    rows = list(shards.read(1))
    assert [row.name for row in rows] == [f"{tmp_path}/train-001.tar: s1/{row}" for row in (0, 1)]
    assert labels(shards) == [0, 1, 0, 0, 1]
    assert list(shards.read(0, 1, 2)) == list(shards.read(0))[1::2]
    assert [shards.count(shard) for shard in (0, 1)] == [3, 2]


@pytest.mark.parametrize(
    ("ending", "stored", "column"),
    [
        ("txt", "dog\n", "label"),
        ("json", json.dumps({"label": "dog", "by": "me"}), "label"),
        ("json", json.dumps({"what": {"kind": 1}}), "json.what.kind"),
        ("index", "1", "index"),
    ],
)
def test_labels_in_tars(tmp_path: Path, ending: str, stored: str, column: str) -> None:
    file = write_tar(tmp_path / "a.tar", {**sample("a", stored, ending), **sample("b", stored, ending)})
    assert labels(file_shards(file, label_column=column, class_names=NAMES)) == [1, 1]


def test_several_formats_of_images_in_one_tar(tmp_path: Path) -> None:
    """A sample may lack what the first ones have, as long as it has an image."""
    files = {}
    for number in range(6):
        files |= sample(f"{number}", 1)
    files |= {"6.cls": b"0"}
    shards = file_shards(write_tar(tmp_path / "a.tar", files), class_names=NAMES)
    with pytest.raises(ValueError, match=r"Expected an image in png, got none in .*a.tar: 6"):
        labels(shards)


def test_labels_that_are_none_of_the_classes_are_refused_by_name(tmp_path: Path) -> None:
    for name, label, message in (
        ("range", 7, r"Expected a label in 0..1, got 7 in .*range.tar: b"),
        ("negative", -1, r"Expected a label in 0..1, got -1 in .*negative.tar: b"),
    ):
        file = write_tar(tmp_path / f"{name}.tar", {**sample("a", 0), **sample("b", label)})
        with pytest.raises(ValueError, match=message):
            labels(file_shards(file, class_names=NAMES))
    file = write_tar(tmp_path / "named.tar", {**sample("a", "cat", "txt"), **sample("b", "cow", "txt")})
    with pytest.raises(ValueError, match=r"Expected one of 2 class names, got 'cow' in .*named.tar: b"):
        labels(file_shards(file, class_names=NAMES))
    samples = [sample(str(number), 1) for number in range(6)] + [{"6.png": png(image_of_mode("RGB"))}]
    files = {name: content for one in samples for name, content in one.items()}
    with pytest.raises(ValueError, match=r"Expected a label in 'cls', got none in .*none.tar: 6"):
        labels(file_shards(write_tar(tmp_path / "none.tar", files), class_names=NAMES))


def test_sources_that_cannot_be_streamed_are_refused(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a" / "a.tar", {**sample("a", 0), **sample("b", 1)})
    with pytest.raises(ValueError, match=r"the names of the classes \(class_names\): column 'cls' is Value"):
        file_shards(file)
    with pytest.raises(ValueError, match="Expected labels in kind, got columns png, cls"):
        file_shards(file, label_column="kind", class_names=NAMES)
    with pytest.raises(ValueError, match="Expected images in column photo, got png, cls"):
        file_shards(file, image_column="photo", class_names=NAMES)
    write_table(tmp_path / "a" / "b.parquet", [b""], [0], datasets.Value("int64"))
    with pytest.raises(ValueError, match="Expected tars or parquet files, got both"):
        file_shards(str(tmp_path / "a"))
    (tmp_path / "broken.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=r"Expected readable webdataset files, got .*broken.tar"):
        file_shards(str(tmp_path / "broken.tar"), class_names=NAMES)


def test_a_tar_that_ends_too_early_is_named(tmp_path: Path) -> None:
    folder = tars(tmp_path, 8, 8)
    last = tmp_path / "train-001.tar"
    last.write_bytes(last.read_bytes()[: 5 * 1024 + 700])
    with pytest.raises(ValueError, match=r"Expected a readable shard, got .*train-001.tar: "):
        labels(file_shards(folder, class_names=NAMES))


def test_parquet_files_know_how_many_rows_they_hold(tmp_path: Path) -> None:
    image = png(image_of_mode("RGB"))
    for number, size in enumerate((5, 3)):
        write_table(tmp_path / f"{number}.parquet", [image] * size, [0, 1, 0, 1, 0][:size], datasets.Value("int64"))
    shards = file_shards(f"{tmp_path}/*.parquet", class_names=NAMES)
    assert (shards.num_shards, shards.num_images) == (2, 8)
    assert [row.name for row in shards.read(1, 1)] == [f"{tmp_path}/1.parquet: row {row}" for row in (1, 2)]
    with pytest.raises(ValueError, match="Expected images in column 'label', got"):
        file_shards(f"{tmp_path}/*.parquet", image_column="label", class_names=NAMES)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A folder in the Hub's format."""
    image = png(image_of_mode("RGB"))
    for split, shards in (("train", 3), ("validation", 1)):
        for shard in range(shards):
            file = tmp_path / "hub" / "data" / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
            write_table(file, [image] * 4, [0, 1, 0, 0], datasets.ClassLabel(names=NAMES))
    return tmp_path / "hub"


def test_a_dataset_of_the_hub(hub: Path) -> None:
    train, validation = hub_shards(str(hub))
    assert (train.num_shards, validation.num_shards) == (3, 1)
    assert train.class_names == validation.class_names == NAMES
    assert labels(train) == [0, 1, 0, 0] * 3
    assert train.num_images == 12
    assert [row.name for row in train.read(2)][1].endswith("data/train-00002-of-00003.parquet: row 1")


def test_classes_are_matched_by_name(hub: Path) -> None:
    train, validation = hub_shards(str(hub), class_names=["cow", "dog", "cat"])
    assert labels(train)[:4] == labels(validation) == [2, 1, 2, 2]
    with pytest.raises(ValueError, match="the classes of the training images, got others: dog"):
        hub_shards(str(hub), class_names=["cat", "cow"])


def test_files_that_number_their_classes_differently_are_refused(hub: Path) -> None:
    """`datasets` would read all of them with the names of the first."""
    file = write_table(
        hub / "data" / "validation-00000-of-00001.parquet", [b""], [0], datasets.ClassLabel(names=NAMES[::-1])
    )
    for source in (lambda: hub_shards(str(hub)), lambda: file_shards(str(hub / "data"))):
        with pytest.raises(ValueError, match=f"one numbering of the classes in all .* another in {file}: dog, cat"):
            source()


def test_a_stream_needs_a_validation_split(hub: Path) -> None:
    (hub / "data" / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"Expected splits 'train' and 'validation' in .* \(missing: validation\)"):
        hub_shards(str(hub))


def collate(examples: list[Any]) -> dict[str, Any]:
    return {"pixel_values": torch.stack([e.image for e in examples]), "labels": [e.label for e in examples]}


def flip(image: torch.Tensor) -> torch.Tensor:
    return image.flip(-1) if torch.rand(()) < 0.5 else image


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("workers", [0, 2])
def test_workers_open_shards_of_their_own_and_continue_exactly(tmp_path: Path, kind: str, workers: int) -> None:
    if kind == "tar":
        shards = file_shards(tars(tmp_path, 5, 7, 6), class_names=NAMES)
    else:
        for number in range(3):
            images = [png(image_of_mode("RGB", 10 * number + row)) for row in range(6)]
            write_table(tmp_path / f"{number}.parquet", images, [0, 1] * 3, datasets.Value("int64"))
        shards = file_shards(str(tmp_path), class_names=NAMES)

    def batches(start: int, number: int) -> list[dict[str, Any]]:
        data = StreamedImages(shards, 4, flip, collate, seed=1, start=start, buffer_size=3)
        return list(islice(DataLoader(data, batch_size=None, num_workers=workers), number))

    whole = batches(0, 14)
    for stop in (1, 6, 11):
        for one, other in zip(batches(stop, 14 - stop), whole[stop:], strict=True):
            assert torch.equal(one["pixel_values"], other["pixel_values"])
            assert one["labels"] == other["labels"]
    evaluation: Any = DataLoader(StreamedEvaluation(shards, 4, collate), batch_size=None, num_workers=workers)
    assert sum(len(batch["labels"]) for batch in evaluation) == 18
