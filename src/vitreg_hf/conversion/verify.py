# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Source and result on the same real images: the largest difference of every layer, token kind and logit."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import PIL.Image
import torch
from torch import Tensor
from transformers import AutoImageProcessor

from vitreg_hf.conversion.convert import Conversion
from vitreg_hf.conversion.source_models import SourceModel, source_model
from vitreg_hf.model.configuration_checks import pair
from vitreg_hf.model.configuration_vitreg import ViTRegConfig
from vitreg_hf.model.token_layout import TokenLayout

TOLERANCE = 1e-4  # in float32
_MOST_IMAGES = 8


@dataclass(frozen=True)
class Difference:
    """The largest absolute difference of one output.

    Attributes:
        what: the output.
        size: height and width of the images in pixels.
        largest: between source and result.
        allowed: what it may be.
    """

    what: str
    size: tuple[int, int]
    largest: float
    allowed: float


@dataclass(frozen=True)
class Verification:
    """What a comparison found.

    Attributes:
        source: name of the implementation of the source.
        images: how many images were compared.
        differences: of every output at every size.
        notes: what was not compared, and why.
    """

    source: str
    images: int
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

    @property
    def is_equal(self) -> bool:
        """Whether no output differs by more than it may."""
        return all(one.largest <= one.allowed for one in self.differences)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        rows = [{**vars(one), "size": list(one.size)} for one in self.differences]
        facts = {"compared_with": self.source, "images": self.images, "equal": self.is_equal}
        return {**facts, "tolerance": TOLERANCE, "differences": rows, "notes": list(self.notes)}

    def __str__(self) -> str:
        sizes = list(dict.fromkeys(one.size for one in self.differences))
        names = list(dict.fromkeys(one.what for one in self.differences))
        found = {(one.what, one.size): one.largest for one in self.differences}
        head = "".join(f"{f'{height} x {width}':>14}" for height, width in sizes)
        lines = [f"compared with {self.source} on {self.images} images, largest differences:", f"  {'':12}{head}"]
        for name in names:
            cells = (found.get((name, size)) for size in sizes)
            lines.append(f"  {name:12}" + "".join(f"{'' if cell is None else f'{cell:.1e}':>14}" for cell in cells))
        lines += [f"  note: {note}" for note in self.notes]
        verdict = "equal" if self.is_equal else "NOT equal"
        return "\n".join(
            [*lines, f"  {verdict} within {TOLERANCE}, or that share of an output's largest value if above 1"]
        )


def verify_conversion(conversion: Conversion, images: Sequence[PIL.Image.Image] | None = None) -> Verification:
    """Run the source in its own implementation and the result on the same images, in float32.

    Weights that are rounded when they are written are compared before that, which a note says. Images are grey for a
    model of one channel. At the size of the model, and where the source has a rule for other sizes also at a larger
    and a wide one.

    Args:
        conversion: of `convert_checkpoint`.
        images: at most eight; None for two photos that scikit-learn brings.

    Raises:
        ValueError: if there is no implementation of the source to be had, or no image.
        ModuleNotFoundError: without timm, where that is the implementation, or without scikit-learn.
    """
    chosen = list(sample_photos() if images is None else images)[:_MOST_IMAGES]
    if not chosen:
        raise ValueError("Expected one or more images, got none")
    if conversion.config.num_channels == 1:
        chosen = [image.convert("L") for image in chosen]
    source, model = source_model(conversion), _exact_model(conversion)
    sizes = _sizes(conversion.config) if source.any_size else _sizes(conversion.config)[:1]
    differences: list[Difference] = []
    for size in sizes:
        pixel_values = _pixels(conversion, chosen, size)
        differences += _compared(source, model, pixel_values)
    notes = [] if source.any_size else [f"other sizes: {source.name} interpolates positions by another rule"]
    notes += _rounding(conversion)
    if (pixels := _processor_difference(conversion, chosen)) is not None:
        differences.append(pixels)
    return Verification(source.name, len(chosen), tuple(differences), tuple(notes))


def sample_photos() -> list[PIL.Image.Image]:
    """Two photos that come with scikit-learn: a temple and a flower."""
    from sklearn.datasets import load_sample_images

    return [PIL.Image.fromarray(photo) for photo in load_sample_images().images]


def images_of(folder: Path) -> list[PIL.Image.Image]:
    """The first images of a folder or of the folders in it; raises ValueError if there is none."""
    known = PIL.Image.registered_extensions()
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in known)
    if not files:
        raise ValueError(f"Expected a folder with images, got {folder}")
    return [PIL.Image.open(file).convert("RGB") for file in files[:_MOST_IMAGES]]


def _exact_model(conversion: Conversion) -> Any:
    """The model in float32, with the weights of the source before they are rounded to another type."""
    if conversion.config.dtype == torch.float32:
        return conversion.model
    config = copy.deepcopy(conversion.config)
    config.dtype = torch.float32
    return replace(conversion, config=config).model


def _rounding(conversion: Conversion) -> list[str]:
    """A note on weights that are written in another type of 16 bits than the source has."""
    dtype, tensors = cast(torch.dtype, conversion.config.dtype), conversion.source.tensors
    if dtype.itemsize > 2 or {tensors[row.foreign].dtype for row in conversion.report.rows} == {dtype}:
        return []
    return [f"compared before rounding: the weights are written in {str(dtype).removeprefix('torch.')}"]


def _sizes(config: ViTRegConfig) -> list[tuple[int, int]]:
    """The size of the model, a larger one, and one that is wide."""
    (height, width), (rows, columns) = pair(config.image_size), config.patch_height_width
    return [(height, width), (height + 2 * rows, width + 2 * columns), (max(height // 2 // rows, 1) * rows, width)]


def _pixels(conversion: Conversion, images: Sequence[PIL.Image.Image], size: tuple[int, int]) -> Tensor:
    exact = {"height": size[0], "width": size[1]}
    pixels = conversion.processor(images, size=exact, do_center_crop=False, return_tensors="pt")["pixel_values"]
    return pixels[:, : conversion.config.num_channels]  # of a grey image that is made RGB, one


@torch.inference_mode()
def _compared(source: SourceModel, model: Any, pixel_values: Tensor) -> list[Difference]:
    theirs, ours = source.run(pixel_values), model(pixel_values, output_hidden_states=True)
    layout = TokenLayout.from_config(model.config)
    layers = zip(ours.hidden_states[1:], theirs.layers, strict=True)
    pairs = [
        *((f"layer {index}", own, other) for index, (own, other) in enumerate(layers)),
        ("CLS", ours.cls_token, layout.cls_token(theirs.tokens)),
        ("registers", ours.register_tokens, layout.register_tokens(theirs.tokens)),
        ("patches", ours.patch_tokens, layout.patch_tokens(theirs.tokens)),
        ("logits", ours.get("logits"), theirs.logits),
    ]
    size = (pixel_values.shape[-2], pixel_values.shape[-1])
    return [_difference(what, size, own, other) for what, own, other in pairs if own is not None and other is not None]


def _difference(what: str, size: tuple[int, int], own: Tensor, other: Tensor) -> Difference:
    allowed = TOLERANCE * max(other.abs().max().item(), 1.0)
    return Difference(what, size, (own - other).abs().max().item(), allowed)


def _processor_difference(conversion: Conversion, images: Sequence[PIL.Image.Image]) -> Difference | None:
    """The largest difference between normalised pixels of the source's image processor and of ours."""
    if conversion.source.processor is None or conversion.source.folder is None:
        return None
    theirs = AutoImageProcessor.from_pretrained(conversion.source.folder)(images, return_tensors="pt")["pixel_values"]
    ours = conversion.processor(images, return_tensors="pt")["pixel_values"]
    if ours.shape != theirs.shape:
        raise ValueError(f"Expected images of {tuple(theirs.shape)} of the image processor, got {tuple(ours.shape)}")
    # one grey level: processors round to whole ones at different places
    allowed = 1.01 / 255 / min(conversion.processor.image_std)
    size = (ours.shape[-2], ours.shape[-1])
    return Difference("pixels", size, (ours - theirs).abs().max().item(), allowed)
