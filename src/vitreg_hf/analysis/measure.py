# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""One pass over a folder of images: what is measured of each goes to disk, so memory does not grow with their number.

Records are written for some images at a time; a pass that was interrupted goes on after the last of them.
Shapes: B images, L layers, h heads, T prefix tokens (CLS, then registers), N tokens, P patches, D channels; "states"
are the residual stream before the first block and after each, L + 1 of them.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vitreg_hf.analysis.attention import mass_by_kind
from vitreg_hf.analysis.channels import (
    MASSIVE_ABSOLUTE,
    MASSIVE_RATIO,
    infinity_norm,
    kurtosis,
    massive_activations,
    sigma_outliers,
)
from vitreg_hf.analysis.extract import Subject, embedded_patches, read
from vitreg_hf.analysis.images import ImageFiles, open_upright, preprocess
from vitreg_hf.analysis.recorder import AttentionCall, Readers
from vitreg_hf.analysis.records import Arrays, Records
from vitreg_hf.analysis.sinks import received_attention
from vitreg_hf.analysis.token_norms import neighbour_similarity, patch_norms
from vitreg_hf.model.fingerprint import fingerprint

_IMAGES_PER_FILE = 32  # what an interruption can lose


@dataclass(frozen=True)
class Pass:
    """How images are run through a model.

    Attributes:
        batch_size: images at a time.
        image_size: side in pixels of the square that images are brought to; None for the size of the image processor.
        overwrite: delete records of another model or other images in the output folder rather than refuse them.
        on_corrupt_image: `raise` stops at an image that cannot be decoded, `skip` leaves it out and lists it.

    Raises:
        ValueError: for a value outside these.
    """

    batch_size: int = 8
    image_size: int | None = None
    on_corrupt_image: str = "raise"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"Expected a batch size of 1 or more, got {self.batch_size}")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"Expected an image size of 1 pixel or more, got {self.image_size}")
        if self.on_corrupt_image not in ("raise", "skip"):
            raise ValueError(f"Expected on_corrupt_image 'raise' or 'skip', got {self.on_corrupt_image!r}")


# One batch


def measure_batch(subject: Subject, pixel_values: Tensor) -> dict[str, Tensor]:
    """Everything that a report needs of a batch, on the CPU, first dimension B.

    Args:
        subject: a vision model.
        pixel_values: `(B, C, H, W)`.

    Returns:
        `norms` `(B, states, P)`; `prefix_norms` `(B, states, T)`; `neighbours` `(B, P)`, similarity after the patch
        embedding; `peak` `(B, states, 2)`, token and channel of the largest magnitude; `infinity_norm`, `kurtosis`,
        `sigma_outliers`, `massive`, `relatively_massive` `(B, states)`; `received` `(B, L, N)`, attention that each
        token gets, mean over heads; `received_prefix` `(B, L, h, T)` and `received_patch` `(B, L, h)`, of the patch
        that gets most; `mass` `(B, L, T, 3)`, of each prefix token on CLS, registers, patches; `maps` `(B, h, T, P)`
        of the last layer; `cls_update` and `cls_update_of_patches` `(B, D)`, what CLS takes in the last layer from
        all tokens and from patches, before the output projection.
    """
    layout, grid = subject.layout, subject.grid(pixel_values)
    last = len(subject.anatomy.blocks) - 1

    def read_state(layer: int, state: Tensor) -> dict[str, Tensor]:
        return {
            "norms": patch_norms(state, layout),
            "prefix_norms": layout.prefix_tokens(state).float().norm(dim=-1),
            **_channels(state.float()),
        }

    def read_attention(layer: int, call: AttentionCall) -> dict[str, Tensor]:
        received = _received(call)
        probabilities = call.probabilities(layout.num_prefix)
        kept = {
            "received": received.mean(dim=1),
            "received_prefix": layout.prefix_of(received),
            "received_patch": layout.patches_of(received).amax(dim=-1),
            "mass": mass_by_kind(probabilities.mean(dim=1), layout),
        }
        return kept if layer < last else {**kept, **_last_attention(call, probabilities, subject)}

    recorded = read(subject, pixel_values, Readers(hidden=read_state, attention=read_attention))
    measured = {name: torch.stack([state[name] for state in recorded.hidden], dim=1) for name in recorded.hidden[0]}
    for name in ("received", "received_prefix", "received_patch", "mass"):
        measured[name] = torch.stack([layer[name] for layer in recorded.attention], dim=1)
    measured.update(
        {name: recorded.attention[last][name] for name in recorded.attention[last].keys() - measured.keys()}
    )
    measured["neighbours"] = neighbour_similarity(embedded_patches(subject, recorded, grid)).flatten(1)
    return {name: value.cpu() for name, value in measured.items()}


def _channels(state: Tensor) -> dict[str, Tensor]:
    flat = state.abs().flatten(1).argmax(dim=1)
    peak = torch.stack([flat // state.shape[2], flat % state.shape[2]], dim=1)
    return {
        "infinity_norm": infinity_norm(state),
        "kurtosis": kurtosis(state).float(),
        "sigma_outliers": sigma_outliers(state).sum(dim=(1, 2)),
        **_massive(state),
        "peak": peak,
    }


def _massive(state: Tensor) -> dict[str, Tensor]:
    """How many massive activations each image has, `(B,)`, by both rules and by the relative one alone.

    None where half of all values are 0; counted only where the largest value is large enough, which is seldom.
    """
    magnitudes = state.abs().flatten(1)
    medians, highest = magnitudes.median(dim=1).values, magnitudes.amax(dim=1)
    possible = ((medians > 0) & (highest >= MASSIVE_RATIO * medians)).tolist()

    def count(absolute: float) -> Tensor:
        images = zip(state, possible, strict=True)
        found = [massive_activations(one[None], absolute=absolute, limit=1).total if can else 0 for one, can in images]
        return torch.tensor(found)

    return {"massive": count(MASSIVE_ABSOLUTE), "relatively_massive": count(0.0)}


def _received(call: AttentionCall) -> Tensor:
    """Attention that each token gets, `(B, h, N)`, one image at a time: N x N maps of a batch would be large."""
    return torch.cat([received_attention(call.of_input(index).probabilities()) for index in range(len(call.query))])


def _last_attention(call: AttentionCall, probabilities: Tensor, subject: Subject) -> dict[str, Tensor]:
    layout = subject.layout
    kept = {"maps": layout.patches_of(probabilities)}
    if layout.num_cls:
        of_cls, values = probabilities[:, :, :1], call.values().float()
        taken, of_prefix = of_cls @ values, layout.prefix_of(of_cls) @ layout.prefix_queries(values)
        kept["cls_update"] = taken.flatten(1)
        kept["cls_update_of_patches"] = (taken - of_prefix).flatten(1)
    return kept


# All images


def measure(subject: Subject, images: ImageFiles, how: Pass, folder: Path) -> Records:
    """Measure every image, or those that an interrupted pass has not measured yet.

    Args:
        subject: a vision model.
        images: image files.
        how: how they are run.
        folder: where records are kept; it may hold those of an earlier pass over the same images with the same model.

    Raises:
        ValueError: if the folder holds records of another model, other images or other settings, or for an image that
            cannot be decoded.
    """
    records = Records(folder)
    # Neither the batch size nor what happens to corrupt images changes a record, so both may change between two runs.
    processor = hashlib.sha256(f"{subject.preprocess!r} {how.image_size}".encode()).hexdigest()[:16]
    facts = {
        "model": subject.name,
        "weights": fingerprint(subject.model.state_dict().items()) + _moved_neurons(subject),
        "image processor": processor,
    }
    records.claim({**facts, "images": images.fingerprint()}, how.overwrite)
    starts = range(0, len(images), _IMAGES_PER_FILE)
    todo = [start for start in starts if not records.holds(start)]
    left = sum(min(_IMAGES_PER_FILE, len(images) - start) for start in todo)
    if left < len(images):
        print(f"{len(images) - left} of {len(images)} images were measured before: going on after them")
    with tqdm(total=left, desc=f"Measuring {subject.name}", unit="image", disable=not todo) as bar:
        for start in todo:
            records.save(
                start, _measure_some(subject, images.files[start : start + _IMAGES_PER_FILE], start, how, bar)
            )
    records.check()
    return records


def _moved_neurons(subject: Subject) -> str:
    """What tells models apart that compute something else with the same weights; empty for any other model."""
    config: Any = getattr(subject.model, "config", None)
    if not getattr(config, "register_neurons", None):
        return ""
    fields = {n: value for n, value in config.to_dict().items() if "test_time_register" in n or "register_neuron" in n}
    return f" {hashlib.sha256(repr(sorted(fields.items())).encode()).hexdigest()[:16]}"


def _measure_some(subject: Subject, files: Sequence[Path], start: int, how: Pass, bar: Any) -> Arrays:
    """Records of the images of one file, batch by batch; the first of them is image `start`."""
    parts: list[Arrays] = []
    for first in range(0, len(files), how.batch_size):
        batch = files[first : first + how.batch_size]
        kept, pixels = decode(batch, subject.preprocess, how)
        if pixels is not None:
            index = np.array([start + first + i for i in kept])
            parts.append({"image": index, **_as_arrays(measure_batch(subject, pixels))})
        bar.update(len(batch))
    if len({part["norms"].shape[1:] for part in parts}) > 1:
        raise ValueError("Expected images of one size, got several: give an image size")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}


def decode(files: Sequence[Path], processor: Any, how: Pass) -> tuple[list[int], Tensor | None]:
    """Indices of the readable files, and those images as a batch, or None if there is none."""
    opened = {}
    for index, file in enumerate(files):
        try:
            opened[index] = open_upright(file)
        except ValueError as error:
            if how.on_corrupt_image == "raise":
                raise ValueError(f"{error} (--on-corrupt-image skip leaves such images out)") from error
    return list(opened), preprocess(list(opened.values()), processor, how.image_size) if opened else None


def _as_arrays(measured: dict[str, Tensor]) -> Arrays:
    return {name: value.contiguous().numpy() for name, value in measured.items()}
