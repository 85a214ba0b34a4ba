# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What the measuring pass of `vitreg analyze` costs beyond the forward passes that it cannot do without.

    python benchmarks/analysis_pass.py
    python benchmarks/analysis_pass.py --images 32 --repetitions 7
    python benchmarks/analysis_pass.py --patch_size 14 --image_size 518 --images 8 --repetitions 4

The pass measures norms, channels and attention of every layer and token, and writes its records to disk. Beside it run
bare forward passes of the same model over the same files, in the same batches, and decoding alone: the first two both
decode and preprocess, so their ratio is given with decoding and with its time taken off both. Weights are random, with
a massive activation from a third of the depth on, so that everything that is counted is there to be counted. Images
are noise in JPEG files of 500 x 375 pixels. The three take turns, see `side_by_side`; on one thread of a CPU the time
is that of the thread, and nothing of the pass runs in another. About 20 minutes for 1,000 images and ViT-S/16 on a
core; writes `benchmarks/results/analysis_pass.json`, in which rows of other settings stay.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from side_by_side import add_machine_options, alternating, check_positive, compared, machine, save_rows, spread, table
from torch import Tensor

from vitreg_hf import ViTRegConfig, ViTRegImageProcessor, ViTRegModel
from vitreg_hf.analysis.extract import Subject, subject_of
from vitreg_hf.analysis.images import ImageFiles, find_images
from vitreg_hf.analysis.measure import Pass, decode, measure

SIZES = {"small": (384, 6), "base": (768, 12)}  # width, heads
PASS, BARE, DECODING = "measuring pass", "forward passes", "decoding alone"
KEY = ("size", "num_layers", "patch_size", "image_size", "images", "batch_size", "device", "threads")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one size, print a table, write the numbers."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        row = measured(subject_for(options), write_images(Path(folder), options.images), options)
    print(table(row, per=options.images, unit="ms / image"))
    for name, ratio in row["pass_over_forward"].items():
        print(
            f"  the pass over forward passes, {name}: {ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
        )
    save_rows([row], KEY, options.output, machine(options.device, threads=options.threads))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--num_layers", type=int, default=12, help="blocks")
    parser.add_argument("--patch_size", type=int, default=16, help="pixels per side of a patch")
    parser.add_argument("--image_size", type=int, default=224, help="pixels per side, which the patch size divides")
    parser.add_argument("--images", type=int, default=1000, help="in each turn")
    parser.add_argument("--batch_size", type=int, default=Pass().batch_size, help="images at a time")
    add_machine_options(parser, "analysis_pass.json")
    parser.set_defaults(repetitions=3)
    options = parser.parse_args(argv)
    names = ("num_layers", "patch_size", "image_size", "images", "batch_size", "repetitions", "threads")
    check_positive(parser, options, *names)
    if options.image_size % options.patch_size:
        parser.error(f"expected an --image_size that {options.patch_size} divides, got {options.image_size}")
    return options


# What is measured


def subject_for(options: argparse.Namespace) -> Subject:
    """A network of random weights, one channel of which becomes massive in all tokens."""
    torch.manual_seed(0)
    width, heads = SIZES[options.size]
    config = ViTRegConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=options.num_layers,
        image_size=options.image_size,
        patch_size=options.patch_size,
        num_register_tokens=4,
    )
    model = ViTRegModel(config)
    with torch.no_grad():
        model.layers[options.num_layers // 3].mlp.down_proj.bias[0] = 3000.0
    return subject_of(model, ViTRegImageProcessor(size=options.image_size), "random", options.device)


def write_images(folder: Path, count: int) -> ImageFiles:
    """JPEG files of noise that is smooth enough to be as large as photos are."""
    generator = np.random.default_rng(0)
    for index in range(count):
        noise = PIL.Image.fromarray(generator.integers(0, 256, (47, 63, 3), dtype=np.uint8))
        noise.resize((500, 375)).save(folder / f"{index:05d}.jpg", quality=90)
    return find_images(folder)


def measured(subject: Subject, files: ImageFiles, options: argparse.Namespace) -> dict[str, Any]:
    """A row: times of the pass, of forward passes and of decoding, and the ratios of the first two."""
    how = Pass(batch_size=options.batch_size)

    def run_pass() -> None:
        with tempfile.TemporaryDirectory() as folder:
            measure(subject, files, how, Path(folder))

    @torch.inference_mode()
    def run_bare() -> None:
        for pixels in batches(subject, files, how):
            subject.model(pixels.to(subject.device))

    works = {PASS: run_pass, BARE: run_bare, DECODING: lambda: [*map(len, batches(subject, files, how))]}
    seconds = alternating(works, options.repetitions, options.device, options.threads)
    return {
        **{name: getattr(options, name) for name in (*KEY, "repetitions")},
        **compared(seconds, PASS),
        "pass_over_forward": {
            "decoding on both sides": spread(seconds[PASS], seconds[BARE]),
            "decoding taken off": spread(*(without(seconds[name], seconds[DECODING]) for name in (PASS, BARE))),
        },
    }


def batches(subject: Subject, files: ImageFiles, how: Pass) -> Iterator[Tensor]:
    """Images as the pass decodes and preprocesses them."""
    for start in range(0, len(files), how.batch_size):
        _, pixels = decode(files.files[start : start + how.batch_size], subject.preprocess, how)
        assert pixels is not None  # it was written here
        yield pixels


def without(seconds: Sequence[float], decoding: Sequence[float]) -> list[float]:
    """Seconds less those of decoding in the same turn."""
    return [whole - part for whole, part in zip(seconds, decoding, strict=True)]


if __name__ == "__main__":
    main()
