# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""How much memory and time converting a checkpoint takes, relative to the size of its weights.

    python benchmarks/conversion_memory.py --size large
    python benchmarks/conversion_memory.py --size giant --shard_gigabytes 1

Writes a file of random weights as DINOv2's reference implementation lays out a model of that size with four registers,
converts it in a process of its own, and reads from the kernel how much memory that process takes at its peak beyond
what imports took. Counted is anonymous memory: pages of the mapped source are the kernel's to drop. With
`--shard_gigabytes` the result is written in shards of that size instead of 5 GB at most, of which one is held at a
time. Needs free disk space of twice the weights (giant: 9 GB) below `--folder`, and about a minute; writes
`benchmarks/results/conversion_memory.json`, in which rows of other sizes stay.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vitreg_hf.training.results import processor_name, versions

# width, blocks; of giant the MLP is gated
SIZES = {"tiny": (64, 2), "small": (384, 12), "base": (768, 12), "large": (1024, 24), "giant": (1536, 40)}
GATED = ("giant",)
GIGABYTE = 10**9
OUTPUT = Path(__file__).parent / "results" / "conversion_memory.json"

# In the process that converts: memory after imports, then the conversion.
CONVERT = """
import json, sys, time
from functools import partial

import torch
from vitreg_hf.conversion import convert, writing

def memory(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name + ":"))

source, output, most_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
convert.write_safetensors = partial(writing.write_safetensors, most_bytes=most_bytes)
before, started = memory("RssAnon"), time.perf_counter()
print(json.dumps({"before": before}), flush=True)
convert.convert_checkpoint(source, output)
print(json.dumps({"before": before, "seconds": time.perf_counter() - started, "resident": memory("VmHWM")}))
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one size, print and write the numbers."""
    options = parse(argv)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        source = folder / "weights.pth"
        torch.save(dict(weights_of(options.size)), source)
        row = measure(source, folder / "converted", options)
    share = f"{row['anonymous_gigabytes']:.2f} GB of memory, {row['anonymous_over_weights']:.2f} of the weights"
    print(f"{row['size']}: weights of {row['weights_gigabytes']:.2f} GB, at the peak {share}, {row['seconds']:.1f} s")
    write(row, options.output)
    print(f"written: {options.output}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="base", help="of the model")
    parser.add_argument("--shard_gigabytes", type=float, default=5.0, help="most of one file of the result")
    parser.add_argument("--folder", type=Path, default=None, help="for temporary files; by default the system's")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file of the numbers")
    options = parser.parse_args(argv)
    if options.shard_gigabytes <= 0:
        parser.error(f"expected a positive number in --shard_gigabytes, got {options.shard_gigabytes}")
    return options


def weights_of(size: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and random values of a model of a size, as the reference implementation has them."""
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes_of(*SIZES[size], is_gated=size in GATED).items():
        yield name, torch.empty(shape).normal_(std=0.02, generator=generator)


def shapes_of(width: int, depth: int, is_gated: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of DINOv2 with four registers, patches of 14 and a table for 518 pixels, by name."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + 37 * 37, width),
        "register_tokens": (1, 4, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    inner = (int(4 * width * 2 / 3) + 7) // 8 * 8 if is_gated else 4 * width
    linear = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    if is_gated:
        linear |= {"mlp.w12": (2 * inner, width), "mlp.w3": (width, inner)}
    else:
        linear |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    for index in range(depth):
        block = f"blocks.{index}."
        for name, (rows, columns) in linear.items():
            shapes |= {f"{block}{name}.weight": (rows, columns), f"{block}{name}.bias": (rows,)}
        for number in (1, 2):
            norm = f"{block}norm{number}."
            shapes |= {f"{norm}weight": (width,), f"{norm}bias": (width,), f"{block}ls{number}.gamma": (width,)}
    return shapes


def measure(source: Path, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Convert in a process of its own and watch its memory."""
    most_bytes = int(options.shard_gigabytes * GIGABYTE)
    command = [sys.executable, "-c", CONVERT, str(source), str(output), str(most_bytes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        process.stdout.readline()  # imports are done
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process.pid))
            time.sleep(0.005)
        said = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"Expected a conversion, got exit status {process.returncode}")
    told = json.loads(said)
    size, held = source.stat().st_size, peak - told["before"]
    files = list(output.glob("*.safetensors"))
    return {
        "size": options.size,
        "weights_gigabytes": size / GIGABYTE,
        "files": len(files),
        "largest_file_gigabytes": max(file.stat().st_size for file in files) / GIGABYTE,
        "anonymous_gigabytes": held / GIGABYTE,
        "anonymous_over_weights": held / size,
        "resident_gigabytes": told["resident"] / GIGABYTE,  # with imports, and with pages of the mapped source
        "seconds": told["seconds"],
    }


def anonymous_memory(process: int) -> int:
    """Bytes of a process that are no pages of files; 0 when it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def write(row: dict[str, Any], output: Path) -> None:
    """Add a row to the file, in place of one of the same size and number of files."""
    rows = json.loads(output.read_text())["rows"] if output.is_file() else []
    kept = [other for other in rows if (other["size"], other["files"]) != (row["size"], row["files"])]
    machine = {"system": platform.platform(), "processor": processor_name(), "cores": os.cpu_count()}
    results = {"rows": sorted([*kept, row], key=order), "machine": machine, "versions": versions()}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")


def order(row: dict[str, Any]) -> tuple[int, int]:
    """By size, then by number of files."""
    return list(SIZES).index(row["size"]), row["files"]


if __name__ == "__main__":
    main()
