# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The examples, run as a person runs them.

One complete training of the digits is shared by all tests that need a good model; everything else trains a small model
on a few images for one or two epochs. What does not need processes of its own calls `main` of the script.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from huggingface_hub import ModelCard
from transformers import AutoImageProcessor, AutoModelForImageClassification

from vitreg_hf.training.checkpoint_files import list_checkpoints
from vitreg_hf.training.data import load_digits
from vitreg_hf.training.labelled_images import Collate

ROOT = Path(__file__).resolve().parents[1]
TRAIN, INFERENCE = ROOT / "examples" / "train_image_classification.py", ROOT / "examples" / "inference.py"
PYTHON = Path(sys.executable)
SMALL = ["--num_hidden_layers", "1", "--hidden_size", "32", "--max_train_samples", "160", "--num_train_epochs", "2"]


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Environment of a person without network and without a launch configuration."""
    own = {"HF_HOME": str(tmp_path_factory.mktemp("hf_home")), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "HF_", "RANK"))}
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    return {**outside, **own, "PYTHONPATH": path, "PATH": f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}"}


def run(command, environment, cwd=None):
    """Run a command to its end; one that hangs is asked to stop, so that a launcher ends its processes too."""
    command = [str(part) for part in command]
    process = subprocess.Popen(
        command, env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def results_in(folder):
    return json.loads((folder / "results.json").read_text())


# The digits demo


@pytest.fixture(scope="session")
def digits(tmp_path_factory, environment):
    """Folder of the default training, what it printed, and how long it took in seconds of processor time."""
    folder = tmp_path_factory.mktemp("demo") / "outputs" / "digits"
    finished = run([PYTHON, TRAIN], environment, cwd=folder.parents[1])
    assert finished.returncode == 0, finished.stderr[-3000:]
    return folder, finished


def test_digits_are_learned(digits):
    results = results_in(digits[0])
    assert results["metrics"]["accuracy"] >= 0.95
    assert results["metrics"]["n"] == 360
    assert results["seconds"]["train"] < results["seconds"]["total"]


def test_the_results_are_complete(digits):
    results = results_in(digits[0])
    assert set(results) == {
        *("model", "data", "hyperparameters", "metrics", "evaluation", "curve"),
        *("versions", "hardware", "seconds", "command", "speed", "license", "steps"),
    }
    assert set(results["metrics"]) == {"accuracy", "loss", "n", "top5_accuracy"}
    assert [entry["epoch"] for entry in results["curve"]] == list(range(1, len(results["curve"]) + 1))
    assert set(results["curve"][0]) == {
        *("epoch", "step", "train_loss", "train_accuracy", "eval_loss", "eval_accuracy"),
        *("images_per_second", "seconds"),
    }
    assert results["curve"][-1]["eval_accuracy"] == results["metrics"]["accuracy"]
    assert results["curve"][-1]["step"] == 1617  # 18 passes over 1,437 images in steps of 16
    assert results["command"].startswith("python ")
    assert results["command"].endswith("examples/train_image_classification.py")
    assert results["evaluation"]["stopped_early"] is False


def test_the_folder_is_a_model_with_card_and_picture(digits):
    folder, finished = digits
    expected = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "results.json"}
    assert {file.name for file in folder.iterdir()} == expected | {"training_curve.png", "training_log.jsonl"}
    with PIL.Image.open(folder / "training_curve.png") as picture:
        assert picture.width > 1000
    accuracy = results_in(folder)["metrics"]["accuracy"]
    assert ModelCard.load(folder / "README.md").data.eval_results[0].metric_value == accuracy
    for part in (f"accuracy  {accuracy:.4f} on 360", "README.md", "results.json", "training_curve.png"):
        assert part in finished.stdout
    assert re.search(r"loss=[\d.]+, images/s=\d+", finished.stderr)


def test_auto_classes_load_what_was_saved_and_repeat_its_accuracy(digits):
    folder = digits[0]
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    assert model.config.id2label == {digit: str(digit) for digit in range(10)}
    test = load_digits().evaluation
    collate = Collate(lambda images: processor(list(images), return_tensors="pt")["pixel_values"])
    batch = collate([test[index] for index in range(len(test))])
    with torch.no_grad():
        right = (model(batch["pixel_values"]).logits.argmax(-1) == batch["labels"]).float().mean().item()
    assert right == pytest.approx(results_in(folder)["metrics"]["accuracy"])


def test_inference_on_the_digits(digits, environment, tmp_path):
    options = ["--output_dir", tmp_path, "--top_k", 2, "--compare_with", digits[0]]
    finished = run([PYTHON, INFERENCE, "--model_dir", digits[0], *options], environment)
    assert finished.returncode == 0, finished.stderr[-3000:]
    lines = re.findall(r"a scanned (\d): (\d) ([\d.]+), (\d) ([\d.]+)", finished.stdout)
    assert len(lines) == 5
    assert sum(true == predicted for true, predicted, *_ in lines) >= 4
    for shape in ("(5, 21, 64)", "cls_token: (5, 64)", "register_tokens: (5, 4, 64)", "patch_map: (5, 64, 4, 4)"):
        assert shape in finished.stdout
    with PIL.Image.open(tmp_path / "attention.png") as picture:
        assert picture.height > 5 * 200
        assert picture.width > 7 * 200  # the input, CLS of the other model, CLS and four registers


# Launches


def launch(environment, *command):
    """Two processes on the CPU that know of one another."""
    cpus = {**environment, "ACCELERATE_USE_CPU": "1"}
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    options += ["--dynamo_backend", "no", "--main_process_port", "0"]
    return run([PYTHON.parent / "accelerate", "launch", *options, *command], cpus)


def test_two_processes_train_one_model(environment, tmp_path):
    finished = launch(environment, TRAIN, *SMALL, "--output_dir", tmp_path, "--save_steps", 5)
    assert finished.returncode == 0, finished.stderr[-3000:]
    results = results_in(tmp_path)
    assert results["hardware"]["processes"] == 2
    assert results["hyperparameters"]["total_train_batch_size"] == 32
    assert results["curve"][-1]["step"] == 2 * 5  # 160 images in steps of 32
    assert results["metrics"]["n"] == 360  # nothing counted twice
    assert finished.stdout.count("held-out images") == 1
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000005", "step-00000010"]


def test_processes_that_do_not_know_of_one_another_are_refused(environment, tmp_path):
    command = [PYTHON.parent / "torchrun", "--standalone", "--nproc_per_node", "2", TRAIN, *SMALL]
    finished = run([*command, "--output_dir", tmp_path / "never"], environment)
    assert finished.returncode != 0
    assert "Expected 2 processes that train one model (WORLD_SIZE=2), got 1" in finished.stderr
    assert not (tmp_path / "never").exists()


# What needs no processes of its own


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Calls `main` of an example in this process, as if the process were new."""

    def call(script, *argv):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        spec = importlib.util.spec_from_file_location(f"example_{script.stem}", script)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        module.main([str(word) for word in argv])

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # Accelerator writes it; this has it restored
    return call


def test_mixing_averaging_accumulation_and_bf16_together(example, tmp_path):
    options = ["--mixup_alpha", 0.8, "--cutmix_alpha", 1.0, "--label_smoothing_factor", 0.1, "--ema_decay", 0.8]
    options += ["--gradient_accumulation_steps", 4, "--mixed_precision", "bf16", "--layerscale_value", 0.1]
    example(TRAIN, *SMALL, *options, "--output_dir", tmp_path)
    results = results_in(tmp_path)
    assert results["hardware"]["mixed_precision"] == "bf16"
    assert results["curve"][-1]["step"] == 5  # 320 images in steps of 64, the third of which takes of both passes
    assert results["curve"][-1]["train_accuracy"] is None
    assert results["curve"][-1]["train_loss"] < results["curve"][0]["train_loss"]
    assert results["evaluation"]["weights"] == "moving average of the weights"
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert model.dtype == torch.float32


def test_early_stopping_is_recorded(example, tmp_path):
    small = [*SMALL[:-1], "30", "--max_train_samples", "16"]
    example(TRAIN, *small, "--early_stopping_patience", 2, "--learning_rate", 1e-5, "--output_dir", tmp_path)
    results = results_in(tmp_path)
    accuracies = [entry["eval_accuracy"] for entry in results["curve"]]
    assert len(accuracies) < 30
    assert max(accuracies[-2:]) <= max(accuracies[:-2]) == accuracies[-3]
    assert results["evaluation"]["stopped_early"] is True
    assert "optimistic" in (tmp_path / "README.md").read_text()


def test_a_training_that_diverges_leaves_no_model(example, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        example(TRAIN, *SMALL, "--learning_rate", 1e30, "--max_grad_norm", 0, "--output_dir", tmp_path)
    assert "Expected a loss to go on with, got nan" in str(stopped.value)
    assert not (tmp_path / "model.safetensors").exists()


# Own images

MODES = ("L", "RGBA", "P", "I;16", "CMYK", "RGB")


def picture(mode, seed):
    noise = np.random.default_rng(seed)
    if mode == "I;16":
        return PIL.Image.fromarray(noise.integers(0, 65536, (40, 50), dtype=np.uint16))
    return PIL.Image.fromarray(noise.integers(0, 256, (40, 50, 3), dtype=np.uint8)).convert(mode)


@pytest.fixture
def photos(tmp_path):
    """Twelve images of every class in six modes."""
    folder = tmp_path / "photos"
    for label, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for index in range(12):
            mode = MODES[index % 6]
            suffix = "tif" if mode == "CMYK" else "png"
            picture(mode, 100 * label + index).save(folder / name / f"{index}.{suffix}")
    return folder


OWN = ["--num_hidden_layers", "1", "--hidden_size", "32", "--num_train_epochs", "1", "--pooling", "cls_mean"]


def test_a_folder_of_images_in_all_modes(example, photos, tmp_path, capsys):
    output = tmp_path / "out"
    example(TRAIN, *OWN, "--train_dir", photos, "--rand_augment", "true", "--output_dir", output)
    results = results_in(output)
    assert results["data"]["classes"] == ["cat", "dog"]
    assert (results["data"]["train_images"], results["metrics"]["n"]) == (21, 3)
    assert "top5_accuracy" not in results["metrics"]
    assert results["hyperparameters"]["horizontal_flip"] is True
    processor = json.loads((output / "preprocessor_config.json").read_text())
    assert processor["do_center_crop"] is True

    files = sorted(photos.glob("cat/*"))[:6]
    example(INFERENCE, "--model_dir", output, "--images", *files)
    printed = capsys.readouterr().out
    assert all(re.search(rf"{file.name}: (cat|dog) [\d.]+, (cat|dog) [\d.]+", printed) for file in files)
    assert (output / "attention.png").is_file()


def test_parquet_in_all_modes(example, photos, tmp_path):
    rows = datasets.load_dataset("imagefolder", data_files={"train": f"{photos}/**"}, split="train")
    rows.rename_columns({"image": "photo", "label": "kind"}).to_parquet(tmp_path / "photos.parquet")
    columns = ["--image_column_name", "photo", "--label_column_name", "kind", "--output_dir", tmp_path / "out"]
    files = ["--train_file", tmp_path / "photos.parquet", "--validation_file", tmp_path / "photos.parquet"]
    example(TRAIN, *OWN, *files, *columns)
    results = results_in(tmp_path / "out")
    assert results["model"]["name"] == "vitreg-photos"
    assert (results["data"]["train_images"], results["metrics"]["n"]) == (24, 24)


def test_a_corrupt_file_is_refused_with_its_path_or_skipped(example, photos, tmp_path):
    broken = photos / "cat" / "broken.png"
    broken.write_bytes((photos / "cat" / "0.png").read_bytes()[:200])
    output = tmp_path / "out"
    with pytest.raises(ValueError, match=re.escape(str(broken))):
        example(TRAIN, *OWN, "--train_dir", photos, "--output_dir", output)
    assert not output.exists()
    skip = ["--on_corrupt_image", "skip", "--output_dir", output]
    example(TRAIN, *OWN, "--train_dir", photos, "--validation_dir", photos, *skip)
    results = results_in(output)
    shown = broken.relative_to(photos)
    assert results["data"]["skipped_images"] == [f"evaluation: {shown}", f"train: {shown}"]
    assert (results["data"]["train_images"], results["metrics"]["n"]) == (24, 24)


def test_inference_refuses_what_is_not_there(example, tmp_path, capsys):
    for argv, message in (
        (["--model_dir", tmp_path], "expected a folder with a trained model in --model_dir"),
        (["--model_dir", "/no/such"], "expected a folder with a trained model"),
        (["--compare_with", "/no/such"], "expected a folder with a trained model in --"),
    ):
        with pytest.raises(SystemExit):
            example(INFERENCE, *argv)
        assert message in capsys.readouterr().err
