# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""JPEGs decoded to fewer pixels: off unless asked for, never below what is needed, and the same draws."""

import io
from itertools import islice
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from skimage import data as photos
from torch import Tensor
from torchvision.transforms.v2 import functional as v2

from vitreg_hf import ViTRegImageProcessor
from vitreg_hf.training.augmentation import TrainingTransform
from vitreg_hf.training.augmented_samples import augmented_samples
from vitreg_hf.training.classification_data import held_out, open_images, training_batches, training_transform
from vitreg_hf.training.classification_settings import ImageClassificationSettings
from vitreg_hf.training.labelled_images import decode
from vitreg_hf.training.scaled_jpeg import ScaledImage, scaled_image
from vitreg_hf.training.seeding import seeded

from .encoded import png, write_tar

PROCESSOR = ViTRegImageProcessor(size={"height": 32, "width": 32})
NAMES = ("astronaut", "coffee", "chelsea", "rocket")


def photo(name: str, width: int, height: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(getattr(photos, name)()).resize((width, height), PIL.Image.Resampling.BICUBIC)


def jpeg(image: PIL.Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def encoded(content: bytes) -> dict[str, Any]:
    return {"bytes": content, "path": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of six photos, 200 to 640 pixels a side."""
    folder = tmp_path_factory.mktemp("photos")
    for split in ("train", "validation"):
        for label, names in enumerate((NAMES[:2], NAMES[2:])):
            (folder / split / f"class{label}").mkdir(parents=True)
            for index in range(6):
                content = jpeg(photo(names[index % 2], 200 + 88 * index, 300 + 50 * index))
                (folder / split / f"class{label}" / f"{index}.jpg").write_bytes(content)
    return folder


def settings_of(folder: Path, **options: Any) -> ImageClassificationSettings:
    given = {"train_dir": str(folder / "train"), "validation_dir": str(folder / "validation"), **options}
    return ImageClassificationSettings(**given, per_device_train_batch_size=4)


def batches_of(settings: ImageClassificationSettings, position: int = 0, count: int = 6) -> list[dict[str, Tensor]]:
    data, transform = open_images(settings), training_transform(settings, PROCESSOR)
    accelerator = Accelerator(cpu=True)
    return list(islice(training_batches(data, settings, accelerator, transform, position, count, set()), count))


def assert_equal(batches: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> None:
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch["labels"], other["labels"])
        assert torch.equal(batch["pixel_values"], other["pixel_values"])


# Sizes


@pytest.mark.parametrize(("width", "height"), [(1600, 1200), (1199, 901), (640, 481), (400, 2000), (120, 90)])
@pytest.mark.parametrize("least_edge", [40, 64, 224, 448])
def test_a_jpeg_keeps_the_edge_and_loses_what_is_beyond(width: int, height: int, least_edge: int) -> None:
    content = encoded(jpeg(photo("coffee", width, height)))
    factor = max([1] + [step for step in (2, 4, 8) if min(width, height) // least_edge >= step])
    pixels = decode(content, least_edge=least_edge)
    assert pixels.shape == (3, -(-height // factor), -(-width // factor))
    assert min(pixels.shape[1:]) >= min(least_edge, width, height)
    assert decode(content).shape == (3, height, width)


def test_other_formats_and_small_photos_are_decoded_whole() -> None:
    image = photo("rocket", 640, 480)
    assert torch.equal(decode(encoded(png(image)), least_edge=32), decode(encoded(png(image))))
    assert torch.equal(decode(encoded(jpeg(image)), least_edge=241), decode(encoded(jpeg(image))))


def test_modes_and_orientation_stay() -> None:
    image = photo("chelsea", 640, 480)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    assert decode(encoded(jpeg(image, exif=exif)), least_edge=120).shape == (3, 160, 120)
    for mode in ("L", "CMYK"):
        assert decode(encoded(jpeg(image.convert(mode))), least_edge=120).shape == (3, 120, 160)
    assert decode(encoded(jpeg(image)), num_channels=1, least_edge=120).shape == (1, 120, 160)
    assert decode(encoded(jpeg(image, progressive=True)), least_edge=120).shape == (3, 120, 160)


def test_broken_files_stay_broken() -> None:
    content = jpeg(photo("chelsea", 640, 480))
    with pytest.raises(OSError, match="truncated"):
        decode(encoded(content[: len(content) // 2]), least_edge=120)


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.35, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_no_crop_of_what_is_left_is_smaller_than_its_result(scale: tuple, size: tuple) -> None:
    processor = ViTRegImageProcessor(size={"height": size[0], "width": size[1]})
    transform = TrainingTransform(processor, crop_scale=scale)
    assert transform.least_edge is not None
    assert transform.crop is not None
    assert transform.least_edge >= 2 * max(size)
    for width, height in ((2, 2), (2.3, 5), (6, 2.1)):  # of the whole, of which a half is decoded
        whole = (int(height * transform.least_edge), int(width * transform.least_edge))
        image = scaled_image(torch.empty(3, -(-whole[0] // 2), -(-whole[1] // 2)), whole)
        assert isinstance(image, ScaledImage)
        for seed in range(300):
            torch.manual_seed(seed)
            drawn = transform.crop.make_params([torch.empty(3, *whole, device="meta")])
            top, left, *extent = image.part(*(drawn[name] for name in ("top", "left", "height", "width")))
            assert extent[0] >= size[0]
            assert extent[1] >= size[1]
            assert 0 <= top <= image.shape[1] - extent[0]
            assert 0 <= left <= image.shape[2] - extent[1]


def test_without_random_crops_twice_the_size_is_left() -> None:
    assert TrainingTransform(PROCESSOR).least_edge == 64
    assert TrainingTransform(ViTRegImageProcessor()).least_edge == 512
    assert TrainingTransform(ViTRegImageProcessor(do_resize=False)).least_edge is None


# Pixels


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [2, 4])
def test_pixels_are_close_to_those_of_the_whole(name: str, factor: int) -> None:
    """Means over the blocks of the whole photo, which is not what fewer frequencies give, are a few levels away."""
    content = encoded(jpeg(photo(name, 1280, 960)))
    whole = decode(content).unflatten(1, (-1, factor)).unflatten(3, (-1, factor)).float().mean(dim=(2, 4))
    difference = (decode(content, least_edge=960 // factor) - whole).abs()
    assert difference.mean() < 1.0


@pytest.mark.parametrize("seed", range(5))
def test_augmentation_draws_the_same(seed: int) -> None:
    content = encoded(jpeg(photo("astronaut", 1024, 768)))
    transform = TrainingTransform(PROCESSOR, crop_scale=(0.25, 1.0), horizontal_flip=True, rand_augment=False)
    seen, states = [], []
    for least_edge in (None, transform.least_edge):
        with seeded(seed):
            seen.append(transform.augment(decode(content, least_edge=least_edge)).float())
            states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert type(seen[1]) is Tensor
    assert (seen[0] - seen[1]).abs().mean() < 10  # the box is rounded to pixels that are as large as those of the crop
    assert (seen[0] - v2.horizontal_flip(seen[1])).abs().mean() > 10  # so the same was mirrored, or nothing


# Trainings


def test_it_is_off_unless_asked_for(folder: Path) -> None:
    assert ImageClassificationSettings().fast_jpeg_decoding is False
    settings = settings_of(folder)
    data, transform = open_images(settings), training_transform(settings, PROCESSOR)
    whole = {image.shape[1:] for image, _ in (data.train[index] for index in range(len(data.train)))}
    assert whole == {(300 + 50 * index, 200 + 88 * index) for index in range(6)}
    for sample in augmented_samples(data, settings, transform, images=12, passes=1):
        assert sample.image.shape[1:] in whole


def test_trainings_see_nearly_the_same_with_it_and_evaluate_the_same(folder: Path) -> None:
    plain, fast = (settings_of(folder, fast_jpeg_decoding=on, random_resized_crop_scale=[0.5, 1.0]) for on in (0, 1))
    differs = 0.0
    for batch, other in zip(batches_of(plain), batches_of(fast), strict=True):
        assert torch.equal(batch["labels"], other["labels"])
        difference = (batch["pixel_values"] - other["pixel_values"]).abs().mean().item()
        assert difference < 0.15  # of a standard deviation of ImageNet
        differs += difference
    assert differs > 0
    data, accelerator = open_images(fast), Accelerator(cpu=True)
    for batch, other in zip(
        *(held_out(data, one, accelerator, PROCESSOR, set()) for one in (plain, fast)), strict=True
    ):
        assert torch.equal(batch["pixel_values"], other["pixel_values"])
    transform = training_transform(fast, PROCESSOR)
    (largest,) = augmented_samples(data, fast, transform, images=12, passes=1)[:1]
    assert min(largest.image.shape[1:]) < 200 + 88 * 5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_that_continues_sees_what_it_would_have_seen(folder: Path, workers: int) -> None:
    settings = settings_of(folder, fast_jpeg_decoding=True, dataloader_num_workers=workers)
    assert_equal(batches_of(settings, position=12, count=3), batches_of(settings, count=6)[3:])


def test_streams_decode_the_same_way(folder: Path, tmp_path: Path) -> None:
    files = sorted((folder / "train").rglob("*.jpg"))
    content = {f"{index:02d}.jpg": file.read_bytes() for index, file in enumerate(files)}
    labels = {f"{index:02d}.cls": str(index % 2).encode() for index in range(len(files))}
    write_tar(tmp_path / "train-0.tar", dict(sorted({**content, **labels}.items())))
    (tmp_path / "names.txt").write_text("a\nb\n")
    shards = {"train_shards": f"{tmp_path}/train-0.tar", "validation_shards": f"{tmp_path}/train-0.tar"}
    common = {**shards, "class_names_file": str(tmp_path / "names.txt"), "random_resized_crop_scale": [0.5, 1.0]}
    plain, fast = (
        ImageClassificationSettings(**common, fast_jpeg_decoding=on, per_device_train_batch_size=4) for on in (0, 1)
    )
    whole = batches_of(fast)
    for batch, other in zip(batches_of(plain), whole, strict=True):
        assert torch.equal(batch["labels"], other["labels"])
        assert 0 < (batch["pixel_values"] - other["pixel_values"]).abs().mean() < 0.15
    assert_equal(batches_of(fast, position=12, count=3), whole[3:])
