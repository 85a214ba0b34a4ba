# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""How long one pooled feature takes, against the implementations that people use, with the same weights.

    python benchmarks/pooled_features.py
    python benchmarks/pooled_features.py --size base --compile
    python benchmarks/pooled_features.py --family dinov3
    python benchmarks/pooled_features.py --device cuda --dtype bfloat16 --compile

DINOv2 (patch 14, a position table) or DINOv3 (patch 16, rotary positions), both with four registers, from random
weights that are made in timm and converted, here and then to Transformers; features are compared before anything is
timed. `all tokens` is this package without `output_tokens=False`; `prepacked`, on CPUs, is it after
`prepack_projections()`, not compiled where the others are. ONNX Runtime runs what `torch.onnx.export` makes of our
model and of Transformers' (`--onnx`). The ratio of these two, and those to the prepacked model, are reported beside.
Operations are counted, and the peak is of PyTorch's own memory beyond weights and images. On one thread of a CPU the
time is that of the thread. About 15 minutes for ViT-S on a core; writes `benchmarks/results/pooled_features.json`,
in which rows of other settings stay.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from side_by_side import (
    add_machine_options,
    alternating,
    check_positive,
    compared,
    gflops_of,
    machine,
    peak_megabytes,
    save_rows,
    spread,
    table,
)
from timm.models import save_for_hf
from torch import Tensor, nn
from transformers import AutoModel

from vitreg_hf import convert_checkpoint, export_checkpoint

# Architecture of timm, patch size, layout of Transformers.
FAMILIES = {
    "dinov2": ("vit_{}_patch14_reg4_dinov2", 14, "dinov2_with_registers"),
    "dinov3": ("vit_{}_patch16_dinov3", 16, "dinov3_vit"),
}
OURS, PREPACKED = "vitreg_hf", "prepacked"
KEY = ("family", "size", "layers", "image_size", "batch_size", "device", "dtype", "compile", "threads")
Feature = Callable[[Tensor], Tensor]  # (B, C, H, W) to (B, D)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every batch size, print a table, write the numbers."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    where = machine(options.device, options.dtype, options.threads)
    with tempfile.TemporaryDirectory() as folder:
        features = features_of(options, Path(folder))
        for batch_size in options.batch_sizes:
            pixels = torch.randn(batch_size, 3, options.image_size, options.image_size)
            row = measure(features, pixels.to(options.device, getattr(torch, options.dtype)), options)
            print(f"{options.family} {options.size}, batch {batch_size}, ms per image, GFLOPs per image, peak in MB")
            columns = {"gflops_per_image": "GFLOPs", "peak_megabytes": "MB"}
            print(table(row, per=batch_size, columns=columns), flush=True)
            save_rows([row], KEY, options.output, where)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="dinov2")
    parser.add_argument("--size", choices=("small", "base", "large", "giant"), default="small")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32], help="images per pass")
    parser.add_argument("--image_size", type=int, default=224, help="pixels per side, which the patch size divides")
    parser.add_argument("--compile", action="store_true", help="all of them by torch.compile")
    parser.add_argument("--onnx", action="store_true", help="with ONNX Runtime, in float32 on a CPU")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--num_layers", type=int, help="blocks, in place of those of the size; for a quick look")
    add_machine_options(parser, "pooled_features.json")
    options = parser.parse_args(argv)
    check_positive(parser, options, "repetitions", "threads", "num_layers", "batch_sizes")
    _, patch_size, _ = FAMILIES[options.family]
    if options.image_size < patch_size or options.image_size % patch_size:
        expected = f"a multiple of the patch size {patch_size} in --image_size"
        parser.error(f"expected {expected}, got {options.image_size}")
    if options.onnx and (options.device, options.dtype, options.compile) != ("cpu", "float32", False):
        parser.error("expected --onnx with float32 on a CPU and without --compile")
    return options


# Models


def features_of(options: argparse.Namespace, folder: Path) -> dict[str, Feature]:
    """The pooled feature by every implementation, from the same weights."""
    models = models_of(options, folder)
    ready = {name: prepared(model, options) for name, model in models.items()}
    features: dict[str, Feature] = {
        OURS: lambda pixels: ready[OURS](pixels, output_tokens=False).pooler_output,
        "all tokens": lambda pixels: ready[OURS](pixels).pooler_output,
        "transformers": lambda pixels: ready["transformers"](pixels).pooler_output,
        "timm": ready["timm"],
    }
    if options.device == "cpu" and options.dtype != "float16":
        packed: Any = copy.deepcopy(models[OURS])  # never compiled: a compiled model does not use packed weights
        packed.prepack_projections()
        features[PREPACKED] = lambda pixels: packed(pixels, output_tokens=False).pooler_output
    if options.onnx:
        read_less = {OURS: {"output_tokens": False}, "transformers": {}}
        for name, arguments in read_less.items():
            features[f"onnx {name}"] = by_onnx_runtime(models[name], arguments, folder / f"{name}.onnx", options)
    return features


def models_of(options: argparse.Namespace, folder: Path) -> dict[str, nn.Module]:
    """Three implementations of one network: made in timm, converted here, and from here to Transformers."""
    architecture, _, layout = FAMILIES[options.family]
    torch.manual_seed(0)
    fields: dict[str, Any] = {"img_size": options.image_size, "num_classes": 0}
    if options.family == "dinov3":  # of which timm averages patches, and Transformers reads CLS
        fields["global_pool"] = "token"
    if options.num_layers:
        fields["depth"] = options.num_layers
    source = timm.create_model(architecture.format(options.size), **fields).eval()
    with torch.no_grad():
        for name, parameter in source.named_parameters():  # timm's own LayerScale of 1e-5 would hide every block
            mean = 1.0 if "norm" in name and "weight" in name else 0.3 * ("gamma" in name)
            parameter.normal_(0, 0.02).add_(mean)
    save_for_hf(source, str(folder / "timm"), model_args=fields)
    ours = convert_checkpoint(folder / "timm", folder / "vitreg").model
    export_checkpoint(folder / "vitreg", folder / "theirs", layout=layout)
    return {OURS: ours, "transformers": AutoModel.from_pretrained(folder / "theirs"), "timm": source}


def prepared(model: nn.Module, options: argparse.Namespace) -> Callable[..., Any]:
    """A model as it is timed."""
    model = model.eval().to(options.device, getattr(torch, options.dtype))
    return torch.compile(model) if options.compile else model


def by_onnx_runtime(model: nn.Module, arguments: dict[str, Any], path: Path, options: argparse.Namespace) -> Feature:
    """The pooled feature of an export for any batch size, run on as many threads as the others."""
    import onnxruntime

    example = torch.randn(2, 3, options.image_size, options.image_size)
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}, **dict.fromkeys(arguments)}
    torch.onnx.export(
        model.eval(), (), path, kwargs={"pixel_values": example, **arguments}, dynamic_shapes=shapes, dynamo=True
    )
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    pooled = [output.name for output in session.get_outputs() if "pooler" in output.name]
    name = pooled[0] if pooled else session.get_outputs()[-1].name
    return lambda pixels: torch.from_numpy(session.run([name], {"pixel_values": pixels.numpy()})[0])


# Measuring


@torch.inference_mode()
def measure(features: dict[str, Feature], pixels: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Differences, operations, memory and times at one batch size."""
    outputs = {name: feature(pixels).float() for name, feature in features.items()}
    differences = {name: float((outputs[OURS] - output).abs().max()) for name, output in outputs.items()}
    allowed = 1e-4 if options.dtype == "float32" else 0.1  # features have a variance of 1
    if not max(differences.values()) < allowed:  # nor if one is not a number
        raise SystemExit(f"expected features within {allowed} of one another, got differences {differences}")
    works = {name: (lambda feature=feature: feature(pixels)) for name, feature in features.items()}
    counted = {} if options.compile else {n: w for n, w in works.items() if not n.startswith("onnx")}
    seconds = alternating(works, options.repetitions, options.device, options.threads)
    row = {name: getattr(options, name) for name in KEY if hasattr(options, name)}
    row |= {"layers": options.num_layers, "batch_size": len(pixels), "repetitions": options.repetitions}
    row |= {
        "largest_difference": differences,
        "gflops_per_image": {name: gflops_of(work) / len(pixels) for name, work in counted.items()},
        "peak_megabytes": {name: peak_megabytes(work, options.device) for name, work in counted.items()},
        **compared(seconds, OURS),
    }
    if PREPACKED in seconds:
        row["prepacked_speedup_over"] = compared(seconds, PREPACKED)["speedup_over"]
    if options.onnx:
        row["onnx_speedup_over_transformers"] = spread(seconds["onnx transformers"], seconds[f"onnx {OURS}"])
    return row


if __name__ == "__main__":
    main()
