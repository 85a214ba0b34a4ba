# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Real launchers: two processes, two machines (on one), a SIGTERM to the launcher, and launches that are refused."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .outcome import CLASSIFY, TINY, checkpoints, differing, outcome
from .trainer import Trainer

ROOT = Path(__file__).parents[2]
SCRIPT, CONFIGS = ROOT / "examples" / f"{CLASSIFY}.py", ROOT / "examples" / "accelerate_configs"
LONGER = [*TINY, "--num_train_epochs", "10", "--save_total_limit", "99", "--ema_decay", "0.8", "--logging_steps", "1"]
ON_CPU = {"ACCELERATE_USE_CPU": "1"}


@pytest.fixture(scope="module")
def together(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes leave that no launcher has started."""
    folder = tmp_path_factory.mktemp("together")
    for job in trainer.start_ranks(CLASSIFY, *LONGER, "--output_dir", folder):
        ended = job.wait()
        assert ended.returncode == 0, ended.stderr
    return outcome(folder)


@pytest.fixture
def launch(trainer: Trainer, tmp_path: Path) -> Iterator[Any]:
    """Starts `accelerate launch`; launchers that are left over are asked to end, with what they have started."""
    started: list[subprocess.Popen[str]] = []

    def start(*argv: Any, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
        command = [str(Path(sys.executable).with_name("accelerate")), "launch", *map(str, argv)]
        output = (tmp_path / f"launcher{len(started)}").open("w+")
        process = subprocess.Popen(
            command,
            env={**trainer.environment, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        process.stdout = output
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and output."""
    code = process.wait(240)
    process.stdout.seek(0)
    return code, process.stdout.read()


def test_a_launcher_that_is_asked_to_stop_lets_all_processes_write_one_checkpoint(
    launch: Any, trainer: Trainer, together: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "output"
    config = ["--config_file", CONFIGS / "two_cpu_processes.yaml"]
    launcher = launch(*config, SCRIPT, *LONGER, "--output_dir", folder, environment=ON_CPU)
    while not checkpoints(folder) and launcher.poll() is None:
        time.sleep(0.05)
    launcher.send_signal(signal.SIGTERM)
    code, said = ended(launcher)
    assert "asked; --resume_from_checkpoint latest continues" in said, said
    assert code == 1  # of torchrun, whatever the exit code of the processes
    newest = checkpoints(folder)[-1]
    assert len(list((folder / "checkpoints" / newest).glob("random_states_*"))) == 2
    assert not (folder / "results.json").exists()

    resume = ["--resume_from_checkpoint", "latest", "--output_dir", folder]
    for job in trainer.start_ranks(CLASSIFY, *LONGER, *resume):
        resumed = job.wait()
        assert resumed.returncode == 0, resumed.stderr
    assert differing(folder, together) == []


def test_two_machines_train_what_two_processes_on_one_train(
    launch: Any, together: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "output"  # that both see
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = ["--num_processes", 2, "--main_process_port", port, "--mixed_precision", "no"]
    launchers = [
        launch(
            *("--config_file", CONFIGS / "two_machines.yaml", "--machine_rank", rank, *here),
            *(SCRIPT, *LONGER, "--output_dir", folder),
            environment=ON_CPU,
        )
        for rank in range(2)
    ]
    results = [ended(launcher) for launcher in launchers]
    assert [code for code, _ in results] == [0, 0], results
    assert differing(folder, together) == []
    assert ["held-out images" in said for _, said in results] == [True, False]


class TestRefused:
    """Launches that would do something else than they were asked to."""

    def test_two_processes_of_which_one_is_started(self, launch: Any, tmp_path: Path) -> None:
        script = tmp_path / "script.py"
        script.write_text(
            "from vitreg_hf.training.launch import create_accelerator\n"
            "create_accelerator('no', gradient_accumulation_steps=1, per_device_train_batch_size=1)\n"
        )
        code, said = ended(launch("--cpu", "--num_processes", 2, script))
        assert code == 1
        assert "Expected 2 processes, as accelerate launch was asked for, got 1" in said

    @pytest.mark.parametrize(
        ("environment", "message"),
        [
            # what torchrun without the variable starts
            ({"ACCELERATE_USE_CPU": "0"}, "Expected 2 processes that train one model (WORLD_SIZE=2), got 1"),
            (
                {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
                "Expected a model sharded by FSDP, got MULTI_CPU",
            ),
        ],
        ids=["processes that do not know of one another", "a model that would stay whole"],
    )
    def test_in_every_process(
        self, trainer: Trainer, tmp_path: Path, environment: dict[str, str], message: str
    ) -> None:
        argv = [*TINY, "--output_dir", tmp_path / "never"]
        refused = [job.wait() for job in trainer.start_ranks(CLASSIFY, *argv, environment=environment)]
        assert [one.returncode for one in refused] == [1, 1]
        # One that is still connecting loses its peer when that ends, and says so instead.
        assert any(message in one.stderr for one in refused)
        assert not (tmp_path / "never").exists()
