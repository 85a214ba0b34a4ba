# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""`vitreg compare`: models on the same images, side by side, difference by difference, with intervals over images.

Differences are paired: each image is measured with all models. Where an interval holds 0, the answer is "no
difference": what the images at hand cannot tell apart is not told apart.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitreg_hf.analysis.analyze import AnalyzeSettings, describe, describe_images, grid_of
from vitreg_hf.analysis.compare_pictures import draw
from vitreg_hf.analysis.compare_sections import lead as lead, sections, title
from vitreg_hf.analysis.differences import MOST_MODELS, Compared, differences, distinct
from vitreg_hf.analysis.extract import Subject, load_vision
from vitreg_hf.analysis.images import ImageFiles, find_images
from vitreg_hf.analysis.measure import measure
from vitreg_hf.analysis.outliers import find_outliers
from vitreg_hf.analysis.report import start_report, write_report, write_results
from vitreg_hf.analysis.summary import summarize

_LETTERS = "abcdef"  # of the folders of records


def compare(
    first: str | Subject,
    second: str | Subject,
    images: str | Path | ImageFiles,
    output: str | Path,
    settings: AnalyzeSettings | None = None,
) -> dict[str, Any]:
    """Compare two models: `compare_models`."""
    return compare_models((first, second), images, output, settings)


def compare_models(
    models: Sequence[str | Subject],
    images: str | Path | ImageFiles,
    output: str | Path,
    settings: AnalyzeSettings | None = None,
) -> dict[str, Any]:
    """Measure models on the same images, and write `results.json`, `report.html` and PNGs.

    Args:
        models: two to six folders or Hub ids, or models under analysis; later ones are compared with the first.
        images: folder of images.
        output: folder of the report; an interrupted run goes on when it is started again, also with more models.
        settings: as for `analyze`; probes are not trained here.

    Returns:
        The content of `results.json`: sections `models`, `images`, `grids`, `differences`, and the summary of each
        model in `summaries`.

    Raises:
        ValueError: as `analyze`, for another number of models, or if different images could be read for them.
    """
    if not 2 <= len(models) <= MOST_MODELS:
        raise ValueError(f"Expected 2 to {MOST_MODELS} models to compare, got {len(models)}")
    settings, folder = settings or AnalyzeSettings(), Path(output)
    files = images if isinstance(images, ImageFiles) else find_images(images, leave_out=folder)
    subjects = [load_vision(model) if isinstance(model, str) else model for model in models]
    for subject in subjects:
        settings.rule.state(len(subject.anatomy.blocks))  # refuses a layer that does not exist
    start_report(folder, "compare", settings.how.overwrite)
    compared = _measured(subjects, files, settings, folder)
    results = write_results(folder, "compare", _results(compared, files, settings))
    draw(compared, files.first(settings.pictured), settings.how, results, folder)
    write_report(folder / "report.html", title(results), lead(results), sections(results, folder))
    return results


def _measured(
    subjects: Sequence[Subject], files: ImageFiles, settings: AnalyzeSettings, folder: Path
) -> list[Compared]:
    names, compared = distinct([subject.name for subject in subjects]), []
    for name, subject, letter in zip(names, subjects, _LETTERS, strict=False):
        records = measure(subject, files, settings.how, folder / f"records-{letter}")
        outliers = find_outliers(records, settings.rule, len(subject.anatomy.blocks))
        compared.append(Compared(name, subject, records, outliers, grid_of(subject, files, settings.how)))
    return compared


def _results(compared: Sequence[Compared], files: ImageFiles, settings: AnalyzeSettings) -> dict[str, Any]:
    first = compared[0]
    return {
        "models": {one.name: describe(one.subject) for one in compared},
        "images": describe_images(files, first.records, first.grid, settings.how),
        "grids": [list(one.grid) for one in compared],
        "differences": differences(compared),
        "summaries": {one.name: summarize(one.records, settings.rule, one.subject, one.grid) for one in compared},
    }
