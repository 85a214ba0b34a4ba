"""Files of weights that are broken, hostile or too small for their config are refused before a model is allocated."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vitreg_hf import ViTRegForImageClassification, ViTRegModel
from vitreg_hf.model import checkpoint_checks

AUTO = "transformers.AutoModelForImageClassification.from_pretrained(argument)"
WEIGHTS = "model.safetensors"
GIANT = {"hidden_size": 16384, "num_hidden_layers": 30, "num_attention_heads": 128, "intermediate_size": 65536}
META = {"format": "pt"}
Edit = Callable[[Path], Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vitreg_hf import ViTRegConfig

    folder = tmp_path_factory.mktemp("saved")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = ViTRegConfig(**small, image_size=32, patch_size=8, num_labels=5)
    ViTRegForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def load(saved: Path, tmp_path: Path, bounded: Any) -> Any:
    """Load a copy of a small model, after an edit of its folder, in a process with limits."""

    def load(edit: Edit, code: str = AUTO, **fields: Any) -> Any:
        folder = tmp_path / "model"
        shutil.copytree(saved, folder)
        edit(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))
        report = bounded(code, str(folder), megabytes=1000)
        assert report.died_of == 0, "ended by the alarm or a crash"
        assert report.megabytes < 300
        return report

    return load


def assert_refused(report: Any, *messages: str) -> None:
    assert "ValueError" in report.bases, report
    for message in messages:
        assert message in report.error


def header_of(content: Any, body: bytes = b"") -> Edit:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + body)


def f32(shape: list[int], *offsets: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": list(offsets)}


def cut(size: int) -> Edit:
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])


def many(count: int) -> bytes:
    entries = (b'"t%08d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % index for index in range(count))
    return b"{" + b",".join(entries) + b"}"


BROKEN: dict[str, tuple[Edit, str]] = {
    "empty": (cut(0), "header too small"),
    "cut in the header": (cut(50), "invalid header length"),
    "cut in the tensors": (cut(20_000), "incomplete metadata, file not fully covered"),
    "header beyond the file": (lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 10**15) + b"{}"), "too large"),
    "negative header": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 8 + b"{}"), "too large"),
    "header of half a gigabyte": (lambda f: _hole(f / WEIGHTS, 2**29), "Expected a header of at most 10000000 bytes"),
    "deep header": (header_of(b'{"a":' * 10**5 + b"1" + b"}" * 10**5), "recursion limit"),
    "header of text": (header_of(b"no JSON"), "invalid JSON"),
    "overlapping tensors": (header_of({"a": f32([4], 0, 16), "b": f32([4], 8, 24)}, b"x" * 24), "invalid offset"),
    "shape beyond its bytes": (header_of({"a": f32([2**40], 0, 16)}, b"x" * 16), "invalid shape"),
    "shape beyond numbers": (header_of({"a": f32([2**40, 2**40], 0, 16)}, b"x" * 16), "overflow"),
    "negative shape": (header_of({"a": f32([-4], 0, 16)}, b"x" * 16), "header"),
    "unknown type": (header_of({"a": {**f32([4], 0, 16), "dtype": "PICKLE"}}, b"x" * 16), "header"),
}


def _hole(path: Path, length: int) -> None:
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(8 + length)


@pytest.mark.parametrize("dtype", ["float32", None])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named(load: Any, case: str, dtype: str | None) -> None:
    """Without a dtype in the config Transformers reads a file before a model is made."""
    edit, message = BROKEN[case]
    if case == "header of half a gigabyte" and dtype is None:
        message = "header too large"
    assert_refused(load(edit, dtype=dtype), "Expected ", "/model", message)


def test_a_header_of_a_million_tensors_is_not_parsed(load: Any) -> None:
    report = load(header_of(many(400_000)))
    assert_refused(report, "Expected a header of at most 10000000 bytes, got", WEIGHTS)


def changed(**tensors: torch.Tensor) -> Edit:
    def edit(folder: Path) -> None:
        save_file({**load_file(folder / WEIGHTS), **tensors}, folder / WEIGHTS, metadata=META)

    return edit


KEY = "vitreg.layers.1.mlp.up_proj.bias"


class TestTensors:
    @pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64])
    def test_of_another_type_are_refused_by_name(self, load: Any, dtype: torch.dtype) -> None:
        assert_refused(load(changed(**{KEY: torch.zeros(48, dtype=dtype)})), f"floating point values for '{KEY}'")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_of_other_floats_load(self, load: Any, dtype: torch.dtype) -> None:
        assert load(changed(**{KEY: torch.zeros(48, dtype=dtype)})).kind is None

    @pytest.mark.parametrize("shape", [(47,), (1, 48), (), (0,)])
    def test_of_another_shape_are_refused_by_name(self, load: Any, shape: tuple[int, ...]) -> None:
        report = load(changed(**{KEY: torch.zeros(shape)}))
        assert report.kind == "RuntimeError"  # Transformers' class for this
        assert f"Expected '{KEY}' of shape (48,), got {shape}; with ignore_mismatched_sizes=True" in report.error

    def test_a_backbone_reads_the_types_of_a_file_with_a_head(self, load: Any) -> None:
        code = "transformers.AutoModel.from_pretrained(argument)"
        report = load(changed(**{KEY: torch.zeros(48, dtype=torch.int64)}), code)
        assert_refused(report, f"floating point values for '{KEY}'")

    def test_that_nothing_reads_may_have_any_type(self, load: Any) -> None:
        assert load(changed(steps=torch.zeros(3, dtype=torch.int64))).kind is None

    def test_counters_stay_integers(self, saved: Path, tmp_path: Path, make_config: Any) -> None:
        from vitreg_hf import ViTRegForSemanticSegmentation

        ViTRegForSemanticSegmentation(make_config(segmentation_batch_norm=True)).save_pretrained(tmp_path)
        loaded = ViTRegForSemanticSegmentation.from_pretrained(tmp_path)
        assert loaded.batch_norm.num_batches_tracked.dtype == torch.int64

    def test_that_are_no_numbers_load(self, load: Any) -> None:
        """What a training left is looked at by `vitreg push`, not here."""
        assert load(changed(**{KEY: torch.full((48,), torch.nan)})).kind is None

    def test_given_as_a_dictionary_are_checked_alike(self, make_config: Any) -> None:
        model = ViTRegModel(make_config())
        state = {**model.state_dict(), "layernorm.bias": torch.zeros(32, dtype=torch.int64)}
        with pytest.raises(ValueError, match=r"floating point values for 'layernorm\.bias'"):
            ViTRegModel.from_pretrained(None, config=model.config, state_dict=state)


class TestGiants:
    """A config of 97 billion parameters, 387 GB, beside a file of 90 KB."""

    IGNORING = AUTO.replace("(argument", "(argument, ignore_mismatched_sizes=True")

    def test_are_not_allocated(self, load: Any) -> None:
        report = load(lambda folder: None, self.IGNORING, **GIANT)
        assert_refused(report, "Expected a config of at most", "parameters for weights of 22,117, got one of 96,646,7")

    def test_are_not_allocated_where_shapes_must_fit(self, load: Any) -> None:
        assert load(lambda folder: None, **GIANT).kind == "RuntimeError"

    def test_are_not_allocated_for_files_without_their_keys(self, load: Any) -> None:
        report = load(lambda folder: save_file({"x": torch.zeros(3)}, folder / WEIGHTS, metadata=META), **GIANT)
        assert_refused(report, "Expected a config of at most 268,435,46")

    def test_are_not_allocated_for_pickles_that_repeat_a_value(self, load: Any) -> None:
        def edit(folder: Path) -> None:
            (folder / WEIGHTS).unlink()
            torch.save({"x": torch.zeros(1).expand(2**45)}, folder / "pytorch_model.bin")

        assert_refused(load(edit, **GIANT), "Expected a config of at most 268,43")

    def test_are_not_allocated_for_shards_of_a_distributed_training(self, load: Any) -> None:
        def edit(folder: Path) -> None:
            (folder / WEIGHTS).rename(folder / "shard-00001-model-00001-of-00001.safetensors")

        report = load(edit, **GIANT)
        assert "Expected a config of at most" in report.error or "no file named" in report.error  # of older versions

    def test_in_layers_are_refused_in_bounded_time(self, load: Any) -> None:
        fields = {"num_hidden_layers": 1024, "hidden_size": 1024, "intermediate_size": 4096}
        assert_refused(load(lambda folder: None, self.IGNORING, **fields), "got one of 12,898,7")

    def test_a_new_head_on_small_weights_is_none(self, load: Any) -> None:
        names = {str(index): f"class {index}" for index in range(50_000)}
        assert load(lambda folder: None, self.IGNORING, id2label=names, label2id=None).kind is None


def indexed(weight_map: dict[str, str]) -> Edit:
    def edit(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder.parent / "outside.safetensors")
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return edit


class TestIndex:
    @pytest.mark.parametrize("dtype", ["float32", None])
    def test_files_outside_the_folder_are_refused(self, load: Any, dtype: str | None) -> None:
        report = load(indexed({"classifier.bias": "../outside.safetensors"}), dtype=dtype)
        assert_refused(report, "Expected files of weights inside", "outside.safetensors")

    def test_absolute_paths_are_refused(self, load: Any, tmp_path: Path) -> None:
        report = load(indexed({"classifier.bias": str(tmp_path / "outside.safetensors")}))
        assert_refused(report, "Expected files of weights inside", "outside.safetensors")

    def test_a_missing_shard_is_named(self, load: Any) -> None:
        report = load(indexed({"classifier.bias": "model-00001-of-00002.safetensors"}))
        assert_refused(report, "Expected the file of weights", "model-00001-of-00002.safetensors", "got none")

    @pytest.mark.parametrize("text", ["[]", "{}", '{"metadata": {}, "weight_map": 3}', "[" * 10**6, ""])
    def test_what_is_no_index_ends_at_once(self, load: Any, text: str) -> None:
        """Transformers reads it, and lets errors of its own or of Python pass."""

        def edit(folder: Path) -> None:
            (folder / WEIGHTS).unlink()
            (folder / "model.safetensors.index.json").write_text(text)

        assert load(edit).kind is not None

    def test_the_config_cannot_lead_outside(self, load: Any) -> None:
        report = load(lambda folder: None, transformers_weights="../outside.safetensors")
        assert_refused(report, "`transformers_weights` must reference a file inside")


class Evil:
    """Pickled, it creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class TestPickles:
    def pickled(self, content: Any) -> Edit:
        def edit(folder: Path) -> None:
            (folder / WEIGHTS).unlink()
            torch.save(content, folder / "pytorch_model.bin")

        return edit

    @pytest.mark.parametrize("option", ["", ", use_safetensors=False", ", weights_only=False"])
    @pytest.mark.parametrize("dtype", ["float32", None])
    def test_do_not_run_code(self, load: Any, tmp_path: Path, option: str, dtype: str | None) -> None:
        code = AUTO.replace("(argument", f"(argument{option}")
        report = load(self.pickled({"x": Evil(tmp_path / "ran")}), code, dtype=dtype)
        ours = dtype is not None or "weights_only" in option  # without a dtype, Transformers reads the file first
        assert report.kind == ("ValueError" if ours else "UnpicklingError")
        assert not (tmp_path / "ran").exists()

    def test_of_tensors_load(self, load: Any, saved: Path) -> None:
        assert load(self.pickled(load_file(saved / WEIGHTS))).kind is None

    def test_of_anything_else_are_refused(self, load: Any) -> None:
        assert_refused(load(self.pickled([1, 2])), "Expected a dictionary of tensors in", "got list")

    def test_unrestricted_ones_are_refused_before_anything_is_read(self) -> None:
        with pytest.raises(ValueError, match="Expected weights_only=True, as a pickle can run code, got False"):
            ViTRegModel.from_pretrained("no/where", weights_only=False)


def test_code_beside_weights_does_not_run_unless_asked(load: Any, tmp_path: Path) -> None:
    def edit(folder: Path) -> None:
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")

    auto_map = {"AutoConfig": "evil.C", "AutoModelForImageClassification": "evil.M"}
    assert load(edit, auto_map=auto_map).kind is None
    assert not (tmp_path / "ran").exists()


def test_a_quantized_file_packs_parameters(make_config: Any) -> None:
    with torch.device("meta"):
        model = ViTRegModel(make_config(hidden_size=2048, num_hidden_layers=8, intermediate_size=8192))
    packed = {"x": torch.zeros(30_000_000, dtype=torch.uint8)}
    with pytest.raises(ValueError, match="Expected a config of at most 328,435,456 parameters"):
        checkpoint_checks.check_checkpoint(model, packed, None, None)
    checkpoint_checks.check_checkpoint(model, packed, None, None, is_quantized=True)
