# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""How long a batch of images of many sizes takes: packed, padded, and one image after the other.

    python benchmarks/mixed_resolutions.py
    python benchmarks/mixed_resolutions.py --most_patches 784 --batch_size 8 --repetitions 3
    python benchmarks/mixed_resolutions.py --device cuda --dtype bfloat16 --attention flash_attention_2

ViT-S/16 with four registers. The areas of a batch are spread evenly from a quarter of `--most_patches` to all of it,
the aspect ratios at random from 1:2 to 2:1. `packed` is `ViTRegModel.forward_packed`; `padded` is `ViTRegModel` on
images that the processor's padding brought to one size, with their `pixel_mask`; `one by one` is a pass per image, in
training with its backward pass behind it, so that gradients accumulate; `transformers` is `Dinov2WithRegistersModel`
with the same weights, one by one, because it takes no mask and so cannot be padded. `prepacked`, in inference on a
CPU, is `packed` after `prepack_projections()` and with `output_tokens=False`, as the feature is all that is read;
ratios to it are reported beside. Features are compared before anything is timed, gradients too. On one thread of a CPU
the time is that of the thread, without waiting for the processor.

About ten minutes on a core; writes `benchmarks/results/mixed_resolutions.json`, in which rows of other settings stay.
"""

import argparse
import copy
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from side_by_side import (
    Work,
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
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModel

from vitreg_hf import ViTRegConfig, ViTRegImageProcessor, ViTRegModel, export_checkpoint

PATCH = 16
OURS, PREPACKED = "packed", "prepacked"
Feature = Callable[[], Iterator[Tensor]]  # parts of a batch, `(images, D)`, each with a backward pass of its own
KEY = ("pass", "most_patches", "batch_size", "hidden_size", "layers", "device", "dtype", "attention", "threads")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every range of sizes, in inference and training, print tables, write the numbers."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    where = machine(options.device, options.dtype, options.threads)
    ours, theirs = models_of(options)
    for most_patches in options.most_patches:
        images = images_of(most_patches, options)
        features = features_of(ours, theirs, images)
        for kind in ("inference", "training"):
            more = {PREPACKED: prepacked(ours, images)} if (kind, options.device) == ("inference", "cpu") else {}
            row = {**measure(kind, features | more, (ours, theirs), options), **describe(images, most_patches)}
            print(told(row), flush=True)
            save_rows([row], KEY, options.output, where)  # each at once: the whole takes long


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most_patches", type=int, nargs="+", default=[16, 64, 196], help="of the largest image")
    parser.add_argument("--batch_size", type=int, default=16, help="images")
    parser.add_argument("--hidden_size", type=int, default=384, help="width, 64 channels per head")
    parser.add_argument("--num_layers", type=int, default=12, help="blocks")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation of this package's model")
    add_machine_options(parser, "mixed_resolutions.json")
    options = parser.parse_args(argv)
    check_positive(
        parser, options, "most_patches", "batch_size", "hidden_size", "num_layers", "threads", "repetitions"
    )
    if min(options.most_patches) < 4:
        parser.error(f"expected at least 4 patches in --most_patches, got {options.most_patches}")
    return options


# Images and models


def images_of(most_patches: int, options: argparse.Namespace) -> list[Tensor]:
    """Noise of many sizes, the same in every run."""
    generator, count = random.Random(0), options.batch_size
    areas = [most_patches * (1 + 3 * i / max(count - 1, 1)) / 4 for i in range(count)]
    grids = [(max(round(math.sqrt(area * 2 ** generator.uniform(-1, 1))), 1), area) for area in areas]
    sizes = [(rows * PATCH, max(round(area / rows), 1) * PATCH) for rows, area in grids]
    generator.shuffle(sizes)
    torch.manual_seed(0)
    return [torch.randn(3, *size).to(options.device, getattr(torch, options.dtype)) for size in sizes]


def models_of(options: argparse.Namespace) -> tuple[Any, Any]:
    """This package's model and that of Transformers, from the same random weights."""
    torch.manual_seed(0)
    config = ViTRegConfig(
        hidden_size=options.hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=max(options.hidden_size // 64, 1),
        layerscale_value=1.0,
    )
    with tempfile.TemporaryDirectory() as folder:
        ViTRegModel(config).save_pretrained(f"{folder}/ours")
        export_checkpoint(f"{folder}/ours", f"{folder}/theirs", layout="dinov2_with_registers")
        ours = ViTRegModel.from_pretrained(f"{folder}/ours", attn_implementation=options.attention)
        theirs = AutoModel.from_pretrained(f"{folder}/theirs")
    dtype = getattr(torch, options.dtype)
    return ours.eval().to(options.device, dtype), theirs.eval().to(options.device, dtype)


def features_of(ours: Any, theirs: Any, images: Sequence[Tensor]) -> dict[str, Feature]:
    """The features of a batch, `(B, D)`, in every way; padding is done beforehand, as a processor does it."""
    as_is = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}
    processor = ViTRegImageProcessor(do_convert_rgb=False, do_pad=True, size_divisor=PATCH, **as_is)
    padded = processor([image.float() for image in images], return_tensors="pt").to(images[0].dtype)
    alone = [image[None] for image in images]

    def packed() -> Iterator[Tensor]:
        yield torch.cat([output.pooler_output for output in ours.forward_packed(images)])

    return {
        OURS: packed,
        "padded": lambda: iter([ours(**padded).pooler_output]),
        "one by one": lambda: (ours(image).pooler_output for image in alone),
        "transformers": lambda: (theirs(image).pooler_output for image in alone),
    }


def prepacked(ours: Any, images: Sequence[Tensor]) -> Feature:
    """The features by a copy that is made for them alone."""
    model = copy.deepcopy(ours)
    model.prepack_projections()
    return lambda: iter(
        [torch.cat([output.pooler_output for output in model.forward_packed(images, output_tokens=False)])]
    )


# Measuring


def measure(
    kind: str, features: dict[str, Feature], models: Sequence[nn.Module], options: argparse.Namespace
) -> dict[str, Any]:
    """Differences, operations, memory, shares of the time, and times, of one kind of pass."""
    works = {name: work_of(kind, feature, models) for name, feature in features.items()}
    differences = check_equal(kind, features, works, models, options.dtype)
    row = {
        "pass": kind,
        "batch_size": options.batch_size,
        "hidden_size": options.hidden_size,
        "layers": options.num_layers,
        **{name: getattr(options, name) for name in ("device", "dtype", "attention", "threads", "repetitions")},
        "largest_difference": differences,
        "gflops": {name: gflops_of(work) for name, work in works.items()},
        "peak_megabytes": {name: memory_of(work, models, options.device) for name, work in works.items()},
        "share_of_time": {name: shares_of(work) for name, work in works.items()} if options.device == "cpu" else {},
    }
    seconds = alternating(works, options.repetitions, options.device, options.threads, kind)
    if PREPACKED in seconds:
        row["prepacked_speedup_over"] = compared(seconds, PREPACKED)["speedup_over"]
    return {**row, **compared(seconds, OURS)}


def work_of(kind: str, feature: Feature, models: Sequence[nn.Module]) -> Work:
    """A pass over a batch; in training forward and backward of one loss, the sum over images."""

    def infer() -> Tensor:
        with torch.inference_mode():
            return torch.cat(list(feature()))

    def train() -> None:
        for model in models:
            model.zero_grad()
        for part in feature():
            loss_of(part).backward()

    return infer if kind == "inference" else train


def loss_of(features: Tensor) -> Tensor:
    """Not their squares, of which a norm has the same sum for all images."""
    return (features.float() ** 3).mean(1).sum()


def memory_of(work: Work, models: Sequence[nn.Module], device: str) -> float:
    """Peak in 1e6 bytes; gradients that were there before would be freed meanwhile."""
    for model in models:
        model.zero_grad()
    return peak_megabytes(work, device)


def check_equal(
    kind: str, features: dict[str, Feature], works: dict[str, Work], models: Sequence[nn.Module], dtype: str
) -> dict[str, float]:
    """Largest differences to ours: of features, whose variance is 1; in training of gradients, relative to the
    largest one, of the same model alone, as the other has other names. Ends where they are too large."""
    found: dict[str, list[Any]] = {}
    for name in features:
        output = works[name]()
        if kind == "inference":
            found[name] = [output.float()]
        elif name != "transformers":
            found[name] = [cast(Tensor, parameter.grad).float() for parameter in models[0].parameters()]
    scale = 1.0 if kind == "inference" else max(float(value.abs().max()) for value in found[OURS])
    differences = {
        name: max(float((one - own).abs().max()) for one, own in zip(values, found[OURS], strict=True)) / scale
        for name, values in found.items()
    }
    allowed = 1e-5 if dtype == "float32" else 0.05
    if not max(differences.values()) < allowed:  # nor if one is not a number
        raise SystemExit(f"expected {kind} within {allowed} of one another, got differences {differences}")
    return differences


def shares_of(work: Work) -> dict[str, float]:
    """Shares of the time that a CPU spends in matrix products, in attention, and in all else."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    seconds = {"matrix products": 0.0, "attention": 0.0, "all else": 0.0}
    for event in profiled.key_averages():
        products = any(name in event.key for name in ("aten::addmm", "aten::mm", "mkldnn::_linear", "convolution"))
        kind = "attention" if "attention" in event.key or "bmm" in event.key else "all else"
        seconds["matrix products" if products else kind] += event.self_cpu_time_total
    return {name: taken / sum(seconds.values()) for name, taken in seconds.items()}


# Results


def describe(images: Sequence[Tensor], most_patches: int) -> dict[str, Any]:
    """What a batch is made of."""
    patches = [image.shape[1] * image.shape[2] // PATCH**2 for image in images]
    padded = max(i.shape[1] for i in images) * max(i.shape[2] for i in images) // PATCH**2
    return {
        "most_patches": most_patches,
        "patches": sorted(patches),
        "sizes": len({tuple(image.shape) for image in images}),
        "patches_padded_to": padded,
    }


def told(row: dict[str, Any]) -> str:
    """A row as lines to print."""
    patches, share = row["patches"], row["share_of_time"].get(OURS, {})
    head = (
        f"{row['pass']}, {len(patches)} images of {patches[0]} to {patches[-1]} patches in {row['sizes']} sizes, "
        f"padded to {row['patches_padded_to']}"
    )
    lines = [head, table(row, len(patches), "ms / image", {"gflops": "GFLOPs", "peak_megabytes": "MB"})]
    if share:
        lines.append("  packed spends " + ", ".join(f"{part:.0%} in {name}" for name, part in share.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
