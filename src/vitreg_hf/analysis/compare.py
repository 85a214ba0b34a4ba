# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""`vitreg compare`: two models on the same images, difference by difference, with intervals over images.

Differences are paired: each image is measured with both models. Where an interval holds 0, the answer is "no
difference": what the images at hand cannot tell apart is not told apart.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from vitreg_hf.analysis.analyze import AnalyzeSettings, describe, describe_images, grid_of
from vitreg_hf.analysis.artifact_pictures import Pictured, look_at, short
from vitreg_hf.analysis.extract import Subject, load_vision
from vitreg_hf.analysis.figures import curves, maps
from vitreg_hf.analysis.images import ImageFiles, find_images
from vitreg_hf.analysis.intervals import CONFIDENCE, difference_interval, mean_interval
from vitreg_hf.analysis.measure import measure
from vitreg_hf.analysis.outliers import Outliers, find_outliers, per_image
from vitreg_hf.analysis.records import Records
from vitreg_hf.analysis.report import (
    Picture,
    Section,
    Table,
    interval,
    number,
    start_report,
    write_report,
    write_results,
)
from vitreg_hf.analysis.summary import summarize

_DIFFERS = {True: "yes", False: "no difference", None: "too few images"}
# With fewer, percentile bootstraps find differences of models that do not differ far too often.
_FEWEST_IMAGES = 20

# Quantity of `outliers.per_image` -> how it is called, its unit, and the factor that brings it to that unit. Norms
# themselves are left out: those of different models do not compare.
COMPARED = {
    "outlier_share": ("patches above the model's own cutoff", "% of an image's patches", 100),
    "largest_over_median": ("largest norm", "times the median of the image", 1),
    "first_token_area": ("area that the first token attends to", "% of the image", 100),
    "mass_on_registers": ("attention of the first token on registers", "%", 100),
    "received_by_outliers": ("attention that an outlier gets", "times an even share", 1),
}


def compare(
    first: str | Subject,
    second: str | Subject,
    images: str | Path | ImageFiles,
    output: str | Path,
    settings: AnalyzeSettings | None = None,
) -> dict[str, Any]:
    """Measure two models on the same images, and write `results.json`, `report.html` and PNGs.

    Args:
        first, second: folders or Hub ids, or models under analysis.
        images: folder of images.
        output: folder of the report; an interrupted run goes on when it is started again.
        settings: as for `analyze`; probes are not trained here.

    Returns:
        The content of `results.json`: sections `models`, `images`, `differences`, and the summary of each model.

    Raises:
        ValueError: as `analyze`, or if different images could be read for the two.
    """
    settings, folder = settings or AnalyzeSettings(), Path(output)
    files = images if isinstance(images, ImageFiles) else find_images(images, leave_out=folder)
    subjects = [load_vision(model) if isinstance(model, str) else model for model in (first, second)]
    for subject in subjects:
        settings.rule.state(len(subject.anatomy.blocks))  # refuses a layer that does not exist
    names = _distinct([subject.name for subject in subjects])
    start_report(folder, "compare", settings.how.overwrite)
    measured = [
        measure(subject, files, settings.how, folder / f"records-{letter}")
        for subject, letter in zip(subjects, "ab", strict=True)
    ]
    outliers = [
        find_outliers(records, settings.rule, len(subject.anatomy.blocks))
        for records, subject in zip(measured, subjects, strict=True)
    ]
    grids = [grid_of(subject, files, settings.how) for subject in subjects]
    results = {
        "models": {name: describe(subject) for name, subject in zip(names, subjects, strict=True)},
        "images": describe_images(files, measured[0], grids[0], settings.how),
        "grids": [list(grid) for grid in grids],
        "differences": differences(measured, outliers, names),
        "summaries": {
            name: summarize(records, settings.rule, subject, grid)
            for name, records, subject, grid in zip(names, measured, subjects, grids, strict=True)
        },
    }
    results = write_results(folder, "compare", results)
    _draw(subjects, names, files.first(settings.pictured), settings, measured, outliers, results, folder)
    title = f"{names[0]} and {names[1]}"
    write_report(folder / "report.html", title, lead(results), sections(results, folder))
    return results


def _distinct(names: list[str]) -> list[str]:
    return names if names[0] != names[1] else [f"{names[0]} (first)", f"{names[1]} (second)"]


def differences(records: list[Records], outliers: list[Outliers], names: list[str]) -> list[dict[str, Any]]:
    """Paired differences `second - first` of every quantity that images of both models have.

    Returns:
        Per quantity its `name`, `unit`, a mean with interval for each model and for the `difference`, and `differs`:
        whether that interval excludes 0; None with too few images to tell. Intervals of differences are wider than
        95 % by Bonferroni's rule, so that all of them together miss in 5 % of comparisons.
    """
    if records[0].measured_images().tolist() != records[1].measured_images().tolist():
        raise ValueError("Expected the same readable images for both models, got different ones")
    first, second = (per_image(*pair) for pair in zip(records, outliers, strict=True))
    rows = []
    for key, (name, unit, factor) in COMPARED.items():
        if key in first and key in second:
            a, b = factor * first[key], factor * second[key]
            change = difference_interval(a, b, 1 - (1 - CONFIDENCE) / len(COMPARED))
            rows.append(
                {
                    "quantity": key,
                    "name": name,
                    "unit": unit,
                    names[0]: asdict(mean_interval(a)),
                    names[1]: asdict(mean_interval(b)),
                    "difference": asdict(change),
                    "differs": change.excludes_zero if change.n >= _FEWEST_IMAGES else None,
                }
            )
    return rows


def _tokens(looked: Pictured) -> int:
    return looked.prefix.shape[2] + looked.norms[0].numel()


def lead(results: dict[str, Any]) -> str:
    """What differs and what does not, in one paragraph."""
    rows, (first, second) = results["differences"], results["models"]
    told = [f"{r['name']}: {interval(r['difference'], unit=r['unit'])}" for r in rows if r["differs"]]
    same = [row["name"] for row in rows if row["differs"] is False]
    none = [row["name"] for row in rows if row["difference"]["n"] == 0]
    few = [row["name"] for row in rows if row["differs"] is None and row["difference"]["n"] > 0]
    parts = [f"On the same {results['images']['measured']} images,"]
    if told:
        parts.append(f"{second} differs from {first} in: {'; '.join(told)}.")
        parts += [f"No difference that they could tell in: {'; '.join(same)}."] if same else []
    else:
        parts.append(f"{first} and {second}: {'no difference' if same else 'nothing that could be told'}.")
    parts += [f"Too few images (under {_FEWEST_IMAGES}) have: {'; '.join(few)}."] if few else []
    parts += [f"Not in both models: {'; '.join(none)}."] if none else []
    return " ".join(parts)


def sections(results: dict[str, Any], folder: Path) -> list[Section]:
    """The differences, then both models side by side."""
    names = list(results["models"])
    rows = [
        (
            f"{row['name']} ({row['unit']})",
            interval(row[names[0]]),
            interval(row[names[1]]),
            interval(row["difference"]),
            _DIFFERS[row["differs"]] if row["difference"]["n"] else "not in both",
        )
        for row in results["differences"]
    ]
    header = ("per image", *names, "difference", "differs")
    caption = (
        "Means with 95 % bootstrap intervals over images; differences are those of the same image, with "
        "intervals that "
        "all hold together in 95 % of comparisons."
    )
    models = [
        (
            name,
            model["family"],
            str(model["layers"]),
            str(model["registers"]),
            number(results["summaries"][name]["outliers"]["cutoff"]),
            "yes" if results["summaries"][name]["outliers"]["two_groups"]["found"] else "no",
        )
        for name, model in results["models"].items()
    ]
    about = ("model", "family", "layers", "registers", "cutoff of norms", "two groups of norms")
    note = "A cutoff is in units of its own model: norms of two models do not compare."
    pictures = {
        "differences": "Grey where the interval holds 0: no difference that these images could tell.",
        "norms": "Norms of patches of both models; each has a cutoff of its own.",
        "layers": "Norms and outliers after every layer of both models.",
        "channels": "Large values of the residual stream of both models.",
        "maps": "Norms of patches on the image, each model on a scale from 0 to the largest of its own here.",
        "attention": "What the first token attends to in the last layer, as multiples of an even share, on one scale.",
    }
    shown = [Picture(folder / f"{n}.png", text) for n, text in pictures.items() if (folder / f"{n}.png").is_file()]
    return [
        Section("Differences", [], [Table(header, rows, caption)], shown[:1]),
        Section("Side by side", [], [Table(about, models, note)], shown[1:]),
    ]


def _draw(
    subjects: list[Subject],
    names: list[str],
    images: ImageFiles,
    settings: AnalyzeSettings,
    records: list[Records],
    outliers: list[Outliers],
    results: dict[str, Any],
    folder: Path,
) -> None:
    count = results["images"]["measured"]
    drawn = [row for row in results["differences"] if row["difference"]["low"] is not None]
    if drawn:
        title = f"Two models on the same {count} images"
        curves.differences(drawn, names[0], names[1], folder / "differences.png", title=title)
    norms = {name: one.norms(cut.state) for name, one, cut in zip(names, records, outliers, strict=True)}
    cutoffs = {name: cut.threshold for name, cut in zip(names, outliers, strict=True)}
    curves.norm_histogram(norms, cutoffs, folder / "norms.png", title=f"Norms of patches, {count} images")
    layers = {name: summary["layers"] for name, summary in results["summaries"].items()}
    curves.layer_curves(layers, folder / "layers.png", title=f"Patches over layers, {count} images")
    curves.channel_curves(layers, folder / "channels.png", title=f"Values of the residual stream, {count} images")
    looked = [look_at(s, images, settings.how, o.state) for s, o in zip(subjects, outliers, strict=True)]
    captions = [short(name) for name in looked[0].names]
    share = [one.norms.numpy() / float(one.norms.max()) for one in looked]
    maps.map_sheet(
        [(f"norms, {name}", map_, "inferno") for name, map_ in zip(names, share, strict=True)],
        looked[0].seen,
        folder / "maps.png",
        captions=captions,
        title="Norms of patches",
        label="norm / largest norm of these images, per model",
    )
    if all(subject.layout.num_prefix for subject in subjects):
        # Models differ in how many tokens share the attention, so both are drawn as multiples of an even share.
        attention = [one.prefix[:, :, 0].mean(dim=1).numpy() * _tokens(one) for one in looked]
        heading = [f"{s.anatomy.prefix_names[0]}, {name}" for s, name in zip(subjects, names, strict=True)]
        maps.map_sheet(
            [(head, map_, "viridis") for head, map_ in zip(heading, attention, strict=True)],
            looked[0].seen,
            folder / "attention.png",
            captions=captions,
            title="Attention in the last layer",
            label="attention to a patch / even share\n(mean of heads)",
        )
