# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Semantic segmentation as a person runs it: frozen and tuned, interrupted, and read back by the pipeline."""

import json
import signal

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline

from vitreg_hf import ViTRegForImageClassification, ViTRegForSemanticSegmentation, ViTRegImageProcessor
from vitreg_hf.training.running import STOPPED_EXIT_CODE

from .outcome import NEWEST, differing, outcome

SEGMENT = "train_semantic_segmentation"
NAMES = ["dark", "red", "green"]
SQUARE = 32
SMALL = [
    *("--num_hidden_layers", "2", "--hidden_size", "32", "--per_device_train_batch_size", "4", "--class_names"),
    *(*NAMES, "--reduce_labels", "true", "--image_size", str(SQUARE)),
]
RANDOM = [
    *("--num_train_epochs", "3", "--drop_path_rate", "0.3", "--random_scale", "0.7", "1.5", "--horizontal_flip"),
    *("--gradient_accumulation_steps", "2", "--dataloader_num_workers", "2", "--save_steps", "2"),
    *("--logging_steps", "1"),
]


def squares(seed):
    """A dark image with a red and a green square on its patches, and labels that count from 1; 0 is of no class."""
    draw = np.random.default_rng(seed)
    image, mask = draw.integers(0, 60, (SQUARE, SQUARE, 3), dtype=np.uint8), np.ones((SQUARE, SQUARE), np.uint8)
    for label, (row, column) in enumerate(draw.permutation([(0, 0), (0, 16), (16, 0), (16, 16)])[:2]):
        part = slice(row, row + 16), slice(column, column + 16)
        image[(*part, label)] += 180
        mask[part] = 2 + label
    mask[0] = 0
    return image, mask


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Folder of 40 images and their masks."""
    folder = tmp_path_factory.mktemp("pairs") / "squares"
    for part in ("images", "annotations"):
        (folder / part).mkdir(parents=True)
    for number in range(40):
        image, mask = squares(number)
        PIL.Image.fromarray(image).save(folder / "images" / f"{number}.png")
        PIL.Image.fromarray(mask).save(folder / "annotations" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A model with the head of a classifier, registers, and colours of its own."""
    from vitreg_hf import ViTRegConfig

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = ViTRegConfig(**shape, image_size=24, patch_size=8, num_labels=7, initializer_range=0.2)
    ViTRegForImageClassification(config).save_pretrained(folder)
    ViTRegImageProcessor(size={"height": 24, "width": 24}, image_mean=[0.4] * 3, image_std=[0.3] * 3).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def whole(trainer, pairs, tmp_path_factory):
    """Folder of a training with everything random, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    done = trainer.run(SEGMENT, *SMALL, *RANDOM, "--train_dir", pairs, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


def results_in(folder):
    return json.loads((folder / "results.json").read_text())


def test_the_folder_is_a_model_with_results_and_picture(whole):
    results = results_in(whole)
    assert set(results["metrics"]) == {"mean_iou", "pixel_accuracy", "iou", "absent_classes", "n"}
    assert list(results["metrics"]["iou"]) == NAMES
    assert (results["data"]["train_images"], results["metrics"]["n"]) == (36, 4)
    assert results["hyperparameters"]["total_train_batch_size"] == 8
    assert [entry["step"] for entry in results["curve"]] == [5, 9, 14]
    assert [record["step"] for record in results["steps"]] == list(range(1, 15))
    with PIL.Image.open(whole / "predictions.png") as picture:
        assert picture.width > 1000


@pytest.mark.parametrize("place", [5, 12, 20])
def test_a_killed_training_ends_as_one_that_is_left_alone(trainer, pairs, whole, tmp_path, place):
    """Batch 5 is the first of a step, batch 12 the second, batch 20 in the second epoch."""
    argv = [*SMALL, *RANDOM, *NEWEST, "--train_dir", pairs, "--output_dir", tmp_path]
    killed = trainer.run(SEGMENT, *argv, fault={"backward": place, "signal": signal.SIGKILL})
    assert killed.returncode == -signal.SIGKILL
    done = trainer.run(SEGMENT, *argv)
    assert done.returncode == 0, done.stderr
    assert differing(tmp_path, outcome(whole)) == []


def test_sigterm_writes_a_checkpoint_and_has_a_code_of_its_own(trainer, pairs, whole, tmp_path):
    argv = [*SMALL, *RANDOM, *NEWEST, "--train_dir", pairs, "--output_dir", tmp_path]
    stopped = trainer.run(SEGMENT, *argv, fault={"backward": 5, "signal": signal.SIGTERM})
    assert stopped.returncode == STOPPED_EXIT_CODE
    assert "stopped   after step 3" in stopped.stdout
    assert trainer.run(SEGMENT, *argv).returncode == 0
    assert differing(tmp_path, outcome(whole)) == []


def test_two_processes_train_as_one_does(trainer, pairs, tmp_path):
    """The same images per step, without BatchNorm, whose statistics are those of a process."""
    same = [*SMALL, "--no_batch_norm", "--random_scale", "1", "1", "--num_train_epochs", "2", "--train_dir", pairs]
    one = trainer.run(SEGMENT, *same, "--output_dir", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    both = ["--per_device_train_batch_size", "2", "--output_dir", tmp_path / "two"]
    for rank in [job.wait() for job in trainer.start_ranks(SEGMENT, *same, *both)]:
        assert rank.returncode == 0, rank.stderr
    curves = [results_in(tmp_path / name)["curve"] for name in ("one", "two")]
    for name in ("train_loss", "eval_mean_iou", "eval_pixel_accuracy"):
        assert [entry[name] for entry in curves[1]] == pytest.approx([entry[name] for entry in curves[0]], rel=1e-3)
    assert results_in(tmp_path / "two")["metrics"]["n"] == 4


def test_squares_are_learned_and_read_back_by_the_pipeline(trainer, pairs, tmp_path):
    longer = ["--random_scale", "1", "1", "--num_train_epochs", "12", "--learning_rate", "5e-3"]
    done = trainer.run(SEGMENT, *SMALL, *longer, "--train_dir", pairs, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert results_in(tmp_path)["metrics"]["mean_iou"] > 0.8

    image, mask = squares(1000)
    model, processor = (
        AutoModelForSemanticSegmentation.from_pretrained(tmp_path),
        AutoImageProcessor.from_pretrained(tmp_path),
    )
    assert processor.do_reduce_labels is True
    assert model.config.id2label == dict(enumerate(NAMES))
    with torch.no_grad():
        outputs = model.eval()(**processor([image], return_tensors="pt"))
    classes = processor.post_process_semantic_segmentation(outputs, target_sizes=[(SQUARE, SQUARE)])[0]
    assert (classes[1:] + 1 == torch.from_numpy(mask[1:])).float().mean() > 0.8

    found = pipeline("image-segmentation", model=str(tmp_path))(PIL.Image.fromarray(image))
    assert {one["label"] for one in found} <= set(NAMES)
    for one in found:
        assert np.array_equal(np.asarray(one["mask"]) > 0, (classes == NAMES.index(one["label"])).numpy())


def test_linear_tuning_leaves_the_model_as_it_is(trainer, pairs, classifier, tmp_path):
    own = ["--class_names", *NAMES, "--reduce_labels", "true", "--max_steps", "3", "--train_dir", pairs]
    done = trainer.run(SEGMENT, *own, "--init_from", classifier, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    source, trained = (load_file(folder / "model.safetensors") for folder in (classifier, tmp_path))
    backbone = {name for name in source if name.startswith("vitreg.")}
    assert backbone == {name for name in trained if name.startswith("vitreg.")}
    assert all(torch.equal(source[name], trained[name]) for name in backbone)
    assert trained["batch_norm.num_batches_tracked"] == 3
    results, processor = results_in(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)
    assert results["model"]["trained_parameters"] == 32 * 3 + 3 + 2 * 32
    assert (list(processor.image_mean), processor.size["height"]) == ([0.4] * 3, 24)


def test_full_tuning_trains_layers_at_rates_of_their_own(trainer, pairs, classifier, tmp_path):
    own = ["--class_names", *NAMES, "--reduce_labels", "true", "--max_steps", "2", "--train_dir", pairs]
    tuned = ["--init_from", classifier, "--tuning", "full", "--layer_decay", "0.1", "--batch_norm", "false"]
    done = trainer.run(SEGMENT, *own, *tuned, "--image_size", "32", "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    source, trained = (load_file(folder / "model.safetensors") for folder in (classifier, tmp_path))
    moved = [
        (trained[name] - source[name]).abs().max()
        for name in ("vitreg.layers.0.mlp.up_proj.weight", "vitreg.layers.1.mlp.up_proj.weight")
    ]
    assert 0 < moved[0] < moved[1] / 5
    assert not [name for name in trained if "batch_norm" in name]
    model = ViTRegForSemanticSegmentation.from_pretrained(tmp_path)
    assert model.config.drop_path_rate == 0


def test_digit_scenes_are_what_there_is_without_arguments(trainer, tmp_path):
    small = ["--num_hidden_layers", "1", "--hidden_size", "32", "--max_steps", "2", "--output_dir", tmp_path]
    done = trainer.run(SEGMENT, *small)
    assert done.returncode == 0, done.stderr
    data = results_in(tmp_path)["data"]
    assert (data["source"], data["train_images"], data["evaluation_images"]) == ("digit scenes", 600, 150)
    assert AutoImageProcessor.from_pretrained(tmp_path).size == {"height": 64, "width": 64}


REFUSED = {
    "Expected a mask for every image": ["images/5.png", None],
    "Expected a mask as large as its image": ["annotations/5.png", np.ones((8, 8), np.uint8)],
    "Expected labels 0..2 or 255, after one was taken off, got 8": [
        "annotations/5.png",
        np.full((SQUARE, SQUARE), 9, np.uint8),
    ],
}


@pytest.mark.parametrize("message", REFUSED)
def test_masks_that_are_wrong_are_refused(trainer, pairs, tmp_path, message):
    file, pixels = REFUSED[message]
    broken = tmp_path / "broken"
    for path in pairs.rglob("*.png"):
        copy = broken / path.relative_to(pairs)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    if pixels is None:
        (broken / file).unlink()
    else:
        PIL.Image.fromarray(pixels).save(broken / file)
    argv = [*SMALL, "--max_steps", "12", "--train_dir", broken, "--output_dir", tmp_path / "never"]
    refused = trainer.run(SEGMENT, *argv)
    assert refused.returncode == 1
    assert message in refused.stderr
    assert not (tmp_path / "never" / "results.json").exists()
