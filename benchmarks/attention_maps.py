# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What maps of CLS and registers in all layers cost, against a plain forward pass and against full maps.

    python benchmarks/attention_maps.py
    python benchmarks/attention_maps.py --device cuda --dtype bfloat16

DINOv2 with four registers, patch 14, at 518 pixels (1374 tokens), one image, the same random weights everywhere
(`pooled_features`). `vitreg_hf` returns what CLS and registers attend to, beside the fused kernel
(`output_prefix_attentions`); `full maps` is this package with `output_attentions`. Others have nothing to return
beside a fused kernel: `transformers` (`Dinov2WithRegistersModel`) runs eager attention and `timm` attention that is
not fused, from which its `AttentionExtract` takes the maps. Rows of CLS and registers are compared first.

Of each the bytes of the maps that it returns, the most memory that it holds beyond a plain forward pass, and its time
over that of a plain forward pass of this package, within turns (see `side_by_side`). About 10 minutes on a core, and
3 GB of memory; writes `benchmarks/results/attention_maps.json`, in which rows of other settings stay.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pooled_features import OURS, models_of
from side_by_side import (
    add_machine_options,
    alternating,
    check_positive,
    compared,
    machine,
    peak_megabytes,
    save_rows,
    spread,
    table,
)
from timm.utils import AttentionExtract
from torch import Tensor

PLAIN, FULL = "plain forward pass", "full maps"
PREFIX = 5  # CLS and four registers
KEY = ("size", "num_layers", "image_size", "device", "dtype", "threads")
Maps = Callable[[Tensor], Sequence[Tensor]]  # (1, C, H, W) to (1, h, prefix or N, N) of every layer


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every size, print its table, write its numbers."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    where = machine(options.device, options.dtype, options.threads)
    for size in options.sizes:
        row = measured(argparse.Namespace(**vars(options), size=size, family="dinov2"))
        print(told(row), flush=True)
        save_rows([row], KEY, options.output, where)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=("small", "base", "large"), nargs="+", default=["small", "base"])
    parser.add_argument("--image_size", type=int, default=518, help="pixels per side, which 14 divides")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--num_layers", type=int, help="blocks, in place of those of the size; for a quick look")
    add_machine_options(parser, "attention_maps.json")
    options = parser.parse_args(argv)
    check_positive(parser, options, "image_size", "num_layers", "repetitions", "threads")
    if options.image_size % 14:
        parser.error(f"expected a multiple of the patch size 14 in --image_size, got {options.image_size}")
    return options


def passes_of(options: argparse.Namespace) -> tuple[Callable[[Tensor], Any], dict[str, Maps]]:
    """A plain forward pass, and every way to maps, by name."""
    with tempfile.TemporaryDirectory() as folder:
        models: dict[str, Any] = models_of(options, Path(folder))
    for model in models.values():
        model.eval().to(options.device, getattr(torch, options.dtype))
    ours, theirs, source = models[OURS], models["transformers"], models["timm"]
    theirs.set_attn_implementation("eager")
    for block in source.blocks:
        block.attn.fused_attn = False
    extract = AttentionExtract(source, method="hook")
    return ours, {
        OURS: lambda pixels: ours(pixels, output_prefix_attentions=True).prefix_attentions,
        FULL: lambda pixels: ours(pixels, output_attentions=True).attentions,
        "transformers": lambda pixels: theirs(pixels, output_attentions=True).attentions,
        "timm": lambda pixels: [*extract(pixels).values()],
    }


@torch.inference_mode()
def measured(options: argparse.Namespace) -> dict[str, Any]:
    """A row: differences, memory and times of one size."""
    plain, passes = passes_of(options)
    pixels = torch.randn(1, 3, options.image_size, options.image_size)
    pixels = pixels.to(options.device, getattr(torch, options.dtype))
    works = {name: partial(maps, pixels) for name, maps in passes.items()}
    differences, megabytes = compare(works, 1e-5 if options.dtype == "float32" else 0.01)
    works[PLAIN] = partial(plain, pixels)
    peaks = {name: peak_megabytes(work, options.device) for name, work in works.items()}
    seconds = alternating(works, options.repetitions, options.device, options.threads, f"ViT-{options.size}")
    return {
        **{name: getattr(options, name) for name in (*KEY, "repetitions")},
        "largest_difference": differences,
        "maps_megabytes": megabytes,
        "peak_megabytes": peaks,
        "peak_megabytes_beyond_plain": {name: peaks[name] - peaks[PLAIN] for name in passes},
        "time_over_plain": {name: spread(seconds[name], seconds[PLAIN]) for name in passes},
        **compared(seconds, OURS),
    }


def compare(works: Mapping[str, Callable[[], Any]], allowed: float) -> tuple[dict[str, float], ...]:
    """Largest difference of the rows of CLS and registers to ours, and megabytes of maps, by name."""
    ours = works[OURS]()
    differences, megabytes = {}, {}
    for name, work in works.items():
        maps = work()
        pairs = zip(maps, ours, strict=True)
        differences[name] = max(float((one[:, :, :PREFIX] - own).abs().max()) for one, own in pairs)
        megabytes[name] = sum(one.untyped_storage().nbytes() for one in maps) / 1e6  # of a view all that it keeps
    if not max(differences.values()) < allowed:  # nor if one is not a number
        raise SystemExit(f"expected maps within {allowed} of one another, got differences {differences}")
    return differences, megabytes


def told(row: dict[str, Any]) -> str:
    """A row as lines to print."""
    columns = {"maps_megabytes": "maps, MB", "peak_megabytes_beyond_plain": "peak, MB"}
    lines = [f"ViT-{row['size']}/14 at {row['image_size']}", table(row, columns=columns)]
    for name, ratio in row["time_over_plain"].items():
        line = f"  {name:22}{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] of a plain forward pass"
        lines.append(f"{line}, maps 1/{row['maps_megabytes'][FULL] / row['maps_megabytes'][name]:.0f} of full ones")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
