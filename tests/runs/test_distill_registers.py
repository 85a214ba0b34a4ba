# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Registers distilled into a model as a person does it: what it leaves, interrupted, and in two processes."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from vitreg_hf import ViTRegConfig, ViTRegForImageClassification, ViTRegImageProcessor, ViTRegModel
from vitreg_hf.training.running import STOPPED_EXIT_CODE

from .outcome import NEWEST, checkpoints, differing, outcome

DISTIL = "distill_registers"
SMALL = [
    *("--max_train_samples", "96", "--num_views", "3", "--max_steps", "6", "--eval_steps", "3"),
    *("--num_registers", "2", "--per_device_train_batch_size", "8", "--learning_rate", "3e-3"),
]
# All that is random or has a past: drawn views and mirrors, crops, several batches per step, a loading process.
RANDOM = [
    *("--mirror_views", "true", "--random_resized_crop", "true", "--gradient_accumulation_steps", "2"),
    *(
        "--dataloader_num_workers",
        "1",
        "--logging_steps",
        "2",
        "--save_steps",
        "2",
        "--gradient_checkpointing",
        "true",
    ),
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A classifier from random weights without registers, with dropout, and its processor."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    noise = {"hidden_dropout_prob": 0.3, "drop_path_rate": 0.3, "patch_dropout_rate": 0.3}
    folder = tmp_path_factory.mktemp("models") / "plain"
    config = ViTRegConfig(**shape, **noise, num_register_tokens=0, initializer_range=0.1)
    ViTRegForImageClassification(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    ViTRegImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def distilled(trainer, plain, tmp_path_factory):
    """Folder of a small training with all that is random, never interrupted, and what it printed."""
    folder = tmp_path_factory.mktemp("distilled") / "whole"
    done = trainer.run(DISTIL, "--model", plain, *SMALL, *RANDOM, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def results_in(folder):
    return json.loads((folder / "results.json").read_text())


def test_what_was_gained_and_lost_is_told(distilled):
    folder, said = distilled
    results = results_in(folder)
    metrics = results["metrics"]
    assert [entry["step"] for entry in results["curve"]] == [0, 3, 6]
    assert (metrics["untrained"], metrics["distilled"]) == tuple(results["curve"][i]["student"] for i in (0, -1))
    assert set(metrics["original"]) == {
        *("cosine_distance", "squared_error", "largest_over_median", "outlier_share", "knn_accuracy")
    }
    for distance in ("cosine_distance", "squared_error"):
        assert metrics["distilled"][distance] < metrics["untrained"][distance]
        assert metrics["untrained"][distance] == pytest.approx(metrics["original"][distance], rel=0.3)
    assert results["curve"][2]["cosine_loss"] < results["curve"][1]["cosine_loss"]
    table = (folder / "table.md").read_text()
    assert table in said
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        *("original", "2 registers added", "distilled")
    ]
    assert results["hyperparameters"]["total_train_batch_size"] == 16


def test_the_folder_is_a_backbone_with_registers_and_its_processor(distilled, plain):
    model, processor = (kind.from_pretrained(distilled[0]) for kind in (AutoModel, AutoImageProcessor))
    assert isinstance(model, ViTRegModel)
    assert model.config.num_register_tokens == 2
    assert list(processor.image_mean) == [0.5] * 3
    old = {name.removeprefix("vitreg."): value for name, value in load_file(plain / "model.safetensors").items()}
    new = load_file(distilled[0] / "model.safetensors")
    changed = {name for name in new if name not in old or not torch.equal(old[name], new[name])}
    assert {name.split(".")[1] for name in changed if name.startswith("layers.")} == {"2"}
    assert {name for name in changed if not name.startswith("layers.")} == {
        *("embeddings.register_tokens", "embeddings.position_embeddings"),
        *(f"embeddings.patch_embeddings.projection.{name}" for name in ("weight", "bias")),
    }


def test_a_stopped_training_goes_on_bit_by_bit(trainer, plain, distilled, tmp_path):
    """SIGTERM between two batches of step 3, then a kill in step 5."""
    argv = ["--model", plain, *SMALL, *RANDOM, *NEWEST, "--output_dir", tmp_path]
    stopped = trainer.run(DISTIL, *argv, fault={"backward": 5, "signal": signal.SIGTERM})
    assert stopped.returncode == STOPPED_EXIT_CODE, stopped.stderr
    assert checkpoints(tmp_path)[-1] == "step-00000003"
    killed = trainer.run(DISTIL, *argv, fault={"backward": 4, "signal": signal.SIGKILL})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = trainer.run(DISTIL, *argv)
    assert resumed.returncode == 0, resumed.stderr
    assert differing(tmp_path, outcome(distilled[0])) == []


def test_another_teacher_is_another_training(trainer, plain, distilled, tmp_path):
    model = ViTRegForImageClassification.from_pretrained(plain)
    torch.nn.init.normal_(model.vitreg.embeddings.cls_token)
    weights = (plain / "model.safetensors").read_bytes()
    argv = [*SMALL, *RANDOM, "--resume_from_checkpoint", "latest", "--output_dir", distilled[0]]
    try:
        model.save_pretrained(plain)
        refused = trainer.run(DISTIL, "--model", plain, *argv)
    finally:
        (plain / "model.safetensors").write_bytes(weights)
    assert refused.returncode == 1
    assert "teacher '" in refused.stderr


def test_two_processes_learn_what_one_does(trainer, plain, tmp_path):
    """Without shifts all processes have the same targets."""
    argv = ["--model", plain, *SMALL, "--max_shift", "0", "--output_dir"]
    alone = trainer.run(DISTIL, *argv, tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    ranks = trainer.start_ranks(DISTIL, *argv, tmp_path / "two", "--per_device_train_batch_size", "4")
    assert [rank.wait().returncode for rank in ranks] == [0, 0]
    one, two = (results_in(tmp_path / name)["metrics"] for name in ("one", "two"))
    for name in ("original", "untrained", "distilled"):
        assert two[name] == pytest.approx(one[name], rel=1e-2, abs=5e-3)


def test_without_new_registers_there_is_still_a_distillation(trainer, plain, tmp_path):
    done = trainer.run(DISTIL, "--model", plain, *SMALL, "--num_registers", 0, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert results_in(tmp_path)["model"]["num_register_tokens"] == 0


def test_what_cannot_be_distilled_is_refused(trainer, plain, tmp_path):
    for argv, said in (
        ([], "Expected a model, got none"),
        (["--model", plain, "--num_tuned_layers", "9"], "num_tuned_layers of 0 to 3, the blocks of the model, got 9"),
    ):
        refused = trainer.run(DISTIL, *argv, "--output_dir", tmp_path / "never")
        assert refused.returncode == 1
        assert said in refused.stderr
