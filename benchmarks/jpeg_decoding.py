# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What `--fast_jpeg_decoding` saves of decoding training images, and how far pixels are from those of whole photos.

    python benchmarks/jpeg_decoding.py
    python benchmarks/jpeg_decoding.py --sizes 375x500 3000x4000 --quality 75

Photos of scikit-image, resized to each size (height x width) and saved as JPEG, are decoded whole and to what random
crops of at least 8 % or 35 % of a photo, or resizing to a shortest edge of 256, need for 224 x 224 pixels. Where a
photo has not twice what is needed both are the same, and so are their times: the usual 375 x 500 of ImageNet is such a
photo. Differences are in grey levels of 255, of what the model would see: `resized` of photos resized to 224 x 224,
`cropped` of crops that are drawn with the same seed, whose edges lie on whole pixels of the smaller image.

What that does to accuracy was measured on a small scale only, see `examples/README.md`; ImageNet was not trained on.
Photos of more than 4 megapixels gain most, because Pillow keeps them in several blocks, which have to be put together.
Four minutes; writes `benchmarks/results/jpeg_decoding.json`, in which rows of other settings stay.
"""

import argparse
import io
from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch
from side_by_side import add_machine_options, alternating, check_positive, compared, machine, save_rows, table
from skimage import data
from torch import Tensor

from vitreg_hf import ViTRegImageProcessor
from vitreg_hf.training.augmentation import TrainingTransform
from vitreg_hf.training.labelled_images import decode
from vitreg_hf.training.seeding import seeded

OURS, WHOLE = "fast", "whole"
PHOTOS = ("astronaut", "coffee", "chelsea", "rocket", "retina", "hubble_deep_field", "immunohistochemistry")
SIZES = ("375x500", "768x1024", "1200x1600", "3000x4000")
CROPS: dict[str, tuple[float, float] | None] = {
    "crops from 8 %": (0.08, 1.0),
    "crops from 35 %": (0.35, 1.0),
    "no random crops": None,
}
CROPS_DRAWN = 4  # of each photo, for their differences
KEY = ("size", "needs", "quality", "photos", "threads")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every size by every need, print a table, write the numbers."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    rows = []
    for size in options.sizes:
        files = [encoded(name, size, options.quality) for name in PHOTOS[: options.photos]]
        for needs in CROPS:
            rows.append(measure(files, size, needs, options))
            print(told(rows[-1]), flush=True)
    save_rows(rows, KEY, options.output, machine(threads=options.threads))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_machine_options(parser, "jpeg_decoding.json")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="height x width of photos, in pixels")
    parser.add_argument("--photos", type=int, default=len(PHOTOS), help=f"of the {len(PHOTOS)}")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs")
    options = parser.parse_args(argv)
    check_positive(parser, options, "photos", "quality", "repetitions", "threads")
    if options.device != "cpu":
        parser.error(f"expected cpu in --device, where JPEGs are decoded, got {options.device}")
    for size in options.sizes:
        if [edge for edge in size.split("x") if edge.isdigit() and int(edge)] != size.split("x") or size.count(
            "x"
        ) != 1:
            parser.error(f"expected sizes like 375x500 in --sizes, got {size}")
    return options


def encoded(name: str, size: str, quality: int) -> dict[str, Any]:
    """A photo of a size as `decode` takes it."""
    height, width = map(int, size.split("x"))
    photo = PIL.Image.fromarray(getattr(data, name)()).resize((width, height), PIL.Image.Resampling.BICUBIC)
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=quality)
    return {"bytes": file.getvalue(), "path": None}


# Measuring


def measure(files: list[dict[str, Any]], size: str, needs: str, options: argparse.Namespace) -> dict[str, Any]:
    """Times and differences of photos of one size by one need."""
    transform = TrainingTransform(ViTRegImageProcessor(), crop_scale=CROPS[needs])
    edges = {OURS: transform.least_edge, WHOLE: None}
    decoded = {name: [decode(file, least_edge=edge) for file in files] for name, edge in edges.items()}

    def decode_all(edge: int | None) -> None:
        for file in files:
            decode(file, least_edge=edge)

    works = {name: lambda edge=edge: decode_all(edge) for name, edge in edges.items()}
    seconds = alternating(works, options.repetitions, threads=options.threads, label=f"{size}, {needs}")
    return {
        "size": size,
        "needs": needs,
        "least_edge": transform.least_edge,
        "decoded": "x".join(str(edge) for edge in decoded[OURS][0].shape[1:]),
        "quality": options.quality,
        "photos": len(files),
        "threads": options.threads,
        "repetitions": options.repetitions,
        "mean_difference": {
            "resized": mean_difference(*(resized(images) for images in decoded.values())),
            "cropped": None if transform.crop is None else crop_difference(transform, *decoded.values()),
        },
        **compared(seconds, OURS),
    }


def resized(images: list[Tensor]) -> list[Tensor]:
    """Whole photos as a model of 224 x 224 pixels sees them, in grey levels."""
    processor = ViTRegImageProcessor(size={"height": 224, "width": 224}, do_rescale=False, do_normalize=False)
    return [processor([image.as_subclass(Tensor)])["pixel_values"][0] for image in images]


def crop_difference(transform: TrainingTransform, ours: list[Tensor], whole: list[Tensor]) -> float:
    """Of random crops, drawn with the same seeds."""

    def crops(images: list[Tensor]) -> list[Tensor]:
        found = []
        for seed in range(CROPS_DRAWN):
            for image in images:
                with seeded(seed):
                    found.append(transform.augment(image))
        return found

    return mean_difference(crops(ours), crops(whole))


def mean_difference(images: list[Tensor], others: list[Tensor]) -> float:
    """Mean absolute difference in grey levels."""
    return float((torch.stack(images).float() - torch.stack(others).float()).abs().mean())


def told(row: dict[str, Any]) -> str:
    """A row as lines to print."""
    levels = ", ".join(f"{name} {value:.2f}" for name, value in row["mean_difference"].items() if value is not None)
    head = f"{row['size']} to {row['decoded']} ({row['needs']}), mean difference in grey levels: {levels}"
    return f"{head}\n{table(row, per=row['photos'], unit='ms / photo')}"


if __name__ == "__main__":
    main()
