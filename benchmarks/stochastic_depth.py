# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What stochastic depth by subsets saves of a training step, against the kind that computes all and drops by a mask.

    python benchmarks/stochastic_depth.py
    python benchmarks/stochastic_depth.py --repetitions 15 --batch_size 32

For ViT-S/16 with 4 registers, and for the same network of Transformers (`Dinov2WithRegistersModel`, which masks), at
each drop rate in every block: operations of a forward and backward pass, counted, and its time on one thread of a CPU,
without the time that the thread waits for the processor. The models take turns, so that whatever else the machine does
meets all of them; what is reported is the ratio within a turn, its median and range. About 6 seconds a turn; writes
`benchmarks/results/stochastic_depth.json`.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from vitreg_hf import ViTRegConfig, ViTRegModel
from vitreg_hf.training.results import processor_name, versions

RATES = (0.0, 0.1, 0.2, 0.3, 0.5)
KINDS = ("mask", "subset", "peer")
COUNTED_BATCH = 128  # rounding to whole samples hides the rate in a small batch
OUTPUT = Path(__file__).parent / "results" / "stochastic_depth.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every rate, print a table, write the numbers."""
    options = parse(argv)
    torch.set_num_threads(1)
    rows = []
    print(HEADER, flush=True)
    for rate in RATES:
        rows.append(measure(rate, options))
        print(line_of(rows[-1]), flush=True)
    machine = {"system": platform.platform(), "processor": processor_name()}
    results = {"settings": settings_of(options), "rows": rows, "machine": machine, "versions": versions()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written: {options.output}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9, help="turns per rate, after one that is not counted")
    parser.add_argument("--batch_size", type=int, default=8, help="images per step that is timed")
    parser.add_argument("--image_size", type=int, default=224, help="pixels per side")
    parser.add_argument("--hidden_size", type=int, default=384, help="width, 64 channels per head")
    parser.add_argument("--num_layers", type=int, default=12, help="blocks")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file of the numbers")
    options = parser.parse_args(argv)
    for name in ("repetitions", "batch_size", "num_layers"):
        if getattr(options, name) < 1:
            parser.error(f"expected a positive number in --{name}, got {getattr(options, name)}")
    return options


def model_of(kind: str, rate: float, options: argparse.Namespace) -> nn.Module:
    """One of the three networks, which differ in how they drop; in training."""
    fields = {
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.num_layers,
        "num_attention_heads": options.hidden_size // 64,
        "image_size": options.image_size,
        "patch_size": 16,
        "num_register_tokens": 4,
        "drop_path_rate": rate,
        "layerscale_value": 1.0,
    }
    if kind == "peer":  # its schedule is uniform
        model: nn.Module = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**fields))
    else:
        model = ViTRegModel(ViTRegConfig(**fields, drop_path_schedule="uniform", drop_path_kind=kind))
    return model.train()


def step(model: nn.Module, images: torch.Tensor) -> None:
    """A forward and a backward pass."""
    model.zero_grad()
    model(images).last_hidden_state.square().mean().backward()


def flops_of(kind: str, rate: float, batch_size: int, options: argparse.Namespace) -> int:
    """Floating point operations of a step, counted on tensors without values."""
    with torch.device("meta"):
        model, images = model_of(kind, rate, options), torch.randn(batch_size, 3, *[options.image_size] * 2)
        with FlopCounterMode(display=False) as counter:
            step(model, images)
    return counter.get_total_flops()


def saved_flops(rate: float, batch_size: int, options: argparse.Namespace) -> float:
    """Share of the operations of the masking kind that subsets do without."""
    return 1 - flops_of("subset", rate, batch_size, options) / flops_of("mask", rate, batch_size, options)


def measure(rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """Operations and times of all three networks at one rate."""
    batch_size = options.batch_size
    images = torch.randn(batch_size, 3, options.image_size, options.image_size)
    models = {kind: model_of(kind, rate, options) for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(options.repetitions + 1):
        for kind, model in models.items():
            started = time.process_time()
            step(model, images)
            if turn:  # the first turn allocates
                seconds[kind].append(time.process_time() - started)
    return {
        "rate": rate,
        "samples_kept": max(int(batch_size * (1 - rate)), 1) if rate else batch_size,
        "gflops": {kind: flops_of(kind, rate, batch_size, options) / 1e9 for kind in KINDS},
        "flops_saved": saved_flops(rate, batch_size, options),
        f"flops_saved_at_batch_{COUNTED_BATCH}": saved_flops(rate, COUNTED_BATCH, options),
        "seconds": {kind: statistics.median(times) for kind, times in seconds.items()},
        "time_subset_over_mask": spread(seconds["subset"], seconds["mask"]),
        "time_subset_over_peer": spread(seconds["subset"], seconds["peer"]),
        "time_mask_over_peer": spread(seconds["mask"], seconds["peer"]),
    }


def spread(times: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Median and range of the ratio within each turn."""
    ratios = [mine / other for mine, other in zip(times, others, strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


HEADER = (
    f"{'rate':>4} {'kept':>5} {'FLOPs saved':>12} {f'at batch {COUNTED_BATCH}':>13}"
    f" {'time subset/mask':>24} {'subset/peer':>12} {'mask/peer':>10}"
)


def line_of(row: dict[str, Any]) -> str:
    """A row of the table."""
    ratio = row["time_subset_over_mask"]
    return (
        f"{row['rate']:4.1f} {row['samples_kept']:5d} {row['flops_saved']:12.1%}"
        f" {row[f'flops_saved_at_batch_{COUNTED_BATCH}']:13.1%}"
        f" {ratio['median']:10.3f} [{ratio['least']:.3f}, {ratio['most']:.3f}]"
        f" {row['time_subset_over_peer']['median']:12.3f} {row['time_mask_over_peer']['median']:10.3f}"
    )


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers were measured with."""
    names = ("repetitions", "batch_size", "image_size", "hidden_size", "num_layers")
    shared = {"patch_size": 16, "num_register_tokens": 4, "schedule": "uniform", "dtype": "float32", "threads": 1}
    return {**{name: getattr(options, name) for name in names}, **shared}


if __name__ == "__main__":
    main()
