# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Studies with a report of their own: the paper's Table 1 over several sets, CorLoc, ablations, sinks of texts."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from vitreg_hf.analysis import ablations, localize
from vitreg_hf.analysis.ablations import Kind, Mode, ablate, has_head
from vitreg_hf.analysis.analyze import describe, describe_images, grid_of
from vitreg_hf.analysis.annotations import AnnotatedImage
from vitreg_hf.analysis.artifact_pictures import short
from vitreg_hf.analysis.artifact_sections import global_table, paper_table
from vitreg_hf.analysis.extract import Subject, load_text, load_vision
from vitreg_hf.analysis.figures.objects import boxes_figure
from vitreg_hf.analysis.images import ImageFiles, find_images, labelled_split
from vitreg_hf.analysis.localize import ImageSize, discover_objects, lost_on_file
from vitreg_hf.analysis.measure import Pass, decode, measure
from vitreg_hf.analysis.object_discovery import PAPER_DEFAULT, LostSettings, sweep_settings
from vitreg_hf.analysis.outliers import OutlierRule, find_outliers
from vitreg_hf.analysis.report import Picture, Section, start_report, write_report, write_results
from vitreg_hf.analysis.text_sinks import analyze_text, read_texts
from vitreg_hf.analysis.token_probes import token_table


def probe(
    model: str | Subject, folders: Sequence[str | Path], output: Path, how: Pass, rule: OutlierRule, draws: int = 5
) -> dict[str, Any]:
    """Table 1 of the paper over several sets of images: what one token tells of the class of its image.

    Args:
        model: folder or Hub id, or a model under analysis.
        folders: one folder per set, each with one folder per class, or with `train` and `test` of those.
        output: folder of `results.json` and `report.html`.
        how: how images are run.
        rule: which patches are outliers; the cutoff is found anew for each set.
        draws: random tokens per image and kind.

    Raises:
        ValueError: if two folders have the same name, or a folder has no classes.
    """
    names = [Path(folder).resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"Expected folders with different names, got {', '.join(names)}")
    files = {name: find_images(folder, leave_out=output) for name, folder in zip(names, folders, strict=True)}
    if missing := [name for name, one in files.items() if one.labels is None]:
        raise ValueError(f"Expected one folder per class (or train and test) in {', '.join(missing)}, got none")
    subject = load_vision(model) if isinstance(model, str) else model
    start_report(output, "probe", how.overwrite)
    rows = {}
    for name, images in files.items():
        records = measure(subject, images, how, output / "records" / name)
        outliers = find_outliers(records, rule, len(subject.anatomy.blocks))
        grid = grid_of(subject, images, how)
        rows[name] = {
            "images": describe_images(images, records, grid, how),
            "cutoff": outliers.threshold,
            **token_table(subject, images, how, outliers, draws),
        }
    results = {"model": describe(subject), "rule": asdict(rule), "draws": draws, "sets": rows}
    results = write_results(output, "probe", results)
    lead = f"{subject.name} on {', '.join(rows)}: image classification from one token per image, {draws} draws."
    each = [Section(name, [], [global_table(row)]) for name, row in rows.items()]
    table = [Section("Table 1", [], [paper_table(rows)]), *each]
    write_report(output / "report.html", f"What tokens of {subject.name} tell", lead, table)
    return results


def discover(
    model: str | Subject,
    annotated: Sequence[AnnotatedImage],
    output: Path,
    *,
    default: LostSettings = PAPER_DEFAULT,
    sweep: bool = True,
    image_size: ImageSize = "original",
    pictured: int = 5,
    overwrite: bool = False,
) -> dict[str, Any]:
    """CorLoc of LOST on annotated images, for the authors' default and for a sweep, with boxes drawn.

    Args:
        model: folder or Hub id, or a model under analysis.
        annotated: images with boxes, of `annotations.read_voc` or `read_coco20k`.
        output: folder of `results.json`, `report.html` and `boxes.png`.
        default: the setting that is fixed beforehand.
        sweep: try keys, queries and values of the last four layers, raw and normalised, with biases.
        image_size: see `localize.discover_objects`.
        pictured: images that are drawn.
        overwrite: replace a report of another kind in the output folder.
    """
    subject = load_vision(model) if isinstance(model, str) else model
    start_report(output, "discover", overwrite)
    layers = tuple(range(-1, -min(4, len(subject.anatomy.blocks)) - 1, -1))
    settings = sweep_settings(layers=layers) if sweep else [default]
    results = discover_objects(subject, annotated, settings=settings, default=default, image_size=image_size)
    results = write_results(output, "discover", results)
    shown = [one for one in annotated if one.boxes][:pictured]
    _draw_boxes(subject, shown, default, image_size, output / "boxes.png")
    picture = Picture(output / "boxes.png", "The setting that was fixed beforehand; dashed: the box that was found.")
    score = results["default"]["corloc"]
    lead = (
        f"{subject.name}: CorLoc {100 * score['mean']:.1f} % of {score['n']} images with the setting fixed beforehand."
    )
    write_report(
        output / "report.html", f"Objects that {subject.name} finds", lead, localize.sections(results, [picture])
    )
    return results


def _draw_boxes(
    subject: Subject, shown: Sequence[AnnotatedImage], setting: LostSettings, image_size: ImageSize, path: Path
) -> None:
    found = [lost_on_file(subject, one.path, setting, image_size) for one in shown]
    boxes_figure(
        [image for image, _ in found],
        [discovery for _, discovery in found],
        path,
        captions=[short(one.path.name) for one in shown],
        title=f"{subject.name}: LOST on {setting.feature} features of layer {setting.layer}",
        patch_size=subject.layout.patch_size if image_size == "original" else None,
        truths=[one.boxes for one in shown],
    )


def ablate_images(
    model: str | Subject,
    images: str | Path,
    output: Path,
    how: Pass,
    rule: OutlierRule,
    kind: Kind = "registers",
    modes: Sequence[Mode] = ablations.MODES,
) -> dict[str, Any]:
    """Replace registers, outliers or sinks of every image, and report what a head or a probe loses.

    Folders of classes give labels: to a head that knows classes of their names, or to a probe if there is no head.

    Raises:
        ValueError: as `ablations.ablate`.
    """
    files = find_images(images, leave_out=output)
    files = labelled_split(files)[0] if files.labels is not None else files  # all images of train and test, if given
    subject = load_vision(model) if isinstance(model, str) else model
    state, threshold = rule.state(len(subject.anatomy.blocks)), None
    start_report(output, "ablate", how.overwrite)
    if kind == "outliers":
        records = measure(subject, files, how, output / "records")
        threshold = find_outliers(records, rule, len(subject.anatomy.blocks)).threshold

    starts = list(range(0, len(files), how.batch_size))
    if len(files) - starts[-1] == 1 < len(starts):
        starts.pop()  # a last image alone has none to be shuffled with, so it joins the batch before

    def batches() -> Iterator[Tensor]:
        for start, end in zip(starts, [*starts[1:], len(files)], strict=True):
            _, pixels = decode(files.files[start:end], subject.preprocess, how)
            if pixels is not None:
                yield pixels

    # Labels count images, and an image that is left out would shift them.
    labels = _labels(files, subject) if how.on_corrupt_image == "raise" else None
    results = ablate(subject, batches, kind=kind, modes=modes, labels=labels, threshold=threshold, state=state)
    if results["images_without"] == results["images"]:
        found = "no outlier under this cutoff" if kind == "outliers" else "none"
        raise ValueError(
            f"Expected {kind} in at least one image to replace, got {found} in {results['images']} images"
        )
    results["labels"] = "folders" if labels is not None else None
    results = write_results(output, "ablate", results)
    lead = f"{subject.name}: {kind} of {results['images']} images replaced at the input of every block."
    write_report(output / "report.html", f"Ablations of {subject.name}", lead, ablations.sections(results))
    return results


def _labels(files: ImageFiles, subject: Subject) -> list[int] | None:
    """Class of each image as the model counts them; None where there are no folders, or the head has other classes."""
    if files.labels is None:
        return None
    known = getattr(getattr(subject.model, "config", None), "label2id", None) or {}
    if not has_head(subject):
        return list(files.labels)
    if not set(files.class_names) <= known.keys():
        return None
    return [int(known[files.class_names[label]]) for label in files.labels]


def sinks(
    model: str, texts: Path, output: Path, batch_size: int = 8, max_length: int = 64, overwrite: bool = False
) -> dict[str, Any]:
    """Attention sinks and outlier channels of a text model, on the lines of a file; see `text_sinks.analyze_text`."""
    lines, subject = read_texts(texts), load_text(model)
    return analyze_text(subject, lines, output, batch_size=batch_size, max_length=max_length, overwrite=overwrite)
