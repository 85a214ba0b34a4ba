# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Self-supervision as a person runs it: what it leaves, interrupted, in two processes, and that it learns."""

import json
import random
import signal

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from vitreg_hf.model.modeling_vitreg import ViTRegModel
from vitreg_hf.training.running import STOPPED_EXIT_CODE

from .outcome import NEWEST, checkpoints, differing, outcome

PRETRAIN = "pretrain_dino"
SMALL = [
    *("--num_hidden_layers", "1", "--hidden_size", "32", "--max_train_samples", "60", "--num_local_crops", "2"),
    *("--num_prototypes", "16", "--head_hidden_size", "32", "--head_bottleneck_size", "16"),
    *("--per_device_train_batch_size", "8", "--max_steps", "6", "--eval_steps", "3"),
]
# All that is random or has a state of its own: a Gram teacher, centres, several batches per step, a loading process.
STATEFUL = [
    *("--gram_weight", "2", "--gram_start_ratio", "0.3", "--targets", "centring", "--color_augmentation"),
    *("--drop_path_rate", "0.2", "--gradient_accumulation_steps", "2", "--dataloader_num_workers", "1"),
    *("--logging_steps", "2", "--save_steps", "2"),
]
MICRO_BATCHES = 12


@pytest.fixture(scope="module")
def pretrained(trainer, tmp_path_factory):
    """Folder of a small training with all parts, never interrupted."""
    folder = tmp_path_factory.mktemp("dino") / "whole"
    done = trainer.run(PRETRAIN, *SMALL, *STATEFUL, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


def results_in(folder):
    return json.loads((folder / "results.json").read_text())


def test_the_results_are_complete(pretrained):
    results = results_in(pretrained)
    assert set(results) == {
        *("model", "hyperparameters", "data", "metrics", "curve", "steps"),
        *("versions", "hardware", "seconds", "command"),
    }
    assert [entry["step"] for entry in results["curve"]] == [0, 3, 6]
    assert results["metrics"]["untrained_knn_accuracy"] == results["curve"][0]["knn_accuracy"]
    assert results["metrics"]["knn_accuracy"] == results["curve"][-1]["knn_accuracy"]
    assert results["metrics"]["n"] == 360
    assert results["hyperparameters"]["total_train_batch_size"] == 16
    assert all(results["curve"][-1][f"{name}_loss"] != 0 for name in ("dino", "ibot", "koleo", "gram"))
    assert [record["step"] for record in results["steps"]] == [2, 4, 6]
    assert {"gradient_norm_tokens", "register_norm", "loss", "learning_rate"} <= results["steps"][0].keys()


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
    checkpoint = pretrained / "checkpoints" / "step-00000006"
    teacher, student = (load_file(checkpoint / f"{name}.safetensors") for name in ("teacher", "model"))
    saved = load_file(pretrained / "model.safetensors")
    assert all(torch.equal(value, teacher[f"backbone.{name}"]) for name, value in saved.items())
    assert not all(torch.equal(value, student[f"backbone.{name}"]) for name, value in saved.items())


def test_a_stopped_training_goes_on_bit_by_bit(trainer, pretrained, tmp_path):
    """SIGTERM inside step 3: after the Gram teacher was taken, between two batches of a step."""
    argv = [*SMALL, *STATEFUL, *NEWEST, "--output_dir", tmp_path]
    stopped = trainer.run(PRETRAIN, *argv, fault={"backward": 5, "signal": signal.SIGTERM})
    assert stopped.returncode == STOPPED_EXIT_CODE, stopped.stderr
    assert checkpoints(tmp_path)[-1] == "step-00000003"
    resumed = trainer.run(PRETRAIN, *argv)
    assert resumed.returncode == 0, resumed.stderr
    assert differing(tmp_path, outcome(pretrained)) == []


def test_a_killed_training_goes_on_bit_by_bit(trainer, pretrained, tmp_path):
    argv, draw = [*SMALL, *STATEFUL, *NEWEST, "--output_dir", tmp_path], random.Random(0)
    for batches in (6, 4):
        killed = trainer.run(PRETRAIN, *argv, fault={"backward": draw.randint(1, batches), "signal": signal.SIGKILL})
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = trainer.run(PRETRAIN, *argv)
    assert resumed.returncode == 0, resumed.stderr
    assert differing(tmp_path, outcome(pretrained)) == []


def test_settings_of_a_checkpoint_are_kept(trainer, pretrained):
    argv = [*SMALL, *STATEFUL, "--resume_from_checkpoint", "latest", "--num_prototypes", "32"]
    refused = trainer.run(PRETRAIN, *argv, "--output_dir", pretrained)
    assert refused.returncode == 1
    assert "num_prototypes 16 (got 32)" in refused.stderr


def test_two_processes_balance_targets_over_all_images(trainer, tmp_path):
    """What does not depend on draws of a process: DINO with Sinkhorn-Knopp has the losses of one process."""
    argv = [*SMALL, "--ibot_weight", "0", "--koleo_weight", "0", "--output_dir"]
    alone = trainer.run(PRETRAIN, *argv, tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    ranks = trainer.start_ranks(PRETRAIN, *argv, tmp_path / "two", "--per_device_train_batch_size", "4")
    assert [rank.wait().returncode for rank in ranks] == [0, 0]
    one, two = (results_in(tmp_path / name)["curve"] for name in ("one", "two"))
    for name in ("dino_loss", "ibot_loss", "koleo_loss"):
        assert [e[name] for e in two[1:]] == pytest.approx([e[name] for e in one[1:]], rel=1e-4)
    assert one[-1]["dino_loss"] > 0 == one[-1]["ibot_loss"] == one[-1]["koleo_loss"]


def test_digits_are_told_apart_better_after_a_tenth_of_the_training(trainer, tmp_path):
    """The whole demo takes minutes; its first steps already show what it learns without labels."""
    done = trainer.run(PRETRAIN, "--max_steps", "150", "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = results_in(tmp_path)["metrics"]
    assert metrics["knn_accuracy"] > metrics["untrained_knn_accuracy"] + 0.05
