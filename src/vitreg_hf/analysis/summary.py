# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""From records of many images to the numbers of a report: plain dicts, whose units stand in `units`.

Shapes: n images, L layers, h heads, T prefix tokens, P patches. "states" are the residual stream before the first
block and after each: state 0 is what the first block gets, state i what block i (from 1) leaves.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitreg_hf.analysis.attention import area, centre, entropy, overlap
from vitreg_hf.analysis.extract import Subject
from vitreg_hf.analysis.features import linear_cka
from vitreg_hf.analysis.intervals import Interval, mean_interval
from vitreg_hf.analysis.measure import Arrays, Records
from vitreg_hf.analysis.sinks import EPSILON
from vitreg_hf.analysis.token_norms import CUTOFF_RULES, Bimodality, bimodality, cutoff

_HALF = 0.5
_CKA_AT_MOST = 2_000  # images; beyond, features would fill memory and the number no longer moves


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
        cutoff(np.ones(1, np.float32), self.rule, self.value) if self.rule != "mixture" else None

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

    def mask(self, batch: Arrays) -> NDArray[np.bool_]:
        """Which patches of a batch of records are outliers, `(B, P)`."""
        return batch["norms"][:, self.state] > self.threshold


def find_outliers(records: Records, rule: OutlierRule, layers: int) -> Outliers:
    """Choose the cutoff from the norms of all images."""
    state = rule.state(layers)
    norms = records.norms(state)
    return Outliers(cutoff(norms, rule.rule, rule.value), state, bimodality(norms))


def summarize(records: Records, rule: OutlierRule, subject: Subject, grid: tuple[int, int]) -> dict[str, Any]:
    """The sections `outliers`, `layers`, `attention` and `sinks` of a report.

    Args:
        records: of `measure`.
        rule: what counts as an outlier.
        subject: the model that was measured.
        grid: rows and columns of patches.
    """
    layers = len(subject.anatomy.blocks)
    outliers = find_outliers(records, rule, layers)
    images = per_image(records, outliers)
    states = _by_state(records, outliers)
    return {
        "outliers": _outlier_section(records, rule, outliers, images, states, grid),
        "layers": states,
        "attention": attention_section(records, subject.anatomy.prefix_names, images, grid),
        "sinks": _sink_section(records, subject.anatomy.prefix_names, images),
    }


# Numbers of each image


def per_image(records: Records, outliers: Outliers) -> dict[str, NDArray[np.float64]]:
    """One number per image, each `(n,)`, NaN where an image does not have the quantity."""
    rows = [_of_batch(batch, outliers) for batch in records.measured()]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _of_batch(batch: Arrays, outliers: Outliers) -> dict[str, NDArray[np.float64]]:
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
        maps = torch.from_numpy(batch["maps"]).mean(dim=1)[:, 0, None]  # (B, 1, P): of the first prefix token
        numbers["cls_entropy"] = entropy(maps).double().numpy()
        numbers["cls_mass_on_registers"] = batch["mass"][:, -1, 0, 1].astype(np.float64)
    return numbers


def _mean_where(values: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    count = mask.sum(axis=1)
    return np.where(count > 0, (values.astype(np.float64) * mask).sum(axis=1) / np.maximum(count, 1), np.nan)


# Outliers


def _outlier_section(
    records: Records,
    rule: OutlierRule,
    outliers: Outliers,
    images: dict[str, NDArray[np.float64]],
    states: list[dict[str, Any]],
    grid: tuple[int, int],
) -> dict[str, Any]:
    norms = records.norms(outliers.state)
    shares, final = [state["outlier_share"] for state in states], images["outlier_share"].mean()
    return {
        "layer": outliers.state,
        "rule": rule.rule,
        "rule_value": CUTOFF_RULES[rule.rule] if rule.value is None else rule.value,
        "cutoff": outliers.threshold,
        "norm": {
            "median": float(np.median(norms)),
            "percentile_98": float(np.percentile(norms, 98)),
            "max": float(norms.max()),
        },
        "share": asdict(mean_interval(images["outlier_share"])),
        "images_with_outliers": float((images["outlier_share"] > 0).mean()),
        "largest_over_median": asdict(mean_interval(images["largest_over_median"])),
        "first_layer": next((i for i, share in enumerate(shares) if final > 0 and share >= _HALF * final), None),
        "on_border": _on_border(position_share(records, outliers, grid)),
        "border_patches": _border(grid).mean().item(),
        "neighbour_similarity": {
            "outlier": asdict(mean_interval(images["neighbours_of_outliers"])),
            "normal": asdict(mean_interval(images["neighbours_of_normal"])),
        },
        "two_groups": {**asdict(outliers.groups), "found": outliers.groups.two_groups},
    }


def position_share(records: Records, outliers: Outliers, grid: tuple[int, int]) -> NDArray[np.float64]:
    """Share of images with an outlier at each position, `(rows, columns)` (appendix A of the paper)."""
    return records.mean(outliers.mask).reshape(grid)


def _border(grid: tuple[int, int]) -> NDArray[np.bool_]:
    border = np.ones(grid, dtype=bool)
    border[1:-1, 1:-1] = False
    return border


def _on_border(share: NDArray[np.float64]) -> float | None:
    return float(share[_border(share.shape)].sum() / share.sum()) if share.sum() else None


# Layers


def _by_state(records: Records, outliers: Outliers) -> list[dict[str, Any]]:
    first = next(records.measured())
    return [_state(records, outliers, state) for state in range(first["norms"].shape[1])]


def _state(records: Records, outliers: Outliers, state: int) -> dict[str, Any]:
    norms = records.norms(state)
    low, median, high = np.percentile(norms, [2, 50, 98])
    return {
        "layer": state,
        "norm_percentile_2": float(low),
        "norm_median": float(median),
        "norm_percentile_98": float(high),
        "norm_max": float(norms.max()),
        "outlier_share": float((norms > outliers.threshold).mean()),
        **{name: _mean(records.column(name)[:, state]) for name in _CHANNEL_NUMBERS},
    }


_CHANNEL_NUMBERS = ("infinity_norm", "kurtosis", "sigma_outliers", "massive", "relatively_massive")


def _mean(values: NDArray[Any]) -> float | None:
    mean = float(np.mean(values, dtype=np.float64))
    return mean if math.isfinite(mean) else None


# Attention


def attention_section(
    records: Records, names: tuple[str, ...], images: dict[str, NDArray[np.float64]], grid: tuple[int, int]
) -> dict[str, Any]:
    """What CLS and each register attend to in the last layer, and whether registers look at different places."""
    if not names:
        return {"tokens": [], "overlap": [], "cls_mass": [], "cls_on_registers": None, **_patch_only(records)}
    measured = [_maps_of(batch, grid) for batch in records.measured()]
    shapes = {key: torch.cat([one[key] for one in measured]) for key in measured[0]}
    mass = records.mean(lambda batch: batch["mass"])
    norms = np.concatenate([batch["prefix_norms"][:, -1] for batch in records.measured()])
    tokens = [
        {
            "name": name,
            "entropy": asdict(_interval(shapes["entropy"][:, index])),
            "area": asdict(_interval(shapes["area"][:, index])),
            "centre": [float(part) for part in shapes["centre"][:, index].mean(dim=0)],
            "mass": mass[-1, index].tolist(),
            "norm": asdict(_interval(norms[:, index])),
        }
        for index, name in enumerate(names)
    ]
    return {
        "tokens": tokens,
        "overlap": shapes["overlap"].mean(dim=0).tolist(),
        "cls_mass": mass[:, 0].tolist(),
        "cls_on_registers": asdict(mean_interval(images["cls_mass_on_registers"])),
        **_patch_only(records),
    }


def _maps_of(batch: Arrays, grid: tuple[int, int]) -> dict[str, Tensor]:
    maps = torch.from_numpy(batch["maps"]).mean(dim=1).unflatten(-1, grid)
    return {"entropy": entropy(maps), "area": area(maps), "centre": centre(maps), "overlap": overlap(maps)}


def average_maps(records: Records, grid: tuple[int, int]) -> Tensor:
    """Mean over heads and images of each prefix token's map in the last layer, `(T, rows, columns)` (Fig. 16)."""
    return torch.from_numpy(records.mean(lambda batch: batch["maps"].mean(axis=1))).unflatten(-1, grid)


def _interval(values: Any) -> Interval:
    return mean_interval(np.asarray(values, dtype=np.float64))


def _patch_only(records: Records) -> dict[str, Any]:
    """How much of what CLS takes comes from patches (Lappe et al., arXiv 2505.05892): CKA of the two over images."""
    taken: list[Tensor] = []
    of_patches: list[Tensor] = []
    for batch in records.measured():
        if "cls_update" in batch and sum(len(one) for one in taken) < _CKA_AT_MOST:
            taken.append(torch.from_numpy(batch["cls_update"]))
            of_patches.append(torch.from_numpy(batch["cls_update_of_patches"]))
    count = sum(len(one) for one in taken)
    cka = linear_cka(torch.cat(taken), torch.cat(of_patches)) if count > 1 else math.nan
    return {"patch_only_cka": cka if math.isfinite(cka) else None, "patch_only_cka_images": count}


# Sinks


def _sink_section(records: Records, names: tuple[str, ...], images: dict[str, NDArray[np.float64]]) -> dict[str, Any]:
    score = records.mean(lambda batch: (batch["received_prefix"] > EPSILON).mean(axis=2))  # (L, T)
    of_patch = records.mean(lambda batch: (batch["received_patch"] > EPSILON).mean(axis=2))  # (L,)
    tokens = next(records.measured())["received"].shape[2]
    uniform = records.mean(lambda batch: batch["received"][:, :, : len(names)]) * tokens
    most = records.mean(lambda batch: batch["received"][:, :, len(names) :].max(axis=2)) * tokens
    rows = [
        {
            "name": name,
            "score": score[:, index].tolist(),
            "times_uniform": uniform[:, index].tolist(),
        }
        for index, name in enumerate(names)
    ]
    rows.append(
        {
            "name": "patch that gets most",
            "score": of_patch.tolist(),
            "times_uniform": most.tolist(),
        }
    )
    return {
        "tokens": rows,
        "outlier_patches_times_uniform": asdict(mean_interval(images["received_by_outliers"])),
        "normal_patches_times_uniform": asdict(mean_interval(images["received_by_normal"])),
    }
