# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What outlier tokens hold, asked of a model: position and pixels (local), the class of the image (global).

A second pass over images whose outliers are known. Features are the tokens of the last block after the final norm.
Shapes: n images, P patches on a grid of rows x columns, D channels, p pixel values of a patch, K draws.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from vitreg_hf.analysis.extract import Subject, normed, read
from vitreg_hf.analysis.images import ImageFiles, as_seen, labelled_split
from vitreg_hf.analysis.intervals import mean_interval
from vitreg_hf.analysis.measure import Pass, decode
from vitreg_hf.analysis.outliers import Outliers
from vitreg_hf.analysis.probes import accuracy_over_draws, choose_one, position_probe, reconstruction_probe
from vitreg_hf.analysis.recorder import Readers
from vitreg_hf.analysis.token_norms import outlier_mask, patch_norms

SAME_IMAGES = "normal, images with outliers"
_PATCHES_PER_IMAGE = 32  # of each kind: more of the same image add little
_CLASSIFIED_AT_MOST = 10_000  # images, so that their tokens fit into memory


@dataclass(frozen=True)
class TokenBatch:
    """Tokens of some images.

    Attributes:
        indices: which images of the batch could be decoded.
        cls, registers: `(B, D)` or None, `(B, R, D)` or None.
        patches: `(B, P, D)`.
        outliers: which patches are, boolean `(B, P)`.
        pixels: of each patch, RGB from 0 to 1, `(B, P, p)`.
    """

    indices: list[int]
    cls: Tensor | None
    registers: Tensor | None
    patches: Tensor
    outliers: Tensor
    pixels: Tensor


def token_batches(
    subject: Subject, images: ImageFiles, how: Pass, outliers: Outliers, purpose: str
) -> Iterator[TokenBatch]:
    """Run images through a model and hand out their tokens, on the CPU; `indices` count over all images."""
    last = len(subject.anatomy.blocks)
    readers = Readers(hidden=lambda layer, state: state if layer in (outliers.state, last) else None)
    starts = range(0, len(images), how.batch_size)
    for start in tqdm(starts, desc=purpose, unit="batch"):
        kept, pixel_values = decode(images.files[start : start + how.batch_size], subject.preprocess, how)
        if pixel_values is None:
            continue
        states = read(subject, pixel_values, readers).hidden
        tokens, layout = normed(subject, states[last]).float().cpu(), subject.layout
        mask = outlier_mask(patch_norms(states[outliers.state], layout), outliers.threshold).cpu()
        pixels = _patch_pixels(as_seen(pixel_values, subject.preprocess), layout.patch_size)
        yield TokenBatch(
            [start + index for index in kept],
            layout.cls_token(tokens),
            layout.register_tokens(tokens),
            layout.patch_tokens(tokens),
            mask,
            pixels,
        )


def _patch_pixels(seen: NDArray[np.uint8], patch_size: tuple[int, int]) -> Tensor:
    images, (height, width) = torch.from_numpy(seen).float() / 255, patch_size
    blocks = images.unflatten(2, (-1, width)).unflatten(1, (-1, height))  # B, rows, height, columns, width, 3
    return blocks.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)


# Local


def local_probes(
    subject: Subject, images: ImageFiles, how: Pass, outliers: Outliers, grid: tuple[int, int], seed: int = 0
) -> dict[str, Any]:
    """How well a linear model reads position and pixels off outlier and off normal patches (Fig. 5b of the paper).

    One probe each is trained on patches of both kinds of four fifths of the images, and scored on those of the rest.

    Returns:
        Per kind and quantity a mean over images: `position_top1` (share), `position_distance` (patches),
        `reconstruction_error` (L2 over the pixels of a patch, RGB from 0 to 1).

    Raises:
        ValueError: if there are too few images to train and to score.
    """
    chosen = [_local_tokens(batch, grid, seed) for batch in token_batches(subject, images, how, outliers, "Tokens")]
    features, positions, pixels, image, outlier = (torch.cat(parts) for parts in zip(*chosen, strict=True))
    place = position_probe(features, positions, grid, image, generator=torch.Generator().manual_seed(seed))
    picture = reconstruction_probe(features, pixels, image, generator=torch.Generator().manual_seed(seed))
    scores = {
        "position_top1": (place.correct.double(), place.test_tokens),
        "position_distance": (place.distance, place.test_tokens),
        "reconstruction_error": (picture.error, picture.test_tokens),
    }
    return {
        kind: {
            name: asdict(mean_interval(_mean_per_image(values, image[tokens], outlier[tokens] == is_outlier)))
            for name, (values, tokens) in scores.items()
        }
        for kind, is_outlier in (("normal", False), ("outlier", True))
    }


def _local_tokens(batch: TokenBatch, grid: tuple[int, int], seed: int) -> tuple[Tensor, ...]:
    """Features, positions, pixels, image index and kind of some outliers and some normal patches of each image."""
    order = torch.stack([torch.rand(len(o), generator=g) for o, g in zip(batch.outliers, _generators(batch, seed))])
    chosen = torch.zeros_like(batch.outliers)
    for kind in (batch.outliers, ~batch.outliers):
        rank = order.masked_fill(~kind, 2).argsort(dim=1).argsort(dim=1)
        chosen |= kind & (rank < _PATCHES_PER_IMAGE)
    image, patch = chosen.nonzero(as_tuple=True)
    positions = torch.stack([patch // grid[1], patch % grid[1]], dim=1)
    index = torch.tensor(batch.indices)[image]
    return batch.patches[image, patch], positions, batch.pixels[image, patch], index, batch.outliers[image, patch]


def _mean_per_image(values: Tensor, image: Tensor, wanted: Tensor) -> NDArray[np.float64]:
    values, image = values[wanted].double(), image[wanted]
    _, number = image.unique(return_inverse=True)
    total = torch.zeros(int(number.max()) + 1 if len(number) else 0, dtype=torch.float64)
    counts = total.clone().index_add(0, number, torch.ones(len(number), dtype=torch.float64))
    return (total.index_add(0, number, values) / counts).numpy()


# Global


def token_table(
    subject: Subject, images: ImageFiles, how: Pass, outliers: Outliers, draws: int = 5, seed: int = 0
) -> dict[str, Any]:
    """Accuracy of image classification from one token: [CLS], or a random normal, outlier or register (Table 1).

    Logistic regression on one token per image; `draws` times another random token. Images without a token of a kind
    are left out of its row. Which images are for training, `images.labelled_split` says.

    Of more than 10,000 images so many are taken, at random.

    Returns:
        Per kind: `accuracy` and `std` over draws, the `accuracies`, images for training and scoring, and how many
        images have no such token; or None where too few are left to classify.

    Raises:
        ValueError: if the images are not in one folder per class.
    """
    files, labels, for_training = labelled_split(images, seed)
    if len(files) > _CLASSIFIED_AT_MOST:
        kept = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:_CLASSIFIED_AT_MOST].sort()[
            0
        ]
        files, labels, for_training = files.only(kept.tolist()), labels[kept], for_training[kept]
    rows = [_drawn(batch, draws, seed) for batch in token_batches(subject, files, how, outliers, "Tokens of images")]
    index = torch.cat([row.pop("index") for row in rows])
    tokens = {kind: torch.cat([row[kind] for row in rows]) for kind in rows[0]}  # (n, K, D), NaN where there is none
    return {kind: _accuracy(drawn, labels[index], for_training[index], seed) for kind, drawn in tokens.items()} | {
        "classes": len(set(labels.tolist())),
        "chance": _chance(labels[index][~for_training[index]]),
    }


def _generators(batch: TokenBatch, seed: int) -> list[torch.Generator]:
    """One generator per image, that what is drawn of it does not depend on the batch that it is in."""
    states = (np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] for index in batch.indices)
    return [torch.Generator().manual_seed(int(state) >> 1) for state in states]


def _drawn(batch: TokenBatch, draws: int, seed: int) -> dict[str, Tensor]:
    """K random tokens of each kind of each image, `(B, K, D)`; [CLS] is one and the same, `(B, 1, D)`."""
    generators = _generators(batch, seed)
    kinds = {"normal": _draw(batch.patches, ~batch.outliers, draws, generators)}
    kinds["outlier"] = _draw(batch.patches, batch.outliers, draws, generators)
    has_outlier = batch.outliers.any(dim=1)[:, None, None]
    kinds[SAME_IMAGES] = kinds["normal"].masked_fill(~has_outlier, torch.nan)  # for a comparison on equal images
    if batch.registers is not None:
        all_of_them = torch.ones(batch.registers.shape[:2], dtype=torch.bool)
        kinds["register"] = _draw(batch.registers, all_of_them, draws, generators)
    if batch.cls is not None:
        kinds = {"CLS": batch.cls[:, None], **kinds}
    return {**kinds, "index": torch.tensor(batch.indices)}


def _draw(tokens: Tensor, mask: Tensor, draws: int, generators: list[torch.Generator]) -> Tensor:
    of_images = zip(mask.expand(draws, -1, -1).unbind(1), generators, strict=True)  # K rows of one image at a time
    chosen = torch.stack([choose_one(rows, generator) for rows, generator in of_images])  # (B, K)
    picked = tokens[torch.arange(len(tokens))[:, None], chosen.clamp(min=0)]
    return picked.masked_fill((chosen < 0)[..., None], torch.nan)


def _accuracy(drawn: Tensor, labels: Tensor, for_training: Tensor, seed: int) -> dict[str, Any] | None:
    has_one = ~drawn[:, 0, 0].isnan()
    train, test = has_one & for_training, has_one & ~for_training
    known = torch.isin(labels, labels[train].unique())  # a class that no training image shows cannot be learned
    unknown, test = test & ~known, test & known
    if len(labels[train].unique()) < 2 or not bool(test.any()):
        return None
    by_draw = drawn.transpose(0, 1)
    scored = accuracy_over_draws(
        by_draw[:, train],
        labels[train],
        by_draw[:, test],
        labels[test],
        generator=torch.Generator().manual_seed(seed),
    )
    return {
        "accuracy": scored.mean,
        "std": scored.std,
        "accuracies": list(scored.accuracies),
        "train_images": scored.n_train,
        "test_images": scored.n_test,
        "images_without": int((~has_one).sum()),
        "images_of_unknown_class": int(unknown.sum()),
    }


def _chance(labels: Tensor) -> float:
    """Accuracy of always naming the most frequent class."""
    return float(labels.bincount().max() / len(labels))
