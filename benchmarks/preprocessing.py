# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""How long photos take to become the tensors a model reads, against Transformers' processors of torchvision.

    python benchmarks/preprocessing.py
    python benchmarks/preprocessing.py --photos 64 --repetitions 31
    python benchmarks/preprocessing.py --device cuda --threads 8

Photos of mixed sizes, 333 to 1600 pixels a side, as PIL images, as numpy arrays `(H, W, 3)` and as uint8 tensors
`(3, H, W)`, by two settings with bicubic resizing: `crop` (shortest edge to 256, the middle 224 x 224) and `fixed`
(to 224 x 224). The photos are those of scikit-image, which has too few and too small ones: each is resized to some of
the sizes that cameras and data sets have. The processors are given the same options. `vit` and `dinov2`
(`BitImageProcessor`) take the same steps in the same order, and outputs are compared with theirs; `dinov3` rescales
before it resizes, so that its outputs differ by up to a few grey levels, which is written down too.

Of uint8 tensors least is gained, less than twice: nobody copies them, so that resizing is most of the work. Of our
time on 16 photos, fixed, the kernel takes about half, putting the channels of a pixel side by side for it (which
Pillow does faster than the kernel itself) a fifth, the batch of floats an eighth and Python the rest; of theirs the
kernel takes three quarters.

On one thread of a CPU the time is that of the thread. Reading files is no part of it; `jpeg_decoding.py` is about
that. Two minutes; writes `benchmarks/results/preprocessing.json`, in which rows of other settings stay.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from side_by_side import add_machine_options, alternating, check_positive, compared, machine, save_rows, table
from skimage import data
from torch import Tensor
from transformers import BitImageProcessor, DINOv3ViTImageProcessor, ViTImageProcessor

from vitreg_hf import ViTRegImageProcessor

OURS = "vitreg_hf"
PEERS = {"vit": ViTImageProcessor, "dinov2": BitImageProcessor, "dinov3": DINOv3ViTImageProcessor}
SAME_STEPS = ("vit", "dinov2")
SETTINGS: dict[str, dict[str, Any]] = {
    "crop": {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}},
    "fixed": {"size": {"height": 224, "width": 224}, "do_center_crop": False},
}
SHARED: dict[str, Any] = {
    "do_resize": True,
    "resample": PIL.Image.Resampling.BICUBIC,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
PHOTOS = ("astronaut", "coffee", "chelsea", "rocket", "retina", "hubble_deep_field", "immunohistochemistry")
# Height and width: ImageNet's usual ones, small ones, and those of screens and cameras.
SIZES = (
    *((375, 500), (500, 375), (333, 500), (500, 500), (480, 640), (640, 427), (300, 400), (500, 333)),
    *((768, 1024), (1024, 683), (600, 800), (800, 800), (1200, 1600), (1600, 1067), (900, 1200), (720, 1280)),
)
KEY = ("input", "setting", "photos", "device", "threads")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every kind of input by every setting, print a table, write the numbers."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    taken = photos(options.photos)
    rows = []
    for setting in SETTINGS:
        for kind, as_kind in INPUTS.items():
            rows.append(measure(kind, setting, [as_kind(photo) for photo in taken], options))
            print(f"{kind}, {setting}\n{table(rows[-1], per=options.photos, unit='ms / photo')}", flush=True)
    save_rows(rows, KEY, options.output, machine(options.device, threads=options.threads))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_machine_options(parser, "preprocessing.json")
    parser.add_argument("--photos", type=int, default=len(SIZES), help="per call")
    options = parser.parse_args(argv)
    check_positive(parser, options, "photos", "repetitions", "threads")
    return options


# Photos


def photos(count: int) -> list[PIL.Image.Image]:
    """`count` photos, of as many sizes as there are."""
    sources = [PIL.Image.fromarray(getattr(data, name)()) for name in PHOTOS]
    sizes = [SIZES[place % len(SIZES)] for place in range(count)]
    return [
        sources[place % len(sources)].resize((width, height), PIL.Image.Resampling.BICUBIC)
        for place, (height, width) in enumerate(sizes)
    ]


INPUTS: dict[str, Callable[[PIL.Image.Image], Any]] = {
    "PIL images": lambda photo: photo,
    "numpy arrays": np.array,
    "uint8 tensors": lambda photo: torch.from_numpy(np.array(photo)).permute(2, 0, 1).contiguous(),
}


# Measuring


def measure(kind: str, setting: str, images: list[Any], options: argparse.Namespace) -> dict[str, Any]:
    """Differences and times of one kind of input by one setting."""
    chosen = {**SHARED, **SETTINGS[setting]}
    processors = {OURS: ViTRegImageProcessor(**chosen), **{name: peer(**chosen) for name, peer in PEERS.items()}}

    def tensors_by(name: str) -> Tensor:
        pixels: Tensor = processors[name](images, device=options.device, return_tensors="pt")["pixel_values"]
        return pixels

    differences = {name: float((tensors_by(OURS) - tensors_by(name)).abs().max()) for name in PEERS}
    if not max(differences[name] for name in SAME_STEPS) < 1e-5:  # nor if one is not a number
        raise SystemExit(f"expected the same tensors, got differences of {differences}")
    works = {name: lambda name=name: tensors_by(name) for name in processors}
    seconds = alternating(works, options.repetitions, options.device, options.threads, f"{kind}, {setting}")
    return {
        "input": kind,
        "setting": setting,
        "photos": len(images),
        "megapixels": sum(photo_pixels(image) for image in images) / 1e6,
        "device": options.device,
        "threads": options.threads,
        "repetitions": options.repetitions,
        "largest_difference": differences,
        **compared(seconds, OURS),
    }


def photo_pixels(image: Any) -> int:
    """Height times width."""
    return image.width * image.height if isinstance(image, PIL.Image.Image) else int(np.prod(image.shape)) // 3


if __name__ == "__main__":
    main()
