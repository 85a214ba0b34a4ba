# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Launches that would do something else than they were asked to are refused; the files of launches are valid."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from accelerate import Accelerator, DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState

from vitreg_hf.training import launch
from vitreg_hf.training.launch import check_launch, create_accelerator, describe_launch

CONFIGS = sorted((Path(__file__).parents[2] / "examples" / "accelerate_configs").glob("*.yaml"))


def launched(kind: DistributedType, processes: int = 2, fsdp2: bool = True) -> Any:
    """As much of an accelerator as the checks look at."""
    return SimpleNamespace(
        num_processes=processes, distributed_type=kind, is_fsdp2=fsdp2, mixed_precision="no"
    )  # fmt: skip


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    for name in ("WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


class TestRefused:
    def test_one_process_alone_is_not(self, accelerator: Accelerator) -> None:
        check_launch(accelerator)
        assert describe_launch(accelerator) == {"processes": 1, "mixed_precision": "no", "sharded": False}

    def test_processes_that_do_not_know_of_one_another(
        self, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match=r"Expected 2 processes that train one model .* got 1"):
            check_launch(accelerator)
        check_launch(launched(DistributedType.MULTI_CPU))

    def test_fewer_processes_than_were_asked_for(
        self, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(launch, "_processes_asked_for", lambda: 2)
        with pytest.raises(ValueError, match="Expected 2 processes, as accelerate launch was asked for, got 1"):
            check_launch(accelerator)

    def test_whole_models_that_were_to_be_sharded(
        self, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(ValueError, match="Expected a model sharded by FSDP, got NO"):
            check_launch(accelerator)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="Expected a model sharded by FSDP, got MULTI_CPU"):
            check_launch(launched(DistributedType.MULTI_CPU))
        check_launch(launched(DistributedType.FSDP))

    def test_the_first_fsdp(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="Expected fsdp_version 2, got 1"):
            check_launch(launched(DistributedType.FSDP, fsdp2=False))


class TestCommandLineOfTheLauncher:
    @pytest.mark.parametrize(
        ("command", "processes"),
        [
            ("/bin/python /venv/bin/accelerate launch --cpu --num_processes 2", 2),
            ("/bin/python /venv/bin/accelerate launch --cpu --num-processes=3", 3),
            ("/bin/python /venv/bin/accelerate-launch --num_processes 2", 2),
            ("python -m accelerate.commands.launch --num_processes 2", 2),
            ("python -m accelerate.commands.accelerate_cli launch --num_processes 2", 2),
            ("/bin/python /venv/bin/accelerate launch --num_processes two", 1),
            ("/bin/python /venv/bin/accelerate launch --num_processes", 1),
            ("/bin/python /venv/bin/accelerate launch --config_file /nowhere.yaml", 1),
            ("/bin/python /venv/bin/accelerate test --num_processes 2", 1),
            ("/bin/sh launch --num_processes 2", 1),
            ("", 1),
        ],
    )
    def test_option(self, command: str, processes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(launch, "default_config_file", tmp_path / "none.yaml")
        assert launch._processes_in(command.split(" ")) == processes

    @pytest.mark.parametrize(
        ("content", "processes"),
        [("num_processes: 4", 4), ("num_processes: -1", -1), ("", 1), ("- 1", 1), ("num_processes: {", 1)],
    )
    def test_file(self, content: str, processes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        file = tmp_path / "launch.yaml"
        file.write_text(content)
        assert launch._processes_in(["accelerate", "launch", "--config_file", str(file)]) == processes
        assert launch._processes_in(["accelerate", "launch", f"--config-file={file}", "--num_processes", "2"]) == 2
        monkeypatch.setattr(launch, "default_config_file", file)  # written by `accelerate config`
        assert launch._processes_in(["accelerate", "launch"]) == processes

    def test_options_of_the_script_are_not_the_launcher_s(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(launch, "default_config_file", tmp_path / "none.yaml")
        words = ["python", "accelerate", "launch", "--cpu", "train.py", "--num_processes", "5"]
        monkeypatch.setattr(sys, "argv", ["train.py"])
        monkeypatch.setattr(Path, "read_bytes", lambda path: "\0".join(words).encode())
        assert launch._processes_asked_for() == 1
        words.insert(3, "--num_processes=2")
        assert launch._processes_asked_for() == 2

    def test_where_nothing_can_be_known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "getppid", lambda: 2**31)
        assert launch._processes_asked_for() == 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
class TestFilesOfLaunches:
    def test_accelerate_knows_every_key(self, path: Path) -> None:
        config = load_config_from_file(str(path))  # refuses unknown keys at the top
        assert config.use_cpu == ("cpu" in path.stem)
        known = vars(launch_command_parser().parse_args(["script.py"]))
        for section in ("fsdp_config", "deepspeed_config"):
            assert {*(yaml.safe_load(path.read_text()).get(section) or {})} <= {*known}

    def test_the_launcher_starts_what_the_name_says(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        arguments = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
        arguments, *_ = _validate_launch_command(arguments)
        chosen = {name for name in ("multi_gpu", "use_fsdp", "use_deepspeed", "cpu") if getattr(arguments, name)}
        expected = {"one_gpu": set(), "fsdp2": {"use_fsdp"}, "deepspeed_zero2": {"use_deepspeed"}}
        assert chosen == expected.get(path.stem, {"multi_gpu"})
        assert arguments.num_machines == (2 if path.stem == "two_machines" else 1)
        assert (arguments.num_processes == 1) == (path.stem == "one_gpu")

    def test_it_begins_with_its_command_and_what_was_run(self, path: Path) -> None:
        text = path.read_text()
        comment = " ".join(line[2:] for line in text.split("compute_environment")[0].splitlines())
        assert f"--config_file examples/accelerate_configs/{path.name}" in comment
        assert "The tests run this" in comment or "was not run" in comment or "NOT RUN" in comment


def test_deepspeed_is_told_what_the_command_line_says(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = SimpleNamespace(deepspeed_config={"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"})
    made = launched(DistributedType.DEEPSPEED)
    made.state = SimpleNamespace(deepspeed_plugin=plugin)
    monkeypatch.setattr(launch, "Accelerator", lambda **_: made)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    create_accelerator("bf16", 4, 32, max_grad_norm=3.0)
    assert plugin.deepspeed_config == {
        "train_micro_batch_size_per_gpu": 32,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 3.0,
    }
