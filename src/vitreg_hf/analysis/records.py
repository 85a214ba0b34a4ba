# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What was measured, in files: written some images at a time, complete or not at all, and read quantity by quantity.

Shapes: n images, P patches; the first dimension of every record is images.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

Arrays = dict[str, NDArray[Any]]
Batch = Mapping[str, NDArray[Any]]  # records of some images
_FORMAT = 1  # raised when records of an earlier version can no longer be read


class _File(Batch):
    """Records of a file, each read when it is asked for: a quantity of all images is a small part of the files."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self:
            raise KeyError(name)
        with safe_open(self.file, framework="numpy") as content:
            return content.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def _names(self) -> list[str]:
        try:
            with safe_open(self.file, framework="numpy") as content:
                return list(content.keys())
        except SafetensorError as error:
            raise ValueError(
                f"Expected whole records, got {str(self.file)!r} ({error}): delete it, and run again"
            ) from error


class Records:
    """Measurements of images in files, some images per file.

    Args:
        folder: made when the first record is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def claim(self, identity: dict[str, Any], overwrite: bool = False) -> None:
        """Say what is measured here; records of the same are kept.

        Args:
            identity: what has to be equal for records to go together.
            overwrite: delete records of something else.

        Raises:
            ValueError: if something else was measured here and is not to be overwritten, naming what differs.
        """
        file = self.folder / "identity.json"
        wanted = json.loads(json.dumps({"format": _FORMAT, **identity}))
        found = json.loads(file.read_text()) if file.is_file() else None
        if found == wanted:
            return
        if found is not None and not overwrite:
            differing = ", ".join(name for name in wanted if found.get(name) != wanted[name])
            raise ValueError(
                f"Expected records of the same {differing} in {self.folder}, got others: use another output "
                "folder, or --overwrite them"
            )
        if found is not None:
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / ".identity.json.unfinished"
        unfinished.write_text(json.dumps(wanted))
        os.replace(unfinished, file)

    def holds(self, start: int) -> bool:
        """Whether the records that start with this image are complete."""
        return self._file(start).is_file()

    def save(self, start: int, arrays: Arrays) -> None:
        """Write records, complete or not at all."""
        unfinished = self.folder / f".{start:08d}.unfinished"
        save_file(arrays, unfinished)
        os.replace(unfinished, self._file(start))

    def check(self) -> None:
        """Refuse records without any image, or of images of several sizes.

        Raises:
            ValueError: then.
        """
        shapes = {batch["norms"].shape[1:] for batch in self.measured()}
        if len(shapes) != 1:
            raise ValueError(f"Expected readable images of one size, got {len(shapes)} sizes: give an image size")

    def __iter__(self) -> Iterator[Batch]:
        return (_File(file) for file in sorted(self.folder.glob("*.safetensors")))

    def column(self, name: str) -> NDArray[Any]:
        """One quantity of all images, first dimension images: for quantities of few numbers per image."""
        return np.concatenate([batch[name] for batch in self.measured()])

    def measured_images(self) -> NDArray[np.int64]:
        """Indices of the images that could be decoded."""
        return np.concatenate([batch["image"] for batch in self.measured()]).astype(np.int64)

    def measured(self) -> Iterator[Batch]:
        """Batches in which at least one image could be decoded."""
        return (batch for batch in self if "norms" in batch)

    def mean(self, quantity: Callable[[Batch], NDArray[Any]]) -> NDArray[np.float64]:
        """Mean over all images of a quantity that is computed batch by batch, first dimension images."""
        total, count = np.float64(0), 0
        for batch in self.measured():
            values = quantity(batch)
            total, count = total + values.sum(axis=0, dtype=np.float64), count + len(values)
        return np.asarray(total / count)

    def norms(self, state: int, at_most: int = 2_000_000) -> NDArray[np.float32]:
        """Norms of all patches of all images in one state, `(n,)`; of more than `at_most` about so many, at random."""
        patches = next(self.measured())["norms"].shape[2]
        return self.thinned(
            lambda batch: batch["norms"][:, state].ravel(), len(self.measured_images()) * patches, at_most
        )

    def thinned(
        self, values: Callable[[Batch], NDArray[Any]], total: int, at_most: int, seed: int = 0
    ) -> NDArray[np.float32]:
        """Values `(n,)` of every batch, put together; where they are too many in total, each is kept by chance.

        By chance rather than evenly: a stride would pick columns of the patch grid.
        """
        generator, share = np.random.default_rng(seed), at_most / max(total, 1)
        parts = (values(batch) for batch in self.measured())
        if share < 1:
            return np.concatenate([part[generator.random(part.size) < share] for part in parts])
        return np.concatenate(list(parts))

    def _file(self, start: int) -> Path:
        return self.folder / f"{start:08d}.safetensors"
