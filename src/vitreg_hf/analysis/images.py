# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Image files of a folder, and batches of them as a model wants them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

_TRAIN_SHARE = 0.7
_TRAIN, _TEST = ("train",), ("test", "val", "validation")
_ENDINGS = frozenset(PIL.Image.registered_extensions()) - {".pdf", ".mpg", ".mpeg"}


@dataclass(frozen=True)
class ImageFiles:
    """Image files with a class each, if they stand in one folder per class.

    Attributes:
        root: folder that they were found in.
        files: paths below it, sorted.
        labels: class index per file; None when the files stand in fewer than two folders.
        class_names: names of the folders.
    """

    root: Path
    files: tuple[Path, ...]
    labels: tuple[int, ...] | None
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def names(self) -> list[str]:
        """Paths below the root, with `/`."""
        return [file.relative_to(self.root).as_posix() for file in self.files]

    def fingerprint(self) -> str:
        """A short code that changes with names, sizes and times of the files."""
        digest = hashlib.sha256()
        for name, file in zip(self.names(), self.files, strict=True):
            about = file.stat()
            digest.update(f"{name} {about.st_size} {about.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]

    def first(self, count: int | None) -> "ImageFiles":
        """`count` files spread evenly over all; all of them when there are no more, or for None."""
        if count is None or count >= len(self):
            return self
        return self.only(np.linspace(0, len(self) - 1, count).round().astype(int).tolist())

    def only(self, kept: Sequence[int]) -> "ImageFiles":
        """The files of these indices."""
        labels = None if self.labels is None else tuple(self.labels[i] for i in kept)
        return ImageFiles(self.root, tuple(self.files[i] for i in kept), labels, self.class_names)


def find_images(folder: str | Path, leave_out: Path | None = None) -> ImageFiles:
    """Image files in a folder and below it, or one image file.

    Args:
        folder: where to look.
        leave_out: a folder below it that holds no images to measure, such as that of a report.

    Raises:
        ValueError: if there is no such folder or file, or no image in it.
    """
    root = Path(folder)
    if root.is_file():
        return ImageFiles(root.parent, (root,), None, ())
    if not root.is_dir():
        raise ValueError(f"Expected a folder of images or an image file, got {str(folder)!r}, which does not exist")
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in _ENDINGS and path.is_file())
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    if leave_out is not None:
        files = [path for path in files if leave_out.resolve() not in path.resolve().parents]
    if not files:
        raise ValueError(f"Expected images in {str(folder)!r}, got none with an ending that Pillow reads")
    folders = [path.relative_to(root).parts[0] if path.parent != root else "" for path in files]
    class_names = tuple(sorted(set(folders)))
    if len(class_names) < 2 or "" in class_names:
        return ImageFiles(root, tuple(files), None, ())
    return ImageFiles(root, tuple(files), tuple(class_names.index(name) for name in folders), class_names)


def open_upright(file: Path) -> PIL.Image.Image:
    """Decode an image and turn it as its EXIF data says.

    Raises:
        ValueError: naming the file, if it cannot be decoded.
    """
    try:
        with PIL.Image.open(file) as image:
            return PIL.ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"Expected a readable image, got {str(file)!r}: {error}") from error


def image_batches(
    files: Sequence[Path], processor: Any, batch_size: int, image_size: int | None = None
) -> Iterator[Tensor]:
    """Batches `(B, 3, H, W)` of float32 as the image processor makes them, in the order of the files.

    Args:
        files: images.
        processor: an image processor of Transformers.
        batch_size: B, but for the last batch.
        image_size: side of the square that images are brought to in place of the processor's own size.

    Raises:
        ValueError: naming the file that cannot be decoded, or if images come out in several sizes or padded.
    """
    for start in range(0, len(files), batch_size):
        yield preprocess([open_upright(file) for file in files[start : start + batch_size]], processor, image_size)


def preprocess(images: Sequence[PIL.Image.Image], processor: Any, image_size: int | None = None) -> Tensor:
    """One batch `(B, 3, H, W)`; see `image_batches`."""
    each = [processor(image, return_tensors="pt", **_sizes(processor, image_size)) for image in images]
    pixels = [one["pixel_values"][0] for one in each]
    sizes = sorted({tuple(one.shape[-2:]) for one in pixels})
    if len(sizes) > 1:
        listed = ", ".join(f"{height} x {width}" for height, width in sizes[:3])
        raise ValueError(
            f"Expected an image processor that brings all images to one size, got {listed}: give an image size"
        )
    if any("pixel_mask" in one and not bool(one["pixel_mask"].all()) for one in each):
        raise ValueError("Expected images without padding, got a pixel mask with some: give an image size")
    return torch.stack(pixels).float()


def _sizes(processor: Any, image_size: int | None) -> dict[str, Any]:
    if image_size is None:
        return {}
    square = {"height": image_size, "width": image_size}
    if not hasattr(processor, "size"):
        raise ValueError(f"Expected an image processor whose size can be set, got {type(processor).__name__}")
    if getattr(processor, "do_center_crop", False):
        return {"size": {"shortest_edge": image_size}, "crop_size": square}
    return {"size": square}


def normalisation(processor: Any) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation per colour, of pixels from 0 to 1, that an image processor normalises with.

    Raises:
        ValueError: if it does not normalise.
    """
    of_timm = getattr(processor, "data_config", {})  # what Transformers keeps of a model of timm
    mean = getattr(processor, "image_mean", of_timm.get("mean"))
    std = getattr(processor, "image_std", of_timm.get("std"))
    if mean is None or std is None or not getattr(processor, "do_normalize", True):
        raise ValueError(f"Expected an image processor that normalises, got {type(processor).__name__} without that")
    return mean, std


def as_seen(pixel_values: Tensor, processor: Any) -> NDArray[np.uint8]:
    """What the model saw, as RGB `(B, H, W, 3)`: normalisation undone, or each image stretched if there was none."""
    pixels = pixel_values.detach().float().cpu()
    try:
        mean, std = normalisation(processor)
    except ValueError:
        low, high = pixels.amin(dim=(1, 2, 3), keepdim=True), pixels.amax(dim=(1, 2, 3), keepdim=True)
        pixels = (pixels - low) / (high - low).clamp(min=1e-6)
    else:
        pixels = pixels * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


# Classes


def labelled_split(images: ImageFiles, seed: int = 0) -> tuple[ImageFiles, Tensor, Tensor]:
    """Images with their classes `(n,)`, and which are for training, boolean `(n,)`.

    A folder with `train` and `test` (or `val`, `validation`) is split as it says, else 70 % of each class are for
    training.

    Raises:
        ValueError: if the images are not in one folder per class.
    """
    folders = set(images.class_names)
    if folders and folders <= {*_TRAIN, *_TEST} and _TRAIN[0] in folders:
        return _given_split(images)
    if images.labels is None:
        raise ValueError(f"Expected one folder per class in {str(images.root)!r} (or train and test), got none")
    labels = torch.tensor(images.labels)
    rank = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed))
    for_training = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        members = members[rank[members].argsort()]
        for_training[members[: max(1, round(_TRAIN_SHARE * len(members)))]] = True
    return images, labels, for_training


def _given_split(images: ImageFiles) -> tuple[ImageFiles, Tensor, Tensor]:
    test_folder = next(name for name in _TEST if name in images.class_names)
    train, test = find_images(images.root / _TRAIN[0]), find_images(images.root / test_folder)
    if train.labels is None or test.labels is None or not set(test.class_names) <= set(train.class_names):
        raise ValueError(f"Expected the same folders of classes in train and {test_folder} of {str(images.root)!r}")
    names = [*train.class_names]
    labels = [*train.labels, *(names.index(test.class_names[label]) for label in test.labels)]
    files = ImageFiles(images.root, (*train.files, *test.files), tuple(labels), train.class_names)
    return files, torch.tensor(labels), torch.arange(len(labels)) < len(train)


def export_dataset(
    name: str,
    folder: Path,
    split: str,
    image_column: str = "image",
    label_column: str = "label",
    config_name: str | None = None,
    at_most: int | None = None,
) -> int:
    """Write images of a dataset (of the Hub, or local) to one folder per class, where every instrument finds them.

    Returns:
        How many images were written.

    Raises:
        ValueError: if the folder is not empty, or a column is missing.
    """
    import datasets

    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"Expected an empty folder for the images of {name!r}, got {str(folder)!r}")
    rows = cast(datasets.IterableDataset, datasets.load_dataset(name, config_name, split=split, streaming=True))
    written = 0
    for row in tqdm(rows if at_most is None else rows.take(at_most), desc=f"Writing {name}", unit="image"):
        _check_columns(row, (image_column, label_column), name)
        label = row[label_column]
        feature = (rows.features or {}).get(label_column)
        named = feature.int2str(label) if isinstance(feature, datasets.ClassLabel) else str(label)
        file = folder / named.replace("/", "_") / f"{written:07d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        row[image_column].convert("RGB").save(file)
        written += 1
    return written


def _check_columns(row: dict[str, Any], columns: Sequence[str], name: str) -> None:
    if missing := [column for column in columns if column not in row]:
        raise ValueError(f"Expected columns {', '.join(missing)} in the dataset {name!r}, got {', '.join(row)}")
