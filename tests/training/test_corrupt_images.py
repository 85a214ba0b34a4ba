# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Images that are met broken while training."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from vitreg_hf.training.corrupt_images import CHECKED_UP_FRONT, SkipLimit, check_up_front
from vitreg_hf.training.data import load_folders
from vitreg_hf.training.labelled_images import Collate, TrainingImages, find_unreadable
from vitreg_hf.training.sampling import BatchStream, SampleKey, SampleStream


@pytest.fixture
def broken(image_folder: Path) -> list[str]:
    """Two neighbours that cannot be decoded."""
    files = [image_folder / "dog" / name for name in ("08_RGB.png", "09_RGB.png")]
    for file in files:
        file.write_bytes(file.read_bytes()[:60])
    return [str(file) for file in files]


def training_images(folder: Path, limit: SkipLimit | None) -> TrainingImages:
    images = load_folders(str(folder), str(folder)).train
    return TrainingImages(images, lambda image: image + torch.randint(0, 9, ()).to(torch.uint8), 3, limit)


def batches(data: TrainingImages, workers: int, position: int = 0) -> list[dict[str, Any]]:
    stream = BatchStream(SampleStream(len(data), seed=1), 4, 15 - position // 4, position)
    collate = Collate(lambda images: torch.stack([image.float() for image in images]))
    return list(islice(DataLoader(data, batch_sampler=stream, num_workers=workers, collate_fn=collate), 15))


def test_small_data_is_checked_before_a_training_and_large_data_while_it_runs() -> None:
    assert check_up_front(CHECKED_UP_FRONT, None)
    assert not check_up_front(CHECKED_UP_FRONT + 1, None)
    assert check_up_front(CHECKED_UP_FRONT + 1, True)
    assert not check_up_front(1, False)


def test_what_every_evaluation_reads_is_always_checked(image_folder: Path, broken: list[str]) -> None:
    data = load_folders(str(image_folder), str(image_folder))
    assert {one.split for one in find_unreadable(data, check_train=False)} == {"evaluation"}


def test_a_broken_image_met_while_training_is_named(image_folder: Path, broken: list[str]) -> None:
    with pytest.raises(ValueError, match=r"Expected a readable image, got .*/dog/0[89]_RGB.png"):
        batches(training_images(image_folder, None), 2)


def test_a_left_out_image_is_replaced_by_the_next_one(image_folder: Path, broken: list[str]) -> None:
    data = training_images(image_folder, SkipLimit())
    first = next(index for index in range(len(data)) if data.images.source_of(index) == broken[0])
    example = data[SampleKey(first, 0)]
    assert example.skipped == tuple(broken)
    assert example.label == 1
    data.augment = lambda image: image
    assert torch.equal(data[SampleKey(first, 0)].image, data.images[first + 2][0])


def test_replacement_does_not_depend_on_workers_or_stops(image_folder: Path, broken: list[str]) -> None:
    whole = batches(training_images(image_folder, SkipLimit()), 0)
    assert {name for batch in whole for name in batch.get("skipped", ())} == set(broken)
    assert not all("skipped" in batch for batch in whole)
    for workers, position in ((2, 0), (0, 20), (2, 32)):
        again = batches(training_images(image_folder, SkipLimit()), workers, position)
        for one, other in zip(again, whole[position // 4 :], strict=True):
            assert torch.equal(one["pixel_values"], other["pixel_values"])
            assert one.get("skipped") == other.get("skipped")


def test_a_share_above_the_limit_is_refused() -> None:
    limit = SkipLimit(0.1)
    for number in range(10):
        limit.count(1, [f"image {number}"])  # the first ten say little
    with pytest.raises(ValueError, match=r"at most 10.0% unreadable images, got 11 among the first 11, .* image 10"):
        limit.count(1, ["image 10"])
    enough = SkipLimit(0.1)
    enough.count(110, [])
    enough.count(11, ["some"] * 11)
    with pytest.raises(ValueError, match=r"a share of images in 0..1 that may be left out, got 2"):
        SkipLimit(2)


def test_nothing_but_broken_images_is_refused(tmp_path: Path, image_folder: Path) -> None:
    for file in image_folder.glob("*/*"):
        file.write_bytes(b"")
    data = training_images(image_folder, SkipLimit(1.0))
    with pytest.raises(ValueError, match="at least one readable image, got 24 that are not"):
        data[SampleKey(0, 0)]
