# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""`vitreg analyze`: one model, a folder of images, and a report of artifacts, registers and sinks.

The paper's figures come in its order: norms, layers, places, neighbours, probes, attention, components, objects.
"""

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vitreg_hf.analysis.artifact_pictures import draw
from vitreg_hf.analysis.artifact_sections import lead, sections
from vitreg_hf.analysis.extract import Subject, load_vision
from vitreg_hf.analysis.images import ImageFiles, find_images
from vitreg_hf.analysis.measure import Pass, decode, measure
from vitreg_hf.analysis.outliers import OutlierRule, Outliers, find_outliers
from vitreg_hf.analysis.records import Records
from vitreg_hf.analysis.report import start_report, write_report, write_results
from vitreg_hf.analysis.summary import summarize
from vitreg_hf.analysis.token_probes import local_probes, token_table
from vitreg_hf.analysis.units import UNITS
from vitreg_hf.analysis.writers import follow_largest
from vitreg_hf.model.fingerprint import fingerprint

# Fewer images than this teach a linear probe nothing about images that it has not seen.
_PROBED_FROM = 10
_PROBED_AT_MOST = 1_000
_FOLLOWED_AT_MOST = 16  # images whose largest value is followed through all branches


@dataclass(frozen=True)
class AnalyzeSettings:
    """What `analyze` does.

    Attributes:
        how: how images are run.
        rule: which patches are outliers.
        probes: train linear probes on tokens, which takes most of the time on a CPU.
        pictured: images that are drawn, evenly spread over all.
    """

    how: Pass = field(default_factory=Pass)
    rule: OutlierRule = field(default_factory=OutlierRule)
    probes: bool = True
    pictured: int = 5

    def __post_init__(self) -> None:
        if self.pictured < 1:
            raise ValueError(f"Expected at least 1 pictured image, got {self.pictured}")


def analyze(
    model: str | Subject, images: str | Path | ImageFiles, output: str | Path, settings: AnalyzeSettings | None = None
) -> dict[str, Any]:
    """Measure a model on a folder of images, and write `results.json`, `report.html` and PNGs.

    An interrupted run goes on where it stopped when it is started again; its records stay in `output/records`.

    Args:
        model: folder or Hub id of a vision model with its image processor, or a model under analysis (`subject_of`).
        images: folder of images; one folder per class adds the paper's Table 1.
        output: folder of the report.
        settings: what is done.

    Returns:
        The content of `results.json`, whose units stand in its section `units`.

    Raises:
        ValueError: for a model, an image or a setting that does not fit, before anything is measured where possible.
    """
    settings, folder = settings or AnalyzeSettings(), Path(output)
    files = images if isinstance(images, ImageFiles) else find_images(images, leave_out=folder)
    subject = load_vision(model) if isinstance(model, str) else model
    settings.rule.state(len(subject.anatomy.blocks))  # refuses a layer that does not exist
    start_report(folder, "analyze", settings.how.overwrite)
    records = measure(subject, files, settings.how, folder / "records")
    grid = grid_of(subject, files, settings.how)
    outliers = find_outliers(records, settings.rule, len(subject.anatomy.blocks))
    results = {
        "model": describe(subject),
        "images": describe_images(files, records, grid, settings.how),
        **summarize(records, settings.rule, subject, grid),
        "probes": _local(subject, files, settings, outliers, grid),
        "classification": _global(subject, files, settings, outliers),
        "units": UNITS,
    }
    results["sinks"]["writer"] = writer(subject, files.first(_FOLLOWED_AT_MOST), settings.how)
    results = write_results(folder, "analyze", results)
    draw(subject, files.first(settings.pictured), settings.how, records, outliers, grid, results, folder)
    write_report(folder / "report.html", f"Artifacts of {subject.name}", lead(results), sections(results, folder))
    return results


def grid_of(subject: Subject, files: ImageFiles, how: Pass) -> tuple[int, int]:
    """Rows and columns of patches that the images have after the image processor."""
    for file in files.files:
        _, pixels = decode([file], subject.preprocess, how)
        if pixels is not None:
            return subject.grid(pixels)
    raise ValueError("Expected at least one image that can be decoded, got none")


def describe(subject: Subject) -> dict[str, Any]:
    """Section `model` of the results."""
    layout = subject.layout
    return {
        "name": subject.name,
        "family": subject.anatomy.family,
        "weights": fingerprint(subject.model.state_dict().items()),
        "parameters": sum(parameter.numel() for parameter in subject.model.parameters()),
        "layers": len(subject.anatomy.blocks),
        "patch_size": list(layout.patch_size),
        "cls_tokens": layout.num_cls,
        "registers": layout.num_registers + layout.num_test_time_registers,
        "prefix_tokens": list(subject.anatomy.prefix_names),
        "device": torch.cuda.get_device_name() if subject.device.type == "cuda" else str(subject.device),
    }


def describe_images(files: ImageFiles, records: Records, grid: tuple[int, int], how: Pass) -> dict[str, Any]:
    """Section `images` of the results."""
    measured = set(records.measured_images().tolist())
    names = files.names()
    return {
        "folder": str(files.root),
        "measured": len(measured),
        "skipped": [names[index] for index in range(len(files)) if index not in measured],
        "classes": len(files.class_names) or None,
        "grid": list(grid),
        "how": asdict(how),
    }


def writer(subject: Subject, files: ImageFiles, how: Pass) -> dict[str, Any] | None:
    """Which FFN writes the largest value of the residual stream, and into which channel and token, most frequently.

    None where no FFN wrote it, states are not sums of branches, or no image can be read.
    """
    followed = []
    for file in files.files:
        _, pixels = decode([file], subject.preprocess, how)
        followed += [] if pixels is None else [follow_largest(subject, pixels)]
    if not followed or not all(one.adds_up for one in followed):
        return None
    kinds = [(one.ffn_layer, one.channel, _kind(subject, one.position)) for one in followed]
    (layer, channel, token), count = Counter(kinds).most_common(1)[0]
    shares = [
        one.ffn / one.value for one, kind in zip(followed, kinds, strict=True) if kind == (layer, channel, token)
    ]
    if median(shares) <= 0:  # no FFN wrote it: it came in with the embedding
        return None
    return {
        "layer": layer,
        "channel": channel,
        "token": token,
        "share": median(shares),
        "agreement": count / len(followed),
        "images": len(followed),
    }


def _kind(subject: Subject, position: int) -> str:
    names = subject.anatomy.prefix_names
    return names[position] if position < len(names) else "a patch"


def _local(
    subject: Subject, files: ImageFiles, settings: AnalyzeSettings, outliers: Outliers, grid: tuple[int, int]
) -> dict[str, Any] | None:
    if not settings.probes or len(files) < _PROBED_FROM:
        return None
    return local_probes(subject, files.first(_PROBED_AT_MOST), settings.how, outliers, grid)


def _global(
    subject: Subject, files: ImageFiles, settings: AnalyzeSettings, outliers: Outliers
) -> dict[str, Any] | None:
    if not settings.probes or files.labels is None or len(files) < _PROBED_FROM:
        return None
    return token_table(subject, files, settings.how, outliers)
