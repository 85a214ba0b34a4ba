# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What an ablation costs: each image with replaced tokens against itself without, and means over images.

Shapes: m images of all batches, B images of one, N tokens, P patches, D channels, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Generator, Tensor

from vitreg_hf.analysis.intervals import difference_interval, mean_interval
from vitreg_hf.analysis.probes import token_classification
from vitreg_hf.analysis.report import Table, interval
from vitreg_hf.model.token_layout import TokenLayout

_POOLED = "pooled"  # the one quantity that is a vector per image


@dataclass(frozen=True)
class Outcome:
    """What one pass leaves: tokens after the final norm `(B, N, D)`, and logits `(B, K)` of a head or None."""

    tokens: Tensor
    logits: Tensor | None


def costs(
    before: Outcome, after: Outcome, layout: TokenLayout, slots: Tensor, complete: Tensor, labels: Tensor | None
) -> dict[str, Tensor]:
    """Compare a batch with itself.

    Args:
        before, after: without and with replaced tokens.
        layout: of the tokens.
        slots: `(B, N)`, -1 for tokens that were not replaced.
        complete: boolean `(B,)`, whether an image counts.
        labels: `(B,)` or None.

    Returns:
        Per image, `(B,)`, NaN where it does not count: `tokens` replaced, `pooled_cosine`, `patch_cosine` over patches
        that were not replaced; with a head `agreement`, with labels too `accuracy`. With labels but no head `pooled`,
        `(B, D)`.
    """
    replaced = slots >= 0
    kept = layout.patches_of(~replaced)
    alike = _cosine(layout.patch_tokens(before.tokens), layout.patch_tokens(after.tokens))
    measured = {
        "tokens": replaced.sum(dim=1),
        "pooled_cosine": _cosine(_pooled(before, layout), _pooled(after, layout)),
        "patch_cosine": alike.where(kept, 0.0).sum(dim=1) / kept.sum(dim=1),
    }
    if before.logits is not None and after.logits is not None:
        answers = after.logits.argmax(dim=1)
        measured["agreement"] = answers == before.logits.argmax(dim=1)
        if labels is not None:
            measured["accuracy"] = answers == labels
    elif labels is not None:
        measured[_POOLED] = _pooled(after, layout)
    return {name: _where(value.double(), complete) for name, value in measured.items()}


def _pooled(outcome: Outcome, layout: TokenLayout) -> Tensor:
    """CLS, or the mean patch of a model without, `(B, D)`."""
    cls_token = layout.cls_token(outcome.tokens)
    return layout.patch_tokens(outcome.tokens).mean(dim=1) if cls_token is None else cls_token


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    """Cosine similarity over the last dimension, by the distance of unit vectors: equal ones give 1 exactly."""
    distance = F.normalize(first.double(), dim=-1) - F.normalize(second.double(), dim=-1)
    return 1 - distance.square().sum(dim=-1) / 2


def _where(values: Tensor, complete: Tensor) -> Tensor:
    return values.masked_fill(~complete.view(-1, *[1] * (values.ndim - 1)), torch.nan)


# Means over images


def summary(
    scores: Mapping[str, NDArray[Any]],
    unablated: Mapping[str, NDArray[Any]],
    labels: Tensor | None,
    seed: int,
) -> dict[str, Any]:
    """Means over images with intervals, `accuracy_change` where there is an accuracy, `probe_accuracy` of a probe.

    Args:
        scores: `costs` of all images, `(m,)` each, `(m, D)` for `pooled`.
        unablated: the same of the model against itself, which a probe is trained on.
        labels: `(m,)` or None.
        seed: of the halves and of the probe's held-out images.
    """
    row = {name: asdict(mean_interval(values)) for name, values in scores.items() if name != _POOLED}
    if "accuracy" in scores:
        row["accuracy_change"] = asdict(difference_interval(unablated["accuracy"], scores["accuracy"]))
    if _POOLED in scores and labels is not None:
        row["probe_accuracy"] = _probe(scores[_POOLED], unablated[_POOLED], labels, seed)
    return row


def _probe(after: NDArray[Any], before: NDArray[Any], labels: Tensor, seed: int) -> dict[str, Any]:
    """Accuracy of a probe on ablated features of one half of the images, trained on unablated ones of the other."""
    train = training_half(labels, torch.Generator().manual_seed(seed))
    test = ~train & ~torch.from_numpy(after).isnan()[:, 0]
    if not bool(test.any()):
        return asdict(mean_interval(np.array([])))
    features, scored = torch.from_numpy(before)[train], torch.from_numpy(after)[test]
    generator = torch.Generator().manual_seed(seed)
    accuracy = token_classification(features, labels[train], scored, labels[test], generator=generator)
    # Resampling images asks only how many of them were right, not which.
    right = np.arange(len(scored)) < round(accuracy * len(scored))
    return asdict(mean_interval(right.astype(np.float64)))


def training_half(labels: Tensor, generator: Generator) -> Tensor:
    """Half of the images of each class, boolean `(m,)`; the larger half where their number is odd."""
    rank, half = torch.rand(len(labels), generator=generator), torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        half[members[rank[members].argsort()][: (len(members) + 1) // 2]] = True
    return half


# Report

_COLUMNS = {
    "tokens": ("tokens per image", 1),
    "pooled_cosine": ("cosine of CLS or mean patch", 1),
    "patch_cosine": ("cosine of other patches", 1),
    "agreement": ("same answer, %", 100),
    "accuracy": ("accuracy, %", 100),
    "accuracy_change": ("change of accuracy, points", 100),
    "probe_accuracy": ("accuracy of a probe, %", 100),
}


def cost_table(results: Mapping[str, Any], kind: str) -> Table:
    """One row for the unablated model, then two per mode: tokens of a `kind`, and the control."""
    columns = [name for name in _COLUMNS if name in results["unablated"]]
    rows = [("none", "", *_cells(results["unablated"], columns))]
    for mode, places in results["modes"].items():
        rows.append((mode, kind.lower(), *_cells(places["ablated"], columns)))
        rows.append((mode, "random patches", *_cells(places["control"], columns)))
    header = ("replaced by", "what", *(_COLUMNS[name][0] for name in columns))
    return Table(header, rows, f"{kind}: what replacing them costs")


def _cells(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, ...]:
    return tuple(interval(row[name], factor=_COLUMNS[name][1]) for name in columns)
