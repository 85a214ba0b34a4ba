# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What all benchmarks share: works that take turns, ratios within a turn, memory, the machine's own limits, the file.

Timings of one machine differ from minute to minute, and more where others work on it. So nothing here is timed alone:
works take turns in an order that changes by the turn, and what is reported is the ratio of the other's time to ours
within a turn, its median and quartiles. Above 1 we are ahead.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from vitreg_hf.training.results import processor_name, versions, write_results

RESULTS = Path(__file__).parent / "results"
Work = Callable[[], Any]
PEERS = ("timm", "onnxruntime", "pillow")  # beside what `versions` names


# Options


def add_machine_options(parser: argparse.ArgumentParser, output: str) -> None:
    """Options that every benchmark has: where it runs, how often, and where its numbers go."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--repetitions", type=int, default=15, help="turns, after one that is not counted")
    parser.add_argument("--output", type=Path, default=RESULTS / output, help="file of the numbers")


def check_positive(parser: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> None:
    """End with a sentence where an option, or one of its values, is no positive number; None is left out."""
    for name in names:
        given = getattr(options, name)
        values = given if isinstance(given, Sequence) else [given]
        if any(value is not None and value <= 0 for value in values):
            several = isinstance(given, Sequence)
            parser.error(f"expected {'positive numbers' if several else 'a positive number'} in --{name}, got {given}")


# Time


def seconds_of(work: Work, device: str = "cpu", threads: int = 1) -> float:
    """Seconds that it takes: of the thread on one thread of a CPU, which leaves out waiting for the processor; else
    of the clock, with the wait for what was given to a GPU."""
    alone = device == "cpu" and threads == 1
    clock = time.thread_time if alone else time.perf_counter
    _synchronize(device)
    started = clock()
    work()
    _synchronize(device)
    return clock() - started


def alternating(
    works: Mapping[str, Work], repetitions: int, device: str = "cpu", threads: int = 1, label: str = "turns"
) -> dict[str, list[float]]:
    """Seconds of every work in every turn, by name; the first turn, which allocates and compiles, is not counted."""
    return in_turns(works, repetitions, lambda work: seconds_of(work, device, threads), label)


def in_turns(
    works: Mapping[str, Work], repetitions: int, timed: Callable[[Work], float], label: str = "turns"
) -> dict[str, list[float]]:
    """The same with a clock of one's own."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for turn in tqdm(range(repetitions + 1), desc=label, unit="turn", leave=False):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken = timed(works[name])
            if turn:
                seconds[name].append(taken)
    return seconds


def compared(seconds: Mapping[str, Sequence[float]], ours: str) -> dict[str, Any]:
    """Median seconds of every work, and the spread of each other's ratio to ours, for a row of results."""
    return {
        "seconds": {name: statistics.median(taken) for name, taken in seconds.items()},
        "speedup_over": {name: spread(taken, seconds[ours]) for name, taken in seconds.items() if name != ours},
    }


def spread(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratio of their time to ours within each turn."""
    ratios = [other / mine for other, mine in zip(theirs, ours, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": median, "low": low, "high": high}


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


# Operations and memory


def gflops_of(work: Work) -> float:
    """Operations that PyTorch counts, in 1e9; nothing of what runs outside of PyTorch."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e9


def peak_megabytes(work: Work, device: str = "cpu") -> float:
    """Most memory (1e6 bytes) that it holds at once beyond what was held before; of PyTorch's tensors, on CPUs too."""
    if device != "cpu":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - held) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = work()  # until the end: results count too
    del kept
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 1e6


# Machine and results


@torch.inference_mode()
def machine(device: str = "cpu", dtype: str = "float32", threads: int = 1) -> dict[str, Any]:
    """What computes, and its own limits: matrix products in 1e9 operations per second, copies in 1e9 bytes read and
    written."""
    on_cpu, kind = device == "cpu", getattr(torch, dtype)
    side = 1024 if on_cpu else 8192
    left, right = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    source = torch.zeros(2**26 if on_cpu else 2**30, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    product = min(seconds_of(lambda: left @ right, device, threads) for _ in range(5))
    copied = min(seconds_of(lambda: target.copy_(source), device, threads) for _ in range(5))
    return {
        "system": platform.platform(),
        "processor": processor_name() if on_cpu else torch.cuda.get_device_name(device),
        "cores": os.cpu_count(),
        "threads": threads,
        "matmul_gflops_per_second": 2 * side**3 / product / 1e9,
        "copy_gigabytes_per_second": 2 * source.numel() / copied / 1e9,
        "versions": {**versions(), **_peer_versions()},
    }


def _peer_versions() -> dict[str, str]:
    found = {}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def save_rows(rows: Sequence[dict[str, Any]], key: Iterable[str], path: Path, where: dict[str, Any]) -> None:
    """Write rows, each with the machine that it comes from; rows of an earlier run that differ in `key` stay."""
    names = tuple(key)

    def key_of(row: dict[str, Any]) -> list[Any]:
        return [row.get(name) for name in names]

    measured = [{**row, "machine": where} for row in rows]
    kept = [row for row in _written(path) if key_of(row) not in [key_of(one) for one in measured]]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_results({"rows": [*measured, *kept]}, path)
    print(f"written: {path}")


def _written(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"] if path.exists() else []


def table(row: dict[str, Any], per: float = 1.0, unit: str = "ms", columns: Mapping[str, str] | None = None) -> str:
    """Lines of a row: name, time (`per` images, say), other columns that the row has by name, ratio with quartiles."""
    columns = columns or {}
    heads = "".join(f"{head:>12}" for head in columns.values())
    lines = [f"  {'':22}{unit:>12}{heads}   others' time / ours [quartiles]"]
    for name, seconds in row["seconds"].items():
        line = f"  {name:22}{1e3 * seconds / per:12.2f}"
        for column in columns:
            value = row[column].get(name)
            line += f"{'' if value is None else f'{value:.2f}':>12}"
        if (ratio := row["speedup_over"].get(name)) is not None:
            line += f"   {ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
        lines.append(line)
    return "\n".join(lines)
