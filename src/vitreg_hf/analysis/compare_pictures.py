# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The pictures of a comparison, all models in each: PNGs named as `compare_sections.CAPTIONS` names them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitreg_hf.analysis.artifact_pictures import Pictured, look_at, short
from vitreg_hf.analysis.differences import Compared, rows_by_model
from vitreg_hf.analysis.figures import curves, maps
from vitreg_hf.analysis.images import ImageFiles
from vitreg_hf.analysis.measure import Pass

_NUMBERS = ("Two", "Three", "Four", "Five", "Six")
# Of norms on maps, in multiples of a model's median: beyond this nothing gets brighter, or one model's artifacts would
# hide those of another. Always the same, so that a model without any is dark.
_BRIGHTEST = 5.0


def draw(models: Sequence[Compared], images: ImageFiles, how: Pass, results: dict[str, Any], folder: Path) -> None:
    """Draw every picture that these models have.

    Args:
        models: that were measured.
        images: the few that maps are drawn of.
        how: how images are run.
        results: content of `results.json`.
        folder: where PNGs are written.
    """
    _draw_differences(results, folder)
    _draw_all_patches(models, results, folder)
    looked = [look_at(one.subject, images, how, one.outliers.state) for one in models]
    _draw_norms(models, looked, folder)
    _draw_attention(models, looked, folder)


def _draw_differences(results: dict[str, Any], folder: Path) -> None:
    drawn = {
        name: [row for row in rows if row["difference"]["low"] is not None]
        for name, rows in rows_by_model(results).items()
    }
    if any(drawn.values()):
        first, count = next(iter(results["models"])), len(results["models"])
        title = f"{_NUMBERS[count - 2]} models on the same {results['images']['measured']} images"
        curves.differences(drawn, first, folder / "differences.png", title=title)


def _draw_all_patches(models: Sequence[Compared], results: dict[str, Any], folder: Path) -> None:
    count = results["images"]["measured"]
    norms = {one.name: one.records.norms(one.outliers.state) for one in models}
    cutoffs = {one.name: one.outliers.threshold for one in models}
    curves.norm_histogram(norms, cutoffs, folder / "norms.png", title=f"Norms of patches, {count} images")
    layers = {name: summary["layers"] for name, summary in results["summaries"].items()}
    curves.layer_curves(layers, folder / "layers.png", title=f"Patches over layers, {count} images")
    curves.channel_curves(layers, folder / "channels.png", title=f"Values of the residual stream, {count} images")


def _draw_norms(models: Sequence[Compared], looked: Sequence[Pictured], folder: Path) -> None:
    medians = [float(np.median(one.records.norms(one.outliers.state))) or 1.0 for one in models]
    times = [one.norms.numpy() / median for one, median in zip(looked, medians, strict=True)]
    headings = [f"{one.name}, up to {values.max():.1f}" for one, values in zip(models, times, strict=True)]
    maps.map_sheet(
        [(heading, values, "inferno") for heading, values in zip(headings, times, strict=True)],
        looked[0].seen,
        folder / "maps.png",
        captions=[short(name) for name in looked[0].names],
        title="Norms of patches, each in multiples of the model's own median",
        label=f"norm / median norm of the model\n(brightest: {_BRIGHTEST:.3g} or more, as artifacts have)",
        limits=(0.0, _BRIGHTEST),
    )


def _draw_attention(models: Sequence[Compared], looked: Sequence[Pictured], folder: Path) -> None:
    """Models differ in how many tokens share the attention, so all are drawn as multiples of an even share."""
    having = [(one, seen) for one, seen in zip(models, looked, strict=True) if one.subject.layout.num_prefix]
    if len(having) < 2:
        return
    attention = [seen.prefix[:, :, 0].mean(dim=1).numpy() for _, seen in having]
    headings = [
        f"{one.subject.anatomy.prefix_names[0]}, {one.name}\n{100 * own.sum(axis=(1, 2)).mean():.0f} % on patches"
        for (one, _), own in zip(having, attention, strict=True)
    ]
    times = [own * _tokens(seen) for (_, seen), own in zip(having, attention, strict=True)]
    title = "Attention in the last layer, mean of heads\nwhat is not on patches is on CLS, registers or a bias"
    maps.map_sheet(
        [(heading, values, "viridis") for heading, values in zip(headings, times, strict=True)],
        looked[0].seen,
        folder / "attention.png",
        captions=[short(name) for name in looked[0].names],
        title=title,
        label="attention to a patch / even share\n(1: as if all tokens got the same)",
    )


def _tokens(looked: Pictured) -> int:
    return looked.prefix.shape[2] + looked.norms[0].numel()
