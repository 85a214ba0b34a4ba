"""Configs that are truncated, huge, deep or absurd end at once, in little memory, with an error that says why."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings, strategies as st

from vitreg_hf import ViTRegBackbone, ViTRegConfig, ViTRegForImageClassification, ViTRegForMaskedImageModeling
from vitreg_hf.model import configuration_checks

# The same examples on every run, and no clock.
fixed = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
REFUSED = {"ValueError", "StrictDataclassError"}
LOADERS = {
    "auto": "transformers.AutoConfig.from_pretrained(argument)",
    "own": "vitreg_hf.ViTRegConfig.from_pretrained(argument)",
}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


def assert_refused(report: Any, message: str, megabytes: int = 200) -> None:
    assert report.died_of == 0, "ended by the alarm or a crash"
    assert REFUSED & set(report.bases), report
    assert message in report.error
    assert report.length < 3000
    assert report.megabytes < megabytes


HUGE = 10**9
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "labels without end": (
        {"num_labels": HUGE},
        "Expected num_labels to be an integer from 0 to 1000000, got 1000000000",
    ),
    "labels below zero": ({"num_labels": -1}, "Expected num_labels to be an integer from 0"),
    "labels as text": ({"num_labels": "7"}, "Expected num_labels to be an integer from 0"),
    "labels as a switch": ({"num_labels": True}, "Expected num_labels to be an integer from 0"),
    "width whose heads are searched": ({"hidden_size": 10**12 + 39, "num_attention_heads": None}, "at most 65536"),
    "layers": ({"num_hidden_layers": HUGE}, "Expected num_hidden_layers to be at most 1024, got 1000000000"),
    "heads": ({"num_attention_heads": HUGE}, "Expected num_attention_heads to be at most 4096"),
    "MLP": ({"intermediate_size": HUGE}, "Expected intermediate_size to be at most 1048576"),
    "head width": ({"head_dim": HUGE}, "Expected head_dim to be at most 65536"),
    "channels": ({"num_channels": HUGE}, "Expected num_channels to be at most 4096"),
    "registers": ({"num_register_tokens": HUGE}, "Expected num_register_tokens to be at most 4096"),
    "image": ({"image_size": 8 * HUGE}, "Expected image_size to be at most 65536 on each side"),
    "image of one side": ({"image_size": [8, 8 * HUGE]}, "Expected image_size to be at most 65536 on each side"),
    "position table": ({"image_size": 16384}, "Expected image_size to be at most 1048576 patches, got 4194304"),
    "product": (
        {"hidden_size": 16384, "num_hidden_layers": 64, "num_attention_heads": 64},
        "Expected a model of at most 100,000,000,000 parameters, got a config of 206,",
    ),
    "negative width": ({"hidden_size": -32}, "Expected hidden_size to be a positive integer, got -32"),
    "float for a count": ({"hidden_size": 32.0}, "expected int, got float"),
    "switch for a count": ({"num_hidden_layers": True}, "expected int, got bool"),
    "text for a count": ({"hidden_size": "32"}, "expected int, got str"),
    "nested sizes": ({"image_size": [[32], [32]]}, "image_size"),
    "not a number": ({"drop_path_rate": math.nan}, "Expected drop_path_rate to be a probability in [0, 1), got nan"),
    "integer too large for a float": (
        {"layerscale_value": 10**400},
        "Expected layerscale_value to be None or a finite",
    ),
    "epsilon too large for a float": ({"layer_norm_eps": 10**400}, "Expected layer_norm_eps to be a positive finite"),
    "megabytes of text": ({"hidden_act": "x" * 10**7}, "Expected texts of at most 10000 characters"),
    "megabytes of text for a count": ({"hidden_size": "x" * 10**7}, "Expected texts of at most 10000 characters"),
    "prefix layers": ({"output_prefix_attentions": [0] * 9999}, "Expected output_prefix_attentions to be at most 2"),
    "long list": ({"stage_names": ["x"] * 10**6}, "Expected a saved config of at most 100000 entries"),
    "stages": ({"out_features": ["stage1"] * 9999}, "Expected out_features to be None or a list of at most 3 stages"),
    "stages as a dictionary": ({"out_features": {"a": 1}}, "Expected out_features to be None or a list"),
    "stage indices": (
        {"out_features": None, "out_indices": [-HUGE]},
        "Expected out_indices to be integers from -3 to 2",
    ),
    "names of labels": ({"id2label": {"0": ["a"]}}, "Expected id2label to be a dictionary of texts and integers"),
    "labels as a list": ({"id2label": ["a"]}, "Expected id2label to be a dictionary"),
    "indices of labels": ({"id2label": {"a": "b"}}, "Expected id2label to be a dictionary whose keys are integers"),
    "dtype that is a function": ({"dtype": "load"}, "Expected dtype to be None or a floating point type"),
    "dtype of integers": ({"dtype": "int64"}, "Expected dtype to be None or a floating point type"),
    "old name of dtype": ({"dtype": None, "torch_dtype": "wish"}, "Expected torch_dtype to be None or a floating"),
    "output_attentions": ({"output_attentions": "yes"}, "Expected output_attentions to be None, True or False"),
    "field of the base class": ({"return_dict": "yes"}, "return_dict"),
    "name of a method": (
        {"check_values": None},
        "Expected fields of ViTRegConfig in a saved config, got 'check_values'",
    ),
    "renamed attributes": ({"attribute_map": {"hidden_size": "x"}}, "got 'attribute_map'"),
    "another class": ({"__class__": "x"}, "got '__class__'"),
    "widths per layer": ({"per_layer_config": {"0": {"hidden_size": HUGE}}}, "got 'per_layer_config'"),
    "code of the Hub": (
        {"attn_implementation": "evil/kernel"},
        "may not choose code of the Hub",
    ),
    "code of the Hub, inside": ({"_attn_implementation_internal": "evil/kernel"}, "may not choose code of the Hub"),
}


class TestFiles:
    @pytest.fixture
    def write(self, tmp_path: Path) -> Any:
        def write(text: str | bytes) -> str:
            content = text if isinstance(text, bytes) else text.encode()
            (tmp_path / "config.json").write_bytes(content)
            return str(tmp_path)

        return write

    @pytest.mark.parametrize("loader", LOADERS)
    @pytest.mark.parametrize("case", HOSTILE)
    def test_hostile_fields_are_refused(self, bounded: Any, write: Any, loader: str, case: str) -> None:
        change, message = HOSTILE[case]
        folder = write(json.dumps({"model_type": "vitreg", **SMALL, **change}))
        assert_refused(bounded(LOADERS[loader], folder), message)

    @pytest.mark.parametrize("loader", LOADERS)
    @pytest.mark.parametrize("depth", [40, 300])
    def test_nesting_that_can_be_parsed_is_refused(self, bounded: Any, write: Any, loader: str, depth: int) -> None:
        for opened, closed in (("[", "]"), ('{"a":', "}")):
            text = opened * depth + "1" + closed * depth
            report = bounded(LOADERS[loader], write(f'{{"model_type": "vitreg", "x": {text}}}'))
            assert_refused(report, "Expected a saved config nested at most 32 deep")

    @pytest.mark.parametrize("depth", [2000, 10**6])
    def test_nesting_beyond_the_parser_ends_at_once(self, bounded: Any, write: Any, depth: int) -> None:
        """Transformers' Auto class parses first, and lets Python's own error pass."""
        folder = write('{"model_type": "vitreg", "x": ' + "[" * depth + "]" * depth + "}")
        auto = bounded(LOADERS["auto"], folder)
        assert (auto.died_of, auto.kind) == (0, "RecursionError")
        assert_refused(bounded(LOADERS["own"], folder), "nested too deep")

    @pytest.mark.parametrize("text", ["[]", "3", "null", '"x"'])
    def test_what_is_no_dictionary_is_refused(self, bounded: Any, write: Any, text: str) -> None:
        folder = write(text)
        assert_refused(bounded(LOADERS["own"], folder), "Expected a saved config that is a dictionary, got")
        auto = bounded(LOADERS["auto"], folder)
        assert auto.died_of == 0
        assert auto.kind in ("ValueError", "TypeError")

    @pytest.mark.parametrize("loader", LOADERS)
    @pytest.mark.parametrize("text", [b"", b'{"model_type": "vitreg", "hid', b"\xff\xfe\x00"])
    def test_truncated_files_are_named(self, bounded: Any, write: Any, loader: str, text: bytes) -> None:
        report = bounded(LOADERS[loader], write(text))
        assert (report.died_of, report.kind) == (0, "OSError")
        assert "config.json' is not a valid JSON file" in report.error

    @pytest.mark.parametrize("loader", LOADERS)
    def test_numbers_too_long_for_python_are_refused(self, bounded: Any, write: Any, loader: str) -> None:
        report = bounded(LOADERS[loader], write('{"model_type": "vitreg", "hidden_size": ' + "9" * 5000 + "}"))
        assert_refused(report, "4300 digits")

    def test_a_file_of_gigabytes_is_not_read(self, bounded: Any, tmp_path: Path) -> None:
        with open(tmp_path / "config.json", "wb") as file:
            file.truncate(2**31)  # a hole: takes no room on disk
        assert_refused(bounded(LOADERS["own"], str(tmp_path)), "Expected a config file of at most 134217728 bytes", 20)

    def test_a_hundred_thousand_named_labels_load(self, bounded: Any, write: Any) -> None:
        names = {str(i): f"class number {i}" for i in range(100_000)}
        labels = {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
        report = bounded(LOADERS["auto"], write(json.dumps({"model_type": "vitreg", **SMALL, **labels})))
        assert (report.died_of, report.kind) == (0, None)

    def test_code_beside_a_config_does_not_run_unless_asked(self, bounded: Any, tmp_path: Path) -> None:
        (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        for model_type in ("vitreg", "evil"):
            config = {"model_type": model_type, **SMALL, "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}
            (tmp_path / "config.json").write_text(json.dumps(config))
            report = bounded(LOADERS["auto"], str(tmp_path))
            assert report.kind == (None if model_type == "vitreg" else "ValueError")
            assert not (tmp_path / "ran").exists()


class TestParameters:
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"use_swiglu_ffn": True, "layerscale_value": 0.1, "pooling": "cls_mean"},
            {"use_cls_token": False, "pooling": "mean", "num_register_tokens": 0, "mlp_bias": False},
            {"qkv_bias": False, "value_bias": True, "proj_bias": False, "head_dim": 12, "num_channels": 5},
            {"image_size": [32, 64], "patch_size": [4, 16], "use_mask_token": True, "num_labels": 0},
        ],
    )
    def test_are_counted_as_the_model_has_them(self, make_config: Any, fields: dict[str, Any]) -> None:
        config = make_config(**fields)
        model = ViTRegForImageClassification(config)
        assert configuration_checks.count_parameters(config) == sum(p.numel() for p in model.parameters())

    def test_the_largest_vision_transformer_fits(self) -> None:
        config = ViTRegConfig(
            **{"hidden_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 48, "intermediate_size": 24576},
            **{"patch_size": 14, "num_labels": 30_000},
        )
        assert 20e9 < configuration_checks.count_parameters(config) < 25e9

    def test_labels_count_when_a_model_is_made(self, make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        backbone = configuration_checks.count_parameters(make_config(num_labels=0))
        monkeypatch.setattr(configuration_checks, "MOST_PARAMETERS", backbone + 100)
        config = make_config(num_labels=5)  # its labels are made after the check
        with pytest.raises(ValueError, match=r"Expected a model of at most .* parameters, got a config of"):
            ViTRegForImageClassification(config)


# Fields as a file may hold them: right, wrong, or of another type.
def near(*values: Any) -> st.SearchStrategy[Any]:
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    anything = st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner), max_leaves=4
    )
    return st.sampled_from(values) | st.sampled_from(values) | anything


FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "hidden_size": near(8, 32, 48, 0, -1, 2**16, 2**40),
    "num_hidden_layers": near(1, 3, 0, 1024, 2**40),
    "num_attention_heads": near(None, 1, 4, 3, 10**6),
    "intermediate_size": near(None, 16, 10**9),
    "hidden_act": near("gelu", "relu", "wish"),
    "image_size": near(32, [32, 64], (64, 32), [32], 10**9, [8, 0]),
    "patch_size": near(8, 16, [8, 16], 0, -8),
    "num_channels": near(3, 1, 0, 10**6),
    "num_register_tokens": near(0, 4, -1, 10**6),
    "num_labels": near(0, 1, 2, 7, -1, 10**9),
    "id2label": near(None, {"0": "a", "1": "b"}, {0: "a"}, {"a": 1}),
    "pooling": near("cls", "mean", "cls_mean", "cls_register_mean"),
    "use_cls_token": near(True, False),
    "qkv_bias": near(True, False),
    "head_dim": near(None, 8, 0),
    "layerscale_value": near(None, 1e-5, math.inf),
    "drop_path_rate": near(0.0, 0.3, 1.0, math.nan),
    "layer_norm_eps": near(1e-6, 0, 10**400),
    "output_prefix_attentions": near(False, True, 0, [-1], [0, 99]),
    "out_indices": near(None, [1], [0, 1], [-1], [9]),
    "out_features": near(None, ["stem"], ["stage1"], ["x"]),
    "dtype": near(None, "float32", "bfloat16", "int8", "load"),
    "return_dict": near(True, False),
    "output_attentions": near(True, False, None),
    "problem_type": near(None, "regression", "x"),
    "position_embedding_type": near("learned", "rotary", "sincos"),
    "rope_theta": near(100.0, 1, 0, math.inf, 10**400),
    "rope_coordinates": near("centered", "grid"),
    "pos_embed_rescale": near(None, 2.0, 0.5, math.nan),
    "register_position_embeddings": near(True, False),
    "qk_norm": near(True, False),
    "pooled_norm": near(True, False),
    "separate_cls_norm": near(True, False),
    "num_classifier_layers": near(1, 2, 0, 10**9),
    "to_dict": near(None),
    "from_the_future": near(3),
}
RIGHT: dict[str, list[Any]] = {
    "hidden_size": [32, 48],
    "num_hidden_layers": [1, 3],
    "num_attention_heads": [None, 1, 4],
    "image_size": [32, [32, 64], (64, 32)],
    "patch_size": [8, 16, [8, 16]],
    "num_register_tokens": [1, 4],
    "pooling": ["cls", "mean", "cls_mean", "cls_register_mean"],
    "layerscale_value": [None, 1e-5],
    "output_prefix_attentions": [False, True, [0], -1],
    "id2label": [None, {"0": "a", "1": "b"}],
}


@st.composite
def dictionaries(draw: st.DrawFn) -> dict[str, Any]:
    """A right dictionary with at most three fields that may be anything."""
    fields = {name: draw(st.sampled_from(values)) for name, values in RIGHT.items()}
    changed = draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=3, unique=True))
    return {**fields, **{name: draw(FIELDS[name]) for name in changed}}


class TestAnyDictionary:
    def test_builds_within_bounds_or_is_refused(self) -> None:
        built: list[bool] = []

        @settings(fixed, max_examples=600)
        @given(fields=dictionaries())
        def check(fields: dict[str, Any]) -> None:
            built.append(False)
            try:
                config = ViTRegConfig.from_dict(dict(fields))
            except (ValueError, TypeError, StrictDataclassError):
                return
            built[-1] = True
            assert configuration_checks.count_parameters(config) <= configuration_checks.MOST_PARAMETERS
            assert (config.num_labels or 0) <= configuration_checks.MOST_LABELS
            assert len(config.stage_names) <= 1025

        check()
        assert 0.2 < sum(built) / len(built) < 0.8  # neither half of the promise is empty

    @settings(fixed, max_examples=250)
    @given(fields=dictionaries())
    def test_what_builds_is_the_same_after_saving(self, fields: dict[str, Any], tmp_path: Path) -> None:
        try:
            config = ViTRegConfig.from_dict(dict(fields))
        except (ValueError, TypeError, StrictDataclassError):
            return
        assert repr(ViTRegConfig.from_dict(config.to_dict()).to_dict()) == repr(config.to_dict())
        config.save_pretrained(tmp_path)
        loaded = ViTRegConfig.from_pretrained(tmp_path)
        assert repr(loaded.to_dict()) == repr(config.to_dict())  # repr, as NaN in an unknown field equals nothing

    @settings(fixed, max_examples=60)
    @given(
        width=st.sampled_from([8, 24, 48]),
        heads=st.sampled_from([1, 2, 4]),
        registers=st.integers(0, 3),
        patch=st.sampled_from([4, 8, (8, 4)]),
        grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        has_cls=st.booleans(),
        swiglu=st.booleans(),
        rotary=st.booleans(),
        qk_norm=st.booleans(),
        model_class=st.sampled_from([ViTRegForImageClassification, ViTRegForMaskedImageModeling, ViTRegBackbone]),
    )
    def test_what_is_valid_makes_a_model_that_runs(
        self,
        width: int,
        heads: int,
        registers: int,
        patch: Any,
        grid: Any,
        has_cls: bool,
        swiglu: bool,
        rotary: bool,
        qk_norm: bool,
        model_class: Any,
    ) -> None:
        rows, columns = (patch, patch) if isinstance(patch, int) else patch
        config = ViTRegConfig(
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=heads,
            num_register_tokens=registers,
            patch_size=patch,
            image_size=(grid[0] * rows, grid[1] * columns),
            use_cls_token=has_cls,
            pooling="cls" if has_cls else "mean",
            use_swiglu_ffn=swiglu,
            position_embedding_type="rotary" if rotary and width // heads % 4 == 0 else "learned",
            qk_norm=qk_norm,
        )
        with torch.no_grad():
            outputs = model_class(config).eval()(torch.zeros(1, 3, *config.image_size))
        assert all(torch.isfinite(tensor).all() for tensor in outputs.to_tuple() if isinstance(tensor, torch.Tensor))
