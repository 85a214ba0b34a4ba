"""For tests of the Hub: a Hub on loopback, processes that use it, and a folder as a training leaves it."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_HERE = Path(__file__).parent
_REPOSITORY = _HERE.parents[1]


def _neutral_environment() -> dict[str, str]:
    """Environment of the tests without settings of the Hub's clients and without proxies."""
    foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "XDG_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    return {key: value for key, value in os.environ.items() if not key.upper().startswith(foreign)}


@dataclass(frozen=True)
class Result:
    """What a process left."""

    returncode: int
    stdout: str
    stderr: str


class LoopbackHub:
    """The server process and its control; see `loopback_hub` and `loopback_server`."""

    def __init__(self, root: Path):
        self.root, self.url = root, ""
        self._port = 0
        self.start()

    def start(self) -> None:
        """Start the process, where it was before if there was one."""
        command = [sys.executable, str(_HERE / "loopback_hub.py"), "--root", str(self.root), "--port", str(self._port)]
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.root / "server.log", "a") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL)
        line = self._process.stdout.readline().decode()
        if not line.startswith("READY "):
            raise RuntimeError(f"The loopback Hub did not start:\n{(self.root / 'server.log').read_text()}")
        self.url = line.split()[1]
        self._port = int(self.url.rpartition(":")[2])

    def stop(self) -> None:
        """Kill the process: nobody answers at its address then."""
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def control(self, what: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/_control/{what}", data)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=300) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{what}: {error.read().decode()}") from None

    def reset(self) -> None:
        """Back to an empty log, no faults and the usual upload modes; repositories stay."""
        self.control("reset", {})
        self.upload_mode(["*.safetensors"])

    def log(self) -> list[dict[str, Any]]:
        return self.control("log")["requests"]

    def fault(self, at: int, kind: str, **more: Any) -> None:
        self.control("fault", {"at": at, "kind": kind, **more})

    def wait_fault(self, timeout: float = 60) -> bool:
        return self.control(f"wait_fault?timeout={timeout}")["reached"]

    def release(self) -> None:
        self.control("release", {})

    def settings(self, repo: str, **settings: Any) -> None:
        """Set `private`, `gated` (False, "auto", "manual") or `grant` (users who were let in)."""
        self.control("settings", {"repo": repo, **settings})

    def upload_mode(self, patterns: list[str]) -> None:
        """Patterns of the files that go to LFS."""
        self.control("upload_mode", {"lfs": patterns})

    def tree(self, repo: str) -> dict[str, Any]:
        """Everything in a repository; empty if there is no such repository."""
        return self.control(f"tree?repo={urllib.parse.quote(repo, safe='')}")

    def environment(self, home: Path, token: str | None = "hf_alice", **more: str) -> dict[str, str]:
        """Environment of a process that uses this Hub, and nothing of the user who runs the tests."""
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
        ours |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "DISABLE_SAFETENSORS_CONVERSION": "1"}
        ours |= {f"HF_HUB_DISABLE_{what}": "1" for what in ("XET", "TELEMETRY", "PROGRESS_BARS")}
        if token is not None:
            ours["HF_TOKEN"] = token
        return {**_neutral_environment(), **ours, **more}


class Job:
    """A process forked by the warm client."""

    def __init__(self, client: "WarmClient", number: int, folder: Path):
        self._client, self._number, self._folder = client, number, folder
        self.pid = client.await_message(number, "pid", 60)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float = 120) -> Result:
        """What the job left, when it has ended.

        Raises:
            TimeoutError: with what it said until then; it is killed.
        """
        try:
            returncode = self._client.await_message(self._number, "returncode", timeout)
        except TimeoutError:
            self.kill()
            raise TimeoutError(f"A job did not end in {timeout} s; it said:\n{self._said('stderr')}") from None
        return Result(returncode, self._said("stdout"), self._said("stderr"))

    def _said(self, name: str) -> str:
        path = self._folder / name
        return path.read_text(errors="replace") if path.exists() else ""


class WarmClient:
    """The process of `warm_client`, which has imported everything and forks for every job."""

    def __init__(self, folder: Path):
        self._folder, self._messages, self._changed = folder, {}, threading.Condition()
        self._jobs = 0
        # what some modules copy while they are imported; the rest a job settles
        environment = {**_neutral_environment(), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(_HERE / "warm_client.py")]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.await_message(-1, "pid", 120)

    def start(self, code: str, arguments: tuple[str, ...], environment: dict[str, str]) -> Job:
        self._jobs += 1
        folder = self._folder / f"job{self._jobs}"
        folder.mkdir()
        job = {"id": self._jobs, "code": code, "args": arguments, "environment": environment, "folder": str(folder)}
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        return Job(self, self._jobs, folder)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)
        self._listener.join(60)
        self._process.stdout.close()

    def await_message(self, number: int, what: str, timeout: float) -> int:
        with self._changed:
            if not self._changed.wait_for(lambda: (number, what) in self._messages or None in self._messages, timeout):
                raise TimeoutError(f"The warm client did not report {what} in {timeout} s")
            if (number, what) not in self._messages:
                raise RuntimeError("The warm client has ended")
            return self._messages[number, what]

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


@dataclass(frozen=True)
class Client:
    """Runs code against one Hub in a process of its own, 0.1 s after it is asked."""

    warm: WarmClient
    hub: LoopbackHub
    homes: Path

    def start(
        self, code: str, *args: str, home: Path | None = None, token: str | None = "hf_alice", **more: str
    ) -> Job:
        """Start `code` as `__main__` with `sys.argv[1:] == args`.

        Args:
            home: HF_HOME; None: a new, empty one.
            token: what is in HF_TOKEN; None: no token.
            more: further environment variables.
        """
        home = home or Path(tempfile.mkdtemp(dir=self.homes))
        return self.warm.start(code, tuple(map(str, args)), self.hub.environment(home, token, **more))

    def run(self, code: str, *args: str, timeout: float = 120, **more: Any) -> Result:
        """As `start`, and wait for the end."""
        return self.start(code, *args, **more).wait(timeout)


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[LoopbackHub]:
    """A Hub without repositories."""
    server = LoopbackHub(tmp_path_factory.mktemp("hub"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def _warm_client(tmp_path_factory) -> Iterator[WarmClient]:
    warm = WarmClient(tmp_path_factory.mktemp("jobs"))
    yield warm
    warm.close()


@pytest.fixture(scope="module")
def client(hub, _warm_client, tmp_path_factory) -> Client:
    """Runs code that uses `hub`, with everything imported already."""
    return Client(_warm_client, hub, tmp_path_factory.mktemp("homes"))


_PREAMBLE = """
import json, sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
api = HfApi()

def failure(call, *args, **settings):
    "Name and HTTP status of the error that a call ends in; None if it ends well."
    try:
        call(*args, **settings)
    except Exception as error:
        return [type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)]

def say(value):
    print(json.dumps(value, default=str))
"""


@pytest.fixture
def ask(client) -> Callable[..., Any]:
    """Run code by `client` after `_PREAMBLE`; returns the last value that it passed to `say`."""

    def run(code: str, *args: str, **settings: Any) -> Any:
        result = client.run(_PREAMBLE + textwrap.dedent(code), *args, **settings)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return run


@pytest.fixture
def pushed(hub, ask, trained, request) -> str:
    """Id of a repository of the test's own which holds the folder `trained`; the log is empty then."""
    repo = "alice/" + re.sub(r"[^a-z0-9]+", "-", request.node.name).strip("-")[:90]
    hub.reset()
    code = "api.create_repo(sys.argv[1]); say(api.upload_folder(folder_path=sys.argv[2], repo_id=sys.argv[1]))"
    ask(code, repo, trained)
    hub.reset()
    return repo


@pytest.fixture
def fresh() -> Callable[..., subprocess.CompletedProcess]:
    """Run code in a new interpreter, for what is settled at import; takes some seconds."""

    def run(code: str, *args: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", code, *map(str, args)]
        settings = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": timeout}
        return subprocess.run(command, env=environment, **settings)

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder as `examples/train_image_classification.py` leaves it, of a tiny model that was not trained."""
    import torch

    from vitreg_hf import ViTRegConfig, ViTRegForImageClassification, ViTRegImageProcessor
    from vitreg_hf.analysis.figures import training_curve
    from vitreg_hf.hub.cards import card_of, save_card
    from vitreg_hf.model.fingerprint import fingerprint
    from vitreg_hf.training.results import write_results

    folder, classes = tmp_path_factory.mktemp("trained") / "model", ["cat", "dog", "bird"]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    layout = {"image_size": 32, "patch_size": 8, "num_register_tokens": 4, "initializer_range": 0.1}
    names = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    torch.manual_seed(0)
    model = ViTRegForImageClassification(ViTRegConfig(**sizes, **layout, **names)).eval()
    model.save_pretrained(folder)
    ViTRegImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    # the facts of a real training, so that all that a card needs is there
    results = json.loads((_REPOSITORY / "model_cards/vitreg-digits/results.json").read_text())
    results["model"] |= {**{name: sizes[name] for name in sizes}, **layout, "name": "vitreg-pets"}
    results["model"] |= {"parameters": model.num_parameters(), "weights": fingerprint(model.state_dict().items())}
    results["data"] |= {"classes": classes, "source": "somebody/pets", "hub_id": "somebody/pets"}
    results["license"] = "mit"
    write_results(results, folder / "results.json")
    training_curve(results, folder / "training_curve.png")
    save_card(card_of(folder, "alice/vitreg-pets"), folder)
    return folder
