# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Images with labels that stay encoded until they are asked for, so that a broken file can be named.

Decoding is what the image processor does with the same file later, so training and inference see the same pixels.

Shapes: H x W pixels of one image, B images.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor
from tqdm.auto import tqdm

from vitreg_hf.model.image_inputs import read_image, read_label_map
from vitreg_hf.model.processor_checks import check_file_size
from vitreg_hf.training.corrupt_images import SkipLimit
from vitreg_hf.training.sampling import SampleKey
from vitreg_hf.training.scaled_jpeg import draft, scaled_image
from vitreg_hf.training.seeding import seeded

# What is held out or drawn is a property of the data, not of a training: runs with other seeds stay comparable.
SPLIT_SEED = 0


class LabelledImages(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """The images of one split, decoded one at a time.

    Args:
        rows: columns `image` (`datasets.Image(decode=False)`), `label` (`datasets.ClassLabel`) and `row` (its number
            at the source).
        num_channels: 3 for RGB, 1 for grey; any other number for images that have as many.
        least_edge: as for `decode`.
    """

    def __init__(self, rows: datasets.Dataset, num_channels: int = 3, least_edge: int | None = None) -> None:
        self.rows, self.num_channels, self.least_edge = rows, num_channels, least_edge

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image as uint8 `(C, H, W)`, RGB or grey whatever its mode, and its class index.

        Raises:
            ValueError: naming the file (or the row, if it has no file) that cannot be decoded.
        """
        row = self.rows[int(index)]
        try:
            return decode(row["image"], self.num_channels, self.least_edge), row["label"]
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more
            raise ValueError(f"Expected a readable image, got {self.source_of(index)}: {error}") from error

    @property
    def num_images(self) -> int:
        """How many there are."""
        return len(self)

    @property
    def class_names(self) -> list[str]:
        """Name of each class, by index."""
        return list(self.rows.features["label"].names)

    def source_of(self, index: int) -> str:
        """Where image `index` came from: its file, or its row at the source where it is stored in a table."""
        row = self.rows[int(index)]
        return source_of(row["image"], row["row"])

    def without(self, left_out: set[int]) -> "LabelledImages":
        """All images but those of the indices given.

        Raises:
            ValueError: if none is left.
        """
        kept = [index for index in range(len(self)) if index not in left_out]
        if not kept:
            raise ValueError(f"Expected at least one readable image, got {len(left_out)} that are not")
        return self._of(self.rows.select(kept)) if left_out else self

    def with_channels(self, num_channels: int) -> "LabelledImages":
        """The same images with other channels."""
        return LabelledImages(self.rows, num_channels, self.least_edge)

    def with_least_edge(self, least_edge: int | None) -> "LabelledImages":
        """The same images, decoded to fewer pixels where `decode` can; None: to all of them."""
        return LabelledImages(self.rows, self.num_channels, least_edge)

    def sample(self, count: int) -> "LabelledImages":
        """`count` images drawn once and for all, or all of them if there are no more.

        Raises:
            ValueError: if `count` is not positive.
        """
        if count < 1:
            raise ValueError(f"Expected at least 1 image to keep, got {count}")
        order = np.random.default_rng(SPLIT_SEED).permutation(len(self))
        return self._of(self.rows.select(sorted(order[:count])))

    def _of(self, rows: datasets.Dataset) -> "LabelledImages":
        return LabelledImages(rows, self.num_channels, self.least_edge)


@dataclass(frozen=True)
class ImageClassificationData:
    """A training split, the split it is evaluated on, and where both came from."""

    train: LabelledImages
    evaluation: LabelledImages
    source: str
    evaluation_split: str  # name of the split
    held_out_by: str  # how its images were chosen, in words
    license: str | None = None
    hub_id: str | None = None  # where it comes from the Hub

    @property
    def class_names(self) -> list[str]:
        """Name of each class, by index."""
        return self.train.class_names

    def with_channels(self, num_channels: int) -> "ImageClassificationData":
        """The same images with other channels."""
        train, evaluation = (split.with_channels(num_channels) for split in (self.train, self.evaluation))
        return replace(self, train=train, evaluation=evaluation)


# Decoding


def decode(encoded: dict[str, Any], num_channels: int = 3, least_edge: int | None = None) -> Tensor:
    """Decode an image as `datasets` stores it, `{"bytes": ..., "path": ...}`, to uint8 `(C, H, W)`.

    Args:
        encoded: the image.
        num_channels: as for `LabelledImages`.
        least_edge: pixels that the shorter edge keeps at least. A JPEG that has several times as many is decoded to a
            half, a quarter or an eighth of both edges, and is a `ScaledImage`; other formats are decoded whole. None
            decodes every image whole, as the image processor does.

    Raises:
        ValueError: if channels other than 3 (RGB) and 1 (grey) are asked for and the image has another number of them.
    """
    with PIL.Image.open(_opened(encoded)) as image:
        check_file_size(image)  # before anything decodes it
        whole_size = None if least_edge is None else draft(image, least_edge)
        upright = PIL.ImageOps.exif_transpose(image)
        if num_channels != 1:
            pixels = read_image(upright, do_convert_rgb=num_channels == 3)
        else:
            pixels = grey(read_image(upright, do_convert_rgb=True))
    if pixels.shape[0] != num_channels:
        raise ValueError(f"Expected an image of {num_channels} channels, got one of {pixels.shape[0]}")
    return pixels if whole_size is None else scaled_image(pixels, whole_size)


def decode_label_map(encoded: dict[str, Any]) -> Tensor:
    """Decode a map of class indices the same way to int64 `(H, W)`.

    Raises:
        ValueError: if it has several channels or no integer values.
    """
    with PIL.Image.open(_opened(encoded)) as image:
        check_file_size(image)
        return read_label_map(PIL.ImageOps.exif_transpose(image))


def source_of(encoded: dict[str, Any], row: int) -> str:
    """File of an encoded image, or its row at the source where it is stored in a table."""
    if encoded["bytes"] is None:
        return str(encoded["path"])
    return f"row {row}" + (f" ({encoded['path']})" if encoded["path"] else "")


def _opened(encoded: dict[str, Any]) -> Any:
    return encoded["path"] if encoded["bytes"] is None else io.BytesIO(encoded["bytes"])


def grey(image: Tensor) -> Tensor:
    """Luma (ITU-R BT.601) of an RGB image, uint8 `(3, H, W)` to `(1, H, W)`, as Pillow's mode L."""
    weights = torch.tensor([19595, 38470, 7471]).view(3, 1, 1)  # Pillow's: 0.299, 0.587, 0.114 in 16 bits
    luma = (image.to(torch.int64) * weights).sum(dim=0, keepdim=True)
    return ((luma + 0x8000) >> 16).to(torch.uint8)


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be decoded."""

    split: Literal["train", "evaluation"]
    index: int
    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.split}: {self.source}"


def find_unreadable(
    data: ImageClassificationData, process_index: int = 0, num_processes: int = 1, check_train: bool = True
) -> list[Unreadable]:
    """Decode every image once and report those that fail; of several processes, each does its share.

    Args:
        data: both splits.
        process_index: which process this is.
        num_processes: of how many.
        check_train: also those of the training split; else only those of the other, which every evaluation reads.
    """
    splits = [("train", data.train), ("evaluation", data.evaluation)]
    share = [
        (split, index)
        for split, images in (splits if check_train else splits[1:])
        for index in range(process_index, len(images), num_processes)
    ]
    found: list[Unreadable] = []
    for split, index in tqdm(share, desc="Checking images", unit="image", disable=process_index != 0, leave=False):
        images: LabelledImages = getattr(data, split)
        try:
            images[index]
        except ValueError as error:
            found.append(Unreadable(split, index, images.source_of(index), str(error.__cause__)))
    return found


def without_unreadable(
    data: ImageClassificationData, unreadable: Sequence[Unreadable], policy: Literal["raise", "skip"]
) -> ImageClassificationData:
    """Refuse or leave out the images that cannot be decoded.

    Raises:
        ValueError: naming the files, if the policy is `raise`, or if no image of a split is left.
    """
    if unreadable and policy == "raise":
        listed = "\n".join(f"  {one}: {one.reason}" for one in unreadable)
        remedy = "on_corrupt_image=skip leaves them out"
        raise ValueError(f"Expected readable images, got {len(unreadable)} that are not ({remedy}):\n{listed}")
    return replace(
        data,
        train=data.train.without({one.index for one in unreadable if one.split == "train"}),
        evaluation=data.evaluation.without({one.index for one in unreadable if one.split == "evaluation"}),
    )


# Training samples and batches


class Example(NamedTuple):
    """One image for a batch.

    Attributes:
        image: uint8 `(C, H, W)`, augmented if it is to be trained on.
        label: class index.
        key: which sample of a training it is; None in evaluation.
        skipped: names of images that were left out before it because they cannot be decoded.
    """

    image: Tensor
    label: int
    key: SampleKey | None = None
    skipped: tuple[str, ...] = ()


class TrainingImages(torch.utils.data.Dataset[Example]):
    """Images of a split by `SampleKey`, augmented as seed and key say, whoever loads them.

    Args:
        images: the split.
        augment: makes of an image, uint8 `(C, H, W)`, a random variant; draws from the global generators.
        seed: of the training.
        skip_limit: how many images that cannot be decoded may be replaced by the next one of the split, which among
            sorted files usually shows the same class; None: none.
    """

    def __init__(
        self,
        images: LabelledImages,
        augment: Callable[[Tensor], Tensor],
        seed: int,
        skip_limit: SkipLimit | None = None,
    ) -> None:
        self.images, self.augment, self.seed, self.skip_limit = images, augment, seed, skip_limit

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: SampleKey) -> Example:
        image, label, skipped = self._readable(key.index)
        with seeded(key.seed(self.seed)):
            return Example(self.augment(image), label, key, skipped)

    def _readable(self, index: int) -> tuple[Tensor, int, tuple[str, ...]]:
        skipped: list[str] = []
        for candidate in range(index, index + len(self)):
            try:
                image, label = self.images[candidate % len(self)]
            except ValueError:
                if self.skip_limit is None:
                    raise
                skipped.append(self.images.source_of(candidate % len(self)))
                self.skip_limit.count(1, skipped[-1:])
            else:
                break
        else:
            raise ValueError(f"Expected at least one readable image, got {len(skipped)} that are not")
        if self.skip_limit is not None:
            self.skip_limit.count(1, ())
        return image, label, tuple(skipped)


@dataclass(frozen=True)
class Collate:
    """Makes a batch of images; the transform runs in the loader's workers."""

    transform: Callable[[Sequence[Tensor]], Tensor]

    def __call__(self, examples: Sequence[Example] | Sequence[tuple[Tensor, int]]) -> dict[str, Any]:
        """`pixel_values` `(B, C, H, W)` float32, `labels` `(B,)` int64; `skipped`: images left out, if any."""
        images, labels = zip(*(example[:2] for example in examples), strict=True)
        batch = {"pixel_values": self.transform(images), "labels": torch.tensor(labels)}
        skipped = [name for example in examples for name in getattr(example, "skipped", ())]
        return {**batch, "skipped": skipped} if skipped else batch
