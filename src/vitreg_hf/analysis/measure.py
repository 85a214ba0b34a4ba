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
from vitreg_hf.analysis.extract import Subject, embedded_patches, read
from vitreg_hf.analysis.images import ImageFiles, open_upright, preprocess
from vitreg_hf.analysis.recorder import Attended, AttentionCall, Readers
from vitreg_hf.analysis.records import Arrays, Records
from vitreg_hf.analysis.stream_numbers import stream_numbers
from vitreg_hf.analysis.token_norms import neighbour_similarity
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
        norms = state.float().norm(dim=-1)
        of_kinds = {"norms": layout.patches_of(norms), "prefix_norms": layout.prefix_of(norms)}
        return {**of_kinds, **stream_numbers(state)}

    def read_attention(layer: int, call: AttentionCall) -> Attended:
        output, received = call.attended()  # all probabilities are needed, so attention is computed of them, too
        probabilities = call.probabilities(layout.num_prefix)
        kept = {
            "received": received.mean(dim=1),
            "received_prefix": layout.prefix_of(received),
            "received_patch": layout.patches_of(received).amax(dim=-1),
            "mass": mass_by_kind(probabilities.mean(dim=1), layout),
        }
        if layer == last:
            kept.update(_last_attention(call, probabilities, subject))
        return Attended(kept, output)

    recorded = read(subject, pixel_values, Readers(hidden=read_state, attention=read_attention))
    measured = {name: torch.stack([state[name] for state in recorded.hidden], dim=1) for name in recorded.hidden[0]}
    for name in ("received", "received_prefix", "received_patch", "mass"):
        measured[name] = torch.stack([layer[name] for layer in recorded.attention], dim=1)
    measured.update(
        {name: recorded.attention[last][name] for name in recorded.attention[last].keys() - measured.keys()}
    )
    measured["neighbours"] = neighbour_similarity(embedded_patches(subject, recorded, grid)).flatten(1)
    return {name: value.cpu() for name, value in measured.items()}


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
