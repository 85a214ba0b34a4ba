# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Linear classifiers on frozen features, with many settings at once, as DINOv2 evaluates (arXiv 2304.07193).

A classifier reads CLS of the last block or of the last four, with or without the mean of the last block's patches, and
has one of 13 learning rates: 52 of them learn from one pass of the backbone. None reads registers.

Shapes: B images, D channels of the backbone, N classifiers, K classes.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from vitreg_hf.model.modeling_vitreg import ViTRegModel
from vitreg_hf.training.schedules import cosine

BLOCKS = (1, 4)
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
_REFERENCE_BATCH = 256
_INITIAL_STD = 0.01


class Features(NamedTuple):
    """What a classifier reads.

    Attributes:
        blocks: CLS of so many of the last blocks, one after the other.
        average_pool: and the mean of the patches of the last block.
    """

    blocks: int
    average_pool: bool

    def width(self, hidden_size: int) -> int:
        """Channels, where the backbone has D."""
        return hidden_size * (self.blocks + self.average_pool)


class Probe(NamedTuple):
    """One classifier: what it reads, and its learning rate for batches of 256 images."""

    features: Features
    learning_rate: float


def probe_grid(blocks: Sequence[int] = BLOCKS, learning_rates: Sequence[float] = LEARNING_RATES) -> tuple[Probe, ...]:
    """Every combination; those that read the same stand together."""
    kinds = [Features(count, average) for count in blocks for average in (False, True)]
    return tuple(Probe(kind, rate) for kind in kinds for rate in learning_rates)


@torch.no_grad()
def probe_features(model: ViTRegModel, pixel_values: Tensor, blocks: Sequence[int]) -> dict[Features, Tensor]:
    """All that the classifiers read of a batch, from one pass of the backbone, after its final norm.

    Args:
        model: in evaluation mode.
        pixel_values: `(B, C, H, W)`.
        blocks: numbers of last blocks.

    Returns:
        `(B, width)` in float32, by what it is.

    Raises:
        ValueError: if the model has fewer blocks, or no CLS.
    """
    layers = model.get_intermediate_layers(pixel_values, n=max(blocks), return_class_token=True)
    mean = layers[-1][0].float().mean(dim=1)
    read: dict[Features, Tensor] = {}
    for count in blocks:
        tokens = torch.cat([cls_token.float() for _, cls_token in layers[len(layers) - count :]], dim=-1)
        read[Features(count, False)] = tokens
        read[Features(count, True)] = torch.cat([tokens, mean], dim=-1)
    return read


class LinearProbes(nn.Module):
    """Independent linear classifiers; those that read the same are one product of matrices.

    Args:
        grid: the classifiers, those that read the same together.
        hidden_size: D.
        num_classes: K.
    """

    def __init__(self, grid: Sequence[Probe], hidden_size: int, num_classes: int) -> None:
        super().__init__()
        self.grid = tuple(grid)
        classifiers = [nn.Linear(probe.features.width(hidden_size), num_classes) for probe in self.grid]
        for classifier in classifiers:
            nn.init.normal_(classifier.weight, std=_INITIAL_STD)
            nn.init.zeros_(classifier.bias)
        self.classifiers = nn.ModuleList(classifiers)

    def forward(self, features: Mapping[Features, Tensor]) -> Tensor:
        """Logits `(N, B, K)`, in the order of the grid, of features `(B, width)`."""
        logits = []
        for kind in dict.fromkeys(probe.features for probe in self.grid):
            same = [one for one, probe in zip(self.classifiers, self.grid, strict=True) if probe.features == kind]
            weight, bias = (torch.cat([getattr(one, name) for one in same]) for name in ("weight", "bias"))
            logits.append(F.linear(features[kind], weight, bias).unflatten(-1, (len(same), -1)).transpose(0, 1))
        return torch.cat(logits)


def probe_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy `(N,)` of each classifier, mean over B, of logits `(N, B, K)` and class indices `(B,)`.

    Their sum has the gradients that every classifier would have alone.
    """
    every = labels.expand(len(logits), -1)
    return F.cross_entropy(logits.flatten(0, 1), every.flatten(), reduction="none").view_as(every).mean(dim=1)


def create_probe_optimizer(probes: LinearProbes, images_per_step: int) -> SGD:
    """SGD with momentum 0.9 and no weight decay; learning rates grow with the images per step of all processes."""
    rates = dict.fromkeys(probe.learning_rate for probe in probes.grid)
    return SGD(
        [
            {
                "params": [
                    parameter
                    for one, probe in zip(probes.classifiers, probes.grid, strict=True)
                    if probe.learning_rate == rate
                    for parameter in one.parameters()
                ],
                "lr": rate * images_per_step / _REFERENCE_BATCH,
            }
            for rate in rates
        ],
        lr=0.0,
        momentum=0.9,
    )


def create_probe_schedule(optimizer: torch.optim.Optimizer, num_steps: int) -> LambdaLR:
    """Half a cosine from the learning rates to 0."""
    return LambdaLR(optimizer, lambda step: cosine(1.0, 0.0, step, num_steps))
