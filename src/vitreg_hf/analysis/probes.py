# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What a token holds, asked with linear models: where it is and what it shows (local), and of which image (global).

Shapes: n tokens of several images, d channels, p pixel values of a patch, m tokens of the images kept for scoring.

Whether outlier tokens lost what normal ones keep is read off one probe, trained on all tokens of some images and
scored on all tokens of others: index a mask of outliers with `test_tokens` to split the scores. All randomness comes
from the generator that is passed in; results lie on the CPU. Reference: Darcet et al., Vision Transformers Need
Registers (arXiv 2309.16588), section 2.1, Figure 5b and Table 1, which publishes no optimiser and no penalties.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy, linear
from tqdm import tqdm

_ONE_IN = 5  # images: that many to score a local probe, and of each class that many to choose a penalty

# Of the position probe. The problem is convex and starts at zero, so these set how far it gets, not where it ends.
_BATCH, _LEARNING_RATE, _WEIGHT_DECAY = 1024, 1e-3, 1e-2
_CHUNK = 8192  # tokens taken to float64 at a time: no second copy of all features is made
_NOISE = 1e-7  # a channel whose spread is below this share of its mean is constant up to float32's rounding
_INVERSE_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C of the logistic regression; the smallest of equals is taken

_Inputs = Callable[[Tensor], Tensor]  # from token indices to standardised float64 features `(tokens, d)`


@dataclass(frozen=True)
class PositionScores:
    """Where a linear classifier puts the tokens of images that it was not trained on.

    Attributes:
        correct: whether the predicted grid position is the true one, bool `(m,)`.
        distance: Euclidean distance between the two, in patches, float64 `(m,)`.
        test_tokens: index of each scored token in the input, int64 `(m,)`.
    """

    correct: Tensor
    distance: Tensor
    test_tokens: Tensor


@dataclass(frozen=True)
class ReconstructionScores:
    """How well a linear map gives back the pixels of patches of images that it was not fitted to.

    Attributes:
        error: L2 norm over the p values of the difference, in the pixels' units, float64 `(m,)`; grows with p.
        test_tokens: index of each scored token in the input, int64 `(m,)`.
    """

    error: Tensor
    test_tokens: Tensor


@dataclass(frozen=True)
class DrawnAccuracy:
    """Accuracy over several draws of one random token per image.

    Attributes:
        mean: over draws, 0 to 1.
        std: sample standard deviation over draws (divisor draws - 1); NaN of a single draw, which shows no spread.
        accuracies: one per draw.
        n_train, n_test: images in training, images scored.
    """

    mean: float
    std: float
    accuracies: tuple[float, ...]
    n_train: int
    n_test: int


def split_images(image_index: Tensor, *, generator: Generator) -> tuple[Tensor, Tensor]:
    """Split tokens by their image, one image in five for scoring (at least one), so that none is on both sides.

    Args:
        image_index: image of each token, int `(n,)`, any numbering.
        generator: chooses the images; generators of one seed give one split.

    Returns:
        Indices of training tokens and of test tokens, int64, ascending.

    Raises:
        ValueError: if there are fewer than two images.
    """
    images, image_of_token = image_index.cpu().unique(return_inverse=True)
    if len(images) < 2:
        raise ValueError(f"Expected tokens of at least 2 images, one to train on and one to score, got {len(images)}")
    in_test = torch.zeros(len(images), dtype=torch.bool)
    in_test[_shuffled(len(images), generator)[: max(len(images) // _ONE_IN, 1)]] = True
    token_in_test = in_test[image_of_token]
    return (~token_in_test).nonzero().flatten(), token_in_test.nonzero().flatten()


def position_probe(
    features: Tensor,
    positions: Tensor,
    grid: tuple[int, int],
    image_index: Tensor,
    *,
    generator: Generator,
    steps: int = 5000,
) -> PositionScores:
    """Guess the grid position of a token by softmax regression, one class per position (2309.16588, Figure 5b).

    Recipe: features standardised with training statistics, weights from zero, cross-entropy, AdamW (learning rate 1e-3
    with a cosine to 0, weight decay 1e-2), batches of 1,024 tokens. It runs on the device of the features.

    Args:
        features: patch tokens, float `(n, d)`.
        positions: row and column of each token, int `(n, 2)`.
        grid: rows and columns.
        image_index: image of each token, int `(n,)`.
        generator: chooses test images as `split_images` does, then the order of training tokens.
        steps: of AdamW; by default 32 passes over four fifths of 200,000 tokens, and more over fewer.

    Raises:
        ValueError: if shapes do not fit, features are not finite, a position is off the grid, or there are no steps,
            or fewer than two images.
    """
    _check_tokens(features, image_index, positions, "positions")
    _check_positions(positions, grid)
    if steps < 1:
        raise ValueError(f"Expected at least 1 step, got {steps}")
    train, test = split_images(image_index, generator=generator)
    positions, inputs = positions.cpu(), _standardiser(features, train)
    classes = positions[:, 0] * grid[1] + positions[:, 1]
    weight, bias = _fit_softmax(inputs, classes, grid[0] * grid[1], train, steps, generator)
    guess = torch.cat([linear(inputs(part).float(), weight, bias).argmax(1).cpu() for part in test.split(_CHUNK)])
    difference = torch.stack((guess // grid[1], guess % grid[1]), dim=1) - positions[test]
    return PositionScores(guess == classes[test], difference.double().norm(dim=1), test)


def reconstruction_probe(
    features: Tensor, pixels: Tensor, image_index: Tensor, *, generator: Generator, ridge: float = 1e-6
) -> ReconstructionScores:
    """Give back a patch's pixels by linear least squares with an intercept, in float64 (2309.16588, Figure 5b).

    Args:
        features: patch tokens, float `(n, d)`; standardised with training statistics.
        pixels: values of each token's patch, float `(n, p)`: errors are in their units, the paper's are not known.
        image_index: image of each token, int `(n,)`.
        generator: chooses test images as `split_images` does: one seed gives both probes the same.
        ridge: penalty on squared weights per training token: 1e-6 makes collinear channels solvable, no more.

    Raises:
        ValueError: if shapes do not fit, values are not finite, `ridge` is not positive, or images are below two.
    """
    _check_tokens(features, image_index, pixels, "pixels")
    _check_features(pixels, "pixels")
    if ridge <= 0:
        raise ValueError(f"Expected a positive ridge, got {ridge}")
    train, test = split_images(image_index, generator=generator)
    pixels, inputs = pixels.detach().to(features.device), _standardiser(features, train)
    intercept = torch.stack([pixels[chunk].double().sum(0) for chunk in train.split(_CHUNK)]).sum(0) / len(train)
    gram = torch.eye(features.shape[1], dtype=torch.float64, device=features.device) * (ridge * len(train))
    cross = gram.new_zeros(features.shape[1], pixels.shape[1])
    for chunk in tqdm(train.split(_CHUNK), desc="reconstruction probe", disable=None, leave=False):
        gram += inputs(chunk).T @ inputs(chunk)
        cross += inputs(chunk).T @ (pixels[chunk].double() - intercept)
    weight = torch.cholesky_solve(cross, torch.linalg.cholesky(gram))
    misses = [inputs(chunk) @ weight + intercept - pixels[chunk].double() for chunk in test.split(_CHUNK)]
    return ReconstructionScores(torch.cat(misses).norm(dim=1).cpu(), test)


def choose_one(mask: Tensor, generator: Generator) -> Tensor:
    """Choose one marked patch per image, each with equal chance (2309.16588, Table 1).

    Args:
        mask: patches to choose from, bool `(images, patches)`.
        generator: draws the patches.

    Returns:
        Index of a patch per image, int64 `(images,)` on the mask's device; -1 where no patch is marked. Leave those
        images out and report `(chosen < 0).sum()`: a patch of another kind would answer another question.

    Raises:
        ValueError: if the mask is not bool `(images, patches)`.
    """
    if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[1] == 0:
        raise ValueError(f"Expected a bool mask (images, patches), got {mask.dtype} {tuple(mask.shape)}")
    # In double precision no two patches draw the same number, which would favour the first.
    lots = torch.rand(mask.shape, generator=generator, device=generator.device, dtype=torch.float64).to(mask.device)
    return lots.masked_fill(~mask, -1).argmax(dim=1).masked_fill(~mask.any(dim=1), -1)


def token_classification(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor, *, generator: Generator
) -> float:
    """Accuracy of a logistic regression that sees one token per image, 0 to 1 (2309.16588, Table 1).

    L2-regularised, by L-BFGS, on features standardised with training statistics. C is that of 1e-4, 1e-3, 1e-2, 0.1
    and 1 with the best accuracy on held-out training images (a fifth of each class, at least one of a class that has
    two); the model that is scored is fitted anew to all training images. Needs scikit-learn.

    Args:
        train_features: one token per training image, float `(n, d)`.
        train_labels: class indices, int `(n,)`.
        test_features: one token per test image, float `(m, d)`.
        test_labels: class indices, int `(m,)`.
        generator: chooses the held-out images.

    Raises:
        ValueError: if shapes do not fit, features are not finite, there are fewer than two classes, a class of the
            test images is not in training, no test image is there, or no class has two training images.
    """
    _check_classification(train_features, train_labels, test_features, test_labels)
    train, test = (features.detach().double().cpu().numpy() for features in (train_features, test_features))
    labels, right = train_labels.cpu().numpy(), test_labels.cpu().numpy()
    held_out = _held_out(labels, generator)
    accuracies = [
        _accuracy(train[~held_out], labels[~held_out], train[held_out], labels[held_out], c)
        for c in tqdm(_INVERSE_PENALTIES, desc="token classification", disable=None, leave=False)
    ]
    return _accuracy(train, labels, test, right, _INVERSE_PENALTIES[int(np.argmax(accuracies))])


def accuracy_over_draws(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor, *, generator: Generator
) -> DrawnAccuracy:
    """Accuracy of `token_classification` for several draws of one token per image (2309.16588, Tables 1 and 6).

    The held-out images are the same in all draws, so that the spread is that of the choice of tokens alone.

    Args: as there, but `train_features` and `test_features` are float `(draws, n, d)` and `(draws, m, d)`, the tokens
    chosen by as many calls of `choose_one`. CLS has one draw.

    Raises:
        ValueError: if the tensors do not hold the same number of draws, at least one; or as `token_classification`.
    """
    train, test = tuple(train_features.shape), tuple(test_features.shape)
    if not len(train) == len(test) == 3 or not 0 < train[0] == test[0]:
        raise ValueError(f"Expected features (draws, n, d) and (draws, m, d) of as many draws, got {train} and {test}")
    draws = list(zip(train_features, test_features, strict=True))
    for of_train, of_test in draws:  # all of them before the first is fitted
        _check_classification(of_train, train_labels, of_test, test_labels)
    state, accuracies = generator.get_state(), []
    for of_train, of_test in draws:
        generator.set_state(state)  # the same held-out images
        accuracies.append(token_classification(of_train, train_labels, of_test, test_labels, generator=generator))
    std = float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else float("nan")
    return DrawnAccuracy(float(np.mean(accuracies)), std, tuple(accuracies), train[1], test[1])


def _check_features(features: Tensor, name: str) -> None:
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"Expected {name} of floats, a row each, got {features.dtype} {tuple(features.shape)}")
    if not features.isfinite().all():
        raise ValueError(f"Expected finite {name}, got NaN or infinity")


def _check_tokens(features: Tensor, image_index: Tensor, targets: Tensor, name: str) -> None:
    _check_features(features, "features")
    n, got = len(features), f"{tuple(targets.shape)} and {tuple(image_index.shape)}"
    if targets.ndim != 2 or len(targets) != n or image_index.shape != (n,):
        raise ValueError(f"Expected {name} ({n}, ...) and image_index ({n},) for as many features, got {got}")


def _check_positions(positions: Tensor, grid: tuple[int, int]) -> None:
    if positions.shape[1] != 2 or positions.is_floating_point():
        raise ValueError(f"Expected integer positions (n, 2), got {positions.dtype} {tuple(positions.shape)}")
    if ((positions < 0) | (positions >= positions.new_tensor(grid))).any():
        got = f"{positions.amin(0).tolist()} to {positions.amax(0).tolist()}"
        raise ValueError(f"Expected positions on a grid of {grid[0]} x {grid[1]}, got {got}")


def _check_classification(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> None:
    for features, labels, name in ((train, train_labels, "train"), (test, test_labels, "test")):
        _check_features(features, f"{name}_features")
        if labels.shape != features.shape[:1] or labels.is_floating_point():
            got = f"{labels.dtype} {tuple(labels.shape)}"
            raise ValueError(f"Expected integer {name}_labels ({len(features)},), got {got}")
    if train.shape[1] != test.shape[1] or len(test) == 0:
        raise ValueError(f"Expected test_features (1 or more, {train.shape[1]}), got {tuple(test.shape)}")
    classes, counts = train_labels.unique(return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"Expected at least 2 classes in training, got {len(classes)}")
    if counts.max() < 2:
        raise ValueError("Expected a class with 2 training images or more, one to choose C, got 1 image of each class")
    if missing := sorted(set(test_labels.tolist()) - set(classes.tolist())):
        raise ValueError(f"Expected every class of the test images in training, got none of {missing}")


def _shuffled(count: int, generator: Generator) -> Tensor:
    """Indices on the CPU, whichever device the generator is on."""
    return torch.randperm(count, generator=generator, device=generator.device).cpu()


def _standardiser(features: Tensor, train: Tensor) -> _Inputs:
    """Standardise with the statistics of the training tokens; a constant channel is only centred."""
    features, chunks = features.detach(), train.split(_CHUNK)
    mean = torch.stack([features[chunk].double().sum(0) for chunk in chunks]).sum(0) / len(train)
    squares = torch.stack([(features[chunk].double() - mean).square().sum(0) for chunk in chunks]).sum(0)
    std = (squares / len(train)).sqrt()
    std = std.where(std > _NOISE * mean.abs(), 1.0)
    return lambda tokens: (features[tokens].double() - mean) / std


def _batches(tokens: Tensor, generator: Generator) -> Iterator[Tensor]:
    """Endless batches of equal size; a pass drops what is left over, a different rest each time."""
    size = min(_BATCH, len(tokens))
    while True:
        order = tokens[_shuffled(len(tokens), generator)]
        yield from order[: len(order) // size * size].split(size)


def _fit_softmax(
    inputs: _Inputs, targets: Tensor, classes: int, train: Tensor, steps: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Weight `(classes, d)` and bias `(classes,)` of a linear classifier, float32."""
    # Tokens often come from under inference_mode, and the caller may be under it still.
    with torch.inference_mode(False), torch.enable_grad():
        example = inputs(train[:1]).float()
        weight = example.new_zeros(classes, example.shape[1]).requires_grad_()
        bias = example.new_zeros(classes).requires_grad_()
        optimizer = torch.optim.AdamW([weight, bias], lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        batches = islice(_batches(train, generator), steps)
        for batch in tqdm(batches, total=steps, desc="position probe", disable=None, leave=False):
            logits = linear(inputs(batch).float(), weight, bias)
            optimizer.zero_grad()
            cross_entropy(logits, targets[batch].to(logits.device)).backward()
            optimizer.step()
            schedule.step()
    return weight.detach(), bias.detach()


def _held_out(labels: np.ndarray, generator: Generator) -> np.ndarray:
    """Mask of the images that choose C: a fifth of each class, at least one where the class keeps another."""
    held_out = np.zeros(len(labels), dtype=bool)
    order = _shuffled(len(labels), generator).numpy()
    for label in np.unique(labels):
        of_class = order[labels[order] == label]
        held_out[of_class[: max(len(of_class) // _ONE_IN, min(len(of_class) - 1, 1))]] = True
    return held_out


def _accuracy(train: np.ndarray, labels: np.ndarray, test: np.ndarray, right: np.ndarray, c: float) -> float:
    from sklearn.linear_model import LogisticRegression  # takes a second to import
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))  # as many as DINOv2 allows
    return float(np.mean(classifier.fit(train, labels).predict(test) == right))
