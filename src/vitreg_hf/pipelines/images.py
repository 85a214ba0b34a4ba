# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""How the pipelines of this package read images: whatever kind they are, and one that is bad says which it is."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import GeneratorType
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers.image_utils import load_image

from vitreg_hf.model.image_inputs import open_image
from vitreg_hf.model.image_processing_pil_vitreg import ViTRegImageProcessorMixin
from vitreg_hf.model.processor_checks import check_file_size

_BOMBS = (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning)
_LONGEST_SHOWN = 300  # characters of a path, and of a reason


@dataclass(frozen=True)
class _Numbered:
    """An image and its place among those that were given, from 1; 0 for one that was given alone."""

    image: Any
    place: int = 0
    count: int | None = None

    def __str__(self) -> str:
        if not self.place:
            return described(self.image)
        place = f"image {self.place}" if self.count is None else f"image {self.place} of {self.count}"
        return f"{place}, {described(self.image)}"


class _NumberedDataset(Dataset[_Numbered]):
    """A dataset whose images know their places; they are still read one by one."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Numbered:
        return _Numbered(self.dataset[index], index + 1, len(self.dataset))


def numbered(inputs: Any) -> Any:
    """Images that know their places, in the container that they came in: a list, a generator or a dataset.

    A single image, and a dataset without a length, are returned as they are.
    """
    if isinstance(inputs, list):
        return [_Numbered(image, place, len(inputs)) for place, image in enumerate(inputs, start=1)]
    if isinstance(inputs, GeneratorType):
        return (_Numbered(image, place) for place, image in enumerate(inputs, start=1))
    sized = isinstance(inputs, Dataset) and hasattr(inputs, "__len__")
    return _NumberedDataset(inputs) if sized and not isinstance(inputs, IterableDataset) else inputs


def described(image: Any) -> str:
    """What an error calls an image: its path or address, or its kind and shape."""
    if isinstance(image, (str, os.PathLike)):
        text = os.fspath(image)
        return repr(text) if len(text) <= _LONGEST_SHOWN else f"{text[:60]!r}... ({len(text)} characters)"
    if isinstance(image, PIL.Image.Image):
        file = getattr(image, "filename", "")
        kind = f"a PIL image of mode {image.mode}, {image.width} x {image.height} pixels"
        return f"{kind}, from {os.fspath(file)!r}" if file else kind
    if isinstance(image, (np.ndarray, Tensor)):
        kind = "an array" if isinstance(image, np.ndarray) else "a tensor"
        return f"{kind} of {str(image.dtype).removeprefix('torch.')} and shape {tuple(image.shape)}"
    return f"an object of type {type(image).__name__}"


def opened(image: Any, timeout: float | None = None) -> PIL.Image.Image | np.ndarray | Tensor:
    """An RGB picture from a path, address, base64 text or PIL image; an array or tensor of one image as it is.

    Raises:
        ValueError: for an array of another shape or of anything but real numbers. What cannot be read raises what
            Pillow and the Hub's client raise for it.
    """
    if isinstance(image, (str, os.PathLike)) and os.path.isfile(image):
        return _opened_file(image)
    if not isinstance(image, (np.ndarray, Tensor)):
        return load_image(os.fspath(image) if isinstance(image, os.PathLike) else image, timeout=timeout)
    if image.ndim == 4 and len(image) == 1:
        image = image[0]
    real = not image.is_complex() if isinstance(image, Tensor) else image.dtype.kind in "biuf"
    if image.ndim not in (2, 3) or 0 in image.shape or not real:
        raise ValueError("expected real numbers of shape (H, W), (H, W, C) or (C, H, W), with one image per array")
    return image


def as_it_is(image: Any, timeout: float | None = None) -> PIL.Image.Image | np.ndarray | Tensor:
    """As `opened`, but files and PIL images keep their mode: our image processors read 16 bit and transparent ones.

    Turning them into RGB first, as Transformers does, would clip the one and drop the transparency of the other, so
    that a pipeline would feed a model other pixels than its image processor does.
    """
    if isinstance(image, (str, os.PathLike)) and os.path.isfile(image):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # refused there, with the size
            return open_image(image)
    if isinstance(image, PIL.Image.Image):
        return PIL.ImageOps.exif_transpose(image)
    return opened(image, timeout)


def _opened_file(path: str | os.PathLike[str]) -> PIL.Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # refused here, with the size
        with PIL.Image.open(path) as picture:  # Transformers leaves a file that it cannot decode open
            check_file_size(picture)
            return load_image(picture)


def _reason(image: Any, error: Exception) -> str:
    """Why an image cannot be read, where the error itself would not tell."""
    text = os.fspath(image) if isinstance(image, (str, os.PathLike)) else None
    if text is not None and os.path.isdir(text):
        return "this is a folder: pass its files"
    if text is not None and not os.path.isfile(text) and not isinstance(error, _BOMBS):
        if not text.startswith(("http://", "https://")):
            return "there is no such file, and it is no base64 data of an image"
        if isinstance(error, PIL.UnidentifiedImageError):
            return "what this address answers is no image"
    return (str(error) or type(error).__name__)[:_LONGEST_SHOWN]


def _of_one_size(collate: Callable[[Sequence[Any]], Any], items: Sequence[Any]) -> Any:
    """Collate what is of one size; the error for other images is one that helps."""
    sizes = sorted({tuple(item["pixel_values"].shape[-2:]) for item in items if "pixel_values" in item})
    if len(sizes) > 1:
        listed = ", ".join(f"{height} x {width}" for height, width in sizes)
        raise ValueError(
            f"Expected images that the image processor brings to one size for a batch of {len(items)}, got {listed}: "
            "pass batch_size=1, or an image processor with a fixed size or a crop"
        )
    return collate(items)


class ReadsImages:
    """Put before a pipeline of Transformers for single images, it reads more kinds of them and names bad ones.

    Images are paths (also `pathlib`), addresses, base64 texts, PIL images, and arrays or tensors of one image in the
    range that the image processor expects; one, or a list, a generator or a dataset of them, which stream.

    Raises:
        ValueError: for an image that cannot be read or prepared. It names the path, the address, or the kind and
            shape, and the place ("image 3 of 5"); what went wrong is its cause.

    It is no pipeline itself, so that Transformers' own follows it; its methods take less than theirs, which is what
    type checkers report where the two meet.
    """

    image_processor: Any
    dtype: Any
    # Transformers would look for one, and with trust_remote_code=True run code of the repository for it.
    _load_video_processor = False

    def __call__(self, inputs: Any = None, **options: Any) -> Any:
        """Run the pipeline; see its class for the options. `images=` is another name of the inputs."""
        inputs = options.pop("images", inputs)
        if isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(numbered(inputs), **options)  # type: ignore[misc]  # a pipeline's

    def preprocess(self, image: Any, timeout: float | None = None, **options: Any) -> Any:
        """Read one image and turn it into model inputs."""
        known = image if isinstance(image, _Numbered) else _Numbered(image)
        try:
            with warnings.catch_warnings():  # Pillow only warns of an image of twice the pixels that it takes for safe
                warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
                if isinstance(self.image_processor, ViTRegImageProcessorMixin):
                    return self._prepare_array(as_it_is(known.image, timeout), **options)
                pixels = opened(known.image, timeout)
            if isinstance(pixels, PIL.Image.Image):
                return self._prepare_picture(pixels, **options)
            return self._prepare_array(pixels, **options)
        except Exception as error:  # decoders, servers and image processors of any model raise anything
            raise ValueError(f"Expected a readable image, got {known}: {_reason(known.image, error)}") from error

    def get_iterator(self, inputs: Any, num_workers: int, batch_size: int, *parameters: Any) -> Iterator[Any]:
        """Results one by one, of images that are read and run in batches."""
        results = super().get_iterator(inputs, num_workers, batch_size, *parameters)  # type: ignore[misc]
        if batch_size > 1:
            images = results.loader.loader
            images.collate_fn = partial(_of_one_size, images.collate_fn)
        return results

    def _prepare_picture(self, picture: PIL.Image.Image, **options: Any) -> Any:
        return super().preprocess(picture, **options)  # type: ignore[misc]

    def _prepare_array(self, array: Any, **options: Any) -> Any:
        return self.image_processor(images=array, return_tensors="pt", **options).to(self.dtype)
