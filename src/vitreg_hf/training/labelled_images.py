# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Images with labels that stay encoded until they are asked for, so that a broken file can be named.

Decoding is what the image processor does with the same file later, so training and inference see the same pixels.

Shapes: H x W pixels of one image, B images.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import datasets
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor
from tqdm.auto import tqdm

from vitreg_hf.model.image_inputs import read_image

# What is held out or drawn is a property of the data, not of a training: runs with other seeds stay comparable.
SPLIT_SEED = 0


class LabelledImages(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """The images of one split, decoded one at a time.

    Args:
        rows: columns `image` (`datasets.Image(decode=False)`), `label` (`datasets.ClassLabel`) and `row` (its number
            at the source).
    """

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image as uint8 `(3, H, W)`, RGB whatever its mode, and its class index.

        Raises:
            ValueError: naming the file (or the row, if it has no file) that cannot be decoded.
        """
        row = self.rows[int(index)]
        try:
            return decode_rgb(row["image"]), row["label"]
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more
            raise ValueError(f"Expected a readable image, got {self.source_of(index)}: {error}") from error

    @property
    def class_names(self) -> list[str]:
        """Name of each class, by index."""
        return list(self.rows.features["label"].names)

    def source_of(self, index: int) -> str:
        """Where image `index` came from: its file, or its row at the source where it is stored in a table."""
        row = self.rows[int(index)]
        path, embedded = row["image"]["path"], row["image"]["bytes"] is not None
        return f"row {row['row']}" + (f" ({path})" if path else "") if embedded else path

    def without(self, left_out: set[int]) -> "LabelledImages":
        """All images but those of the indices given.

        Raises:
            ValueError: if none is left.
        """
        kept = [index for index in range(len(self)) if index not in left_out]
        if not kept:
            raise ValueError(f"Expected at least one readable image, got {len(left_out)} that are not")
        return LabelledImages(self.rows.select(kept)) if left_out else self

    def sample(self, count: int) -> "LabelledImages":
        """`count` images drawn once and for all, or all of them if there are no more.

        Raises:
            ValueError: if `count` is not positive.
        """
        if count < 1:
            raise ValueError(f"Expected at least 1 image to keep, got {count}")
        order = np.random.default_rng(SPLIT_SEED).permutation(len(self))
        return LabelledImages(self.rows.select(sorted(order[:count])))


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


# Decoding


def decode_rgb(encoded: dict[str, Any]) -> Tensor:
    """Decode an image as `datasets` stores it, `{"bytes": ..., "path": ...}`, to uint8 `(3, H, W)`."""
    source = encoded["path"] if encoded["bytes"] is None else io.BytesIO(encoded["bytes"])
    with PIL.Image.open(source) as image:
        upright = PIL.ImageOps.exif_transpose(image)
        return read_image(upright, do_convert_rgb=True)


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be decoded."""

    split: Literal["train", "evaluation"]
    index: int
    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.split}: {self.source}"


def find_unreadable(data: ImageClassificationData, process_index: int = 0, num_processes: int = 1) -> list[Unreadable]:
    """Decode every image of both splits once and report those that fail; of several processes, each does its share."""
    share = [
        (split, index)
        for split, images in (("train", data.train), ("evaluation", data.evaluation))
        for index in range(process_index, len(images), num_processes)
    ]
    found = []
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


# Batches


@dataclass(frozen=True)
class Collate:
    """Makes a batch of decoded images; the transform runs in the loader's workers."""

    transform: Callable[[Sequence[Tensor]], Tensor]

    def __call__(self, examples: Sequence[tuple[Tensor, int]]) -> dict[str, Tensor]:
        """`pixel_values` `(B, 3, H, W)` float32 and `labels` `(B,)` int64."""
        images, labels = zip(*examples, strict=True)
        return {"pixel_values": self.transform(images), "labels": torch.tensor(labels)}
