# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""How long `from_pretrained` takes and what memory it needs, against Transformers' own classes with the same weights.

    python benchmarks/loading.py

DINOv2-S and -B with four registers from safetensors on disk, which the first turn leaves in the machine's page cache.
Times are those of the process, all of its threads. Memory is the highest that a process of its own has had while
loading, beyond what it had after its imports; weights that are mapped from the file count. About two minutes; writes
`benchmarks/results/loading.json`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pooled_features import OURS, models_of
from side_by_side import add_machine_options, check_positive, compared, in_turns, machine, save_rows, table
from transformers import AutoModel

KEY = ("size", "layers", "device", "threads")
# Runs alone, and starts anew to count its highest memory when its imports are done (Linux).
ALONE = """
import json, pathlib, sys, torch, vitreg_hf
from transformers import AutoModel, Dinov2WithRegistersModel
def held(field):
    line = next(l for l in pathlib.Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
    return int(line.split()[1]) * 1024
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = held("VmRSS")
model = AutoModel.from_pretrained(sys.argv[1])
print(json.dumps({"megabytes": (held("VmHWM") - before) / 1e6}))
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every size, print a table, write the numbers."""
    options = parse(argv)
    where = machine(options.device, "float32", options.threads)
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(size, Path(folder), options)
        print(f"DINOv2-{size[0].upper()}: ms to load, MB of memory")
        print(table(row, columns={"peak_megabytes": "MB"}), flush=True)
        save_rows([row], KEY, options.output, where)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=("small", "base", "large", "giant"), nargs="+", default=["small", "base"])
    parser.add_argument("--num_layers", type=int, help="blocks, in place of those of the size; for a quick look")
    add_machine_options(parser, "loading.json")
    options = parser.parse_args(argv)
    check_positive(parser, options, "repetitions", "threads", "num_layers")
    options.family, options.image_size = "dinov2", 224
    return options


def measure(size: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Times and memory of loading one size."""
    options.size = size
    models_of(options, folder)  # which leaves the checkpoints in these folders
    folders = {OURS: folder / "vitreg", "transformers": folder / "theirs"}
    loads = {name: partial(AutoModel.from_pretrained, path) for name, path in folders.items()}
    seconds = in_turns(loads, options.repetitions, process_seconds)
    return {
        **{"size": size, "layers": options.num_layers, "device": options.device, "threads": options.threads},
        "repetitions": options.repetitions,
        "peak_megabytes": {name: megabytes_alone(path) for name, path in folders.items()},
        **compared(seconds, OURS),
    }


def process_seconds(work: Callable[[], Any]) -> float:
    """Seconds that all threads of this process compute: weights are read by several."""
    started = time.process_time()
    work()
    return time.process_time() - started


def megabytes_alone(folder: Path) -> float:
    """Most memory of a process that loads a checkpoint and nothing else."""
    run = subprocess.run([sys.executable, "-c", ALONE, str(folder)], capture_output=True, text=True, check=True)
    return float(json.loads(run.stdout.strip().splitlines()[-1])["megabytes"])


if __name__ == "__main__":
    main()
