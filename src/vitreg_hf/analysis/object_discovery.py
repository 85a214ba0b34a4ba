# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""LOST: one object per image from the similarities of its patches alone, and CorLoc, the share of objects found.

Object and background are told apart by signs: an object's patch has a positive dot product with few other patches,
one of the background with many. Artifacts break this, which is why registers are judged by it.

Shapes: rows x columns patches, N = rows * columns in row-major order, d features per patch; H x W pixels of the image
without padding. A box is `(x_min, y_min, x_max, y_max)` in whole pixels from 0, its maxima just outside.

Reference: Siméoni et al., Localizing Objects with Self-Supervised Transformers and no Labels (arXiv 2109.14279).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

import numpy as np
import scipy.ndimage
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Box = tuple[int, int, int, int]
Feature = Literal["key", "query", "value"]


def _check_comparison(normalize: bool, bias: float, num_expansion: int) -> None:
    """Raise what `LostSettings` says of these three."""
    if not math.isfinite(bias):
        raise ValueError(f"Expected a finite bias, got {bias}")
    if normalize and abs(bias) > 1:
        raise ValueError(f"Expected a bias within -1..1 for normalised features, got {bias}: it decides every sign")
    if num_expansion < 1:
        raise ValueError(f"Expected num_expansion of 1 or more, got {num_expansion}")


@dataclass(frozen=True)
class LostSettings:
    """Which features LOST reads and how it compares them. The defaults are the choices of its authors.

    Attributes:
        feature: which projection of an attention layer, all heads side by side.
        layer: index of that layer; negative counts from the last. Whoever has the model checks that it exists.
        normalize: compare by cosines instead of dot products. The authors use dot products.
        bias: added to every similarity, a patch's with itself included, before any is tested for its sign. 0 in LOST.
            Darcet et al. (arXiv 2309.16588, section 3.3) set one by hand for each model and do not say its value.
            Cosines plus -1 are positive by rounding alone.
        num_expansion: how many patches of the lowest degrees may join the seed; k in the paper, which takes 100.

    Raises:
        ValueError: if `feature` is another word, `bias` not finite or, with cosines, outside -1..1 (where it decides
            every sign), or `num_expansion` not positive.
    """

    feature: Feature
    layer: int = -1
    normalize: bool = False
    bias: float = 0.0
    num_expansion: int = 100

    def __post_init__(self) -> None:
        if self.feature not in get_args(Feature):
            raise ValueError(f"Expected feature to be one of {', '.join(get_args(Feature))}, got {self.feature!r}")
        _check_comparison(self.normalize, self.bias, self.num_expansion)


# Section 3 of the paper, and what its code does unless told otherwise.
PAPER_DEFAULT = LostSettings("key")

# Tenths of the range that leaves cosines of both signs. Without -1, where all are negative but for rounding.
COSINE_BIASES = (0.0, -0.1, -0.2, -0.3, -0.4, -0.5, -0.6, -0.7, -0.8, -0.9)


def sweep_settings(
    layers: Sequence[int] = (-1, -2, -3, -4),
    features: Sequence[Feature] = get_args(Feature),
    biases_raw: Sequence[float] = (0.0,),
    biases_normalized: Sequence[float] = COSINE_BIASES,
) -> list[LostSettings]:
    """The grid from which a report takes its best setting, beside the fixed `PAPER_DEFAULT` that it holds by default.

    Models differ in which features serve best (arXiv 2309.16588, section 3.3), so one setting for all would be unfair.

    Args:
        layers: indices; negative count from the last. By default the last four.
        features: by default all.
        biases_raw: biases of dot products. Their scale is the model's own, so that only 0 serves as a default.
        biases_normalized: biases of cosines.

    Raises:
        ValueError: if the grid is empty or one of its settings is no valid one.
    """
    comparisons = [(False, bias) for bias in biases_raw] + [(True, bias) for bias in biases_normalized]
    grid = [
        LostSettings(feature, layer, normalize, bias)
        for layer, feature, (normalize, bias) in product(layers, features, comparisons)
    ]
    if not grid:
        raise ValueError(
            "Expected at least one layer, one feature and one bias, got "
            f"{len(layers)} layers, {len(features)} features and {len(comparisons)} biases"
        )
    return grid


@dataclass(frozen=True)
class Discovery:
    """The object that LOST finds in one image.

    Attributes:
        box: in pixels, within the image.
        seed: row and column of the patch of the lowest degree.
        mask: bool `(rows, columns)`, the patches of the object: a 4-connected component that holds the seed.
        degree: int `(rows, columns)`, how many other patches each one has a positive similarity with.
    """

    box: Box
    seed: tuple[int, int]
    mask: NDArray[np.bool_]
    degree: NDArray[np.int64]

    @property
    def inverse_degree(self) -> NDArray[np.float64]:
        """High on objects, `(rows, columns)`. The patch itself counts too, as in the authors' maps: never infinite."""
        return 1 / (self.degree + 1)


def discover(
    features: Tensor,
    patch_size: int | tuple[int, int],
    image_size: tuple[int, int],
    *,
    normalize: bool,
    bias: float,
    num_expansion: int,
) -> Discovery:
    """Find one object with LOST (arXiv 2109.14279, section 3), computed as the authors' code does.

    Of equal degrees the patch of the lower index comes first (the authors leave that to their sort). Where no
    candidate has a positive similarity with the seed, the seed itself included, the seed alone is the object: a
    negative bias or a seed of zeros does that, and the authors' code stops there with an error.

    Args:
        features: of the patches without CLS and registers, `(rows, columns, d)`, any floating type; half precision is
            widened to float32.
        patch_size: of one patch in pixels, or its height and width.
        image_size: H, W of the image before it was padded at the right and the bottom to whole patches.
        normalize: see `LostSettings`, like the next two.
        bias: added to the similarities.
        num_expansion: number of candidates to join the seed; more than there are patches means all of them.

    Raises:
        ValueError: if features have another shape or type or are not finite, if that many patches do not make an
            image of this size, or as `LostSettings` does.
    """
    _check_comparison(normalize, bias, num_expansion)
    patch_height, patch_width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    _check_features(features, (patch_height, patch_width), image_size)
    similarity = _similarity(features.flatten(0, 1), normalize, bias)
    degree = (similarity > 0).sum(dim=1) - (similarity.diagonal() > 0).long()
    by_degree = degree.argsort(stable=True)
    expanded = _expand(similarity, by_degree, num_expansion)
    rows, columns = features.shape[:2]
    row, column = divmod(int(by_degree[0]), columns)
    mask = _component(expanded.reshape(rows, columns).cpu().numpy(), (row, column))
    box = _box(mask, (patch_height, patch_width), image_size)
    return Discovery(box, (row, column), mask, degree.reshape(rows, columns).cpu().numpy())


def intersection_over_union(a: Box, b: Box) -> float:
    """Common area of two boxes as a share of the area they cover together; 0 where both are empty.

    Raises:
        ValueError: if a box has a maximum below its minimum.
    """
    for box in (a, b):
        if box[2] < box[0] or box[3] < box[1]:
            raise ValueError(f"Expected a box (x_min, y_min, x_max, y_max) with minima up to its maxima, got {box}")
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    together = _area(a) + _area(b) - common
    return common / together if together else 0.0


def correct_localization(
    boxes: Sequence[Box], ground_truth: Sequence[Sequence[Box]], threshold: float = 0.5
) -> NDArray[np.bool_]:
    """Which images have their object found; the mean is CorLoc (arXiv 2109.14279, section 4).

    Args:
        boxes: the box found in each of B images.
        ground_truth: the true boxes of each; any one of them may be the one found.
        threshold: intersection over union from which a box is found; the usual 0.5 unless given.

    Returns:
        `(B,)`.

    Raises:
        ValueError: if there are no images, the two lengths differ, `threshold` is not within 0..1 or is 0, a box is
            inverted, or an image has no true box: nothing can be found there, and whether to count it is not for this
            function to say. The authors leave such images out.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"Expected a threshold above 0 and up to 1, got {threshold}")
    if len(boxes) == 0 or len(boxes) != len(ground_truth):
        raise ValueError(
            f"Expected one box and one list of true boxes for each image, got {len(boxes)} and {len(ground_truth)}"
        )
    empty = [index for index, truths in enumerate(ground_truth) if len(truths) == 0]
    if empty:
        raise ValueError(
            f"Expected a true box in every image, got none in {len(empty)} of {len(boxes)} (the first is image "
            f"{empty[0]}): leave those out, and say how many"
        )
    return np.array(
        [
            any(intersection_over_union(box, truth) >= threshold for truth in truths)
            for box, truths in zip(boxes, ground_truth)
        ]
    )


def _check_features(features: Tensor, patch_size: tuple[int, int], image_size: tuple[int, int]) -> None:
    """Raise unless these are finite features of the patches of such an image."""
    if features.ndim != 3 or not features.is_floating_point() or features.numel() == 0:
        raise ValueError(
            "Expected floating-point features of shape (rows, columns, d), got "
            f"{features.dtype} of shape {tuple(features.shape)}"
        )
    if min(*patch_size, *image_size) < 1:
        raise ValueError(f"Expected positive sizes, got patches of {patch_size} and an image of {image_size}")
    rows, columns = (-(-pixels // patch) for pixels, patch in zip(image_size, patch_size))
    if features.shape[:2] != (rows, columns):
        raise ValueError(
            f"Expected {rows} x {columns} patches of {patch_size[0]} x {patch_size[1]} pixels for an image of "
            f"{image_size[0]} x {image_size[1]}, got {features.shape[0]} x {features.shape[1]}"
        )
    if not features.isfinite().all():
        raise ValueError("Expected finite features, got NaN or infinity, which have no sign")


def _similarity(features: Tensor, normalize: bool, bias: float) -> Tensor:
    """Gram matrix `(N, N)` of features `(N, d)`, plus the bias."""
    features = features.detach().to(torch.promote_types(features.dtype, torch.float32))
    if normalize:
        features = F.normalize(features, dim=-1)
    return features @ features.T + bias


def _expand(similarity: Tensor, by_degree: Tensor, num_expansion: int) -> Tensor:
    """What every patch has in common with the seed and the candidates alike to it, summed: `(N,)`.

    The candidates are the first of `by_degree`, the patches in the order of their degree; its first is the seed.
    """
    candidates = by_degree[:num_expansion]
    alike = candidates[similarity[by_degree[0], candidates] > 0]
    return similarity[alike].sum(dim=0)


def _component(expanded: NDArray[np.floating], seed: tuple[int, int]) -> NDArray[np.bool_]:
    """The 4-connected patches with a positive sum around the seed, or the seed alone where its own is not."""
    labels, _ = scipy.ndimage.label(expanded > 0)
    if labels[seed]:
        return labels == labels[seed]
    alone = np.zeros(expanded.shape, dtype=bool)
    alone[seed] = True
    return alone


def _box(mask: NDArray[np.bool_], patch_size: tuple[int, int], image_size: tuple[int, int]) -> Box:
    """Extent of a mask of patches in pixels, cut at the image's right and bottom, where padding may follow."""
    rows, columns = np.nonzero(mask)
    (patch_height, patch_width), (height, width) = patch_size, image_size
    return (
        int(columns.min()) * patch_width,
        int(rows.min()) * patch_height,
        min((int(columns.max()) + 1) * patch_width, width),
        min((int(rows.max()) + 1) * patch_height, height),
    )


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])
