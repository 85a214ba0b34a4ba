# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Frozen features evaluated as a person does it: linear classifiers, nearest neighbours, one and two processes."""

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from vitreg_hf import ViTRegConfig, ViTRegForImageClassification, ViTRegImageProcessor, ViTRegModel

FEATURES = "evaluate_features"
LINEAR = ["--max_train_samples", "400", "--max_steps", "60", "--learning_rates", "1e-3", "0.5", "10"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A backbone from random weights, with its processor."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    folder = tmp_path_factory.mktemp("models") / "tiny"
    ViTRegModel(ViTRegConfig(**shape, initializer_range=0.1)).save_pretrained(folder)
    ViTRegImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        folder
    )
    return folder


def results_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def linear(trainer, model, tmp_path_factory):
    """Folder of a linear probe in one process, and what it said."""
    folder = tmp_path_factory.mktemp("linear")
    done = trainer.run(
        *(FEATURES, "--model", model, *LINEAR, "--per_device_train_batch_size", 16, "--output_dir", folder)
    )
    assert done.returncode == 0, done.stderr
    return folder, done


def test_the_best_classifier_is_reported_with_its_settings(linear):
    folder, done = linear
    results = results_in(folder)
    sweep, best = results["sweep"], results["metrics"]
    assert len(sweep) == 2 * 2 * 3
    assert best["accuracy"] == max(entry["accuracy"] for entry in sweep)
    assert {name: best[name] for name in sweep[0]} in sweep
    assert best["n"] == 360
    assert best["accuracy"] > 0.2  # a tenth is right by chance
    assert results["settings"]["learning_rates"] == [1e-3, 0.5, 10.0]
    assert "neighbours" not in results["settings"]
    assert f"accuracy  {best['accuracy']:.4f} on 360" in done.stdout
    assert "Training: 100%" in done.stderr


def test_the_table_and_the_picture_are_written(linear):
    folder, done = linear
    table = (folder / "table.md").read_text()
    assert table.count("the best of 3") == 4
    assert all(line in done.stdout for line in table.splitlines())
    with PIL.Image.open(folder / "probe_sweep.png") as picture:
        assert picture.width > 1000


def test_the_same_seed_gives_the_same_numbers_in_one_process_and_two(trainer, model, linear, tmp_path):
    argv = [FEATURES, "--model", model, *LINEAR, "--output_dir"]
    again = trainer.run(*argv, tmp_path / "again", "--per_device_train_batch_size", 16)
    assert again.returncode == 0, again.stderr
    assert results_in(tmp_path / "again")["sweep"] == results_in(linear[0])["sweep"]
    ranks = trainer.start_ranks(*argv, tmp_path / "two", "--per_device_train_batch_size", 8)
    assert [job.wait().returncode for job in ranks] == [0, 0]
    two = [entry["accuracy"] for entry in results_in(tmp_path / "two")["sweep"]]
    one = [entry["accuracy"] for entry in results_in(linear[0])["sweep"]]
    assert two == pytest.approx(one, abs=0.01)  # sums of other order


def test_neighbours_vote(trainer, model, tmp_path):
    argv = [FEATURES, "--model", model, "--task", "knn", "--max_train_samples", "60", "--image_size", "48"]
    done = trainer.run(*argv, "--output_dir", tmp_path / "knn")
    assert done.returncode == 0, done.stderr
    results = results_in(tmp_path / "knn")
    assert [entry["neighbours"] for entry in results["neighbours"]] == [10, 20]  # of 60 images
    assert results["metrics"]["neighbours"] == 20
    assert results["metrics"]["accuracy"] > 0.2
    assert results["model"]["image_size"] == 48
    assert "max_steps" not in results["settings"]
    ranks = trainer.start_ranks(*argv, "--output_dir", tmp_path / "two")
    assert [job.wait().returncode for job in ranks] == [0, 0]
    assert results_in(tmp_path / "two")["neighbours"] == results["neighbours"]


def test_own_images_and_a_classifier_of_other_classes(trainer, tmp_path):
    for index in range(24):
        folder = tmp_path / "photos" / ("light", "dark")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (40, 50), ((60, 180)[index % 2], 90 + index, 120)).save(folder / f"{index}.png")
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    ViTRegForImageClassification(ViTRegConfig(**shape, num_labels=7)).save_pretrained(tmp_path / "model")
    argv = [
        FEATURES,
        "--model",
        tmp_path / "model",
        "--train_dir",
        tmp_path / "photos",
        "--output_dir",
        tmp_path / "o",
    ]
    done = trainer.run(*argv, "--max_steps", 2, "--learning_rates", "0.1", "--last_blocks", "2")
    assert done.returncode == 0, done.stderr
    assert results_in(tmp_path / "o")["settings"]["random_resized_crop"] is True
    refused = trainer.run(*argv, "--max_steps", 2)  # four blocks of two
    assert refused.returncode == 1
    assert "1 to 2" in refused.stderr


def test_without_a_model_nothing_begins(trainer):
    refused = trainer.run(FEATURES)
    assert refused.returncode == 1
    assert "Expected a model, got none" in refused.stderr
