# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""A process that has imported what trainings need, and forks for every job; `trainer.py` talks to it.

    python tests/runs/warm_trainer.py

reads jobs as lines of JSON from stdin: {"id", "script", "argv", "environment", "folder", "fault"}; writes
{"id", "pid"} when one has begun and {"id", "returncode"} when it has ended (negative: the signal that ended it).

A job calls `main` of a script of `examples/` in a session of its own, with `folder` as its working directory; its
output goes to `stdout` and `stderr` there. The environment is all of it that the job sees. The ranks of a launch are
jobs that find one another by their environment.
"""

import importlib.util
import json
import os
import selectors
import signal
import sys
import threading
import traceback
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))

import faults

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def serve() -> None:
    """Start jobs until stdin ends; report those that end."""
    ended, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler, nothing is written to the pipe
    signal.set_wakeup_fd(wakeup)
    running: dict[int, int] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        selector.register(ended, selectors.EVENT_READ)
        unread = b""
        while True:
            for key, _ in selector.select():
                received = os.read(key.fd, 1 << 16)
                if key.fd == ended:
                    _report_ended(running)
                elif not received:
                    return
                else:
                    *lines, unread = (unread + received).split(b"\n")
                    for line in lines:
                        _start(json.loads(line), running)


def _start(job: dict[str, Any], running: dict[int, int]) -> None:
    module = _script(job["script"])
    pid = os.fork()
    if pid == 0:
        _run(job, module)
    running[pid] = job["id"]
    _say(id=job["id"], pid=pid)


def _report_ended(running: dict[int, int]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        _say(id=running.pop(pid), returncode=os.waitstatus_to_exitcode(status))


def _say(**message: int) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


@cache
def _script(name: str) -> ModuleType:
    """A script of the examples, with all that it imports: the first job pays for that."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _warm_up() -> None:
    """What is slow the first time and the same every time: imports, and the digits as a data set."""
    import matplotlib.pyplot
    import sklearn.datasets

    from vitreg_hf.training import data

    _script("train_image_classification")
    digits = data.load_digits()
    data.load_digits = lambda: digits
    matplotlib.pyplot.close(matplotlib.pyplot.figure())
    assert sklearn.datasets


def _run(job: dict[str, Any], module: ModuleType) -> None:
    """Be the job: in a forked process, which ends here."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    status = 1
    try:
        os.setsid()
        _redirect(Path(job["folder"]))
        os.environ.clear()
        os.environ.update(job["environment"])
        os.chdir(job["folder"])
        _own_cache(Path(job["folder"]))
        _own_locks()
        faults.install(job["fault"], Path(job["folder"]))
        sys.argv = [str(EXAMPLES / f"{job['script']}.py"), *job["argv"]]
        module.main(job["argv"])
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        _leave(status)


def _leave(status: int) -> None:
    """End as an interpreter does that is told to exit: processes of multiprocessing end before."""
    import multiprocessing.util

    try:
        multiprocessing.util._exit_function()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status & 0xFF)


def _redirect(folder: Path) -> None:
    """Nothing to read, and files to write to."""
    for descriptor, name in ((0, os.devnull), (1, folder / "stdout"), (2, folder / "stderr")):
        opened = os.open(name, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)


def _own_cache(folder: Path) -> None:
    import datasets

    datasets.config.HF_DATASETS_CACHE = folder / "datasets_cache"


def _own_locks() -> None:
    """Progress bars share a semaphore with the process that forked this one: a job killed with it would stop all."""
    classes = [tqdm]
    for bar in classes:
        classes += bar.__subclasses__()
        if "_lock" in vars(bar):
            bar.set_lock(threading.RLock())


if __name__ == "__main__":
    _warm_up()
    _say(id=-1, pid=os.getpid())
    serve()
