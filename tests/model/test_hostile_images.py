"""Images and options of processors that are hostile or absurd are refused in little memory, by both backends."""

import base64
import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings, strategies as st

from vitreg_hf import ViTRegConfig, ViTRegForImageClassification, ViTRegImageProcessor, ViTRegImageProcessorPil
from vitreg_hf.model import processor_checks
from vitreg_hf.model.image_inputs import segmentation_scores

# The same examples on every run, and no clock.
fixed = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CLASSES = {"torchvision": ViTRegImageProcessor, "pil": ViTRegImageProcessorPil}
both = pytest.mark.parametrize("backend", CLASSES)
NAMES = {backend: class_.__name__ for backend, class_ in CLASSES.items()}
SAFE = PIL.Image.MAX_IMAGE_PIXELS or 0
image = np.full((30, 40, 3), 7, np.uint8)


def write_png(path: Path, width: int, height: int) -> str:
    """A black picture that a decoder really unpacks: a few kilobytes for any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packer = zlib.compressobj()
    rows = b"".join(packer.compress(bytes(width + 1)) for _ in range(height if width * height < 2**28 else 1))
    data = chunk(b"IDAT", rows + packer.flush())
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b""))
    return str(path)


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Above what Pillow refuses, and between that and what it only warns of."""
    folder = tmp_path_factory.mktemp("bombs")
    assert SAFE < 11_000**2 < 2 * SAFE < 50_000**2
    sides = {"refused by Pillow": 50_000, "warned of by Pillow": 11_000}
    return {name: write_png(folder / f"{side}.png", side, side) for name, side in sides.items()}


SIZES = {"refused by Pillow": "2500000000 pixels", "warned of by Pillow": "got 11000 x 11000"}


def assert_refused(report: Any, *messages: str, megabytes: int = 100) -> None:
    assert report.died_of == 0, "ended by the alarm or a crash"
    assert report.kind == "ValueError", report
    for message in messages:
        assert message in report.error
    assert report.length < 1000
    assert report.megabytes < megabytes


class TestBombs:
    @both
    @pytest.mark.parametrize("bomb", SIZES)
    def test_files_are_refused_by_name_before_they_are_decoded(
        self, bounded: Any, bombs: dict[str, str], backend: str, bomb: str
    ) -> None:
        report = bounded(f"vitreg_hf.{NAMES[backend]}()(argument)", bombs[bomb])
        assert_refused(report, "expected a readable image file", bombs[bomb], SIZES[bomb], megabytes=30)

    @pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
    @pytest.mark.parametrize("bomb", SIZES)
    def test_base64_is_refused(self, bounded: Any, bombs: dict[str, str], bomb: str, prefix: str) -> None:
        text = prefix + base64.b64encode(Path(bombs[bomb]).read_bytes()).decode()
        report = bounded("vitreg_hf.ViTRegImageProcessor()(argument)", text)
        assert_refused(report, "expected an existing image file", SIZES[bomb], megabytes=700)  # Transformers decodes

    @both
    def test_opened_images_are_refused_before_they_are_decoded(
        self, bounded: Any, bombs: dict[str, str], backend: str
    ) -> None:
        report = bounded(f"vitreg_hf.{NAMES[backend]}()(PIL.Image.open(argument))", bombs["warned of by Pillow"])
        assert_refused(report, f"expected an image of at most {SAFE} pixels", "got 11000 x 11000", megabytes=30)

    def test_label_maps_are_refused(self, bounded: Any, bombs: dict[str, str]) -> None:
        code = "vitreg_hf.ViTRegImageProcessor()(PIL.Image.new('L', (4, 4)), segmentation_maps=argument)"
        assert_refused(bounded(code, bombs["warned of by Pillow"]), "got 11000 x 11000", megabytes=50)

    @pytest.mark.parametrize("bomb", SIZES)
    def test_pipelines_refuse_them(self, bounded: Any, bombs: dict[str, str], bomb: str, model: Path) -> None:
        code = f"pipeline('image-classification', model={str(model)!r})(argument)"
        report = bounded(code, bombs[bomb], megabytes=3000)
        assert_refused(report, SIZES[bomb].removeprefix("got "), bombs[bomb], megabytes=1500)  # Transformers decodes

    def test_a_program_may_raise_the_limit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_png(tmp_path / "image.png", 40, 30)
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 700)
        with pytest.raises(ValueError, match=r"image\.png.*exceeds limit of 700 pixels"):
            ViTRegImageProcessor()(path)
        for most in (None, 1200):
            monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", most)
            assert len(ViTRegImageProcessor()(path)["pixel_values"]) == 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    ViTRegForImageClassification(ViTRegConfig(**small)).save_pretrained(folder)
    ViTRegImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(folder)
    return folder


class TestResults:
    @both
    @pytest.mark.parametrize("shape", [(1, 100_000), (100_000, 1)])
    def test_extreme_ratios_are_refused(self, bounded: Any, backend: str, shape: tuple[int, int]) -> None:
        code = f"vitreg_hf.{NAMES[backend]}(do_center_crop=False)(numpy.zeros(argument, 'uint8'))"
        height, width = (256 * edge for edge in shape)
        report = bounded(code, shape)
        assert_refused(report, "expected a resized image", "at most 67108864 in all", f"got {height} x {width}")

    @both
    def test_extreme_ratios_fit_a_fixed_size(self, backend: str) -> None:
        processor = CLASSES[backend](size={"height": 16, "width": 16}, do_center_crop=False)
        assert np.asarray(processor(np.zeros((1, 5000), np.uint8))["pixel_values"][0]).shape == (3, 16, 16)

    @pytest.mark.parametrize("shape", [(2, 1, 3), (9, 5, 3), (9, 5, 1), (1, 2, 3)])
    @pytest.mark.parametrize("resample", [2, 3])
    @pytest.mark.parametrize("height", [1, 2, 3])
    def test_of_one_column_are_those_of_pillow(self, height: int, resample: int, shape: tuple[int, ...]) -> None:
        """For these PyTorch's own kernel for bytes returns other pixels, or fails."""
        pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        options = {"size": {"height": height, "width": 1}, "do_center_crop": False, "resample": resample}
        found, expected = (
            np.asarray(class_(do_rescale=False, do_normalize=False, **options)(pixels)["pixel_values"][0]).astype(int)
            for class_ in CLASSES.values()
        )
        assert found.shape == (3, height, 1)
        assert np.abs(found - expected).max() <= 2

    @both
    @pytest.mark.parametrize(
        "options",
        [
            {"size": {"height": 2**26, "width": 2}},
            {"size": {"shortest_edge": 2**26}},
            {"size": {"max_height": 2**26, "max_width": 2**26}},
            {"crop_size": {"height": 2**14, "width": 2**14}},
            {"do_pad": True, "pad_size": {"height": 2**14, "width": 2**14}},
            {"do_pad": True, "size_divisor": 2**20},
        ],
        ids=lambda options: str(options)[:45],
    )
    def test_beyond_all_memory_are_refused(self, bounded: Any, backend: str, options: dict[str, Any]) -> None:
        code = f"vitreg_hf.{NAMES[backend]}(**argument)(PIL.Image.new('RGB', (40, 30)))"
        assert_refused(bounded(code, options), "at least one pixel per side and at most 67108864 in all")

    def test_of_segmentation_are_bounded(self) -> None:
        with pytest.raises(ValueError, match=r"expected a segmentation map of .* at most 67108864 in all"):
            segmentation_scores(torch.zeros(1, 2, 4, 4), [(10**6, 10**6)], None)

    @both
    @pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (0, 0), (5, 5, 0), (3, 0, 5), (0,)])
    def test_need_pixels(self, backend: str, shape: tuple[int, ...]) -> None:
        for kind in (np.zeros(shape, np.uint8), torch.zeros(shape)):
            with pytest.raises(ValueError, match=r"expected an image with pixels, got shape"):
                CLASSES[backend]()(kind)

    @both
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
    def test_need_finite_pixels(self, backend: str, value: float) -> None:
        pixels = np.zeros((8, 8, 3))
        pixels[3, 4, 1] = value
        with pytest.raises(ValueError, match="expected finite pixel values"):
            CLASSES[backend]()(pixels)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"size": 10**9}, "shortest_edge of size to be an integer from 1 to 67108864, got 1000000000"),
    ({"size": -5}, "shortest_edge of size to be an integer from 1"),
    ({"size": 0}, "shortest_edge of size to be an integer from 1"),
    ({"size": {"height": 10**9, "width": 10**9}}, "height of size to be an integer from 1"),
    ({"size": {"height": -5, "width": 5}}, "height of size to be an integer from 1"),
    ({"size": {"height": 5.5, "width": 5}}, "height"),
    ({"size": {"height": "a", "width": 5}}, "height"),
    ({"size": {"shortest_edge": True}}, "shortest_edge"),
    ({"size": {"shortest_edge": math.nan}}, "shortest_edge"),
    ({"size": "x"}, "x"),
    ({"crop_size": 0}, "height of crop_size to be an integer from 1"),
    ({"crop_size": -5}, "height of crop_size to be an integer from 1"),
    ({"crop_size": 10**9}, "height of crop_size to be an integer from 1"),
    ({"crop_size": {"shortest_edge": 5}}, "expected crop_size with height and width"),
    ({"do_pad": True, "pad_size": {"height": -3, "width": 3}}, "height of pad_size to be an integer from 1"),
    ({"do_pad": True, "size_divisor": 0}, "expected a positive size_divisor, got 0"),
    ({"do_pad": True, "size_divisor": 2.5}, "size_divisor"),
    ({"do_pad": True, "size_divisor": "x"}, "size_divisor"),
    ({"image_mean": [0.5]}, "expected image_mean of 3 values, one per image channel, got 1"),
    ({"image_mean": [0.5] * 4}, "expected image_mean of 3 values, one per image channel, got 4"),
    ({"image_mean": []}, "expected image_mean of 3 values"),
    ({"image_mean": math.nan}, "image_mean to be numbers from -1e+06 to 1e+06, got nan"),
    ({"image_mean": [0.5, math.inf, 0.5]}, "image_mean to be numbers"),
    ({"image_mean": "abc"}, "image_mean"),
    ({"image_mean": ["a", "b", "c"]}, "image_mean"),
    ({"image_mean": [[0.5]] * 3}, "image_mean"),
    ({"image_std": [0.0, 1.0, 1.0]}, "image_std to be numbers from 1e-09 to 1e+06, got 0.0"),
    ({"image_std": [-1.0, 1.0, 1.0]}, "image_std to be numbers"),
    ({"image_std": math.nan}, "image_std to be numbers"),
    ({"rescale_factor": math.nan}, "rescale_factor to be numbers from 1e-09 to 1e+06, got nan"),
    ({"rescale_factor": 0.0}, "rescale_factor to be numbers"),
    ({"rescale_factor": math.inf}, "rescale_factor to be numbers"),
    ({"rescale_factor": 10**400}, "rescale_factor"),
    ({"rescale_factor": "x"}, "rescale_factor"),
    ({"resample": 77}, "expected resample to be one of 0 (NEAREST), "),
    ({"resample": "x"}, "resample"),
    ({"resample": math.nan}, "resample"),
    ({"resample": [3]}, "resample"),
    ({"do_resize": "no"}, "do_resize"),
    ({"do_convert_rgb": 1}, "do_convert_rgb"),
]


class TestOptions:
    @both
    @pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda part: str(part)[:40])
    def test_wrong_ones_are_refused(self, backend: str, options: dict[str, Any], message: str) -> None:
        """When a processor is made, as from a file, and in a call, where Transformers checks types before."""
        with pytest.raises(ValueError) as made:
            CLASSES[backend](**options)(image)
        assert message in str(made.value)
        with pytest.raises((ValueError, StrictDataclassError)) as called:
            CLASSES[backend]()(image, **options)
        assert next(iter(options.keys() - {"do_pad"})) in str(called.value)

    @both
    def test_long_ones_are_cut_in_the_message(self, backend: str) -> None:
        with pytest.raises(ValueError, match="expected resample to be one of") as caught:
            CLASSES[backend](resample="x" * 10**6)
        assert len(str(caught.value)) < 300


class TestFiles:
    CODE = "processor = CLASS.from_pretrained(argument)\nprocessor(PIL.Image.new('RGB', (9, 9)))"
    CLASSES = {"auto": "transformers.AutoImageProcessor", "own": "vitreg_hf.ViTRegImageProcessor"}

    def load(self, bounded: Any, folder: Path, text: str, loader: str) -> Any:
        (folder / "preprocessor_config.json").write_text(text)
        report = bounded(self.CODE.replace("CLASS", self.CLASSES[loader]), str(folder))
        assert report.died_of == 0, "ended by the alarm or a crash"
        return report

    @pytest.mark.parametrize("loader", CLASSES)
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"size": {"height": 10**9, "width": 10**9}}, "height of size to be an integer"),
            ({"preprocess": 3}, "expected options of ViTRegImageProcessor, got 'preprocess'"),
            ({"_validate_preprocess_kwargs": 3}, "got '_validate_preprocess_kwargs'"),
            ({"valid_kwargs": 3}, "got 'valid_kwargs'"),
            ({"image_mean": "x"}, "image_mean to be numbers"),
            ({"do_resize": "x"}, "do_resize to be True or False"),
        ],
        ids=lambda part: str(part)[:30],
    )
    def test_hostile_options_are_refused(
        self, bounded: Any, tmp_path: Path, loader: str, options: dict[str, Any], message: str
    ) -> None:
        text = json.dumps({"image_processor_type": "ViTRegImageProcessor", **options})
        assert_refused(self.load(bounded, tmp_path, text, loader), message)

    @pytest.mark.parametrize("depth", [2000, 10**6])
    def test_nesting_ends_at_once(self, bounded: Any, tmp_path: Path, depth: int) -> None:
        """Transformers' Auto class parses first, and lets Python's own error pass."""
        text = '{"image_processor_type": "ViTRegImageProcessor", "x": ' + "[" * depth + "]" * depth + "}"
        assert self.load(bounded, tmp_path, text, "auto").kind == "RecursionError"
        assert_refused(self.load(bounded, tmp_path, text, "own"), "expected a processor file of a few levels")

    @pytest.mark.parametrize("text", ["[]", "3", '"x"'])
    def test_what_is_no_dictionary_is_refused(self, bounded: Any, tmp_path: Path, text: str) -> None:
        report = self.load(bounded, tmp_path, text, "own")
        assert_refused(report, "expected a processor file that holds a dictionary")
        assert self.load(bounded, tmp_path, text, "auto").kind is not None

    @pytest.mark.parametrize("loader", CLASSES)
    def test_truncated_ones_are_named(self, bounded: Any, tmp_path: Path, loader: str) -> None:
        report = self.load(bounded, tmp_path, '{"image_processor_type": "ViT', loader)
        assert report.kind == "OSError"
        assert "preprocessor_config.json' is not a valid JSON file" in report.error

    @pytest.mark.parametrize("loader", CLASSES)
    def test_code_beside_them_does_not_run_unless_asked(self, bounded: Any, tmp_path: Path, loader: str) -> None:
        (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        options = {"image_processor_type": "ViTRegImageProcessor", "auto_map": {"AutoImageProcessor": "evil.E"}}
        assert self.load(bounded, tmp_path, json.dumps(options), loader).kind is None
        assert not (tmp_path / "ran").exists()


edges = st.integers(1, 12)
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F"]
TYPES = ["uint8", "uint16", "int8", "int32", "int64", "bool", "float16", "float32", "float64"]


@st.composite
def pictures(draw: st.DrawFn) -> Any:
    """A PIL image of any mode, or an array or tensor of any shape and type, of few pixels."""
    height, width = draw(edges), draw(edges)
    level = draw(st.sampled_from([0, 1, 7, 255]))
    if draw(st.booleans()):
        return PIL.Image.new("L", (width, height), level).convert(draw(st.sampled_from(MODES)))
    shape = draw(
        st.sampled_from(
            [(height, width), (height, width, 3), (3, height, width), (height, width, 1), (4, height, width)]
        )
        | st.lists(st.integers(0, 5), max_size=5).map(tuple)
    )
    with np.errstate(all="ignore"):
        array = np.full(shape, level).astype(draw(st.sampled_from(TYPES)))
        if array.dtype.kind == "f":
            array = np.asarray(array * array.dtype.type(draw(st.sampled_from([1.0, 1 / 255, -1.0, math.nan, 1e30]))))
    return torch.from_numpy(array) if draw(st.booleans()) else array


def sizes_of(*names: str) -> st.SearchStrategy[Any]:
    edge = st.integers(1, 20) | st.sampled_from([0, -1, 10**9])
    return st.fixed_dictionaries(dict.fromkeys(names, edge))


NUMBERS = st.sampled_from([0.5, 1.0, 2, 0.0, -1.0, math.nan, math.inf, 1e300, "x", None])
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "size": st.one_of(
        sizes_of("height", "width"),
        sizes_of("shortest_edge"),
        sizes_of("shortest_edge", "longest_edge"),
        sizes_of("max_height", "max_width"),
        st.integers(1, 20),
    ),
    "crop_size": sizes_of("height", "width") | st.integers(-1, 20),
    "resample": st.sampled_from([*range(-1, 7), None, "x"]),
    "do_resize": st.booleans(),
    "do_center_crop": st.booleans(),
    "do_rescale": st.booleans(),
    "do_normalize": st.booleans(),
    "do_convert_rgb": st.booleans(),
    "rescale_factor": NUMBERS,
    "image_mean": NUMBERS | st.lists(NUMBERS, max_size=4),
    "image_std": NUMBERS | st.lists(NUMBERS, max_size=4),
    "do_pad": st.booleans(),
    "size_divisor": st.sampled_from([None, 1, 8, 0, -8, 10**9, 2.5]),
    "pad_size": st.none() | sizes_of("height", "width"),
}
# Small by default: the processors' own 224 x 224 would take most of the time.
BASE = {"size": {"shortest_edge": 16}, "crop_size": {"height": 12, "width": 10}}


class TestAnyInput:
    @both
    def test_gives_finite_pixels_of_the_promised_shape_or_is_refused(self, backend: str) -> None:
        done: list[bool] = []

        @settings(fixed, max_examples=500)
        @given(picture=pictures(), data=st.data())
        def check(picture: Any, data: Any) -> None:
            names = data.draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=4, unique=True))
            options = {**BASE, **{name: data.draw(OPTIONS[name]) for name in names}}
            done.append(False)
            try:
                processor = CLASSES[backend](**options)
                outputs = processor(picture, return_tensors="pt")
            except ValueError:
                return
            done[-1] = True
            pixels = outputs["pixel_values"]
            assert pixels.dtype in (torch.float32, torch.uint8)  # bytes where nothing was to be computed
            assert pixels.ndim == 4
            assert torch.isfinite(pixels).all()
            assert pixels[0, 0].numel() <= processor_checks.MOST_PIXELS
            if processor.do_center_crop and not processor.do_pad:
                assert tuple(pixels.shape[-2:]) == (processor.crop_size.height, processor.crop_size.width)
            if processor.do_pad:
                assert outputs["pixel_mask"].shape == (1, *pixels.shape[-2:])

        check()
        assert 0.2 < sum(done) / len(done) < 0.8  # neither half of the promise is empty

    @settings(fixed, max_examples=100)
    @given(data=st.data())
    def test_options_that_are_taken_survive_saving(self, data: Any, tmp_path: Path) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=3, unique=True))
        try:
            processor = ViTRegImageProcessor(**{name: data.draw(OPTIONS[name]) for name in names})
        except ValueError:
            return
        processor.save_pretrained(tmp_path)
        assert ViTRegImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()
