"""Both image processors: what they read, that they agree, what they pad and mask, label maps, errors, saving."""

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from PIL.Image import Resampling
from sklearn.datasets import load_sample_images
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import _geometry
from transformers import BatchFeature

from vitreg_hf.model import (
    image_inputs,
    image_processing_pil_vitreg,
    image_processing_vitreg,
    patch_budget,
    processor_checks,
)
from vitreg_hf.model.image_processing_pil_vitreg import ViTRegImageProcessorPil
from vitreg_hf.model.image_processing_vitreg import ViTRegImageProcessor

MODULES: list[Any] = [
    processor_checks,
    patch_budget,
    image_inputs,
    image_processing_pil_vitreg,
    image_processing_vitreg,
]
PROCESSORS: list[Any] = [ViTRegImageProcessor, ViTRegImageProcessorPil]
RAW = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}
both = pytest.mark.parametrize("processor_class", PROCESSORS)


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    """Two 427 x 640 photos, uint8 `(H, W, 3)`, writable."""
    return [np.array(photo) for photo in load_sample_images().images]


def pixels(processor_class: Any, image: object, **options: Any) -> np.ndarray:
    """Pixel values of one image before rescaling and normalisation, `(C, H, W)`."""
    return processor_class(**{**RAW, **options})(image, return_tensors="np")["pixel_values"][0]


def random_array(*shape: int, dtype: str = "uint8", high: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def mode_of(path: Path) -> str:
    with PIL.Image.open(path) as image:
        return image.mode


def first(image: np.ndarray) -> np.ndarray:
    return np.moveaxis(image, -1, 0)


# ---- the usual pipeline --------------------------------------------------------------------------------------------


@both
def test_defaults_are_the_usual_vit_pipeline(processor_class: Any, photos: list[np.ndarray]) -> None:
    resized = PIL.Image.fromarray(photos[0]).resize((383, 256), Resampling.BICUBIC)
    cropped = np.array(resized)[16 : 16 + 224, 79 : 79 + 224] / 255
    expected = first((cropped - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225])
    batch = processor_class()(PIL.Image.fromarray(photos[0]), return_tensors="pt")
    assert list(batch) == ["pixel_values"]
    assert batch["pixel_values"].dtype == torch.float32
    # one grey level is 1 / 255 / std
    assert np.abs(batch["pixel_values"][0].numpy() - expected).max() <= 1.001 / 255 / 0.224


@both
@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"shortest_edge": 100}, (100, 149)),
        (100, (100, 149)),
        ({"shortest_edge": 100, "longest_edge": 120}, (80, 120)),
        ({"height": 33, "width": 70}, (33, 70)),
        ((33, 70), (33, 70)),
        ({"max_height": 100, "max_width": 100}, (66, 100)),
    ],
)
def test_resize_options(processor_class: Any, photos: list[np.ndarray], size: object, expected: tuple) -> None:
    assert pixels(processor_class, photos[0], do_resize=True, size=size).shape == (3, *expected)


@both
def test_size_that_says_too_little_is_refused(processor_class: Any, photos: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match=r"expected size with shortest_edge.*got .*longest_edge=50"):
        pixels(processor_class, photos[0], do_resize=True, size={"longest_edge": 50})


@both
@pytest.mark.parametrize(("height", "width"), [(30, 40), (31, 41), (9, 40), (30, 8), (7, 6)])
def test_centre_crop_pads_what_is_too_small(processor_class: Any, height: int, width: int) -> None:
    image = random_array(height, width, 3)
    expected = np.zeros((12, 13, 3), dtype=np.uint8)
    top, left = (12 - height) // 2 if height < 12 else 0, (13 - width) // 2 if width < 13 else 0
    part = image[max(height - 12, 0) // 2 :, max(width - 13, 0) // 2 :][:12, :13]
    expected[top : top + part.shape[0], left : left + part.shape[1]] = part
    cropped = pixels(processor_class, image, do_center_crop=True, crop_size={"height": 12, "width": 13})
    assert np.array_equal(cropped, first(expected))


@both
def test_steps_can_be_left_out(processor_class: Any) -> None:
    image = random_array(8, 9, 3)
    rescaled = pixels(processor_class, image, do_rescale=True, rescale_factor=0.5)
    assert np.allclose(rescaled, first(image) * 0.5)
    normalised = pixels(processor_class, image, do_normalize=True, image_mean=[1, 2, 3], image_std=[2, 4, 8])
    assert np.allclose(normalised, first((image - np.array([1, 2, 3])) / np.array([2, 4, 8])), atol=1e-5)
    same_for_all = pixels(processor_class, image, do_normalize=True, image_mean=100.0, image_std=50.0)
    assert np.allclose(same_for_all, first((image - 100.0) / 50), atol=1e-5)


@both
def test_batches_may_be_lists_nested_lists_or_arrays(processor_class: Any) -> None:
    images = random_array(4, 10, 12, 3)
    processor = processor_class(**RAW)
    for given in (images, list(images), [list(images[:1]), list(images[1:])], [images[:3], images[3]]):
        assert np.array_equal(processor(given, return_tensors="np")["pixel_values"], images.transpose(0, 3, 1, 2))


@both
def test_pipelines_call_works(processor_class: Any, photos: list[np.ndarray]) -> None:
    inputs = processor_class()(images=[PIL.Image.fromarray(photos[0])], return_tensors="pt").to(torch.float16)
    assert inputs["pixel_values"].dtype == torch.float16


@both
def test_inputs_are_not_written_to(processor_class: Any) -> None:
    image = np.random.default_rng(0).random((3, 20, 20)).astype(np.float32)
    before = image.copy()
    processor_class(size=20, crop_size=20)(torch.from_numpy(image), return_tensors="pt", disable_grouping=True)
    assert np.array_equal(image, before)


# ---- the backends agree --------------------------------------------------------------------------------------------

SIZES = [(256, 383), (97, 131), (427, 320), (518, 700), (1000, 1400)]


def assert_agree(ours: np.ndarray, reference: np.ndarray, allow_two: bool) -> None:
    difference = np.abs(ours.astype(int) - reference.astype(int)).max(axis=0)
    assert difference.max() <= (2 if allow_two else 1)
    assert (difference > 1).mean() < 1e-4


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resample", [Resampling.BILINEAR, Resampling.BICUBIC])
def test_backends_agree_within_a_grey_level(photos: list[np.ndarray], size: tuple, resample: Resampling) -> None:
    options = {"do_resize": True, "size": size, "resample": resample}
    for photo in (*photos, photos[0][100:200, 100:240]):
        torchvision, pil = (pixels(processor_class, photo, **options) for processor_class in PROCESSORS)
        enlarged = size[0] > photo.shape[0]
        assert_agree(torchvision, pil, allow_two=enlarged and resample == Resampling.BICUBIC)
        expected = PIL.Image.fromarray(np.ascontiguousarray(photo)).resize(size[::-1], resample)
        assert np.array_equal(pil, first(np.array(expected)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resample", [Resampling.BILINEAR, Resampling.BICUBIC])
def test_a_gpu_agrees_as_well(
    photos: list[np.ndarray], size: tuple, resample: Resampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU made to resize as a GPU does: floats, no rounding between the passes unless we ask for two."""
    monkeypatch.setattr(_geometry, "_do_native_uint8_resize_on_cpu", lambda _: False)
    needs_two_passes = image_processing_vitreg._needs_two_passes

    def as_if_on_gpu(image: torch.Tensor, resample: Resampling) -> bool:
        on_gpu: Any = SimpleNamespace(dtype=image.dtype, device=torch.device("cuda"))
        return needs_two_passes(on_gpu, resample)

    monkeypatch.setattr(image_processing_vitreg, "_needs_two_passes", as_if_on_gpu)
    options = {"do_resize": True, "size": size, "resample": resample}
    torchvision, pil = (pixels(processor_class, photos[0], **options) for processor_class in PROCESSORS)
    assert_agree(torchvision, pil, allow_two=size[0] > 427 and resample == Resampling.BICUBIC)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", SIZES)
def test_cuda_agrees(photos: list[np.ndarray], size: tuple) -> None:
    options = {**RAW, "do_resize": True, "size": size}
    on_gpu = ViTRegImageProcessor(**options)(photos[0], device="cuda", return_tensors="pt")["pixel_values"]
    assert on_gpu.device.type == "cuda"
    pil = pixels(ViTRegImageProcessorPil, photos[0], do_resize=True, size=size)
    assert_agree(on_gpu[0].cpu().numpy(), pil, allow_two=size[0] > 427)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_pads_masks_and_labels(photos: list[np.ndarray]) -> None:
    images = [photos[0], np.ascontiguousarray(photos[1][:300])]
    maps = [np.zeros(image.shape[:2], dtype=np.uint8) for image in images]
    options: dict[str, Any] = {
        "size": 64,
        "do_center_crop": False,
        "do_pad": True,
        "segmentation_maps": maps,
        "return_tensors": "pt",
    }
    on_gpu, on_cpu = (ViTRegImageProcessor()(images, device=device, **options) for device in ("cuda", "cpu"))
    assert {value.device.type for value in on_gpu.values()} == {"cuda"}
    assert torch.equal(on_gpu["pixel_mask"].cpu(), on_cpu["pixel_mask"])
    assert torch.equal(on_gpu["labels"].cpu(), on_cpu["labels"])
    from_gpu = ViTRegImageProcessorPil()(torch.from_numpy(photos[0]).cuda(), return_tensors="pt")["pixel_values"]
    assert from_gpu.device.type == "cpu"


@pytest.mark.parametrize("size", [(17, 23), (97, 131), (300, 301)])
def test_nearest_is_the_same_everywhere(photos: list[np.ndarray], size: tuple) -> None:
    options = {"do_resize": True, "size": size, "resample": Resampling.NEAREST}
    torchvision, pil = (pixels(processor_class, photos[0], **options) for processor_class in PROCESSORS)
    assert np.array_equal(torchvision, pil)
    rows, columns = (np.floor((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, (427, 640)))
    assert np.array_equal(pil, first(photos[0][rows][:, columns]))


@pytest.mark.parametrize("size", [(17, 23), (90, 95)])
def test_float_images_are_resized_as_floats(size: tuple) -> None:
    image = np.random.default_rng(0).normal(size=(30, 40, 3)).astype(np.float32)
    options = {"do_resize": True, "size": size}
    torchvision, pil = (pixels(processor_class, image, **options) for processor_class in PROCESSORS)
    assert pil.dtype == np.float32
    assert np.abs(torchvision - pil).max() < 1e-4


def test_filters_are_named_by_either_library(photos: list[np.ndarray]) -> None:
    names = [Resampling.BICUBIC, 3, InterpolationMode.BICUBIC]
    for processor_class in PROCESSORS:
        processor = processor_class()
        image = processor.process_image(photos[0])
        size = processor.size | {"shortest_edge": 50}
        resized = [np.asarray(processor.resize(image, size, name)) for name in names]
        assert np.array_equal(resized[0], resized[1])
        assert np.array_equal(resized[0], resized[2])


def test_filters_that_torchvision_lacks_are_refused(photos: list[np.ndarray]) -> None:
    options = {"do_resize": True, "size": 50, "resample": Resampling.BOX}
    assert pixels(ViTRegImageProcessorPil, photos[0], **options).shape == (3, 50, 74)
    with pytest.raises(ValueError, match="expected resample NEAREST, BILINEAR, BICUBIC or LANCZOS, got BOX"):
        pixels(ViTRegImageProcessor, photos[0], **options)


# ---- PIL images ----------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV"])
def test_modes_become_rgb(processor_class: Any, photos: list[np.ndarray], mode: str) -> None:
    photo = PIL.Image.fromarray(photos[1][::8, ::8].copy())
    image = (
        (photo.convert("YCbCr") if mode == "LAB" else photo).convert(mode) if mode != "LAB" else photo.convert(mode)
    )
    found = pixels(processor_class, image)
    assert found.dtype == np.uint8
    assert np.array_equal(found, first(np.array(image.convert("RGB"))))
    # modes that hold all colours also show the photo they were made from: HSV, LAB and YCbCr lose some levels
    if mode not in ("1", "L", "P"):
        assert np.abs(found.astype(int) - first(np.array(photo))).mean() < 3


def rgba_image() -> PIL.Image.Image:
    """Red, opaque to fully transparent from left to right."""
    rgba = np.zeros((4, 256, 4), dtype=np.uint8)
    rgba[..., 0], rgba[..., 3] = 255, np.arange(256)
    return PIL.Image.fromarray(rgba)


@both
@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa"])
def test_alpha_is_laid_over_white(processor_class: Any, mode: str) -> None:
    image = rgba_image().convert(mode)
    rgba = np.array(image.convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    expected = np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha))
    found = pixels(processor_class, image)
    assert np.array_equal(found, first(expected))
    assert (found[:, :, 0] == 255).all()  # fully transparent is white, whatever colour it hides


@both
def test_transparent_colours_are_white(processor_class: Any, tmp_path: Path) -> None:
    palette = PIL.Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8)).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.save(tmp_path / "palette.png", transparency=1)
    assert mode_of(tmp_path / "palette.png") == "P"
    found = pixels(processor_class, tmp_path / "palette.png")
    assert found[:, 0].T.tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]

    PIL.Image.fromarray(np.array([[7, 9]], dtype=np.uint8)).save(tmp_path / "grey.png", transparency=9)
    assert pixels(processor_class, str(tmp_path / "grey.png"))[:, 0].T.tolist() == [[7, 7, 7], [255, 255, 255]]

    rgb = PIL.Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    rgb.save(tmp_path / "rgb.png", transparency=(4, 5, 6))
    assert pixels(processor_class, str(tmp_path / "rgb.png"))[:, 0].T.tolist() == [[1, 2, 3], [255, 255, 255]]


SIXTEEN_BIT = np.array([[0, 128, 129, 257, 1000, 32768, 65406, 65407, 65535]], dtype=np.uint16)
EIGHT_BIT = [0, 0, 1, 1, 4, 128, 254, 255, 255]


@both
@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I"])
def test_sixteen_bit_is_scaled_not_clipped(processor_class: Any, mode: str) -> None:
    image = PIL.Image.fromarray(SIXTEEN_BIT.astype(np.int32)) if mode == "I" else PIL.Image.fromarray(SIXTEEN_BIT)
    image = image if image.mode == mode else image.convert("I").convert(mode)
    found = pixels(processor_class, image)
    assert found.dtype == np.uint8
    assert found.shape == (3, 1, 9)
    assert (found[:, 0] == EIGHT_BIT).all()


@both
def test_sixteen_bit_files(processor_class: Any, tmp_path: Path) -> None:
    PIL.Image.fromarray(SIXTEEN_BIT).save(tmp_path / "deep.png")
    assert mode_of(tmp_path / "deep.png") == "I;16"
    assert (pixels(processor_class, str(tmp_path / "deep.png"))[:, 0] == EIGHT_BIT).all()
    PIL.Image.fromarray(SIXTEEN_BIT).save(tmp_path / "hole.png", transparency=1000)
    assert (pixels(processor_class, str(tmp_path / "hole.png"))[:, 0] == [*EIGHT_BIT[:4], 255, *EIGHT_BIT[5:]]).all()


@both
@pytest.mark.parametrize("value", [-1, 65536])
def test_wider_integers_are_refused(processor_class: Any, value: int) -> None:
    image = PIL.Image.fromarray(np.array([[0, value]], dtype=np.int32))
    with pytest.raises(ValueError, match=rf"expected values 0..65535 in a PIL image of mode 'I', got .*{value}"):
        pixels(processor_class, image)


@both
def test_float_images_of_pil_hold_grey_levels(processor_class: Any) -> None:
    image = PIL.Image.fromarray(np.array([[0, 0.4, 0.6, 200, 255]], dtype=np.float32))
    assert (pixels(processor_class, image)[:, 0] == [0, 0, 1, 200, 255]).all()
    for bad in (-0.5, 255.5, np.nan):
        with pytest.raises(ValueError, match=r"expected values 0..255 in a PIL image of mode 'F', got"):
            pixels(processor_class, PIL.Image.fromarray(np.array([[0, bad]], dtype=np.float32)))


@both
@pytest.mark.parametrize(
    ("mode", "channels"), [("1", 1), ("L", 1), ("I;16", 1), ("LA", 2), ("P", 3), ("RGB", 3), ("RGBA", 4), ("CMYK", 4)]
)
def test_without_conversion_images_keep_their_channels(processor_class: Any, mode: str, channels: int) -> None:
    image = PIL.Image.fromarray(SIXTEEN_BIT) if mode == "I;16" else rgba_image().convert("RGB").convert(mode)
    found = pixels(processor_class, image, do_convert_rgb=False)
    assert found.shape[0] == channels
    if mode in ("L", "LA", "RGB", "RGBA", "CMYK"):
        assert np.array_equal(
            found.squeeze(), np.moveaxis(np.array(image), -1, 0) if channels > 1 else np.array(image)
        )
    if mode == "1":
        assert set(np.unique(found)) <= {0, 255}


# ---- files ---------------------------------------------------------------------------------------------------------


@both
def test_cmyk_jpeg(processor_class: Any, photos: list[np.ndarray], tmp_path: Path) -> None:
    photo = PIL.Image.fromarray(photos[1])
    photo.convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    assert mode_of(tmp_path / "print.jpg") == "CMYK"
    assert np.abs(pixels(processor_class, tmp_path / "print.jpg").astype(int) - first(photos[1])).mean() < 3


@both
def test_exif_orientation_of_files_is_applied(processor_class: Any, tmp_path: Path) -> None:
    image = PIL.Image.fromarray(random_array(6, 9, 3))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # shown upright after a quarter turn clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(pixels(processor_class, tmp_path / "turned.png"), first(np.rot90(np.array(image), -1)))


@both
def test_base64_and_urls_are_loaded(processor_class: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = PIL.Image.fromarray(random_array(6, 9, 3))
    image.save(tmp_path / "image.png")
    text = base64.b64encode((tmp_path / "image.png").read_bytes()).decode()
    for source in (text, f"data:image/png;base64,{text}"):
        assert np.array_equal(pixels(processor_class, source), first(np.array(image)))
    asked: list[str] = []

    def remember(url: str) -> PIL.Image.Image:
        asked.append(url)
        return image

    monkeypatch.setattr(image_inputs, "load_image", remember)
    assert np.array_equal(pixels(processor_class, ["https://example.org/a.png"]), first(np.array(image)))
    assert asked == ["https://example.org/a.png"]


@both
def test_files_that_cannot_be_read_are_named(processor_class: Any, tmp_path: Path) -> None:
    PIL.Image.fromarray(random_array(60, 90, 3)).save(tmp_path / "whole.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("broken.png", "text.jpg", ""):
        with pytest.raises(ValueError, match=r"expected a readable image file, got '.*" + name):
            pixels(processor_class, tmp_path / name)
    for missing in (tmp_path / "missing.png", str(tmp_path / "missing.png")):
        with pytest.raises(ValueError, match=r"expected an existing image file.*got '.*missing\.png'"):
            pixels(processor_class, missing)


# ---- arrays --------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("as_array", [np.asarray, torch.from_numpy])
def test_arrays_become_rgb(processor_class: Any, as_array: Any) -> None:
    grey, rgba = random_array(8, 9), random_array(8, 9, 4)
    for one_channel in (grey, grey[None], grey[..., None]):
        assert np.array_equal(pixels(processor_class, as_array(one_channel)), np.stack([grey] * 3))
    over_white = np.array(PIL.Image.alpha_composite(PIL.Image.new("RGBA", (9, 8), "white"), PIL.Image.fromarray(rgba)))
    found = pixels(processor_class, as_array(rgba))
    assert np.abs(found.astype(int) - first(over_white[..., :3])).max() <= 1
    assert np.array_equal(found, pixels(processor_class, PIL.Image.fromarray(rgba)))
    as_floats = pixels(processor_class, as_array((rgba / 255).astype(np.float32)))
    assert np.abs(as_floats * 255 - found).max() <= 0.501
    five = random_array(5, 8, 9)
    assert np.array_equal(pixels(processor_class, as_array(five)), five)


@both
def test_number_types_of_arrays(processor_class: Any) -> None:
    sixteen = np.stack([SIXTEEN_BIT] * 3)
    for deep in (sixteen, torch.from_numpy(sixteen), sixteen.astype(">u2")):
        assert (pixels(processor_class, deep)[:, 0] == EIGHT_BIT).all()
    levels = random_array(3, 8, 9)
    for dtype in ("int16", "int32", "int64", "uint32"):
        found = pixels(processor_class, levels.astype(dtype))
        assert found.dtype == np.uint8
        assert np.array_equal(found, levels)
    assert np.array_equal(pixels(processor_class, levels > 100), (levels > 100) * 255)
    for dtype in ("float16", "float32", "float64"):
        found = pixels(processor_class, levels.astype(dtype))
        assert found.dtype == np.float32
        assert np.array_equal(found, levels)
    assert np.array_equal(pixels(processor_class, torch.from_numpy(levels).bfloat16()), levels)
    levels.flags.writeable = False
    assert np.array_equal(pixels(processor_class, levels), levels)
    assert np.array_equal(pixels(processor_class, levels[:, ::-1]), levels[:, ::-1])


@both
def test_array_values_out_of_range_are_refused(processor_class: Any) -> None:
    with pytest.raises(ValueError, match=r"expected torch.int64 pixels in 0..255, got 0..300; 16 bit data must be"):
        pixels(processor_class, np.array([[0, 300]]))
    with pytest.raises(ValueError, match=r"expected float RGBA values in 0..1, got 0.0..2.0"):
        pixels(processor_class, np.array([0, 0, 1, 2], dtype=np.float32).reshape(4, 1, 1).repeat(5, -1))


@both
def test_what_is_no_image_is_refused(processor_class: Any) -> None:
    processor = processor_class()
    with pytest.raises(ValueError, match="expected at least one image, got none"):
        processor([], return_tensors="pt")
    with pytest.raises(
        ValueError, match="expected a PIL image, array, tensor, path or URL, or lists of them, got int"
    ):
        processor([3], return_tensors="pt")
    with pytest.raises(ValueError, match=r"expected an image of 2 or 3 dimensions, got shape \(5,\)"):
        processor(np.zeros(5), return_tensors="pt")


# ---- any channel count ---------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("channels", [1, 2, 5, 13])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_any_channel_count_is_resized_per_channel(processor_class: Any, channels: int, dtype: str) -> None:
    image = random_array(40, 50, channels, dtype=dtype)
    options = {"do_convert_rgb": False, "do_resize": True, "size": 30, "do_center_crop": True, "crop_size": 28}
    found = pixels(processor_class, image, **options)
    assert found.shape == (channels, 28, 28)
    assert np.array_equal(found, pixels(processor_class, first(image), **options))
    for channel in range(channels):
        assert np.array_equal(found[channel], pixels(processor_class, image[..., channel], **options)[0])
    mean, std = np.arange(channels) + 1.0, np.arange(channels) + 2.0
    normalised = pixels(
        processor_class, image, **options, do_normalize=True, image_mean=mean.tolist(), image_std=std.tolist()
    )
    assert np.allclose(normalised, (found - mean[:, None, None]) / std[:, None, None], atol=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 5, 13])
def test_backends_agree_for_any_channel_count(channels: int) -> None:
    image = random_array(40, 50, channels)
    options = {"do_convert_rgb": False, "do_resize": True, "size": 30}
    torchvision, pil = (pixels(processor_class, image, **options) for processor_class in PROCESSORS)
    assert_agree(torchvision, pil, allow_two=False)


@both
def test_channel_axis_is_the_smaller_one_unless_told(processor_class: Any) -> None:
    options = {"do_convert_rgb": False}
    assert pixels(processor_class, random_array(6, 9, 5), **options).shape == (5, 6, 9)
    assert pixels(processor_class, random_array(5, 9, 6), **options).shape == (5, 9, 6)
    tall = random_array(6, 9, 13)
    assert pixels(processor_class, tall, **options).shape == (6, 9, 13)
    processor = processor_class(**RAW, **options)
    told = processor(tall, input_data_format="channels_last", return_tensors="np")["pixel_values"]
    assert np.array_equal(told[0], first(tall))
    strip = random_array(3, 9, 5)  # Transformers would take the 3 for the channels
    told = processor(strip, input_data_format="channels_last", return_tensors="np")["pixel_values"]
    assert np.array_equal(told[0], first(strip))


@both
@pytest.mark.parametrize("name", ["image_mean", "image_std"])
def test_statistics_must_fit_the_channels(processor_class: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = {"image_mean": [0.5] * 5, "image_std": [0.5] * 5, name: [0.5] * 3}
    processor = processor_class(**statistics)
    monkeypatch.setattr(processor, "resize", lambda *_, **__: pytest.fail("work started before the check"))
    with pytest.raises(ValueError, match=rf"expected {name} of 5 values, one per image channel, got 3: \(0.5, 0.5"):
        processor(random_array(5, 300, 300), return_tensors="pt")


# ---- padding -------------------------------------------------------------------------------------------------------


def unequal_images() -> list[np.ndarray]:
    return [random_array(20, 30, 3), random_array(25, 18, 3)]


PAD = {"do_resize": False, "do_center_crop": False, "do_pad": True}


@both
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (25, 30)),
        ({"size_divisor": 14}, (28, 42)),
        ({"pad_size": {"height": 40, "width": 41}}, (40, 41)),
        ({"pad_size": {"height": 40, "width": 41}, "size_divisor": 16}, (48, 48)),
    ],
)
def test_padding_is_masked(processor_class: Any, options: dict, expected: tuple) -> None:
    images = unequal_images()
    processor = processor_class(**PAD, **options)
    batch = processor(images, return_tensors="pt")
    assert set(batch) == {"pixel_values", "pixel_mask"}
    assert batch["pixel_values"].shape == (2, 3, *expected)
    assert batch["pixel_mask"].dtype == torch.int64
    for image, values, mask in zip(images, batch["pixel_values"], batch["pixel_mask"]):
        height, width = image.shape[:2]
        true_mask = torch.zeros(expected, dtype=torch.int64)
        true_mask[:height, :width] = 1
        assert torch.equal(mask, true_mask)
        assert (values[:, true_mask == 0] == 0).all()  # zero after normalisation, not black
        alone = processor(image, do_pad=False, return_tensors="pt")
        assert "pixel_mask" not in alone
        assert torch.equal(values[:, :height, :width], alone["pixel_values"][0])


def test_masks_agree_and_stay_masks() -> None:
    masks = []
    for processor_class in PROCESSORS:
        batch = processor_class(**PAD, size_divisor=7)(unequal_images(), return_tensors="pt").to(torch.bfloat16)
        assert batch["pixel_values"].dtype == torch.bfloat16
        assert batch["pixel_mask"].dtype == torch.int64
        assert processor_class.model_input_names == ["pixel_values", "pixel_mask"]
        masks.append(batch["pixel_mask"])
    assert torch.equal(*masks)


@both
def test_padding_without_tensors_or_as_numpy(processor_class: Any) -> None:
    processor = processor_class(**PAD)
    arrays = processor(unequal_images(), return_tensors="np")
    assert isinstance(arrays["pixel_mask"], np.ndarray)
    assert arrays["pixel_mask"].shape == (2, 25, 30)
    assert [tuple(values.shape) for values in processor(unequal_images())["pixel_values"]] == [(3, 25, 30)] * 2


@both
def test_padding_options_are_checked(processor_class: Any) -> None:
    processor = processor_class(**PAD)
    with pytest.raises(ValueError, match=r"pad_size=\(20, 20\), image_size=.*20, 30"):
        processor(unequal_images(), pad_size=20)
    with pytest.raises(ValueError, match=r"expected pad_size with height and width, got .*shortest_edge=20"):
        processor(unequal_images(), pad_size={"shortest_edge": 20})
    with pytest.raises(ValueError, match="expected a positive size_divisor, got 0"):
        processor(unequal_images(), size_divisor=0)


@both
def test_images_that_do_not_stack_are_refused(processor_class: Any) -> None:
    processor = processor_class(do_resize=False, do_center_crop=False)
    with pytest.raises(ValueError, match=r"expected images of one shape to stack, got .*\(3, 20, 30\).*do_pad=True"):
        processor(unequal_images(), return_tensors="pt")
    assert len(processor(unequal_images())["pixel_values"]) == 2


@both
def test_channels_last_output_is_refused(processor_class: Any) -> None:
    with pytest.raises(ValueError, match="expected data_format 'channels_first', got 'channels_last'"):
        processor_class()(unequal_images(), data_format="channels_last")


# ---- segmentation --------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("kind", ["uint8", "int64", "uint16", "torch", "L", "P", "I;16", "file"])
def test_label_maps_keep_their_values(processor_class: Any, kind: str, tmp_path: Path) -> None:
    labels = random_array(20, 30, high=200)
    given: Any
    if kind in ("uint8", "int64", "uint16"):
        given = labels.astype(kind)
    elif kind == "torch":
        given = torch.from_numpy(labels)
    elif kind == "I;16":
        given = PIL.Image.fromarray(labels.astype(np.uint16))
    else:
        given = PIL.Image.fromarray(labels)
        if kind == "P":
            given.putpalette(list(range(255, -1, -1)) * 3)
            assert given.mode == "P"
    if kind == "file":
        given.save(tmp_path / "map.png")
        given = tmp_path / "map.png"
    batch = processor_class(**RAW)(random_array(20, 30, 3), given, return_tensors="pt")
    assert batch["labels"].dtype == torch.int64
    assert np.array_equal(batch["labels"][0], labels)


@both
def test_label_maps_go_the_way_of_their_image(processor_class: Any) -> None:
    """A map that is the image must stay it under a nearest resize, the crop and the padding."""
    image = random_array(40, 60, 3)
    options = {**RAW, "do_resize": True, "size": 30, "resample": 0, "do_center_crop": True}
    for crop in ({"height": 24, "width": 25}, {"height": 36, "width": 60}):
        batch = processor_class(**options, crop_size=crop)(image, image[..., 0], return_tensors="pt")
        inside = np.zeros((crop["height"], crop["width"]), dtype=bool)
        top, left = max(crop["height"] - 30, 0) // 2, max(crop["width"] - 45, 0) // 2
        inside[top : top + 30, left : left + 45] = True
        assert np.array_equal(batch["labels"][0][inside], batch["pixel_values"][0, 0][inside])
        assert (batch["labels"][0][~inside] == 255).all()
        assert batch["labels"].shape[-2:] == batch["pixel_values"].shape[-2:]


@both
def test_label_maps_are_padded_with_the_ignored_label(processor_class: Any) -> None:
    images = unequal_images()
    maps = [random_array(*image.shape[:2], high=10) for image in images]
    batch = processor_class(**PAD, size_divisor=8)(images, maps, return_tensors="pt")
    assert batch["labels"].shape == (2, 32, 32)
    assert (batch["labels"][batch["pixel_mask"] == 0] == 255).all()
    for labels, truth in zip(batch["labels"], maps):
        assert np.array_equal(labels[: truth.shape[0], : truth.shape[1]], truth)


@both
@pytest.mark.parametrize("dtype", ["uint8", "int64"])
def test_labels_can_be_reduced(processor_class: Any, dtype: str) -> None:
    given = np.array([[0, 1, 2, 150, 254, 255]] * 2, dtype=dtype)
    batch = processor_class(**RAW)(random_array(2, 6, 3), given, do_reduce_labels=True, return_tensors="np")
    assert batch["labels"].tolist() == [[[255, 0, 1, 149, 253, 255]] * 2]
    assert given.tolist() == [[0, 1, 2, 150, 254, 255]] * 2
    plain = processor_class(**RAW)(random_array(2, 6, 3), given)
    assert type(plain["labels"][0]) is type(plain["pixel_values"][0])


@both
def test_label_maps_must_fit_their_images(processor_class: Any) -> None:
    processor = processor_class()
    image = random_array(20, 30, 3)
    with pytest.raises(ValueError, match=r"as large as their images, \[\(20, 30\)\], got \[\(30, 20\)\]"):
        processor(image, random_array(30, 20))
    with pytest.raises(ValueError, match=r"as large as their images, \[\(20, 30\)\], got \[\(20, 30\), \(20, 30\)\]"):
        processor(image, [random_array(20, 30)] * 2)
    for several in (PIL.Image.fromarray(image), random_array(20, 30).astype(np.float32)):
        with pytest.raises(ValueError, match="expected a segmentation map of integers with one channel, got"):
            processor(image, several)


def logits_output(*shape: int) -> SimpleNamespace:
    return SimpleNamespace(logits=torch.randn(*shape, generator=torch.Generator().manual_seed(0)))


@both
def test_post_processing_without_padding(processor_class: Any) -> None:
    processor, outputs = processor_class(), logits_output(3, 5, 7, 8)
    maps = processor.post_process_semantic_segmentation(outputs)
    assert torch.equal(torch.stack(maps), outputs.logits.argmax(1))
    assert maps[0].dtype == torch.int64
    for sizes in ([(20, 30), (7, 8), (3, 90)], torch.tensor([[20, 30], [7, 8], [3, 90]])):
        found = processor.post_process_semantic_segmentation(outputs, sizes, return_segmentation_scores=True)
        plain = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        for item, labels, logits, size in zip(found, plain, outputs.logits, sizes):
            expected = F.interpolate(logits[None], tuple(int(edge) for edge in size), mode="bilinear")[0]
            assert torch.allclose(item.segmentation_scores, expected, atol=1e-5)
            assert torch.equal(item.segmentation, labels)
            assert torch.equal(labels, item.segmentation_scores.argmax(0))


@both
def test_post_processing_cuts_padding_off_first(processor_class: Any) -> None:
    """Logits of a padded batch, stride 4: what they say about padding must not reach the map."""
    processor, outputs = processor_class(), logits_output(2, 5, 8, 10)
    mask = torch.zeros(2, 32, 40, dtype=torch.int64)
    mask[0, :20, :40] = mask[1, :32, :24] = 1
    whole = [outputs.logits[0, :, :5, :10], outputs.logits[1, :, :8, :6]]
    for given in (mask, mask.numpy(), mask.bool()):
        maps = processor.post_process_semantic_segmentation(outputs, [(41, 80), (64, 50)], given)
        for labels, logits, size in zip(maps, whole, [(41, 80), (64, 50)]):
            scores = F.interpolate(logits[None], size, mode="bilinear")[0]
            assert (labels == scores.argmax(0)).float().mean() > 0.999  # ties aside
    kept = processor.post_process_semantic_segmentation(outputs, pixel_mask=mask)
    assert torch.equal(kept[0], whole[0].argmax(0))
    assert torch.equal(kept[1], whole[1].argmax(0))


def test_post_processing_of_a_patch_that_is_half_padding() -> None:
    """22 of 32 pixels are 5.5 logits of 4 pixels each: the map is stretched over those, not over 5 or 6."""
    processor: Any = ViTRegImageProcessor()
    logits = torch.zeros(1, 2, 8, 8)
    logits[:, 0], logits[:, 1] = 3.0, torch.arange(8.0)[:, None] + 0.5  # label 1 wins below 2.5 rows of logits
    mask = torch.zeros(1, 32, 32)
    mask[:, :22, :] = 1
    (labels,) = processor.post_process_semantic_segmentation(SimpleNamespace(logits=logits), [(22, 32)], mask)
    assert torch.equal(labels[:, 0], (torch.arange(22) + 0.5 > 12).long())
    (labels,) = processor.post_process_semantic_segmentation(SimpleNamespace(logits=logits), None, mask)
    assert labels.shape == (6, 8)


@both
def test_post_processing_checks_counts(processor_class: Any) -> None:
    processor, outputs = processor_class(), logits_output(2, 5, 8, 10)
    with pytest.raises(ValueError, match="expected 2 target_sizes, one per image of the logits, got 3"):
        processor.post_process_semantic_segmentation(outputs, [(1, 4)] * 3)
    with pytest.raises(ValueError, match="expected 2 pixel_mask, one per image of the logits, got 1"):
        processor.post_process_semantic_segmentation(outputs, pixel_mask=torch.ones(1, 8, 10))


# ---- saving, loading, importing ------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("other_class", PROCESSORS)
def test_saved_and_reloaded(processor_class: Any, other_class: Any, tmp_path: Path, photos: list[np.ndarray]) -> None:
    options = {
        "size": {"height": 40, "width": 44},
        "resample": Resampling.BILINEAR,
        "do_center_crop": False,
        "do_pad": True,
        "size_divisor": 14,
        "do_reduce_labels": True,
        "image_mean": [0.1, 0.2, 0.3],
    }
    saved = processor_class(**options)
    (written,) = saved.save_pretrained(tmp_path)
    assert Path(written).name == "preprocessor_config.json"
    assert json.loads(Path(written).read_text())["image_processor_type"] == "ViTRegImageProcessor"
    loaded = other_class.from_pretrained(tmp_path)
    assert type(loaded) is other_class
    assert loaded.to_dict() == saved.to_dict()
    assert other_class.from_pretrained(tmp_path, size_divisor=16).size_divisor == 16
    if other_class is processor_class:
        before, after = (one(photos, return_tensors="pt") for one in (saved, loaded))
        assert isinstance(after, BatchFeature)
        assert all(torch.equal(before[key], after[key]) for key in ("pixel_values", "pixel_mask"))
        assert before["pixel_values"].shape == (2, 3, 42, 56)


def test_both_write_the_same_file() -> None:
    assert ViTRegImageProcessor().to_json_string() == ViTRegImageProcessorPil().to_json_string()


def test_options_are_found_where_transformers_looks_for_them() -> None:
    for module, processor_class in zip((image_processing_vitreg, image_processing_pil_vitreg), PROCESSORS):
        assert vars(module)["ViTRegImageProcessorKwargs"] is processor_class.valid_kwargs
    assert [processor_class().backend for processor_class in PROCESSORS] == ["torchvision", "pil"]


@both
def test_unknown_options_are_refused(processor_class: Any) -> None:
    with pytest.raises(TypeError, match="do_resise"):
        processor_class()(random_array(30, 30, 3), do_resise=True)


WITHOUT_TORCHVISION = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import importlib.util
real_find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torchvision" else real_find_spec(name, package)

import numpy as np
from flat.image_processing_pil_vitreg import ViTRegImageProcessorPil
from flat.image_processing_vitreg import ViTRegImageProcessor

image = np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)
batch = ViTRegImageProcessorPil(size=20, crop_size=18, do_pad=True)(image, image[..., 0], return_tensors="pt")
assert batch["pixel_values"].shape == (1, 3, 18, 18), batch["pixel_values"].shape
assert "torchvision" not in sys.modules
try:
    ViTRegImageProcessor()
except ImportError as error:
    print(error)
"""


def test_modules_import_without_torchvision(tmp_path: Path) -> None:
    """In a folder of their own, as beside weights: the other modules of the package are not asked."""
    (tmp_path / "flat").mkdir()
    for module in MODULES:
        shutil.copy(module.__file__, tmp_path / "flat")
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_TORCHVISION], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "ViTRegImageProcessor requires the Torchvision library" in result.stdout


def test_modules_import_only_named_siblings() -> None:
    """The folder ships flat beside weights, and Transformers finds what to copy by reading `from .name import`."""
    for module in MODULES:
        text = Path(module.__file__).read_text()
        assert "from . import" not in text
        assert "import vitreg_hf" not in text
        assert "from vitreg_hf" not in text
        assert "import torchvision" not in text
        assert len(text.splitlines()) < 350


@pytest.mark.parametrize("processor_class", [ViTRegImageProcessor, ViTRegImageProcessorPil])
@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (224, 224)),
        ({"size": {"height": 32, "width": 48}}, (32, 48)),
        ({"size": {"shortest_edge": 32}}, (32, 32)),
        ({"size": 32}, (32, 32)),
        ({"size": {"shortest_edge": 32}, "crop_size": 24}, (24, 24)),
        ({"size": {"shortest_edge": 32}, "do_center_crop": False}, (32, 64)),
        ({"size": {"height": 48, "width": 48}, "do_center_crop": True, "crop_size": 32}, (32, 32)),
    ],
)
def test_a_size_chosen_alone_is_what_comes_out(processor_class, options, size, tmp_path) -> None:
    """The default crop of 224 would put a small image in a black frame."""
    image = np.zeros((100, 200, 3), np.uint8)
    processor = processor_class(**options)
    assert processor(image, return_tensors="pt")["pixel_values"].shape[-2:] == size
    processor.save_pretrained(tmp_path)
    reloaded = processor_class.from_pretrained(tmp_path)
    assert reloaded(image, return_tensors="pt")["pixel_values"].shape[-2:] == size


def test_a_binary_segmenter_and_the_mask_of_patches() -> None:
    logits = torch.tensor([[[[5.0, -5.0], [-5.0, 5.0]]]])
    outputs = SimpleNamespace(logits=logits, patch_mask=None)
    processor = ViTRegImageProcessorPil()
    assert processor.post_process_semantic_segmentation(outputs)[0].tolist() == [[1, 0], [0, 1]]
    masked = SimpleNamespace(
        logits=logits.repeat(1, 3, 1, 1),
        patch_mask=torch.tensor([[True, False] * 2]),
        patch_map=torch.zeros(1, 4, 2, 2),
    )
    by_pixels = torch.tensor([[[1, 1, 0, 0]] * 4])
    expected = processor.post_process_semantic_segmentation(masked, [(8, 4)], pixel_mask=by_pixels)
    assert torch.equal(processor.post_process_semantic_segmentation(masked, [(8, 4)])[0], expected[0])
