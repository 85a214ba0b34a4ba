# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Decoding, and files that cannot be decoded."""

import re
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from vitreg_hf import ViTRegImageProcessor
from vitreg_hf.training.data import load_folders, load_parquet
from vitreg_hf.training.labelled_images import (
    Collate,
    TrainingImages,
    decode,
    find_unreadable,
    grey,
    without_unreadable,
)
from vitreg_hf.training.sampling import BatchStream, SampleKey, SampleStream

from .conftest import MODES, image_of_mode


@pytest.mark.parametrize("mode", MODES)
def test_training_sees_the_pixels_that_inference_sees(tmp_path: Path, mode: str) -> None:
    file = str(tmp_path / f"image.{'tif' if mode == 'CMYK' else 'png'}")
    image_of_mode(mode).save(file)
    pixels = decode({"bytes": None, "path": file})
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 20, 30)
    as_is = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}
    seen = ViTRegImageProcessor()(file, **as_is, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(pixels, seen)
    assert torch.equal(pixels, decode({"bytes": Path(file).read_bytes(), "path": None}))


def test_rotated_photos_are_turned_upright(tmp_path: Path) -> None:
    file = tmp_path / "rotated.jpg"
    image = image_of_mode("RGB")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    image.save(file, exif=exif)
    assert decode({"bytes": None, "path": str(file)}).shape == (3, 30, 20)


@pytest.fixture
def broken(image_folder: Path) -> list[str]:
    """Three files that cannot be decoded, in a folder of good ones."""
    whole = (image_folder / "dog" / "08_RGB.png").read_bytes()
    files = {"cat/empty.png": b"", "cat/text.jpg": b"not an image", "dog/truncated.png": whole[: len(whole) // 2]}
    for name, content in files.items():
        (image_folder / name).write_bytes(content)
    return [str(image_folder / name) for name in files]


def test_corrupt_files_are_found_and_named(image_folder: Path, broken: list[str]) -> None:
    data = load_folders(str(image_folder), str(image_folder))
    found = find_unreadable(data)
    assert sorted(one.source for one in found if one.split == "train") == sorted(broken)
    assert sorted(one.source for one in found if one.split == "evaluation") == sorted(broken)
    for one in found[:3]:
        with pytest.raises(ValueError, match=f"Expected a readable image, got {re.escape(one.source)}"):
            data.train[one.index]


def test_images_inside_a_table_are_named_by_its_rows(image_folder: Path, broken: list[str], tmp_path: Path) -> None:
    files = [str(image_folder / "cat" / f"{index:02d}_RGB.png") for index in (8, 9, 10)] + broken[-1:]
    rows = {"image": [{"bytes": Path(file).read_bytes(), "path": None} for file in files], "label": [0, 1, 0, 1]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))
    table.to_parquet(tmp_path / "table.parquet")
    data = load_parquet(str(tmp_path / "table.parquet"), str(tmp_path / "table.parquet"))
    data = replace(data, train=data.train.sample(4).without({0}))  # numbers stay those of the file
    assert [str(one) for one in find_unreadable(data)] == ["train: row 3", "evaluation: row 3"]


def test_several_processes_share_the_checking(image_folder: Path, broken: list[str]) -> None:
    data = load_folders(str(image_folder), str(image_folder))
    shares = [find_unreadable(data, process, 3) for process in range(3)]
    together = {(one.split, one.index) for share in shares for one in share}
    assert together == {(one.split, one.index) for one in find_unreadable(data)}
    assert sum(len(share) for share in shares) == 2 * len(broken)


def test_corrupt_files_are_refused_or_skipped_as_asked(image_folder: Path, broken: list[str]) -> None:
    data = load_folders(str(image_folder), str(image_folder))
    found = find_unreadable(data)
    named = r"(?s)got 6 that are not .on_corrupt_image=skip.*empty\.png.*text\.jpg.*truncated\.png"
    with pytest.raises(ValueError, match=named):
        without_unreadable(data, found, "raise")
    kept = without_unreadable(data, found, "skip")
    assert len(kept.train) == len(data.train) - len(broken)
    assert find_unreadable(kept) == []
    assert without_unreadable(kept, [], "raise") == kept


def test_nothing_left_is_refused(image_folder: Path, broken: list[str]) -> None:
    data = load_folders(str(image_folder), str(image_folder))
    names = [data.train.source_of(index) for index in range(len(data.train))]
    only_broken = data.train.without({index for index, name in enumerate(names) if name not in broken})
    data = replace(data, train=only_broken)
    with pytest.raises(ValueError, match="at least one readable image, got 3 that are not"):
        without_unreadable(data, find_unreadable(data), "skip")


def test_a_sample_is_the_same_every_time(image_folder: Path) -> None:
    images = load_folders(str(image_folder), str(image_folder)).train
    first, second = images.sample(5), images.sample(5)
    assert [first.source_of(i) for i in range(5)] == [second.source_of(i) for i in range(5)]
    assert len(images.sample(1000)) == len(images)
    with pytest.raises(ValueError, match="at least 1 image to keep, got 0"):
        images.sample(0)


def test_a_batch(image_folder: Path) -> None:
    images = load_folders(str(image_folder), str(image_folder)).train
    batch = Collate(lambda pixels: torch.stack([one.float() for one in pixels]))([images[0], images[20]])
    assert batch["pixel_values"].shape == (2, 3, 20, 30)
    assert batch["labels"].tolist() == [0, 1]


def test_grey_is_what_pillow_calls_l(tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    levels[0, :3] = [[255, 255, 255], [0, 0, 0], [255, 0, 0]]
    picture = PIL.Image.fromarray(levels)
    expected = torch.from_numpy(np.array(picture.convert("L")))
    assert torch.equal(grey(torch.from_numpy(levels).permute(2, 0, 1))[0], expected)
    picture.save(tmp_path / "a.png")
    encoded = {"bytes": None, "path": str(tmp_path / "a.png")}
    assert torch.equal(decode(encoded, num_channels=1)[0], expected)
    with pytest.raises(ValueError, match="Expected an image of 4 channels, got one of 3"):
        decode(encoded, num_channels=4)


def noisy(image: torch.Tensor) -> torch.Tensor:
    return image.roll(int(torch.randint(0, 1000, ())), dims=-1)


def test_a_training_sample_is_a_function_of_its_key(image_folder: Path) -> None:
    images = TrainingImages(load_folders(str(image_folder), str(image_folder)).train, noisy, seed=1)
    before = torch.get_rng_state()
    one = images[SampleKey(8, 0)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(images[SampleKey(8, 0)].image, one.image)
    assert (one.label, one.key) == (0, SampleKey(8, 0))
    variants = [images[SampleKey(8, epoch, repeat)].image for epoch in range(4) for repeat in range(2)]
    assert len({variant.numpy().tobytes() for variant in variants}) > 4
    other = TrainingImages(images.images, noisy, seed=2)
    assert any(not torch.equal(other[SampleKey(8, e)].image, images[SampleKey(8, e)].image) for e in range(3))


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_do_not_change_what_is_loaded(image_folder: Path, workers: int) -> None:
    images = TrainingImages(load_folders(str(image_folder), str(image_folder)).train, noisy, seed=1)
    collate = Collate(lambda pixels: torch.stack([one.float() for one in pixels]))
    batches = BatchStream(SampleStream(len(images), seed=1), 4, 5, position=18)
    loader = torch.utils.data.DataLoader(images, batch_sampler=batches, collate_fn=collate, num_workers=workers)
    expected = [collate([images[key] for key in keys]) for keys in batches]
    for loaded, batch in zip(loader, expected, strict=True):
        assert torch.equal(loaded["pixel_values"], batch["pixel_values"])
        assert torch.equal(loaded["labels"], batch["labels"])
