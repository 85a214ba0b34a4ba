"""A process that has imported what clients of the Hub need, and forks for every job; run by `conftest`.

    python tests/hub/warm_client.py

reads jobs as lines of JSON from stdin: {"id", "code", "args", "environment", "folder"}; writes {"id", "pid"} when one
has begun and {"id", "returncode"} when it has ended (negative: the signal that ended it). A job's output goes to
`stdout` and `stderr` in its folder. The environment is all of it that the job sees.

huggingface_hub reads its settings while it is imported, that is before a job's environment is known. A job therefore
executes `huggingface_hub.constants` again, and wherever else a module of the client libraries holds a path below the
placeholder for HF_HOME or the placeholder for the endpoint, it is replaced.
"""

import importlib
import json
import os
import selectors
import signal
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

PLACE_OF_HOME = "/nowhere/home-of-a-job"
PLACE_OF_ENDPOINT = "http://endpoint-of-a-job.invalid"
_TO_IMPORT = ("torch", "torchvision", "huggingface_hub.hf_api", "transformers.pipelines", "vitreg_hf.hub.cards")
_LIBRARIES = ("huggingface_hub", "transformers", "datasets", "evaluate", "accelerate", "vitreg_hf")


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
    pid = os.fork()
    if pid == 0:
        _run(job)
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


def _run(job: dict[str, Any]) -> None:
    """Be the job: in a forked process, which ends here."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    status = 1
    try:
        _redirect(Path(job["folder"]))
        os.environ.clear()
        os.environ.update(job["environment"])
        _settle()
        sys.argv = ["-c", *job["args"]]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(job["code"], "<job>", "exec"), main.__dict__)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status & 0xFF)


def _redirect(folder: Path) -> None:
    """Nothing to read, and files to write to."""
    for descriptor, name in ((0, os.devnull), (1, folder / "stdout"), (2, folder / "stderr")):
        opened = os.open(name, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)


def _settle() -> None:
    """Let the client libraries have the settings that they would have read from the environment at import."""
    from huggingface_hub import HfApi, constants

    importlib.reload(constants)
    replaced = {PLACE_OF_HOME: constants.HF_HOME, PLACE_OF_ENDPOINT: constants.ENDPOINT}
    for module in [m for name, m in sys.modules.items() if name.split(".")[0] in _LIBRARIES]:
        for name, value in list(vars(module).items()):
            if isinstance(value, HfApi) and value.endpoint == PLACE_OF_ENDPOINT:
                value.endpoint = constants.ENDPOINT
            for place, found in replaced.items():
                if isinstance(value, str | Path) and str(value).startswith(place):
                    setattr(module, name, type(value)(found + str(value)[len(place) :]))


if __name__ == "__main__":
    os.environ.update(HF_HOME=PLACE_OF_HOME, HF_ENDPOINT=PLACE_OF_ENDPOINT)
    for one in _TO_IMPORT:
        importlib.import_module(one)
    _say(id=-1, pid=os.getpid())
    serve()
