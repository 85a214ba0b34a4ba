# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""A model of digits is fine-tuned on images of a folder: other classes, another size, grey, in every way of tuning."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from transformers import pipeline

from vitreg_hf import ViTRegConfig, ViTRegForImageClassification
from vitreg_hf.register_neurons.adding import add_registers

from .outcome import CLASSIFY, NEWEST

PATTERNS = ("across", "dots", "upright")
SHORT = ["--num_train_epochs", "5", "--learning_rate", "3e-3", "--random_resized_crop", "false", "--image_size", "48"]
BACKBONE = "vitreg."


@pytest.fixture(scope="module")
def digits(trainer, tmp_path_factory) -> Path:
    """A small model of digits."""
    folder = tmp_path_factory.mktemp("models") / "digits"
    shape = ["--num_hidden_layers", "3", "--hidden_size", "32", "--max_train_samples", "400"]
    done = trainer.run(CLASSIFY, *shape, "--num_train_epochs", 5, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Three classes of coloured, noisy patterns as JPEG files of two sizes, in folders to train and to validate on."""
    folder, noise = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for label, name in enumerate(PATTERNS):
        for split in ("train", "val"):
            (folder / split / name).mkdir(parents=True)
        for index in range(50):
            height, width = (60, 80) if index % 2 else (70, 64)
            rows, columns = np.mgrid[:height, :width] + noise.integers(0, 12)
            wave = [np.sin(rows / 2), np.sin(rows / 2) * np.sin(columns / 2), np.sin(columns / 2)][label]
            colours = noise.uniform(20, 80, 3)
            image = 128 + wave[..., None] * colours + noise.normal(0, 20, (height, width, 3))
            file = folder / ("train" if index < 32 else "val") / name / f"{index}.jpg"
            PIL.Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(file, quality=90)
    return folder


def tuning(digits: Path, photos: Path, *argv: Any) -> list[Any]:
    """Options that fine-tune."""
    data = ["--train_dir", photos / "train", "--validation_dir", photos / "val"]
    return ["--init_from", digits, *data, *SHORT, *argv]


def tune(trainer, digits: Path, photos: Path, folder: Path, *argv: Any) -> dict[str, Any]:
    """Fine-tune, and return the results."""
    done = trainer.run(CLASSIFY, *tuning(digits, photos, *argv), "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text())


def changed(digits: Path, folder: Path) -> set[str]:
    """Parts of the backbone whose weights are not those of the model of digits; positions have another size."""
    old, new = (load_file(where / "model.safetensors") for where in (digits, folder))
    assert old.keys() == new.keys()  # a plain checkpoint, whatever was added in between
    kept = [name for name in old if name.startswith(BACKBONE) and "position" not in name]
    return {name.removeprefix(BACKBONE) for name in kept if not torch.equal(old[name], new[name])}


WAYS = {
    "linear": ["--learning_rate", "3e-2"],
    "partial": ["--num_tuned_layers", "1"],
    "full": ["--layer_decay", "0.7", "--decay_tokens", "true"],
    "lora": ["--lora_rank", "4", "--lora_alpha", "8", "--lora_registers", "true"],
    "registers": ["--add_registers", "2", "--learning_rate", "3e-2"],
    "registers_partial": ["--num_tuned_layers", "1"],
}


@pytest.fixture(scope="module")
def tuned(trainer, digits, photos, tmp_path_factory):
    """Results and folder of each way of tuning."""
    folders = {way: tmp_path_factory.mktemp(way) for way in WAYS}
    return {
        way: (tune(trainer, digits, photos, folders[way], "--tuning", way, *options), folders[way])
        for way, options in WAYS.items()
    }


@pytest.mark.parametrize("way", WAYS)
def test_other_classes_are_learned_at_another_size(way, tuned, photos):
    results, folder = tuned[way]
    assert results["data"]["classes"] == list(PATTERNS)
    assert results["model"]["image_size"] == 48
    assert results["metrics"]["accuracy"] > 0.65  # a third is right by chance
    assert results["hyperparameters"]["tuning"] == way
    classify = pipeline("image-classification", model=str(folder))
    scores = classify([str(photos / "val" / name / "40.jpg") for name in PATTERNS])
    assert {entry["label"] for entry in scores[0]} == set(PATTERNS)


def test_only_what_is_tuned_has_changed(tuned, digits):
    assert changed(digits, tuned["linear"][1]) == set()
    assert {name.rpartition("layers.")[2][0] for name in changed(digits, tuned["partial"][1])} == {"2", "l"}
    of_lora = {name.rpartition(".attention.")[2] for name in changed(digits, tuned["lora"][1])}
    assert of_lora == {"embeddings.register_tokens", *(f"{part}_proj.weight" for part in "qkvo")}
    assert changed(digits, tuned["registers"][1]) == {"embeddings.register_tokens"}
    tokens, *others = sorted(changed(digits, tuned["registers_partial"][1]))
    assert tokens == "embeddings.register_tokens"
    assert {name.rpartition("layers.")[2][0] for name in others} == {"2", "l"}
    everything = changed(digits, tuned["full"][1])
    assert {"embeddings.cls_token", "embeddings.register_tokens", "layers.0.mlp.up_proj.weight"} < everything


def test_lower_layers_learn_slower(tuned, digits):
    """Relative to their learning rates AdamW moves all weights alike, so decay by depth shows in how far they went."""
    old, new = (load_file(where / "model.safetensors") for where in (digits, tuned["full"][1]))
    name = "vitreg.layers.{}.attention.q_proj.weight"
    moved = [(new[name.format(layer)] - old[name.format(layer)]).abs().mean().item() for layer in range(3)]
    assert moved[0] < moved[1] < moved[2]


def test_grey_images_of_one_channel(trainer, digits, photos, tmp_path):
    results = tune(trainer, digits, photos, tmp_path / "photos", "--num_channels", 1, "--tuning", "partial")
    assert results["model"]["num_channels"] == 1
    assert results["metrics"]["accuracy"] > 0.65
    # The same images in the same classes: nothing but the channels changes, not even the head.
    argv = ["--init_from", digits, "--num_channels", 1, "--max_steps", 1, "--learning_rate", 1e-9]
    done = trainer.run(CLASSIFY, *argv, "--output_dir", tmp_path / "digits")
    assert done.returncode == 0, done.stderr
    before, after = (json.loads((folder / "results.json").read_text()) for folder in (digits, tmp_path / "digits"))
    assert after["metrics"]["accuracy"] == pytest.approx(before["metrics"]["accuracy"], abs=0.02)


def test_added_registers_are_saved_with_the_model(tuned):
    results, folder = tuned["registers"]
    assert json.loads((folder / "config.json").read_text())["num_register_tokens"] == 6
    assert results["model"]["num_register_tokens"] == 6
    assert results["hyperparameters"]["add_registers"] == 2


def test_a_model_with_added_registers_learns_in_them_alone_if_its_classes_stay(trainer, digits, tmp_path):
    grown = add_registers(ViTRegForImageClassification.from_pretrained(digits), 2)
    grown.save_pretrained(tmp_path / "grown")
    argv = ["--init_from", tmp_path / "grown", "--tuning", "registers", "--max_steps", 4, "--layer_decay", 0.5]
    done = trainer.run(CLASSIFY, *argv, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "trains    192 of " in done.stdout  # six registers of 32 channels
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("grown", "out"))
    tokens = "vitreg.embeddings.register_tokens"
    assert {name for name in old if not torch.equal(old[name], new[name])} == {tokens}
    moved = (new[tokens] - old[tokens]).abs().max()
    assert 0 < moved < 4 * 2e-3 * 0.5**4  # four steps of AdamW at the rate of the lowest layer


@pytest.mark.parametrize("way", ["lora", "registers"])
def test_a_tuning_is_continued_bit_by_bit(way, trainer, digits, photos, tuned, tmp_path):
    argv = tuning(digits, photos, "--tuning", way, *WAYS[way], *NEWEST, "--save_steps", 4, "--output_dir", tmp_path)
    killed = trainer.run(CLASSIFY, *argv, fault={"backward": 19, "signal": signal.SIGKILL})
    assert killed.returncode == -signal.SIGKILL
    assert trainer.run(CLASSIFY, *argv).returncode == 0
    files = [folder / "model.safetensors" for folder in (tmp_path, tuned[way][1])]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("way", ["partial", "lora", "registers"])
def test_two_processes_tune_what_one_does(way, trainer, digits, photos, tuned, tmp_path):
    argv = tuning(digits, photos, "--tuning", way, *WAYS[way], "--per_device_train_batch_size", 8)
    jobs = trainer.start_ranks(CLASSIFY, *argv, "--output_dir", tmp_path)
    assert [job.wait().returncode for job in jobs] == [0, 0]
    assert changed(digits, tmp_path) == changed(digits, tuned[way][1])
    together, alone = (load_file(folder / "model.safetensors") for folder in (tmp_path, tuned[way][1]))
    torch.testing.assert_close(together, alone, rtol=1e-2, atol=1e-2)


def test_what_cannot_be_tuned_is_refused(trainer, digits, tmp_path):
    plain = tmp_path / "plain"
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    ViTRegForImageClassification(ViTRegConfig(**shape, num_register_tokens=0)).save_pretrained(plain)
    for argv, said in (
        (["--init_from", digits, "--tuning", "partial", "--num_tuned_layers", "9"], "num_tuned_layers of 1 to 3"),
        (["--init_from", plain, "--tuning", "registers"], "registers to tune them, got one without: add_registers"),
        (["--recipe", "finetune_dinov2"], "init_from with the recipe finetune_dinov2"),
        (["--recipe", "deit3"], "did you mean deit3_"),
    ):
        refused = trainer.run(CLASSIFY, *argv, "--output_dir", tmp_path / "never")
        assert refused.returncode == 1
        assert said in refused.stderr
    assert not (tmp_path / "never").exists()
