# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Which patches of many images are outliers, from their records, and what that says of each image.

Shapes: n images, B images of a batch of records, T prefix tokens, P patches. "states" are the residual stream before
the first block and after each.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vitreg_hf.analysis.attention import area
from vitreg_hf.analysis.records import Batch, Records
from vitreg_hf.analysis.token_norms import Bimodality, bimodality, checked_rule, cutoff


@dataclass(frozen=True)
class OutlierRule:
    """What counts as an outlier.

    Attributes:
        rule, value: as `token_norms.cutoff` reads them.
        layer: block after which norms are compared with the cutoff, from 1; negative counts from the last. The last is
            the paper's; some models shrink all norms there, so that the one before shows more.
    """

    rule: str = "median"
    value: float | None = None
    layer: int = -1

    def __post_init__(self) -> None:
        checked_rule(self.rule, self.value)

    def state(self, layers: int) -> int:
        """Index of the state after that block.

        Raises:
            ValueError: if there is no such block.
        """
        if not (1 <= self.layer <= layers or -layers <= self.layer <= -1):
            raise ValueError(f"Expected one of the layers 1 to {layers}, or -{layers} to -1, got {self.layer}")
        return self.layer if self.layer > 0 else layers + 1 + self.layer


@dataclass(frozen=True)
class Outliers:
    """The patches of all images that are outliers.

    Attributes:
        threshold: cutoff, in units of the residual stream.
        state: index of the state that it applies to.
        groups: test of two groups of the norms in that state.
    """

    threshold: float
    state: int
    groups: Bimodality

    def mask(self, batch: Batch) -> NDArray[np.bool_]:
        """Which patches of a batch of records are outliers, `(B, P)`."""
        return batch["norms"][:, self.state] > self.threshold


def find_outliers(records: Records, rule: OutlierRule, layers: int) -> Outliers:
    """Choose the cutoff from the norms of all images."""
    state = rule.state(layers)
    norms = records.norms(state)
    return Outliers(cutoff(norms, rule.rule, rule.value), state, bimodality(norms))


def position_share(records: Records, outliers: Outliers, grid: tuple[int, int]) -> NDArray[np.float64]:
    """Share of images with an outlier at each position, `(rows, columns)` (appendix A of the paper)."""
    return records.mean(outliers.mask).reshape(grid)


# Numbers of each image


def per_image(records: Records, outliers: Outliers) -> dict[str, NDArray[np.float64]]:
    """One number per image, each `(n,)`, NaN where an image does not have the quantity."""
    rows = [_of_batch(batch, outliers) for batch in records.measured()]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _of_batch(batch: Batch, outliers: Outliers) -> dict[str, NDArray[np.float64]]:
    mask, norms = outliers.mask(batch), batch["norms"][:, outliers.state].astype(np.float64)
    prefix = batch["mass"].shape[2]
    received = batch["received"][:, -1, prefix:] * batch["received"].shape[2]  # times uniform
    numbers = {
        "outlier_share": mask.mean(axis=1),
        "median_norm": np.median(norms, axis=1),
        "largest_over_median": norms.max(axis=1) / np.median(norms, axis=1),
        "neighbours_of_outliers": _mean_where(batch["neighbours"], mask),
        "neighbours_of_normal": _mean_where(batch["neighbours"], ~mask),
        "received_by_outliers": _mean_where(received, mask),
        "received_by_normal": _mean_where(received, ~mask),
    }
    if prefix:
        maps = torch.from_numpy(batch["maps"]).mean(dim=1)[:, :1]  # (B, 1, P) of the first prefix token, as one row
        numbers["first_token_area"] = area(maps).double().numpy()
        on_registers = batch["mass"][..., 1].astype(np.float64)  # exactly 0 where there are none
        numbers["mass_on_registers"] = on_registers[:, -1, 0] if on_registers.any() else np.full(len(mask), np.nan)
    return numbers


def _mean_where(values: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    count = mask.sum(axis=1)
    return np.where(count > 0, (values.astype(np.float64) * mask).sum(axis=1) / np.maximum(count, 1), np.nan)
