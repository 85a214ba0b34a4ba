# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The pictures of an analysis: which are drawn, from what, and what a reader sees in each.

Shapes: B pictured images, T prefix tokens (CLS, then registers), rows x columns patches.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitreg_hf.analysis.attention import rollout_step
from vitreg_hf.analysis.extract import Subject, normed, read
from vitreg_hf.analysis.features import principal_components
from vitreg_hf.analysis.figures import curves, maps, objects
from vitreg_hf.analysis.images import ImageFiles, as_seen
from vitreg_hf.analysis.localize import lost_on_batch
from vitreg_hf.analysis.measure import Pass, decode
from vitreg_hf.analysis.object_discovery import PAPER_DEFAULT
from vitreg_hf.analysis.outliers import Outliers, position_share
from vitreg_hf.analysis.recorder import AttentionCall, Readers
from vitreg_hf.analysis.records import Records
from vitreg_hf.analysis.summary import average_maps
from vitreg_hf.analysis.token_norms import patch_norms

_HEADS_AT_MOST = 16
_COMPONENT_RANGE = (-3.0, 3.0)  # that of the paper's Fig. 20
_SIMILARITIES_AT_MOST = 500_000


@dataclass(frozen=True)
class Pictured:
    """What is drawn of a few images.

    Attributes:
        names: of the files.
        seen: RGB as the model gets them, `(B, H, W, 3)`.
        pixel_values: `(B, C, H, W)`.
        norms: `(B, rows, columns)` in the state that outliers are judged by.
        prefix: what prefix tokens attend to in the last layer, `(B, h, T, rows, columns)`.
        rolled: rollout of the first prefix token, `follow` and `cut`, each `(B, rows, columns)`; empty without one.
        features: patches after the final norm, `(B, rows, columns, D)`.
    """

    names: list[str]
    seen: NDArray[np.uint8]
    pixel_values: Tensor
    norms: Tensor
    prefix: Tensor
    rolled: dict[str, Tensor]
    features: Tensor


def look_at(subject: Subject, images: ImageFiles, how: Pass, state: int) -> Pictured:
    """Run a few images and keep what is drawn of them."""
    kept, pixel_values = decode(images.files, subject.preprocess, how)
    if pixel_values is None:
        raise ValueError("Expected at least one readable image to draw, got none")
    layout, grid, last = subject.layout, subject.grid(pixel_values), len(subject.anatomy.blocks)
    rolled: dict[str, Tensor] = {}

    def read_attention(layer: int, call: AttentionCall) -> Tensor | None:
        if layout.num_prefix:
            by_image = [call.of_input(index).probabilities().mean(dim=1) for index in range(len(call.query))]
            for registers in ("follow", "cut"):
                rolled[registers] = rollout_step(rolled.get(registers), torch.cat(by_image), layout, registers)
        return call.probabilities(layout.num_prefix) if layer == last - 1 else None

    readers = Readers(hidden=lambda i, x: x if i in (state, last) else None, attention=read_attention)
    recorded = read(subject, pixel_values, readers)
    features = layout.patch_tokens(normed(subject, recorded.hidden[last]))
    return Pictured(
        names=[images.names()[index] for index in kept],
        seen=as_seen(pixel_values, subject.preprocess),
        pixel_values=pixel_values,
        norms=patch_norms(recorded.hidden[state], layout).unflatten(1, grid).cpu(),
        prefix=layout.attention_to_patches(recorded.attention[last - 1], grid).cpu(),
        rolled={name: layout.attention_to_patches(flow[:, 0], grid).cpu() for name, flow in rolled.items()},
        features=features.float().unflatten(1, grid).cpu(),
    )


def draw(
    subject: Subject,
    images: ImageFiles,
    how: Pass,
    records: Records,
    outliers: Outliers,
    grid: tuple[int, int],
    results: dict[str, Any],
    folder: Path,
) -> None:
    """Draw every picture that this model has: PNGs in the folder, named as `artifact_sections.CAPTIONS` names them."""
    looked = look_at(subject, images, how, outliers.state)
    _draw_all_patches(subject.name, records, outliers, results, folder)
    _draw_places(subject, records, outliers, grid, results, folder)
    _draw_images(subject, looked, outliers, folder)
    if subject.layout.num_prefix:
        _draw_attention(subject, looked, folder)


def _draw_all_patches(name: str, records: Records, outliers: Outliers, results: dict[str, Any], folder: Path) -> None:
    count = results["images"]["measured"]
    norms = records.norms(outliers.state)
    title = f"{name}: norms after layer {outliers.state}, {count} images"
    curves.norm_histogram({name: norms}, {name: outliers.threshold}, folder / "norms.png", title=title)
    curves.layer_curves(
        {name: results["layers"]}, folder / "layers.png", title=f"{name}: patches over layers, {count} images"
    )
    total = count * int(np.prod(results["images"]["grid"]))
    outlier = records.thinned(lambda b: b["neighbours"][outliers.mask(b)], total, _SIMILARITIES_AT_MOST)
    normal = records.thinned(lambda b: b["neighbours"][~outliers.mask(b)], total, _SIMILARITIES_AT_MOST)
    title = f"{name}: patches and their neighbours, {count} images"
    curves.similarity_density(outlier, normal, folder / "neighbours.png", title=title)
    curves.sink_curves(
        results["sinks"]["tokens"], folder / "sinks.png", title=f"{name}: who gets attention, {count} images"
    )
    title = f"{name}: values of the residual stream, {count} images"
    curves.channel_curves({name: results["layers"]}, folder / "channels.png", title=title)


def _draw_places(
    subject: Subject,
    records: Records,
    outliers: Outliers,
    grid: tuple[int, int],
    results: dict[str, Any],
    folder: Path,
) -> None:
    name, count = subject.name, results["images"]["measured"]
    share = 100 * position_share(records, outliers, grid)
    title = f"{name}: where outliers lie\n{count} images"
    heading = f"{grid[0]} x {grid[1]} patches" + ("" if share.any() else ": none anywhere")
    label = "images with an outlier there (%)"
    maps.token_maps(share[None], [heading], folder / "positions.png", title=title, label=label)
    if subject.layout.num_prefix:
        averages = average_maps(records, grid).numpy()
        title = f"{name}: what each token attends to in the last layer, mean of heads and {count} images"
        maps.token_maps(
            averages,
            subject.anatomy.prefix_names,
            folder / "average_attention.png",
            title=title,
            label="attention to a patch",
        )
        curves.mass_curve(
            results["attention"]["cls_mass"],
            subject.anatomy.prefix_names[0],
            folder / "cls_mass.png",
            title=f"{name}: where attention goes, {count} images",
        )


def _draw_images(subject: Subject, looked: Pictured, outliers: Outliers, folder: Path) -> None:
    name, captions = subject.name, [short(one) for one in looked.names]
    title = f"{name}: norms after layer {outliers.state}, cutoff {outliers.threshold:.3g}"
    norms = looked.norms.numpy()
    maps.norm_maps(looked.seen, norms, outliers.threshold, folder / "norm_maps.png", captions=captions, title=title)
    components, explained = _components(looked.features)
    colours = np.clip((components - _COMPONENT_RANGE[0]) / (_COMPONENT_RANGE[1] - _COMPONENT_RANGE[0]), 0, 1)
    maps.map_sheet(
        [("first component", components[..., 0], "RdBu_r"), ("first three as RGB", colours, "")],
        looked.seen,
        folder / "components.png",
        captions=captions,
        title=f"{name}: principal components of\npatch features of these {len(captions)} images",
        label=f"first component ({100 * explained:.0f} % of variance),\nin standard deviations",
        limits=_COMPONENT_RANGE,
    )
    found = lost_on_batch(subject, looked.pixel_values, PAPER_DEFAULT)
    objects.boxes_figure(
        list(looked.seen),
        found,
        folder / "objects.png",
        captions=captions,
        title=f"{name}: LOST on keys of the last layer",
        patch_size=None,
    )


def _draw_attention(subject: Subject, looked: Pictured, folder: Path) -> None:
    name, names = subject.name, subject.anatomy.prefix_names
    captions, layer = [short(one) for one in looked.names], len(subject.anatomy.blocks)
    rows, columns = looked.norms.shape[1:]
    maps.attention_figure(
        looked.seen,
        looked.prefix.mean(dim=1),
        folder / "attention.png",
        token_names=names,
        captions=captions,
        title=f"{name}: attention in the last layer (layer {layer})",
        equal_share=1 / (len(names) + rows * columns),
    )
    heads = looked.prefix[:, :_HEADS_AT_MOST, 0].numpy()
    maps.map_sheet(
        [(f"head {head + 1}", heads[:, head], "viridis") for head in range(heads.shape[1])],
        looked.seen,
        folder / "heads.png",
        captions=captions,
        title=f"{name}: what {names[0]} attends to in the last layer, "
        f"{heads.shape[1]} of {looked.prefix.shape[1]} heads",
        label="attention to a patch",
    )
    of_first = looked.prefix[0].numpy()  # (h, T, rows, columns)
    maps.map_sheet(
        [(f"head {head + 1}", of_first[head], "viridis") for head in range(min(len(of_first), _HEADS_AT_MOST))],
        np.repeat(looked.seen[:1], len(names), axis=0),
        folder / "heads_of_tokens.png",
        captions=names,
        title=f"{name}: every token and head in the last layer, {captions[0]}",
        label="attention to a patch",
    )
    maps.map_sheet(
        [("through registers", looked.rolled["follow"].numpy(), "viridis")]
        + [("registers cut", looked.rolled["cut"].numpy(), "viridis")] * (len(names) > 1),
        looked.seen,
        folder / "rollout.png",
        captions=captions,
        title=f"{name}: attention rollout of {names[0]}\nover all layers",
        label="share of the input patch in the output",
    )


def _components(features: Tensor) -> tuple[NDArray[np.float32], float]:
    """First three components of all patches, `(B, rows, columns, 3)`, and the variance that the first explains."""
    shape = features.shape[:3]
    coordinates, explained = principal_components(features.flatten(0, 2), min(3, features.shape[3]))
    return coordinates.reshape(*shape, -1).numpy(), float(explained[0])


def short(name: str, length: int = 18) -> str:
    """The file name, cut in the middle where it is long."""
    name = name.rsplit("/", 1)[-1]
    return name if len(name) <= length else f"{name[: length // 2]}...{name[-length // 2 + 2 :]}"
