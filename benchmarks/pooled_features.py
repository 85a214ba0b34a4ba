# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""How long one pooled feature takes, against the implementations that people use, with the same weights.

    python benchmarks/pooled_features.py
    python benchmarks/pooled_features.py --size base --compile
    python benchmarks/pooled_features.py --device cuda --dtype bfloat16 --compile

DINOv2 with four registers, patch 14, from random weights that are made in timm and converted, here and then to
Transformers; features are compared before anything is timed. Models take turns in an order that changes by the turn,
so that whatever else the machine does meets all of them; what is reported is the ratio of the other's time to ours
within a turn, its median and quartiles: above 1 we are ahead. `all tokens` is this package without
`output_tokens=False`. On one thread of a CPU the time is that of the thread, without waiting for the processor.
Operations are counted, not estimated; of the machine its own rates of matrix products and of copies are measured.
About eight minutes for ViT-S on a core; writes `benchmarks/results/pooled_features.json`, in which rows of other settings
stay.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from vitreg_hf import convert_checkpoint, export_checkpoint
from vitreg_hf.training.results import processor_name, versions, write_results

ARCHITECTURE = "vit_{}_patch14_reg4_dinov2"
OURS = "vitreg_hf"
OUTPUT = Path(__file__).parent / "results" / "pooled_features.json"
Feature = Callable[[Tensor], Tensor]  # (B, C, H, W) to (B, D)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every batch size, print a table, write the numbers."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    features = features_of(options)
    rows = []
    for batch_size in options.batch_sizes:
        pixels = torch.randn(batch_size, 3, options.image_size, options.image_size)
        pixels = pixels.to(options.device, getattr(torch, options.dtype))
        rows.append(measure(features, pixels, options))
        print(told(rows[-1]), flush=True)
    machine = {"system": platform.platform(), "processor": device_name(options), **rates(options)}
    kept = [row for row in written(options.output) if key_of(row) not in map(key_of, rows)]
    results = {"rows": [*rows, *kept], "machine": machine, "versions": {**versions(), "timm": timm.__version__}}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_results(results, options.output)
    print(f"written: {options.output}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "base", "large", "giant"), default="small")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32], help="images per pass")
    parser.add_argument("--image_size", type=int, default=224, help="pixels per side, which 14 divides")
    parser.add_argument("--repetitions", type=int, default=15, help="turns, after one that is not counted")
    parser.add_argument("--compile", action="store_true", help="all of them by torch.compile")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--num_layers", type=int, help="blocks, in place of those of the size; for a quick look")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file of the numbers")
    options = parser.parse_args(argv)
    for name in ("repetitions", "threads", "num_layers"):
        if (given := getattr(options, name)) is not None and given < 1:
            parser.error(f"expected a positive number in --{name}, got {given}")
    if min(options.batch_sizes) < 1:
        parser.error(f"expected positive numbers in --batch_sizes, got {options.batch_sizes}")
    if options.image_size < 14 or options.image_size % 14:
        parser.error(f"expected a multiple of the patch size 14 in --image_size, got {options.image_size}")
    return options


# Models


def models_of(options: argparse.Namespace) -> dict[str, nn.Module]:
    """The network by every implementation, from the same random weights."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {"img_size": options.image_size, "num_classes": 0}
    if options.num_layers:
        fields["depth"] = options.num_layers
    source = timm.create_model(ARCHITECTURE.format(options.size), **fields).eval()
    with torch.no_grad():
        for name, parameter in source.named_parameters():  # timm's own LayerScale of 1e-5 would hide every block
            parameter.normal_(0, 0.02).add_(
                1.0 if "norm" in name and "weight" in name else 0.3 * name.endswith("gamma")
            )
    with tempfile.TemporaryDirectory() as folder:
        save_for_hf(source, f"{folder}/timm", model_args=fields)
        ours = convert_checkpoint(f"{folder}/timm", f"{folder}/vitreg").model
        export_checkpoint(f"{folder}/vitreg", f"{folder}/theirs", layout="dinov2_with_registers")
        theirs = AutoModel.from_pretrained(f"{folder}/theirs")
    return {OURS: ours, "transformers": theirs, "timm": source}


def features_of(options: argparse.Namespace) -> dict[str, Feature]:
    """The pooled feature by every implementation, from the same weights."""
    models = {name: ready(model, options) for name, model in models_of(options).items()}
    return {
        OURS: lambda pixels: models[OURS](pixels, output_tokens=False).pooler_output,
        "all tokens": lambda pixels: models[OURS](pixels).pooler_output,
        "transformers": lambda pixels: models["transformers"](pixels).pooler_output,
        "timm": models["timm"],
    }


def ready(model: nn.Module, options: argparse.Namespace) -> Callable[..., Any]:
    """A model as it is timed."""
    model = model.eval().to(options.device, getattr(torch, options.dtype))
    return torch.compile(model, dynamic=False) if options.compile else model


# Measuring


@torch.inference_mode()
def measure(features: dict[str, Feature], pixels: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Differences, operations and times at one batch size."""
    outputs = {name: feature(pixels).float() for name, feature in features.items()}
    differences = {name: float((outputs[OURS] - output).abs().max()) for name, output in outputs.items()}
    allowed = 1e-4 if options.dtype == "float32" else 0.1  # features have a variance of 1
    if not max(differences.values()) < allowed:  # nor if one is not a number
        raise SystemExit(f"expected features within {allowed} of one another, got differences {differences}")
    seconds: dict[str, list[float]] = {name: [] for name in features}
    names = list(features)
    for turn in range(options.repetitions + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken = time_of(lambda name=name: features[name](pixels), options)
            if turn:  # the first turn allocates
                seconds[name].append(taken)
    settings = {
        name: getattr(options, name) for name in ("size", "image_size", "device", "dtype", "compile", "threads")
    }
    return {
        **settings,
        "layers": options.num_layers,
        "batch_size": len(pixels),
        "repetitions": options.repetitions,
        "largest_difference": differences,
        "gflops_per_image": {}
        if options.compile
        else {name: gflops(feature, pixels) for name, feature in features.items()},
        "seconds": {name: statistics.median(taken) for name, taken in seconds.items()},
        "speedup_over": {name: spread(taken, seconds[OURS]) for name, taken in seconds.items() if name != OURS},
    }


def time_of(work: Callable[[], Any], options: argparse.Namespace) -> float:
    """Seconds that it takes: of the thread on one thread of a CPU, else of the clock."""
    alone = options.device == "cpu" and options.threads == 1
    clock = time.thread_time if alone else time.perf_counter
    synchronize(options)
    started = clock()
    work()
    synchronize(options)
    return clock() - started


def synchronize(options: argparse.Namespace) -> None:
    """Wait for what was given to a GPU."""
    if options.device != "cpu":
        torch.accelerator.synchronize()


def gflops(feature: Feature, pixels: Tensor) -> float:
    """Counted operations of one image."""
    with FlopCounterMode(display=False) as counter:
        feature(pixels)
    return counter.get_total_flops() / 1e9 / len(pixels)


def spread(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratio within each turn."""
    ratios = [other / mine for other, mine in zip(theirs, ours, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": median, "low": low, "high": high}


@torch.inference_mode()
def rates(options: argparse.Namespace) -> dict[str, float]:
    """The machine's own limits: matrix products in 1e9 operations per second, copies in 1e9 bytes read and written."""
    side, dtype = (1024 if options.device == "cpu" else 8192), getattr(torch, options.dtype)
    left, right = (torch.randn(side, side, device=options.device, dtype=dtype) for _ in range(2))
    source = torch.zeros(2**26, device=options.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    product = min(time_of(lambda: left @ right, options) for _ in range(5))
    copied = min(time_of(lambda: target.copy_(source), options) for _ in range(5))
    return {
        "matmul_gflops_per_second": 2 * side**3 / product / 1e9,
        "copy_gigabytes_per_second": 2 * 2**26 / copied / 1e9,
    }


# Results


def told(row: dict[str, Any]) -> str:
    """A row as lines to print."""
    lines = [f"batch {row['batch_size']:3d}   ms / image   GFLOPs   others' time / ours [quartiles]"]
    for name, seconds in row["seconds"].items():
        counted = row["gflops_per_image"].get(name)
        line = f"  {name:14}{1e3 * seconds / row['batch_size']:8.2f}{'' if counted is None else f'{counted:11.2f}'}"
        if (ratio := row["speedup_over"].get(name)) is not None:
            line += f"   {ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
        lines.append(line)
    return "\n".join(lines)


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is of; one that is measured anew replaces the last."""
    names = ("size", "layers", "image_size", "batch_size", "device", "dtype", "compile", "threads")
    return tuple(row[name] for name in names)


def written(path: Path) -> list[dict[str, Any]]:
    """Rows of earlier runs."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def device_name(options: argparse.Namespace) -> str:
    """Model of what computes."""
    return processor_name() if options.device == "cpu" else torch.cuda.get_device_name(options.device)


if __name__ == "__main__":
    main()
