# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""How long a step of training takes, with stochastic depth, against the implementations that people use.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --compile
    python benchmarks/training_step.py --device cuda --dtype bfloat16 --compile --batch_size 128

DINOv2-S (patch 14, four registers, or `--size`) and a linear classifier on CLS: forward, backward and an update by
AdamW, which is the fused one for all. Same weights everywhere; at a rate of 0 the losses, and the gradients of the
projection of patches, behind all blocks, are compared before anything is timed. Rates: none; 0.3 in every block
(`uniform`, as in DINOv2); from 0 in the first to 0.3 in the last (`linear`). Ours leaves out dropped samples before a
block computes them (`drop_path_kind="subset"`) and computes
the last block for CLS alone (`output_tokens=False`); `masking` is ours without both. Transformers and timm compute all
and drop by a mask. On one thread of a CPU the time is that of the thread. About 20 minutes for ViT-S on a core; writes
`benchmarks/results/training_step.json`, in which rows of other settings stay.
"""

import argparse
import copy
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from pooled_features import OURS, models_of
from side_by_side import (
    add_machine_options,
    alternating,
    check_positive,
    compared,
    gflops_of,
    machine,
    peak_megabytes,
    save_rows,
    table,
)
from timm.layers import DropPath
from torch import Tensor, nn
from torch.optim import AdamW

RATE = 0.3
SCHEDULES = ("none", "uniform", "linear")
KEY = ("schedule", "size", "layers", "image_size", "batch_size", "device", "dtype", "compile", "threads")
CLASSES = 1000
Step = Callable[[], Tensor]  # returns the loss


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every schedule, print a table, write the numbers."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    where = machine(options.device, options.dtype, options.threads)
    with tempfile.TemporaryDirectory() as folder:
        models = models_of(options, Path(folder))
    generator = torch.Generator().manual_seed(0)
    size = (options.batch_size, 3, options.image_size, options.image_size)
    pixels = torch.randn(size, generator=generator).to(options.device)
    labels = torch.randint(CLASSES, size[:1], generator=generator).to(options.device)
    for schedule in options.schedules:
        row = measure(models, pixels, labels, schedule, options)
        print(f"{options.size}, drop path {schedule}, batch {options.batch_size}: ms per image, GFLOPs, MB")
        print(table(row, per=options.batch_size, columns={"gflops_per_image": "GFLOPs", "peak_megabytes": "MB"}))
        save_rows([row], KEY, options.output, where)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "base", "large", "giant"), default="small")
    parser.add_argument("--schedules", choices=SCHEDULES, nargs="+", default=list(SCHEDULES))
    parser.add_argument("--batch_size", type=int, default=20, help="images per step")
    parser.add_argument("--image_size", type=int, default=224, help="pixels per side, which 14 divides")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="by autocast")
    parser.add_argument("--compile", action="store_true", help="all of them by torch.compile")
    parser.add_argument("--num_layers", type=int, help="blocks, in place of those of the size; for a quick look")
    add_machine_options(parser, "training_step.json")
    parser.set_defaults(repetitions=5)
    options = parser.parse_args(argv)
    check_positive(parser, options, "repetitions", "threads", "num_layers", "batch_size")
    if options.image_size < 14 or options.image_size % 14:
        parser.error(f"expected a multiple of the patch size 14 in --image_size, got {options.image_size}")
    options.family = "dinov2"
    return options


# Steps


def steps_of(
    models: dict[str, nn.Module], pixels: Tensor, labels: Tensor, schedule: str, options: argparse.Namespace
) -> tuple[dict[str, Step], dict[str, nn.Module]]:
    """A step of every implementation, each with its own copy of the weights and its own optimizer; and the copies."""
    kinds = {
        OURS: (OURS, "subset", {"output_tokens": False}),
        "masking": (OURS, "mask", {}),
        "transformers": ("transformers", None, {}),
        "timm": ("timm", None, {}),
    }
    steps, trained = {}, {}
    for name, (source, kind, arguments) in kinds.items():
        model = copy.deepcopy(models[source]).to(options.device).train()
        set_drop_path(model, schedule, kind)
        trained[name] = model
        steps[name] = one_step(model, arguments, pixels, labels, options)
    return steps, trained


def set_drop_path(model: nn.Module, schedule: str, kind: str | None) -> None:
    """Give every block its rate; `kind` is None for other implementations, which drop by a mask."""
    names = {"layers", "encoder.layer", "blocks"}  # of this package, of Transformers, of timm
    blocks: Any = next(part for name, part in model.named_modules() if name in names)
    for index, block in enumerate(blocks):
        rate = {"none": 0.0, "uniform": RATE, "linear": RATE * index / max(len(blocks) - 1, 1)}[schedule]
        if kind is not None:
            block.drop_path.rate, block.drop_path.kind = rate, kind
        else:
            for name in ("drop_path", "drop_path1", "drop_path2"):  # of Transformers; of timm
                if hasattr(block, name):
                    setattr(block, name, DropPath(rate) if rate else nn.Identity())


def one_step(
    model: nn.Module, arguments: dict[str, Any], pixels: Tensor, labels: Tensor, options: argparse.Namespace
) -> Step:
    """Forward, backward and update of a model and a classifier on it."""
    torch.manual_seed(0)
    width = next(part for part in model.modules() if isinstance(part, nn.LayerNorm)).normalized_shape[0]
    classifier = nn.Linear(width, CLASSES).to(options.device)
    optimizer = AdamW([*model.parameters(), *classifier.parameters()], lr=1e-6, fused=True)
    run = torch.compile(model) if options.compile else model
    kind = getattr(torch, options.dtype)

    def step() -> Tensor:
        with torch.autocast(options.device, dtype=kind, enabled=kind is not torch.float32):
            outputs = run(pixels, **arguments)
            feature = outputs if isinstance(outputs, Tensor) else outputs.pooler_output
            loss = F.cross_entropy(classifier(feature).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


# Measuring


def measure(
    models: dict[str, nn.Module], pixels: Tensor, labels: Tensor, schedule: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Losses, operations, memory and times with one schedule."""
    steps, trained = steps_of(models, pixels, labels, schedule, options)
    losses = {name: float(step()) for name, step in steps.items()}
    if schedule == "none":
        check_equal(losses, trained, options)
    elif not all(math.isfinite(loss) for loss in losses.values()):
        raise SystemExit(f"expected losses that are numbers, got {losses}")
    counted = {} if options.compile else steps
    row = {name: getattr(options, name) for name in KEY if hasattr(options, name)}
    return row | {
        "schedule": schedule,
        "layers": options.num_layers,
        "repetitions": options.repetitions,
        "loss_of_the_first_step": losses,
        "gflops_per_image": {name: gflops_of(step) / len(pixels) for name, step in counted.items()},
        "peak_megabytes": {name: peak_megabytes(step, options.device) for name, step in counted.items()},
        **compared(alternating(steps, options.repetitions, options.device, options.threads), OURS),
    }


def check_equal(losses: dict[str, float], trained: dict[str, nn.Module], options: argparse.Namespace) -> None:
    """End with a sentence where the first losses, or the gradients behind all blocks, are not those of one network."""
    gradients = {
        name: next(part for part in model.modules() if isinstance(part, nn.Conv2d)).weight.grad
        for name, model in trained.items()
    }
    mine = cast(Tensor, gradients[OURS])
    differences = {name: float((cast(Tensor, one) - mine).norm() / mine.norm()) for name, one in gradients.items()}
    differences |= {f"loss of {name}": abs(loss / losses[OURS] - 1) for name, loss in losses.items()}
    allowed = 1e-4 if options.dtype == "float32" else 0.05
    if not all(difference < allowed for difference in differences.values()):  # nor if one is not a number
        raise SystemExit(f"expected losses and gradients within {allowed} of one another, got {differences}")


if __name__ == "__main__":
    main()
