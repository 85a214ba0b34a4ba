# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Self-supervision as a person runs it: a few steps of everything, and the whole demo once."""

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import datasets
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from vitreg_hf.model.modeling_vitreg import ViTRegModel
from vitreg_hf.training.running import STOPPED_EXIT_CODE
from vitreg_hf.training.training_log import without_timing

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "pretrain_dino.py"
SMALL = [
    *("--num_hidden_layers", "1", "--hidden_size", "32", "--max_train_samples", "60", "--num_local_crops", "2"),
    *("--num_prototypes", "16", "--head_hidden_size", "32", "--head_bottleneck_size", "16", "--drop_path_rate", "0.2"),
    *("--per_device_train_batch_size", "8", "--max_steps", "6", "--eval_steps", "3", "--color_augmentation"),
]
# Everything that has a state of its own: a Gram teacher, centres, and several batches per step.
STATEFUL = [
    *("--gram_weight", "2", "--gram_start_ratio", "0.3", "--targets", "centring", "--patch_head", "separate"),
    *("--gradient_accumulation_steps", "2", "--dataloader_num_workers", "1", "--logging_steps", "2"),
]


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def pretrain(module_patch, tmp_path_factory):
    """Calls `main` of the example in this process, as if the process were new; returns the module."""
    module_patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets_cache"))
    module_patch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # Accelerator writes it; this has it restored

    def call(folder, *argv, before=lambda module: None):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        spec = importlib.util.spec_from_file_location("example_pretrain_dino", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        module_patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        before(module)
        module.main([*argv, "--output_dir", str(folder)])

    return call


@pytest.fixture(scope="module")
def pretrained(pretrain, tmp_path_factory):
    """Folder of a small training with all parts, never interrupted."""
    folder = tmp_path_factory.mktemp("dino") / "whole"
    pretrain(folder, *SMALL, *STATEFUL, "--save_steps", "6")
    return folder


def results_in(folder):
    return json.loads((folder / "results.json").read_text())


def test_the_results_are_complete(pretrained):
    results = results_in(pretrained)
    assert set(results) == {
        *(
            "model",
            "hyperparameters",
            "data",
            "metrics",
            "curve",
            "steps",
            "versions",
            "hardware",
            "seconds",
            "command",
        )
    }
    assert [entry["step"] for entry in results["curve"]] == [0, 3, 6]
    assert results["metrics"]["untrained_knn_accuracy"] == results["curve"][0]["knn_accuracy"]
    assert results["metrics"]["knn_accuracy"] == results["curve"][-1]["knn_accuracy"]
    assert results["metrics"]["n"] == 360
    assert results["hyperparameters"]["total_train_batch_size"] == 16
    assert all(
        entry[f"{name}_loss"] != 0 for name in ("dino", "ibot", "koleo", "gram") for entry in results["curve"][2:]
    )


def test_the_folder_is_a_backbone_with_processor_and_picture(pretrained):
    files = {file.name for file in pretrained.iterdir() if file.is_file()}
    written = {"knn_curve.png", "results.json", "training_log.jsonl"}
    assert files == {"config.json", "model.safetensors", "preprocessor_config.json"} | written
    model, processor = AutoModel.from_pretrained(pretrained), AutoImageProcessor.from_pretrained(pretrained)
    assert isinstance(model, ViTRegModel)
    inputs = processor([PIL.Image.new("RGB", (8, 8))], return_tensors="pt")
    assert model(**inputs).register_tokens.shape == (1, 4, 32)
    assert "embeddings.mask_token" not in load_file(pretrained / "model.safetensors")
    with PIL.Image.open(pretrained / "knn_curve.png") as picture:
        assert picture.width > 1000


def test_the_saved_weights_are_those_of_the_teacher(pretrained):
    teacher = load_file(pretrained / "checkpoints" / "step-00000006" / "teacher.safetensors")
    student = load_file(pretrained / "checkpoints" / "step-00000006" / "model.safetensors")
    saved = load_file(pretrained / "model.safetensors")
    assert all(torch.equal(value, teacher[f"backbone.{name}"]) for name, value in saved.items())
    assert not all(torch.equal(value, student[f"backbone.{name}"]) for name, value in saved.items())


def test_a_stopped_training_goes_on_bit_by_bit(pretrain, pretrained, tmp_path):
    """SIGTERM in step 4: after the Gram teacher was taken, between two evaluations, with a worker and accumulation."""

    def stop_in_step_four(module):
        train_step = module.train_step

        def stopping(run, batches):
            if run.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return train_step(run, batches)

        module.train_step = stopping

    with pytest.raises(SystemExit) as stopped:
        pretrain(tmp_path, *SMALL, *STATEFUL, "--save_steps", "6", before=stop_in_step_four)
    assert stopped.value.code == STOPPED_EXIT_CODE
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000004"]
    pretrain(tmp_path, *SMALL, *STATEFUL, "--save_steps", "6", "--resume_from_checkpoint", "latest")

    ours, theirs = (folder / "checkpoints" / "step-00000006" for folder in (tmp_path, pretrained))
    names = {file.name for file in theirs.iterdir()}
    assert {"teacher.safetensors", "gram_teacher.safetensors", "cls_targets.safetensors"} <= names
    for name in names:
        if name.endswith(".safetensors"):
            expected, found = load_file(theirs / name), load_file(ours / name)
            assert expected.keys() == found.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected), name
    assert without_times(results_in(tmp_path)["curve"]) == without_times(results_in(pretrained)["curve"])
    records = results_in(pretrained)["steps"]
    assert [record["step"] for record in records] == [2, 4, 6]
    assert {"gradient_norm_tokens", "register_norm", "loss", "learning_rate"} <= records[0].keys()
    assert without_timing(results_in(tmp_path)["steps"]) == without_timing(records)


def without_times(curve):
    return [{name: value for name, value in entry.items() if "second" not in name} for entry in curve]


def test_without_masks_and_local_crops_there_is_dino_alone(pretrain, tmp_path):
    off = ["--ibot_weight", "0", "--koleo_weight", "0", "--num_local_crops", "0", "--max_steps", "2"]
    pretrain(tmp_path, *SMALL, *off)
    last = results_in(tmp_path)["curve"][-1]
    assert last["dino_loss"] > 0
    assert last["ibot_loss"] == last["koleo_loss"] == last["gram_loss"] == 0


def test_settings_of_a_checkpoint_are_kept(pretrain, pretrained):
    checkpoint = str(pretrained / "checkpoints" / "step-00000006")
    resumed = ["--resume_from_checkpoint", checkpoint, "--num_prototypes", "32"]
    with pytest.raises(ValueError, match=r"num_prototypes 16 \(got 32\)"):
        pretrain(pretrained, *SMALL, *STATEFUL, *resumed)
