"""Small models, compiled ones that count their graphs, and code that runs in a process of its own under limits."""

import json
import os
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import pytest
import torch

from vitreg_hf import ViTRegModel

# By default hypothesis leaves a folder in the working directory, and then warns of it, which is an error here.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(tempfile.gettempdir(), "hypothesis_of_vitreg_hf"))

# Imports everything once, then forks per job: a job costs 0.1 s rather than 5 s.
# A job reads `argument` and may set `result`; all that leaves it is JSON.
SERVER = r"""
import json, os, resource, signal, sys

import numpy, PIL.Image, torch, transformers
from transformers import pipeline
import vitreg_hf

torch.set_num_threads(1)


def work(job, answer):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    limit = used + job["megabytes"] * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    names = {**globals(), "argument": job["argument"], "result": None}
    report = {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        exec(job["code"], names)
    except BaseException as error:
        text, bases = str(error), [c.__name__ for c in type(error).__mro__]
        report = {"kind": type(error).__name__, "error": text[:3000], "length": len(text), "bases": bases}
    report["megabytes"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    report["result"] = names["result"]
    with os.fdopen(answer, "w") as pipe:
        pipe.write(json.dumps(report))


for line in sys.stdin:
    job = json.loads(line)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        for standard in (0, 1):  # nobody answers questions, and no output mixes with answers
            os.dup2(os.open(os.devnull, os.O_RDWR), standard)
        signal.alarm(job["seconds"])
        work(job, writer)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    print("ANSWER" + json.dumps([status, text]), flush=True)
"""


class Report(NamedTuple):
    """How a job ended."""

    died_of: int  # wait status: 0 unless a signal, of the alarm for instance, ended the process
    kind: str | None = None  # class of the exception that left the code; None if there was none
    error: str = ""  # the first 3000 characters of its message
    length: int = 0  # characters of the whole message
    bases: tuple[str, ...] = ()  # names of its classes
    megabytes: float = 0.0  # growth of the resident memory at its peak
    result: Any = None  # what the job called `result`


class Bounded:
    """A process that has imported everything, and runs jobs in forks of itself."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, "-c", SERVER], env=environment, text=True, **pipes)

    def __call__(self, code: str, argument: Any = None, megabytes: int = 1500, seconds: int = 30) -> Report:
        """Run `code`, which may read `argument`; memory is what it may have besides what imports took."""
        job = {"code": code, "argument": argument, "megabytes": megabytes, "seconds": seconds}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ANSWER"):
                status, text = json.loads(line.removeprefix("ANSWER"))
                return Report(status, **json.loads(text or "{}"))
        raise RuntimeError("Expected an answer of the process that runs jobs, which ended")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture(scope="session")
def bounded():
    """Call with code to run it under limits: `bounded(code, argument)` gives a `Report`."""
    runner = Bounded()
    yield runner
    runner.close()


@pytest.fixture
def make_model(make_config):
    """A small model whose every parameter counts (biases start at zero), ready to be used."""

    def make(model_class=ViTRegModel, **fields):
        model = model_class(make_config(**fields))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    return make


@pytest.fixture
def count_graphs():
    """Call with a model for it compiled, for any size, and the list that its graphs are put into as they are made."""
    torch.compiler.reset()

    def make(model):
        graphs = []

        def counting(graph, inputs):
            graphs.append(graph)
            return graph.forward

        return torch.compile(model, fullgraph=True, dynamic=True, backend=counting), graphs

    yield make
    torch.compiler.reset()
