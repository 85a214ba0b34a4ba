"""Photos are resized from where they lie: same values as with copies, nothing shared, nothing written to."""

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from PIL.Image import Resampling
from skimage import data
from torchvision import tv_tensors
from transformers import BitImageProcessor, ViTImageProcessor

from vitreg_hf.model import image_processing_vitreg, pixel_memory
from vitreg_hf.model.image_inputs import read_image
from vitreg_hf.model.image_processing_vitreg import ViTRegImageProcessor

SIZES = [(300, 451), (512, 512), (97, 60), (33, 200), (301, 299)]  # height, width: larger and smaller than 224


def photos() -> list[PIL.Image.Image]:
    sources = [data.chelsea(), data.astronaut()]
    return [PIL.Image.fromarray(sources[i % 2]).resize(size[::-1]) for i, size in enumerate(SIZES)]


def read_only(photo: PIL.Image.Image) -> np.ndarray:
    array = np.asarray(photo)
    assert not array.flags.writeable
    return array


def planes(photo: PIL.Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1).contiguous()


def values_of(image: Any) -> np.ndarray:
    return image.numpy() if isinstance(image, torch.Tensor) else np.asarray(image)


LAYOUTS: dict[str, Callable[[PIL.Image.Image], Any]] = {
    "pil": lambda photo: photo,
    "grey pil": lambda photo: photo.convert("L"),
    "rgba pil": lambda photo: photo.convert("RGBA"),
    "palette": lambda photo: photo.convert("P"),
    "read-only": read_only,
    "array": np.array,
    "planes array": lambda photo: planes(photo).numpy(),
    "planes": planes,
    "channels last": lambda photo: torch.from_numpy(np.array(photo)),
    "part": lambda photo: torch.from_numpy(np.array(photo))[3:-2, 5:-1],
    "of four channels": lambda photo: torch.from_numpy(np.array(photo.convert("RGBA")))[..., :3],
    "mirrored": lambda photo: np.array(photo)[:, ::-1],
    "tv_tensor": lambda photo: tv_tensors.Image(planes(photo)),
    "float": lambda photo: planes(photo).float(),
    "grey": lambda photo: np.array(photo.convert("L")),
}
FIXED = {"size": {"height": 224, "width": 224}}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "fixed": FIXED,
    "bilinear": {"resample": Resampling.BILINEAR, **FIXED},
    "lanczos": {"resample": Resampling.LANCZOS, **FIXED},
    "nearest": {"resample": Resampling.NEAREST},
    "column": {"size": {"height": 50, "width": 1}},
    "no crop": {"size": 64, "do_center_crop": False, "do_pad": True, "size_divisor": 16},
    "box": {"size": {"max_height": 100, "max_width": 80}, "do_center_crop": False, "do_pad": True},
    "crop alone": {"do_resize": False},
    "not normalised": {"do_normalize": False},
    "not rescaled": {"do_rescale": False},
    "levels": {"do_rescale": False, "do_normalize": False},
    "one statistic": {"image_mean": 0.4, "image_std": 0.3},
}


def slowly(monkeypatch: pytest.MonkeyPatch, processor: Any, *arguments: Any, **options: Any) -> Any:
    """With copies: Pillow's bytes packed by Pillow, planes, and the steps of Transformers."""
    with monkeypatch.context() as patch:
        patch.setattr(pixel_memory, "_pillow_memory", lambda _: None)
        patch.setattr(image_processing_vitreg, "interleaved", lambda image: image.contiguous())
        patch.setattr(image_processing_vitreg, "_has_levels", lambda _: False)
        return processor(*arguments, **options)


def assert_same(found: Any, expected: Any) -> None:
    assert list(found) == list(expected)
    for name in expected:
        assert type(found[name]) is type(expected[name])
        assert len(found[name]) == len(expected[name])
        for one, other in zip(found[name], expected[name]):
            assert one.dtype == other.dtype
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
            assert name != "pixel_values" or torch.as_tensor(one).is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_values_are_those_of_copies(layout: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [LAYOUTS[layout](photo) for photo in photos()]
    processor = ViTRegImageProcessor(**OPTIONS[name])
    expected = slowly(monkeypatch, processor, images, return_tensors="pt")
    assert_same(processor(images, return_tensors="pt"), expected)


@pytest.mark.parametrize("call", [{"return_tensors": "np"}, {"device": "cpu"}, {"disable_grouping": False}, {}])
@pytest.mark.parametrize("name", ["default", "no crop", "levels"])
def test_the_way_it_is_called_does_not_matter(call: dict, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images, processor = photos() + photos(), ViTRegImageProcessor(**OPTIONS[name])
    maps = [np.asarray(photo.convert("L")) for photo in images]
    expected = slowly(monkeypatch, processor, images, maps, **call)
    assert_same(processor(images, maps, **call), expected)


def test_mixed_kinds_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    for layouts in (["pil", "planes", "array", "grey", "mirrored"], ["pil", "float", "array", "grey", "planes"]):
        images = [LAYOUTS[layout](photo) for layout, photo in zip(layouts, photos())]
        processor = ViTRegImageProcessor()
        expected = slowly(monkeypatch, processor, images, return_tensors="pt")
        assert_same(processor(images, return_tensors="pt"), expected)


@pytest.mark.parametrize("layout", ["pil", "array", "planes"])
@pytest.mark.parametrize("theirs", [BitImageProcessor, ViTImageProcessor])
def test_transformers_processors_give_the_same(layout: str, theirs: Any) -> None:
    images = [LAYOUTS[layout](photo) for photo in photos()]
    for options in (
        {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True},
        {**FIXED, "do_center_crop": False, "resample": Resampling.BILINEAR},
    ):
        statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
        processors = [
            one(**{"resample": Resampling.BICUBIC, **options, **statistics}) for one in (ViTRegImageProcessor, theirs)
        ]
        ours, expected = (processor(images, return_tensors="pt")["pixel_values"] for processor in processors)
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "float"])
@pytest.mark.parametrize("name", ["levels", "raw"])
def test_nothing_is_shared_with_the_images(layout: str, name: str) -> None:
    """Whoever writes into the outputs changes no photo."""
    options = {"do_resize": False, "do_center_crop": False, **OPTIONS["levels"]} if name == "raw" else OPTIONS[name]
    processor = ViTRegImageProcessor(**options)
    images = [LAYOUTS[layout](photo) for photo in photos()]
    before = [values_of(image).copy() for image in images]
    for call in ({}, {"device": "cpu"}):
        for values in processor(images, **call)["pixel_values"]:
            values.fill_(7)
    assert all(np.array_equal(values_of(image), copy) for image, copy in zip(images, before))


@pytest.mark.parametrize("layout", ["pil", "grey pil", "read-only"])
def test_an_image_that_is_read_to_be_kept_is_nobody_elses(layout: str) -> None:
    photo = LAYOUTS[layout](photos()[0])
    before = values_of(photo).copy()
    pixels = read_image(photo, do_convert_rgb=False)
    assert pixels.is_contiguous()
    pixels.fill_(7)
    assert np.array_equal(values_of(photo), before)


# ---- memory --------------------------------------------------------------------------------------------------------


def test_a_photo_of_pillow_is_read_where_it_is() -> None:
    photo = photos()[0]
    pixels = pixel_memory.pillow_pixels(photo, do_convert_rgb=True)
    assert np.array_equal(pixels, np.array(photo))
    photo.putpixel((5, 4), (1, 2, 3))
    assert pixels[4, 5].tolist() == [1, 2, 3]


def test_it_is_kept_as_long_as_it_is_read() -> None:
    photo = PIL.Image.new("RGB", (1000, 1000), (1, 2, 3))
    pixels = pixel_memory.pillow_pixels(photo, do_convert_rgb=True)
    del photo
    gc.collect()
    others = [PIL.Image.new("RGB", (1000, 1000), (9, 9, 9)) for _ in range(4)]
    assert len(others) == 4
    assert torch.equal(pixels, torch.tensor([1, 2, 3], dtype=torch.uint8).expand(1000, 1000, 3))


def test_photos_in_several_blocks_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    photo = PIL.Image.fromarray(data.astronaut()).resize((2300, 2000))
    assert pixel_memory._pillow_memory(photo) is None
    processor = ViTRegImageProcessor()
    for image in (photo, planes(photo)):
        expected = slowly(monkeypatch, processor, image, return_tensors="pt")
        assert_same(processor(image, return_tensors="pt"), expected)


def test_older_pillow_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(PIL.Image.Image, "__arrow_c_array__")
    photo = photos()[0]
    assert pixel_memory._pillow_memory(photo) is None
    assert np.array_equal(pixel_memory.pillow_pixels(photo, do_convert_rgb=True), np.array(photo))
    assert pixel_memory.interleaved(planes(photo)).shape[0] == 3


@pytest.mark.parametrize("layout", ["pil", "planes", "of four channels", "array"])
def test_channels_of_a_pixel_lie_side_by_side(layout: str) -> None:
    image = LAYOUTS[layout](photos()[0])
    pixels = ViTRegImageProcessor().process_image(image, do_convert_rgb=True)
    side_by_side = pixel_memory.interleaved(pixels)
    assert side_by_side.stride(0) == 1
    assert torch.equal(side_by_side[:3], pixels)
    assert torch.equal(pixel_memory.moved(pixels, "cpu"), pixels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["default", "bilinear", "no crop", "levels"])
def test_cuda_gives_the_same_from_any_layout(layout: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [LAYOUTS[layout](photo) for photo in photos()]
    processor = ViTRegImageProcessor(**OPTIONS[name])
    expected = slowly(monkeypatch, processor, images, device="cuda", return_tensors="pt")
    found = processor(images, device="cuda", return_tensors="pt")
    assert found["pixel_values"].device.type == "cuda"
    assert torch.equal(found["pixel_values"], expected["pixel_values"])


def test_rows_with_room_behind_them_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PILLOW_ALIGNMENT asks for: rows of 21 pixels are 84 bytes, which 64 does not divide."""
    levels = np.random.default_rng(0).integers(0, 256, (9, 21, 3), dtype=np.uint8)
    before = PIL.Image.core.get_alignment()
    PIL.Image.core.set_alignment(64)
    try:
        photo = PIL.Image.fromarray(levels)
        pixels = ViTRegImageProcessor().process_image(photo, do_convert_rgb=True)
    finally:
        PIL.Image.core.set_alignment(before)
    assert torch.equal(pixels, torch.from_numpy(levels).permute(2, 0, 1))
