# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What each place of an image shows, read off frozen patch tokens by a linear classifier.

The problem is convex, its solver takes all tokens at once and nothing is drawn, so that two models differ by their
tokens alone. Scores of patches are upsampled to pixels as in the linear segmentation of DINOv2 (arXiv 2304.07193,
section 7.4), which trains on pixels instead.

Shapes: n images, P patches on a grid of rows x columns, D channels, H x W pixels, K classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_ITERATIONS, _PENALTY = 100, 1e-4  # of L-BFGS; weight of the squared weights beside the mean cross-entropy


@dataclass(frozen=True)
class DenseProbe:
    """A linear classifier of standardised patch tokens.

    Attributes:
        mean, std: of the tokens that it was fitted to, `(D,)`.
        weight, bias: `(K, D)` and `(K,)`.
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def predict(self, tokens: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Class of each pixel of images of a size, int64 `(n, H, W)`, from patch tokens `(n, P, D)`."""
        scores = F.linear((tokens.float() - self.mean) / self.std, self.weight, self.bias)
        maps = scores.transpose(1, 2).unflatten(2, grid)
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False).argmax(dim=1)


def fit_dense_probe(tokens: Tensor, labels: Tensor, grid: tuple[int, int], num_classes: int) -> DenseProbe:
    """Softmax regression of the shares that the classes have of each patch.

    Args:
        tokens: patch tokens, `(n, P, D)`.
        labels: class of each pixel, `(n, H, W)`; numbers outside 0 to K - 1 do not count.
        grid: rows and columns.
        num_classes: K.

    Raises:
        ValueError: if shapes do not fit, or no pixel has a class.
    """
    if tokens.ndim != 3 or len(tokens) != len(labels) or tokens.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"Expected tokens (n, {grid[0] * grid[1]}, D) of {len(labels)} images, got {tuple(tokens.shape)}"
        )
    shares = _shares(labels, grid, num_classes).flatten(0, 1).to(tokens.device)
    known = shares.sum(dim=1) > 0
    if not bool(known.any()):
        raise ValueError("Expected pixels with a class, got none")
    flat, targets = tokens.flatten(0, 1)[known].float(), shares[known]
    mean, std = flat.mean(dim=0), flat.std(dim=0, correction=0).clamp(min=1e-6)
    weight, bias = _fit((flat - mean) / std, targets)
    return DenseProbe(mean, std, weight, bias)


def _shares(labels: Tensor, grid: tuple[int, int], num_classes: int) -> Tensor:
    """Share of each class in the known pixels of each patch, `(n, P, K)`; all 0 where none is known."""
    rows, columns = grid
    if labels.shape[1] % rows or labels.shape[2] % columns:
        raise ValueError(f"Expected label maps that a grid of {rows} x {columns} divides, got {tuple(labels.shape)}")
    blocks = labels.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).transpose(2, 3).flatten(3).flatten(1, 2)
    known = (blocks >= 0) & (blocks < num_classes)
    counts = torch.zeros(*blocks.shape[:2], num_classes)
    counts.scatter_add_(2, blocks.where(known, 0).long(), known.float())
    return counts / counts.sum(dim=2, keepdim=True).clamp(min=1)


def _fit(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    # Tokens often come from under inference_mode, and the caller may be under it still.
    with torch.inference_mode(False), torch.enable_grad():
        features, targets = features.clone(), targets.clone()
        weight = features.new_zeros(targets.shape[1], features.shape[1]).requires_grad_()
        bias = features.new_zeros(targets.shape[1]).requires_grad_()
        solver = torch.optim.LBFGS([weight, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            solver.zero_grad()
            loss = F.cross_entropy(F.linear(features, weight, bias), targets) + _PENALTY * weight.square().sum()
            loss.backward()
            return loss

        solver.step(closure)
    return weight.detach(), bias.detach()
