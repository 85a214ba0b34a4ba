# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Trainings as processes that begin within a fraction of a second, alone or as the ranks of a launch."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]


@dataclass(frozen=True)
class Result:
    """What a process left.

    Attributes:
        returncode: negative: the signal that ended it.
        events: how often a file below `checkpoints` was opened, renamed, made or removed.
    """

    returncode: int
    stdout: str
    stderr: str
    events: int


class Job:
    """A process of the warm trainer."""

    def __init__(self, trainer: "Trainer", number: int, folder: Path):
        self._trainer, self._number, self._folder = trainer, number, folder
        self.pid = trainer.await_message(number, "pid", 120)

    def send(self, number: int, to_all: bool = False) -> None:
        """Send a signal to the process, or also to those that load images for it; too late is no error."""
        with suppress(ProcessLookupError):
            (os.killpg if to_all else os.kill)(self.pid, number)

    def wait(self, timeout: float = 120) -> Result:
        """What the job left, when it has ended.

        Raises:
            TimeoutError: with what it said until then; it is killed.
        """
        try:
            returncode = self._trainer.await_message(self._number, "returncode", timeout)
        except TimeoutError:
            self.send(signal.SIGKILL, to_all=True)
            raise TimeoutError(f"A job did not end in {timeout} s; it said:\n{self._said('stderr')}") from None
        return Result(returncode, self._said("stdout"), self._said("stderr"), int(self._said("events") or 0))

    def _said(self, name: str) -> str:
        path = self._folder / name
        return path.read_text(errors="replace") if path.exists() else ""


class Trainer:
    """The process of `warm_trainer`, which has imported everything and forks for every job."""

    def __init__(self, folder: Path):
        self._folder, self._messages, self._changed = folder, {}, threading.Condition()
        self._jobs = 0
        self.environment = _neutral_environment(folder)
        command = [sys.executable, str(_HERE / "warm_trainer.py")]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.environment, cwd=folder
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        try:
            self.await_message(-1, "pid", 240)
        except BaseException:
            self._process.kill()
            self.close()
            raise

    def start(
        self, script: str, *argv: Any, fault: dict[str, Any] | None = None, environment: dict[str, str] | None = None
    ) -> Job:
        """Start `main(argv)` of a script of the examples, with a fault of `faults.py`."""
        self._jobs += 1
        folder = self._folder / f"job{self._jobs}"
        folder.mkdir()
        self._send(
            id=self._jobs,
            script=script,
            argv=[str(word) for word in argv],
            environment={**self.environment, **(environment or {})},
            folder=str(folder),
            fault=fault or {},
        )
        return Job(self, self._jobs, folder)

    def run(self, script: str, *argv: Any, **more: Any) -> Result:
        """As `start`, and wait for the end."""
        return self.start(script, *argv, **more).wait()

    def start_ranks(
        self,
        script: str,
        *argv: Any,
        faults: Sequence[dict[str, Any] | None] = (None, None),
        environment: dict[str, str] | None = None,
    ) -> list[Job]:
        """Start one process per fault (None: no fault), which train one model on the CPU."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        size = {"WORLD_SIZE": str(len(faults)), "LOCAL_WORLD_SIZE": str(len(faults))}
        own = environment or {}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
        return [
            self.start(
                script,
                *argv,
                fault=fault,
                environment={**size, **address, "RANK": str(rank), "LOCAL_RANK": str(rank), **own},
            )
            for rank, fault in enumerate(faults)
        ]

    def close(self) -> None:
        """End the process, when no job runs any more."""
        self._process.stdin.close()
        self._process.wait(60)
        self._listener.join(60)
        self._process.stdout.close()

    def await_message(self, number: int, what: str, timeout: float) -> int:
        """What the process reported of a job."""
        with self._changed:
            if not self._changed.wait_for(lambda: (number, what) in self._messages or None in self._messages, timeout):
                raise TimeoutError(f"The warm trainer did not report {what} in {timeout} s")
            if (number, what) not in self._messages:
                raise RuntimeError("The warm trainer has ended")
            return self._messages[number, what]

    def _send(self, **job: Any) -> None:
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()

    def _listen(self) -> None:
        for line in self._process.stdout:
            message = json.loads(line)
            number = message.pop("id")
            with self._changed:
                self._messages.update({(number, what): value for what, value in message.items()})
                self._changed.notify_all()
        with self._changed:
            self._messages[None] = True
            self._changed.notify_all()


def _neutral_environment(home: Path) -> dict[str, str]:
    """The environment of the tests without settings of launches and of the Hub's clients."""
    foreign = ("ACCELERATE", "HF_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "FSDP_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    path = os.pathsep.join(filter(None, [str(_ROOT / "src"), os.environ.get("PYTHONPATH")]))
    own = {"HF_HOME": str(home / "hf_home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return {**kept, **own, "TOKENIZERS_PARALLELISM": "false"}
