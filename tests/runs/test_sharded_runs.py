# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Trainings whose model FSDP2 spreads over two processes: saved, continued, made whole, loaded by anybody.

`sharded_on_cpu.py` says by what detour they run on the CPU.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.merge import merge_command, merge_command_parser
from safetensors.torch import load_file

from vitreg_hf import ViTRegForImageClassification

from .trainer import Result, Trainer

SHARDED = "../tests/runs/sharded_on_cpu"
SMALL = ["--num_hidden_layers", "2", "--hidden_size", "32", "--max_train_samples", "160", "--num_train_epochs", "2"]
RANDOM = ["--mixup_alpha", "0.8", "--drop_path_rate", "0.2", "--gradient_accumulation_steps", "2"]
AVERAGED = ["--ema_decay", "0.9"]


@pytest.fixture(scope="module")
def sharded_run(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five steps of two processes, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("sharded")
    options = [*SMALL, *RANDOM, *AVERAGED, "--save_steps", 1, "--save_total_limit", 9, "--output_dir", folder]
    succeeded(run(trainer, *options))
    return folder


def run(trainer: Trainer, *argv: Any, processes: int = 2, script: str = SHARDED) -> list[Result]:
    return [job.wait() for job in trainer.start_ranks(script, *argv, faults=[None] * processes)]


def succeeded(results: Sequence[Result]) -> str:
    for result in results:
        assert result.returncode == 0, result.stderr[-3000:]
    return results[0].stdout


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def merged(sharded: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Weights of a sharded checkpoint, as `accelerate merge-weights` writes them."""
    arguments = merge_command_parser().parse_args([str(sharded / "pytorch_model_fsdp_0"), str(folder)])
    merge_command(arguments)
    return load_file(folder / "model.safetensors")


def test_the_saved_model_is_whole(sharded_run: Path) -> None:
    model, loading = ViTRegForImageClassification.from_pretrained(sharded_run, output_loading_info=True)
    assert not any(loading.values())
    results = json.loads((sharded_run / "results.json").read_text())
    assert results["hardware"]["processes"] == 2
    assert results["curve"][-1]["step"] == 5
    assert results["metrics"]["n"] == 360
    assert results["model"]["parameters"] == model.num_parameters()
    assert (checkpoint(sharded_run, 5) / "pytorch_model_fsdp_0" / "__1_0.distcp").is_file()


def test_a_continued_training_equals_an_uninterrupted_one_bit_by_bit(
    trainer: Trainer, sharded_run: Path, tmp_path: Path
) -> None:
    resume = ["--resume_from_checkpoint", checkpoint(sharded_run, 2), "--output_dir", tmp_path, "--save_steps", 1]
    succeeded(run(trainer, *SMALL, *RANDOM, *AVERAGED, *resume))
    averages = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path, sharded_run)]
    assert averages[0] == averages[1]
    weights = [
        merged(checkpoint(folder, 5), tmp_path / f"merged{number}")
        for number, folder in enumerate((tmp_path, sharded_run))
    ]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_merged_weights_are_those_that_the_training_saves(trainer: Trainer, sharded_run: Path, tmp_path: Path) -> None:
    resume = ["--resume_from_checkpoint", checkpoint(sharded_run, 5), "--resume_with_changes", "true"]
    without_average = [*SMALL, *RANDOM, *resume, "--output_dir", tmp_path]
    assert "ema_decay 0.9 (got None)" in succeeded(run(trainer, *without_average))
    saved = load_file(tmp_path / "model.safetensors")
    merged_weights = merged(checkpoint(sharded_run, 5), tmp_path / "merged")
    torch.testing.assert_close(merged_weights, saved, rtol=0, atol=0)
    average = load_file(sharded_run / "model.safetensors")
    assert not all(torch.equal(saved[name], average[name]) for name in saved)

    shutil.copy(sharded_run / "config.json", tmp_path / "merged")
    model, loading = ViTRegForImageClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(loading.values())
    torch.testing.assert_close(model.state_dict(), saved, rtol=0, atol=0)


def test_another_number_of_processes_finds_the_same_weights_if_it_is_accepted(
    trainer: Trainer, sharded_run: Path, tmp_path: Path
) -> None:
    as_many_images_per_step = ["--gradient_accumulation_steps", 4]
    options = [*SMALL, *RANDOM, *AVERAGED, *as_many_images_per_step, "--output_dir", tmp_path]
    resume = ["--resume_from_checkpoint", checkpoint(sharded_run, 5)]
    (refused,) = run(trainer, *options, *resume, processes=1)
    assert refused.returncode == 1
    assert "processes 2 (got 1)" in refused.stderr
    succeeded(run(trainer, *options, *resume, "--resume_with_changes", "true", processes=1))
    assert (tmp_path / "model.safetensors").read_bytes() == (sharded_run / "model.safetensors").read_bytes()


def test_a_launch_with_whole_models_refuses_a_sharded_checkpoint(
    trainer: Trainer, sharded_run: Path, tmp_path: Path
) -> None:
    resume = ["--resume_from_checkpoint", checkpoint(sharded_run, 5), "--resume_with_changes", "true"]
    options = [*SMALL, *RANDOM, *AVERAGED, *resume, "--output_dir", tmp_path]
    (refused,) = run(trainer, *options, processes=1, script="train_image_classification")
    assert refused.returncode == 1
    assert "Expected a checkpoint with whole weights" in refused.stderr
