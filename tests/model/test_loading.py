"""Saving and loading: by every Auto class, across heads, with code, in other dtypes and places."""

import json
import logging
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from vitreg_hf import (
    ViTRegBackbone,
    ViTRegForImageClassification,
    ViTRegForMaskedImageModeling,
    ViTRegForSemanticSegmentation,
    ViTRegImageProcessor,
    ViTRegImageProcessorPil,
    ViTRegModel,
    register,
)

AUTO = {
    "AutoModel": ViTRegModel,
    "AutoModelForImageClassification": ViTRegForImageClassification,
    "AutoModelForMaskedImageModeling": ViTRegForMaskedImageModeling,
    "AutoModelForSemanticSegmentation": ViTRegForSemanticSegmentation,
    "AutoBackbone": ViTRegBackbone,
}
pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def warnings_of_transformers(caplog):
    """Records of Transformers' own logger, which does not propagate by itself."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("auto", AUTO)
def test_auto_classes_find_the_family(make_config, tmp_path, auto):
    model_class, auto_class = AUTO[auto], getattr(transformers, auto)
    assert type(auto_class.from_config(make_config())) is model_class
    saved = model_class(make_config()).eval()
    saved.save_pretrained(tmp_path)
    # AutoBackbone asks the Hub about local folders, for every family
    loader = model_class if auto == "AutoBackbone" else auto_class
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is model_class
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    torch.testing.assert_close(loaded.eval()(pixels)[0], saved(pixels)[0])


def test_registering_again_changes_nothing(make_config):
    register()
    assert type(transformers.AutoModel.from_config(make_config())) is ViTRegModel


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_auto_image_processor_finds_both_backends(make_config, tmp_path, backend):
    make_config().save_pretrained(tmp_path)
    ViTRegImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(tmp_path)
    expected = {"torchvision": ViTRegImageProcessor, "pil": ViTRegImageProcessorPil}[backend]
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    assert type(loaded) is expected
    assert (loaded.size["height"], loaded.do_center_crop) == (32, False)


def test_weights_are_safetensors_with_split_projections(make_config, tmp_path):
    ViTRegForImageClassification(make_config()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    names = {name.removeprefix("vitreg.layers.0.") for name in weights if name.startswith("vitreg.layers.0.")}
    assert {f"attention.{p}_proj.weight" for p in "qkvo"} <= names
    assert {"mlp.up_proj.weight", "mlp.down_proj.weight"} <= names
    assert not list(tmp_path.glob("*.bin"))


HEADS = [ViTRegForImageClassification, ViTRegForMaskedImageModeling, ViTRegForSemanticSegmentation]


class TestAcrossHeads:
    def test_a_backbone_without_a_head_makes_the_classifier_warn(
        self, make_config, tmp_path, warnings_of_transformers
    ):
        base = ViTRegModel(make_config())
        base.save_pretrained(tmp_path)
        loaded = ViTRegForImageClassification.from_pretrained(tmp_path)
        assert "classifier.weight" in warnings_of_transformers.text
        assert "newly initialized" in warnings_of_transformers.text
        for name, tensor in base.state_dict().items():
            assert torch.equal(loaded.vitreg.state_dict()[name], tensor)

    @pytest.mark.parametrize("loaded_class", [ViTRegModel, ViTRegBackbone])
    @pytest.mark.parametrize("head", HEADS)
    def test_every_head_loads_as_a_backbone_without_complaint(
        self, make_config, tmp_path, warnings_of_transformers, head, loaded_class
    ):
        saved = head(make_config(segmentation_batch_norm=True))
        saved.save_pretrained(tmp_path)
        loaded = loaded_class.from_pretrained(tmp_path)
        assert not warnings_of_transformers.records
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(saved.vitreg.state_dict()[name], tensor)

    def test_what_belongs_to_the_own_head_is_reported(self, make_config, tmp_path, warnings_of_transformers):
        ViTRegForSemanticSegmentation(make_config(segmentation_batch_norm=True)).save_pretrained(tmp_path)
        ViTRegForSemanticSegmentation.from_pretrained(tmp_path, segmentation_batch_norm=False)
        assert "batch_norm.weight" in warnings_of_transformers.text

    def test_another_number_of_labels(self, make_config, tmp_path):
        ViTRegForImageClassification(make_config()).save_pretrained(tmp_path)
        loaded = ViTRegForImageClassification.from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
        assert loaded(pixels).logits.shape == (2, 9)
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            ViTRegForImageClassification.from_pretrained(tmp_path, num_labels=9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loading_in_half_precision(make_config, tmp_path, dtype):
    saved = ViTRegForImageClassification(make_config()).eval()
    saved.save_pretrained(tmp_path)
    loaded = ViTRegForImageClassification.from_pretrained(tmp_path, dtype=dtype).eval()
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    torch.testing.assert_close(loaded(pixels).logits.float(), saved(pixels).logits, atol=0.1, rtol=0.1)


def test_device_map_with_offloaded_layers(make_config, tmp_path):
    saved = ViTRegForImageClassification(make_config()).eval()
    saved.save_pretrained(tmp_path / "model")
    places = {"vitreg.embeddings": "cpu", "vitreg.layernorm": "cpu", "classifier": "cpu"}
    places |= {"vitreg.layers.0": "cpu", "vitreg.layers.1": "disk", "vitreg.layers.2": "disk"}
    loaded = ViTRegForImageClassification.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    torch.testing.assert_close(loaded.eval()(pixels).logits, saved(pixels).logits)
    auto = ViTRegForImageClassification.from_pretrained(tmp_path / "model", device_map="auto")
    torch.testing.assert_close(auto.eval()(pixels).logits.cpu(), saved(pixels).logits, atol=1e-4, rtol=1e-4)


def test_plans_match_modules(make_config):
    model = ViTRegForImageClassification(make_config(use_swiglu_ffn=True))
    modules = {name for name, _ in model.named_modules()}
    for plan in (model.tp_plan, model._fsdp_plan):
        assert plan
        for pattern in plan:
            assert pattern.replace("*", "0") in modules, pattern
    assert "vitreg.layers.*.mlp.gate_proj" in model.tp_plan
    assert "vitreg.layers.*.mlp.gate_proj" not in ViTRegForImageClassification(make_config()).tp_plan


def enable_checkpointing(model, arguments):
    """Under its name of today, or that of Transformers before 5.20 or so."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(arguments)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(make_config, use_reentrant):
    model = ViTRegForImageClassification(make_config(drop_path_rate=0.3, hidden_dropout_prob=0.1)).train()
    gradients = []
    for enable in (False, True):
        if enable:
            enable_checkpointing(model, {"use_reentrant": use_reentrant})
        torch.manual_seed(5)
        model.zero_grad()
        images = pixels.clone().requires_grad_()  # reentrant checkpoints need an input with a gradient
        model(images, labels=torch.tensor([0, 1])).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


REMOTE = """
    import importlib.abc, json, sys

    class Blocker(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "vitreg_hf":
                raise ModuleNotFoundError(name)

    sys.meta_path.insert(0, Blocker())
    import torch, transformers

    folder = sys.argv[1]
    pixels = torch.load(folder + "/pixels.pt", weights_only=True)
    result = {}
    for name in sys.argv[2:]:
        model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True).eval()
        result[name] = [type(model).__module__, type(model).__name__]
        if name == "AutoModel":
            result["state"] = model(pixels).last_hidden_state.flatten()[:5].tolist()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    result["AutoImageProcessor"] = [type(processor).__module__, type(processor).__name__]
    model.save_pretrained(folder + "/again")
    print("RESULT" + json.dumps(result))
"""


class TestRemoteCode:
    @pytest.fixture
    def folder(self, make_config, tmp_path, monkeypatch):
        """A checkpoint saved with its code, as a user does it."""
        for class_ in (ViTRegForImageClassification, ViTRegImageProcessor):
            monkeypatch.setattr(class_, "_auto_class", None)  # undone after the test: registering is global
        ViTRegForImageClassification.register_for_auto_class("AutoModelForImageClassification")
        ViTRegImageProcessor.register_for_auto_class()
        self.model = ViTRegForImageClassification(make_config()).eval()
        self.model.save_pretrained(tmp_path)
        ViTRegImageProcessor().save_pretrained(tmp_path)
        torch.save(pixels, tmp_path / "pixels.pt")
        return tmp_path

    def test_the_whole_map_and_all_files_are_written(self, folder):
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert auto_map.keys() == {"AutoConfig", *AUTO}
        for reference in auto_map.values():
            file, class_name = reference.split(".")
            assert f"class {class_name}(" in (folder / f"{file}.py").read_text()

    def test_loads_where_the_package_is_not_installed(self, folder, tmp_path_factory):
        names = [name for name in AUTO if name != "AutoBackbone"]
        environment = {"HF_HOME": str(tmp_path_factory.mktemp("home")), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(REMOTE), str(folder), *names],
            capture_output=True,
            text=True,
            env=environment,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        result = json.loads(run.stdout.split("RESULT")[1])
        for name in names:
            module, class_name = result[name]
            assert module.startswith("transformers_modules")
            assert class_name == AUTO[name].__name__
        assert result["AutoImageProcessor"][1] == "ViTRegImageProcessor"
        expected = self.model.vitreg(pixels).last_hidden_state.flatten()[:5].tolist()
        assert result["state"] == pytest.approx(expected, abs=1e-5)
        again = json.loads((folder / "again" / "config.json").read_text())["auto_map"]
        assert again.keys() == {"AutoConfig", *AUTO}

    def test_code_is_not_written_unless_asked(self, make_config, tmp_path):
        ViTRegForImageClassification(make_config()).save_pretrained(tmp_path)
        assert not list(tmp_path.glob("*.py"))
        assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
