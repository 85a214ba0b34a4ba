# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""From records of many images to the numbers of a report: plain dicts, whose units stand in `units`.

Shapes: n images, L layers, h heads, T prefix tokens, P patches. "states" are the residual stream before the first
block and after each: state 0 is what the first block gets, state i what block i (from 1) leaves.
"""

import math
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitreg_hf.analysis.attention import area, centre, entropy, overlap
from vitreg_hf.analysis.extract import Subject
from vitreg_hf.analysis.features import linear_cka
from vitreg_hf.analysis.intervals import Interval, mean_interval
from vitreg_hf.analysis.outliers import OutlierRule, Outliers, find_outliers, per_image, position_share
from vitreg_hf.analysis.records import Batch, Records
from vitreg_hf.analysis.sinks import EPSILON
from vitreg_hf.analysis.token_norms import CUTOFF_RULES
from vitreg_hf.model.token_layout import TokenLayout

_HALF = 0.5
_CKA_AT_MOST = 2_000  # images; beyond, features would fill memory and the number no longer moves


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
    states = _by_state(records, outliers, subject.anatomy.prefix_names)
    return {
        "outliers": _outlier_section(records, rule, outliers, images, states, grid),
        "layers": states,
        "attention": attention_section(records, subject.anatomy.prefix_names, images, grid),
        "sinks": _sink_section(records, subject, images, outliers),
    }


# Outliers


def _outlier_section(
    records: Records,
    rule: OutlierRule,
    outliers: Outliers,
    images: dict[str, NDArray[np.float64]],
    states: list[dict[str, Any]],
    grid: tuple[int, int],
) -> dict[str, Any]:
    norms, groups = records.norms(outliers.state), outliers.groups
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
        "two_groups": {**asdict(groups), "found": groups.two_groups, "probably": groups.probably},
    }


def _border(grid: tuple[int, int]) -> NDArray[np.bool_]:
    border = np.ones(grid, dtype=bool)
    border[1:-1, 1:-1] = False
    return border


def _on_border(share: NDArray[np.float64]) -> float | None:
    return float(share[_border(share.shape)].sum() / share.sum()) if share.sum() else None


# Layers


def _by_state(records: Records, outliers: Outliers, names: tuple[str, ...]) -> list[dict[str, Any]]:
    first = next(records.measured())
    peaks = records.column("peak")  # (n, states, 2): token and channel of the largest value
    return [
        {**_state(records, outliers, state), "peak": _peak(peaks[:, state], names)}
        for state in range(first["norms"].shape[1])
    ]


def _peak(places: NDArray[np.int64], names: tuple[str, ...]) -> dict[str, Any]:
    """Where the largest value of an image stands most frequently: channel, and kind of token."""
    kinds = Counter((int(channel), names[token] if token < len(names) else "a patch") for token, channel in places)
    (channel, token), count = kinds.most_common(1)[0]
    return {"channel": channel, "token": token, "agreement": count / len(places)}


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
        "cls_on_registers": asdict(mean_interval(images["mass_on_registers"])),
        **_patch_only(records),
    }


def _maps_of(batch: Batch, grid: tuple[int, int]) -> dict[str, Tensor]:
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


def _sink_section(
    records: Records, subject: Subject, images: dict[str, NDArray[np.float64]], outliers: Outliers
) -> dict[str, Any]:
    layout, names = subject.layout, subject.anatomy.prefix_names
    score = records.mean(lambda batch: (batch["received_prefix"] > EPSILON).mean(axis=2))  # (L, T)
    of_patch = records.mean(lambda batch: (batch["received_patch"] > EPSILON).mean(axis=2))  # (L,)
    tokens = next(records.measured())["received"].shape[2]
    uniform = records.mean(lambda batch: layout.prefix_of(torch.from_numpy(batch["received"])).numpy()) * tokens
    most = records.mean(lambda batch: layout.patches_of(torch.from_numpy(batch["received"])).amax(2).numpy()) * tokens
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
        "shares": _shares(records, outliers, layout),
        "outlier_patches_times_uniform": asdict(mean_interval(images["received_by_outliers"])),
        "normal_patches_times_uniform": asdict(mean_interval(images["received_by_normal"])),
    }


def _shares(records: Records, outliers: Outliers, layout: TokenLayout) -> dict[str, list[float]]:
    """Share of all attention that each kind of token gets per layer, mean over images and heads; they sum to 1."""

    def by_kind(batch: Batch) -> NDArray[np.float64]:
        parts = layout.by_kind(torch.from_numpy(batch["received"]))
        cls, registers, patches = (part.double().numpy() for part in parts)
        marked = outliers.mask(batch)[:, None]
        kinds = (cls, registers, patches * marked, patches * ~marked)
        return np.stack([kind.sum(axis=2) for kind in kinds], axis=2)  # (B, L, 4)

    mean = records.mean(by_kind)
    kinds = ("CLS", "registers", "outlier patches", "normal patches")
    return {kind: mean[:, index].tolist() for index, kind in enumerate(kinds)}
