# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Trainings on streams: of every source, interrupted in the middle of a pass, in two processes, with broken images."""

import json
import signal
from pathlib import Path

import datasets
import pytest

from vitreg_hf.training.data import load_digits

from ..training.encoded import write_table, write_tar
from .outcome import AUGMENTED, CLASSIFY, NEWEST, checkpoints, differing, outcome

NAMES = [str(digit) for digit in range(10)]
SHARDS, HELD_OUT = (23, 17, 20), 21  # images of each
STREAM = [
    *("--num_hidden_layers", "1", "--hidden_size", "32", "--mixup_alpha", "0.8", "--drop_path_rate", "0.2"),
    *("--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2", "--save_steps", "4"),
    *("--max_steps", "8", "--steps_per_epoch", "4", "--logging_steps", "1", "--ema_decay", "0.8"),
    *("--dataloader_num_workers", "2", "--shuffle_buffer_size", "10", "--per_device_eval_batch_size", "8", *AUGMENTED),
]
STOP = {"backward": 5, "signal": signal.SIGTERM}  # after step 3: 48 of 60 images of the first pass


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, list[str]]:
    """The same digits in every form that can be streamed, and the options that name them."""
    folder, digits = tmp_path_factory.mktemp("shards"), load_digits().train
    (folder / "names.txt").write_text("\n".join(NAMES))
    feature, start = datasets.ClassLabel(names=NAMES), 0
    for number, size in enumerate((*SHARDS, HELD_OUT)):
        split, place = ("validation", 0) if number == len(SHARDS) else ("train", number)
        rows = [digits.rows[index] for index in range(start, start + size)]
        images, labels = [row["image"]["bytes"] for row in rows], [row["label"] for row in rows]
        start += size
        files = {f"{row}.png": image for row, image in enumerate(images)}
        files |= {f"{row}.cls": str(label).encode() for row, label in enumerate(labels)}
        write_tar(folder / "tars" / f"{split}-{place}.tar", dict(sorted(files.items())))
        write_table(folder / "tables" / f"{split}-{place}.parquet", images, labels, feature)
        of = len(SHARDS) if split == "train" else 1
        write_table(folder / "hub" / "data" / f"{split}-{place:05d}-of-{of:05d}.parquet", images, labels, feature)
    tars, tables = folder / "tars", folder / "tables"
    return {
        "tars": [
            *("--train_shards", f"{tars}/train-{{0..2}}.tar", "--validation_shards", f"{tars}/validation-0.tar"),
            *("--class_names_file", str(folder / "names.txt")),
        ],
        "parquet files": [
            *("--train_shards", f"{tables}/train-*.parquet", "--validation_shards", f"{tables}/validation-0.parquet")
        ],
        "a dataset": ["--dataset_name", str(folder / "hub"), "--streaming"],
    }


@pytest.mark.parametrize("source", ["tars", "parquet files", "a dataset"])
def test_stopped_in_the_middle_of_a_pass_it_goes_on_bit_by_bit(trainer, sources, tmp_path, source):
    argv = [*STREAM, *sources[source]]
    whole = trainer.run(CLASSIFY, *argv, "--output_dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    argv += [*NEWEST, "--output_dir", tmp_path / "stopped"]
    assert trainer.run(CLASSIFY, *argv, fault=STOP).returncode == 85
    assert checkpoints(tmp_path / "stopped") == ["step-00000003"]
    if source == "tars":
        others = trainer.run(CLASSIFY, *argv, "--dataloader_num_workers", 1)
        assert "dataloader_num_workers 2 (got 1)" in others.stderr
    resumed = trainer.run(CLASSIFY, *argv)
    assert resumed.returncode == 0, resumed.stderr
    assert differing(tmp_path / "stopped", outcome(tmp_path / "whole")) == []

    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["data"]["train_images"] == (None if source == "tars" else sum(SHARDS))
    assert results["metrics"]["n"] == results["data"]["evaluation_images"] == HELD_OUT
    assert [entry["step"] for entry in results["curve"]] == [4, 8]
    card = (tmp_path / "whole" / "README.md").read_text()
    assert f"Training images: {'unknown number' if source == 'tars' else sum(SHARDS)}" in card
    assert (tmp_path / "whole" / "augmentations.png").is_file()


def test_two_processes_stream_as_one_training(trainer, sources, tmp_path):
    argv = [*STREAM, *sources["tars"], "--max_steps", 4]
    whole = trainer.start_ranks(CLASSIFY, *argv, "--output_dir", tmp_path / "whole")
    assert [job.wait().returncode for job in whole] == [0, 0]
    argv += [*NEWEST, "--output_dir", tmp_path / "stopped"]
    stopped = trainer.start_ranks(CLASSIFY, *argv, "--logging_steps", 1, faults=(STOP, None))
    assert [job.wait().returncode for job in stopped] == [85, 85]
    results = [job.wait() for job in trainer.start_ranks(CLASSIFY, *argv)]
    assert [one.returncode for one in results] == [0, 0], results[0].stderr
    assert differing(tmp_path / "stopped", outcome(tmp_path / "whole")) == []
    metrics = json.loads((tmp_path / "whole" / "results.json").read_text())["metrics"]
    assert metrics["n"] == HELD_OUT  # nothing counted twice, nothing left out


def test_broken_images_of_a_stream_are_left_out_and_named(trainer, tmp_path):
    rows = [load_digits().train.rows[index] for index in range(40)]
    images, labels = [row["image"]["bytes"] for row in rows], [row["label"] for row in rows]
    images[3] = images[35] = images[3][:40]
    feature = datasets.ClassLabel(names=NAMES)
    for split, part in (("train", slice(0, 24)), ("validation", slice(24, 40))):
        write_table(tmp_path / "data" / f"{split}.parquet", images[part], labels[part], feature)
    shards = ["--train_shards", tmp_path / "data" / "train.parquet"]
    shards += ["--validation_shards", tmp_path / "data" / "validation.parquet"]
    argv = ["--num_hidden_layers", 1, "--max_steps", 4, *shards, "--output_dir", tmp_path / "out"]
    refused = trainer.run(CLASSIFY, *argv)
    assert "Expected a readable image, got" in refused.stderr
    assert "train.parquet: row 3" in refused.stderr
    done = trainer.run(CLASSIFY, *argv, "--on_corrupt_image", "skip")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["data"]["skipped_images"] == [
        "evaluation: validation.parquet: row 11",
        "train: train.parquet: row 3",
    ]
    assert results["metrics"]["n"] == 15


def test_images_that_nobody_checked_are_left_out_while_training(trainer, tmp_path: Path):
    rows = [load_digits().train.rows[index] for index in range(80)]
    for number, row in enumerate(rows):
        file = tmp_path / "data" / NAMES[row["label"]] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(row["image"]["bytes"][: 40 if number == 3 else None])
    folders = ["--train_dir", tmp_path / "data", "--validation_dir", tmp_path / "data"]
    argv = ["--num_hidden_layers", 1, "--max_steps", 10, *folders, "--check_images", "false"]
    done = trainer.run(CLASSIFY, *argv, "--on_corrupt_image", "skip", "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    broken = f"{NAMES[rows[3]['label']]}/3.png"
    assert results["data"]["skipped_images"] == [f"evaluation: {broken}", f"train: {broken}"]
    assert (results["data"]["train_images"], results["metrics"]["n"]) == (80, 79)


def test_a_batch_that_does_not_fit_is_divided(trainer, tmp_path: Path):
    argv = ["--num_hidden_layers", 1, "--max_train_samples", 64, "--num_train_epochs", 1, "--output_dir", tmp_path]
    done = trainer.run(CLASSIFY, *argv, "--auto_find_batch_size", fault={"images": 5})
    assert done.returncode == 0, done.stderr
    assert "batch     4 images x 4 per update and process, asked for 16 x 1" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    settings = results["hyperparameters"]
    assert (settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]) == (4, 4)
    assert settings["total_train_batch_size"] == 16
    assert [entry["step"] for entry in results["curve"]] == [4]
