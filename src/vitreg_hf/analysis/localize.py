# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""LOST on a model: which object it finds in each image, and how often that is a true one (CorLoc).

The protocol is that of LOST's authors: every image at its own size, normalised, then padded with zeros at the right
and the bottom to whole patches, one image at a time. One forward pass serves all settings.

One difference: their features are the output of the qkv layer, these are what attention gets. Where a model rotates
queries and keys by position (DINOv3) or norms them first, that has happened; values, and the keys of DINO and DINOv2,
are the same in both.

Shapes: H x W pixels, rows x columns patches, h heads of d channels, N tokens. A box is
`(x_min, y_min, x_max, y_max)` in whole pixels from 0, its maxima just outside.

References: Siméoni et al., Localizing Objects with Self-Supervised Transformers and no Labels (arXiv 2109.14279);
Darcet et al., Vision Transformers Need Registers (arXiv 2309.16588), section 3.3.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from vitreg_hf.analysis.annotations import AnnotatedImage
from vitreg_hf.analysis.extract import Subject, read
from vitreg_hf.analysis.images import normalisation, open_upright, preprocess
from vitreg_hf.analysis.intervals import mean_interval
from vitreg_hf.analysis.object_discovery import (
    Box,
    Discovery,
    Feature,
    LostSettings,
    correct_localization,
    discover,
)
from vitreg_hf.analysis.recorder import AttentionCall, Readers
from vitreg_hf.analysis.report import Picture, Section, Table, interval, number

ImageSize = Literal["original", "processor"]

_TRIAL = (2, 3)  # rows and columns of patches, a grid that no model is made for


# Features


def lost_features(
    subject: Subject, pixel_values: Tensor, layers: Collection[int], features: Collection[Feature]
) -> dict[tuple[Feature, int], Tensor]:
    """Queries, keys or values of the patches of one image, all heads side by side, from one forward pass.

    Args:
        subject: a vision model.
        pixel_values: `(1, C, H, W)`, H and W whole patches.
        layers: indices; negative count from the last.
        features: which projections.

    Returns:
        `(rows, columns, h * d)` for each feature and layer as they were asked for, on the model's device.

    Raises:
        ValueError: for more or fewer images than one, a layer that the model does not have, or images that do not fit.
    """
    if len(pixel_values) != 1:
        raise ValueError(f"Expected one image, got {len(pixel_values)}: models pad batches, LOST does not")
    _check_layers(subject, layers)
    count, (layout, grid) = len(subject.anatomy.blocks), (subject.layout, subject.grid(pixel_values))
    wanted = {layer % count for layer in layers}

    def keep(layer: int, call: AttentionCall) -> dict[Feature, Tensor] | None:
        if layer not in wanted:
            return None
        by_head = {feature: getattr(call, feature) for feature in features}
        tokens = {feature: heads.transpose(1, 2).flatten(2) for feature, heads in by_head.items()}
        return {feature: layout.patch_tokens(one)[0].unflatten(0, grid) for feature, one in tokens.items()}

    kept = read(subject, pixel_values, Readers(attention=keep)).attention
    return {(feature, layer): kept[layer][feature] for layer in layers for feature in features}


def lost_on_batch(subject: Subject, pixel_values: Tensor, setting: LostSettings) -> list[Discovery]:
    """The object that LOST finds in each image of a batch as the image processor makes it; no annotations are needed.

    Args:
        subject: a vision model.
        pixel_values: `(B, C, H, W)`, H and W whole patches; boxes are in these pixels.
        setting: features and their comparison.

    Raises:
        ValueError: as `lost_features` and `object_discovery.discover` do.
    """
    size = (pixel_values.shape[-2], pixel_values.shape[-1])
    return [_discoveries(subject, image, size, [setting])[0] for image in pixel_values.split(1)]


def lost_on_file(
    subject: Subject, path: Path, setting: LostSettings, image_size: ImageSize = "original"
) -> tuple[NDArray[np.uint8], Discovery]:
    """One image file as `discover_objects` treats it: the image, RGB `(H, W, 3)`, and the object, in its pixels.

    Args:
        subject: a vision model with its image processor.
        path: of the image.
        setting: features and their comparison.
        image_size: see `discover_objects`, whose default is the same.

    Raises:
        ValueError: as `discover_objects` does.
    """
    _check_layers(subject, [setting.layer])
    size = _fixed_size(subject, image_size)
    image = open_upright(path)
    return np.asarray(image), _on_image(subject, image, size, [setting])[0]


# All images


def discover_objects(
    subject: Subject,
    annotated: Sequence[AnnotatedImage],
    *,
    settings: Sequence[LostSettings],
    default: LostSettings,
    image_size: ImageSize = "original",
) -> dict[str, Any]:
    """CorLoc of a model: the share of images where LOST's box is that of a true object (intersection over union 0.5).

    Memory does not grow with the number of images but for one truth value per image and setting.

    Args:
        subject: a vision model with its image processor.
        annotated: images and their boxes; those without a box are left out and listed by their number, from 0.
        settings: the sweep; its best is chosen on these same images, which flatters it.
        default: the setting that was fixed beforehand, in the sweep or not.
        image_size: "original" is the protocol. "processor" is for models that take no other size than their own:
            images are stretched to the size of the image processor, without its crop, and boxes scaled back.

    Returns:
        `images` that count, `images_without_boxes`, and `setting` with `corloc` (0 to 1) of `default`, of
        `best_on_the_same_images` (of equals the first) and of all `settings`.

    Raises:
        ValueError: before work starts, if there is no setting or no image with a box, a setting names a layer that the
            model does not have, the image processor's normalisation is not known, or the model does not take such
            sizes; later, naming the file, for an image that cannot be read.
    """
    if not settings:
        raise ValueError("Expected at least one setting to sweep over, got none")
    for setting in (default, *settings):
        _check_layers(subject, [setting.layer])
    counted = [image for image in annotated if image.boxes]
    if not counted:
        raise ValueError(f"Expected an image with a box, got none among {len(annotated)}")
    size, tried = _fixed_size(subject, image_size), list(dict.fromkeys([default, *settings]))
    found = np.zeros((len(counted), len(tried)), dtype=bool)
    for row, image in enumerate(tqdm(counted, desc=f"LOST on {subject.name}", unit="image")):
        discoveries = _on_image(subject, open_upright(image.path), size, tried)
        found[row] = correct_localization([one.box for one in discoveries], [image.boxes] * len(tried))
    scores = {setting: _score(setting, found[:, column]) for column, setting in enumerate(tried)}
    best = max(settings, key=lambda setting: scores[setting]["corloc"]["mean"])
    return {
        "model": subject.name,
        "image_size": image_size,
        "images": len(counted),
        "images_without_boxes": [index for index, image in enumerate(annotated) if not image.boxes],
        "default": scores[default],
        "best_on_the_same_images": scores[best],
        "settings": [scores[setting] for setting in dict.fromkeys(settings)],
    }


def _score(setting: LostSettings, found: NDArray[np.bool_]) -> dict[str, Any]:
    return {"setting": asdict(setting), "corloc": asdict(mean_interval(found.astype(np.float64)))}


def _on_image(
    subject: Subject, image: PIL.Image.Image, size: tuple[int, int] | None, settings: Sequence[LostSettings]
) -> list[Discovery]:
    """What each setting finds in an image that is stretched to `size` (height, width) if one is given."""
    seen = image if size is None else image.resize(size[::-1], PIL.Image.Resampling.BICUBIC)
    pixels = _padded(_normalised(seen, subject.preprocess), subject)
    found = _discoveries(subject, pixels, (seen.height, seen.width), settings)
    if size is None:
        return found
    scale = (image.width / seen.width, image.height / seen.height)
    return [replace(one, box=_scaled(one.box, scale)) for one in found]


def _discoveries(
    subject: Subject, pixel_values: Tensor, size: tuple[int, int], settings: Sequence[LostSettings]
) -> list[Discovery]:
    """What each setting finds in one image `(1, C, H, W)`, which has this size without its padding."""
    layers, features = {setting.layer for setting in settings}, {setting.feature for setting in settings}
    recorded = lost_features(subject, pixel_values, layers, features)
    return [
        discover(
            recorded[setting.feature, setting.layer],
            subject.layout.patch_size,
            size,
            normalize=setting.normalize,
            bias=setting.bias,
            num_expansion=setting.num_expansion,
        )
        for setting in settings
    ]


def _scaled(box: Box, scale: tuple[float, float]) -> Box:
    (x_min, y_min, x_max, y_max), (wide, high) = box, scale
    return (round(x_min * wide), round(y_min * high), round(x_max * wide), round(y_max * high))


# Images


def _normalised(image: PIL.Image.Image, processor: Any) -> Tensor:
    """`(1, 3, H, W)` float32 at the image's own size, with the image processor's mean and std and nothing else."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    mean, std = normalisation(processor)
    return (pixels / 255 - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def _padded(pixel_values: Tensor, subject: Subject) -> Tensor:
    """Zeros at the right and the bottom; after normalisation, where 0 is the mean colour, as the authors do."""
    missing_rows, missing_columns = subject.layout.missing_pixels(*pixel_values.shape[-2:])
    return F.pad(pixel_values, (0, missing_columns, 0, missing_rows))


# Checks


def _check_layers(subject: Subject, layers: Collection[int]) -> None:
    count = len(subject.anatomy.blocks)
    if missing := [layer for layer in layers if not -count <= layer < count]:
        raise ValueError(f"Expected layers from {-count} to {count - 1}, got {', '.join(map(str, missing))}")


def _fixed_size(subject: Subject, image_size: ImageSize) -> tuple[int, int] | None:
    """Height and width that all images are stretched to, or None; refuses what the model would not take."""
    normalisation(subject.preprocess)
    if image_size not in get_args(ImageSize):
        raise ValueError(f"Expected image_size to be one of {', '.join(get_args(ImageSize))}, got {image_size!r}")
    size = _processor_size(subject) if image_size == "processor" else None
    rows, columns = size or (patches * pixels for patches, pixels in zip(_TRIAL, subject.layout.patch_size))
    try:
        read(subject, _padded(torch.zeros(1, 3, rows, columns), subject), Readers())
    except (ValueError, RuntimeError) as error:
        wanted = "any size" if size is None else "the size of its processor"
        raise ValueError(
            f"Expected a model that takes images of {wanted}, got {subject.name!r}, which refused one of {rows} x "
            f"{columns} pixels, padded to whole patches ({error}): make it with dynamic_img_size=True (timm), or set "
            "image_size='processor'"
        ) from error
    return size


def _processor_size(subject: Subject) -> tuple[int, int]:
    """Height and width that the image processor brings images to; `preprocess` refuses one that keeps their shape."""
    blanks = [PIL.Image.new("RGB", shape) for shape in ((64, 48), (48, 64))]
    height, width = preprocess(blanks, subject.preprocess).shape[-2:]
    return height, width


# Report


def sections(results: dict[str, Any], pictures: Sequence[Picture] = ()) -> list[Section]:
    """What `discover_objects` found, for a report, with pictures that `figures.objects` drew."""
    without, tried = len(results["images_without_boxes"]), len(results["settings"])
    text = [
        "LOST takes one object per image from the similarities of its patches alone, without any training. CorLoc is "
        "the share of images whose box overlaps a true box by at least half (intersection over union). Intervals are "
        f"95 % bootstrap intervals over {results['images']} images; {without} images without a true box are left out.",
        "The default was fixed beforehand. The best of the sweep was chosen on the same images that it is scored on, "
        f"out of {tried} settings, and its interval does not know of that choice: read it as an upper bound.",
    ]
    if results["image_size"] == "processor":
        text.append("Images were stretched to the processor's size; published numbers use each image's own size.")
    rows = [
        ("fixed default", results["default"]),
        ("best of the sweep (chosen on these images)", results["best_on_the_same_images"]),
    ]
    header = ("", "feature", "layer", "similarity", "bias", "CorLoc in %")
    chosen = Table(header, [(name, *_cells(score)) for name, score in rows], "CorLoc, share of objects found")
    caption = "Best of the biases and similarities for each feature and layer, again chosen on these images"
    swept = Table(header[1:], [_cells(score) for score in _best_of_each(results["settings"])], caption)
    return [Section(f"Object discovery: {results['model']}", text, [chosen, swept], pictures)]


def _cells(score: dict[str, Any]) -> tuple[str, ...]:
    setting = score["setting"]
    similarity = "cosine" if setting["normalize"] else "dot product"
    corloc = interval(score["corloc"], factor=100)
    return (setting["feature"], str(setting["layer"]), similarity, number(setting["bias"]), corloc)


def _best_of_each(scores: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best score of each feature and layer, in the order of the sweep."""
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for score in scores:
        key = (score["setting"]["feature"], score["setting"]["layer"])
        if key not in best or score["corloc"]["mean"] > best[key]["corloc"]["mean"]:
            best[key] = score
    return list(best.values())
