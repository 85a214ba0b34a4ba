# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Images with masks, and masks that cannot be used."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader

from vitreg_hf import ViTRegImageProcessor
from vitreg_hf.training.sampling import BatchStream, SampleKey, SampleStream
from vitreg_hf.training.segmentation_augmentation import CollateScenes, SceneTransform
from vitreg_hf.training.segmentation_data import (
    LabelledScenes,
    TrainingScenes,
    load_columns,
    load_pairs,
    load_scenes,
)

from .conftest import image_of_mode
from .encoded import png

NAMES = ["sky", "sea", "ship"]


def mask_of(seed: int, height: int = 20, width: int = 30) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 3, (height, width), dtype=np.uint8))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Twelve pairs, two of them deeper."""
    folder = tmp_path / "pairs"
    for number in range(12):
        name = f"deep/{number:02d}" if number > 9 else f"{number:02d}"
        for part, image, ending in (
            ("images", image_of_mode("RGB", number), "jpg"),
            ("annotations", mask_of(number), "png"),
        ):
            (folder / part / "deep").mkdir(parents=True, exist_ok=True)
            image.save(folder / part / f"{name}.{ending}")
    return folder


def test_pairs_belong_together(pairs: Path) -> None:
    data = load_pairs(str(pairs), str(pairs), NAMES)
    assert (len(data.train), data.class_names, data.hub_id) == (12, NAMES, None)
    for index in range(12):
        image, mask = data.train[index]
        assert image.shape == (3, 20, 30)
        assert mask.dtype == torch.int64
        assert torch.equal(mask, torch.from_numpy(np.array(mask_of(index))).long())


def test_a_tenth_is_held_out_once_and_for_all(pairs: Path) -> None:
    data, again = load_pairs(str(pairs), None, NAMES), load_pairs(str(pairs), None, NAMES)
    assert (len(data.train), len(data.evaluation)) == (11, 1)
    assert "10 %" in data.held_out_by
    assert data.evaluation.rows[0] == again.evaluation.rows[0]
    assert data.evaluation.rows[0]["image"] not in list(data.train.rows["image"])


def test_pairs_that_are_not_complete_are_refused(pairs: Path, tmp_path: Path) -> None:
    (pairs / "annotations" / "03.png").unlink()
    (pairs / "images" / "05.jpg").unlink()
    with pytest.raises(ValueError, match=r"got 2 files alone: .*images/03.jpg, .*annotations/05.png"):
        load_pairs(str(pairs), None, NAMES)
    with pytest.raises(ValueError, match=r"Expected folders 'images' and 'annotations' in .*, got no 'images'"):
        load_pairs(str(tmp_path), None, NAMES)
    for part in ("images", "annotations"):
        (tmp_path / part).mkdir()
    with pytest.raises(ValueError, match=r"Expected images below .*images', got none"):
        load_pairs(str(tmp_path), None, NAMES)


def replaced(pairs: Path, mask: PIL.Image.Image, ending: str = "png") -> LabelledScenes:
    (pairs / "annotations" / "00.png").unlink()
    mask.save(pairs / "annotations" / f"00.{ending}")
    return load_pairs(str(pairs), str(pairs), NAMES).train


def test_a_mask_of_another_size_is_refused(pairs: Path) -> None:
    found = replaced(pairs, mask_of(0, 30, 20))
    with pytest.raises(ValueError, match=r"20 x 30 and 30 x 20 pixels: .*images/00.jpg, .*annotations/00.png"):
        found[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((20, 30), 3, np.uint8), r"Expected labels 0..2 or 255, got 3 in .*00.png"),
        (np.full((20, 30, 3), 1, np.uint8), r"Expected a readable mask, got .*00.png: expected a segmentation map"),
        (np.full((20, 30), 1.5, np.float32), r"Expected a readable mask, got .*00.tif: expected a segmentation map"),
    ],
)
def test_masks_without_classes_are_refused_by_name(pairs: Path, values: Any, message: str) -> None:
    found = replaced(pairs, PIL.Image.fromarray(values), "tif" if values.dtype == np.float32 else "png")
    with pytest.raises(ValueError, match=message):
        found[0]


def test_files_that_cannot_be_decoded_are_named(pairs: Path) -> None:
    (pairs / "annotations" / "00.png").write_bytes(b"")
    (pairs / "images" / "01.jpg").write_bytes((pairs / "images" / "01.jpg").read_bytes()[:200])
    found = load_pairs(str(pairs), str(pairs), NAMES).train
    with pytest.raises(ValueError, match=r"Expected a readable mask, got .*annotations/00.png"):
        found[0]
    with pytest.raises(ValueError, match=r"Expected a readable image, got .*images/01.jpg"):
        found[1]


def test_palettes_wide_integers_and_ignored_pixels_keep_their_values(pairs: Path) -> None:
    palette = mask_of(1).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    assert set(replaced(pairs, palette)[0][1].unique().tolist()) == {0, 1, 2}
    wide = np.zeros((20, 30), np.uint16)
    wide[0] = 255
    assert replaced(pairs, PIL.Image.fromarray(wide))[0][1].unique().tolist() == [0, 255]


def test_labels_that_count_from_one_are_lowered(pairs: Path) -> None:
    values = np.zeros((20, 30), np.uint8)
    values[0], values[1], values[2] = 1, 3, 255
    rows = replaced(pairs, PIL.Image.fromarray(values)).rows
    mask = LabelledScenes(rows, NAMES, reduce_labels=True)[0][1]
    assert [mask[row, 0].item() for row in range(4)] == [0, 2, 255, 255]
    with pytest.raises(ValueError, match=r"Expected labels 0..1 or 255, after one was taken off, got 2 in"):
        LabelledScenes(rows, NAMES[:2], reduce_labels=True)[0]


def write_columns(path: Path, count: int = 6) -> str:
    rows = {
        "picture": [{"bytes": png(image_of_mode("RGB", number)), "path": None} for number in range(count)],
        "map": [{"bytes": png(mask_of(number)), "path": None} for number in range(count)],
        "note": ["x"] * count,
    }
    features = {"picture": datasets.Image(), "map": datasets.Image(), "note": datasets.Value("string")}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)
    return str(path)


def test_columns_of_parquet_files_and_of_the_hub(tmp_path: Path) -> None:
    for number in range(2):
        write_columns(tmp_path / "hub" / f"train-{number:05d}.parquet")
    write_columns(tmp_path / "hub" / "validation-00000.parquet", 2)
    columns = {"image_column": "picture", "mask_column": "map"}
    files = load_columns(
        f"{tmp_path}/hub/train-*.parquet", NAMES, validation_file=f"{tmp_path}/hub/validation-00000.parquet", **columns
    )
    hub = load_columns(str(tmp_path / "hub"), NAMES, **columns)
    for data in (files, hub):
        assert (len(data.train), len(data.evaluation), data.hub_id) == (12, 2, None)
        assert torch.equal(data.train[7][1], torch.from_numpy(np.array(mask_of(1))).long())
    with pytest.raises(ValueError, match=r"Expected a readable mask, got row 1"):
        broken = files.train.rows.map(lambda row: {**row, "mask": {"bytes": b"x", "path": None}})
        LabelledScenes(broken, NAMES)[1]
    with pytest.raises(ValueError, match="Expected a column 'annotation', got picture, map, note"):
        load_columns(str(tmp_path / "hub"), NAMES, image_column="picture")


def test_default_scenes_test_on_digits_that_were_never_shown() -> None:
    data = load_scenes()
    assert (len(data.train), len(data.evaluation)) == (600, 150)
    assert len(data.class_names) == 11
    assert data.train[0][0].shape == (3, 64, 64)
    assert len(data.train.sample(5)) == 5
    with pytest.raises(ValueError, match="at least 1 image to keep, got 0"):
        data.train.sample(0)


def test_samples_do_not_depend_on_workers_or_on_where_a_stream_starts(pairs: Path) -> None:
    processor = ViTRegImageProcessor(size={"height": 16, "width": 16})
    transform = SceneTransform(processor, (0.5, 2.0), horizontal_flip=True)
    data = TrainingScenes(load_pairs(str(pairs), str(pairs), NAMES).train, transform.augment, seed=4)

    def batches(workers: int, first: int) -> list[dict[str, torch.Tensor]]:
        stream = BatchStream(SampleStream(12, seed=4), 4, 6 - first, 4 * first)
        return list(DataLoader(data, batch_sampler=stream, num_workers=workers, collate_fn=CollateScenes(transform)))

    whole = batches(0, 0)
    assert len(data) == 12
    for workers, first in ((2, 0), (0, 4), (2, 3)):
        for one, other in zip(batches(workers, first), whole[first:], strict=True):
            assert torch.equal(one["pixel_values"], other["pixel_values"])
            assert torch.equal(one["labels"], other["labels"])
    passes = [data[SampleKey(0, epoch)].image for epoch in range(2)]
    assert not torch.equal(passes[0], passes[1])
