# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Commands that measure and draw: they need the extra `analysis`, so each imports what it calls."""

import argparse
from pathlib import Path
from typing import Any

from vitreg_hf.cli.options import IMAGES, add_command, add_overwrite, add_pass, add_rule


def add_measuring(commands: Any) -> None:
    """Add analyze, compare, probe, discover, ablate, sinks and dataset."""
    one = add_command(
        commands, "analyze", _analyze, "measure and draw artifacts, registers and sinks of a vision model"
    )
    one.add_argument("model", help="folder or Hub id of a vision model")
    one.add_argument("images", help=f"{IMAGES}; one folder per class adds the paper's Table 1")
    add_pass(one)
    add_rule(one)
    one.add_argument("--no-probes", action="store_true", help="train no probes, which takes most of the time on a CPU")
    one.add_argument("--pictured", type=int, default=5, help="images that are drawn (default: 5)")

    several = add_command(commands, "compare", _compare, "models side by side on the same images, with intervals")
    models = "folders or Hub ids of two to six vision models, of which the first is what the others are compared with"
    several.add_argument("models", nargs="+", metavar="model", help=models)
    several.add_argument("images", help=IMAGES)
    add_pass(several)
    add_rule(several)
    several.add_argument("--pictured", type=int, default=5, help="images that are drawn (default: 5)")

    probe = add_command(commands, "probe", _probe, "the paper's Table 1: classify images from one token")
    probe.add_argument("model", help="folder or Hub id of a vision model")
    probe.add_argument("images", nargs="+", help="folders with one folder per class, or with train and test of those")
    add_pass(probe)
    add_rule(probe)
    probe.add_argument("--draws", type=int, default=5, help="random tokens per image and kind (default: 5)")

    discover = add_command(commands, "discover", _discover, "object discovery with LOST, and its CorLoc")
    discover.add_argument("model", help="folder or Hub id of a vision model")
    discover.add_argument("annotations", type=Path, help="VOCdevkit/VOC2007 or alike, or the folder of COCO train2014")
    discover.add_argument("--split", default="trainval", help="of VOC (default: trainval)")
    discover.add_argument("--no-hard", action="store_true", help="leave difficult and truncated objects of VOC out")
    discover.add_argument("--coco20k", type=Path, metavar="LIST", help="file with the names of COCO20k; not VOC then")
    discover.add_argument("--no-sweep", action="store_true", help="the setting of the next four options alone")
    add_overwrite(discover)
    discover.add_argument("--feature", choices=("key", "query", "value"), default="key", help="default: key")
    discover.add_argument("--layer", type=int, default=-1, help="default: -1, the last")
    discover.add_argument("--normalize", action="store_true", help="compare by cosine rather than by dot product")
    discover.add_argument("--bias", type=float, default=0.0, help="added to every similarity (default: 0)")
    discover.add_argument(
        "--resolution",
        choices=("original", "processor"),
        default="original",
        help="their own size, as LOST has it (default), or that of the image processor, for models that take no other",
    )

    ablate = add_command(commands, "ablate", _ablate, "replace registers, outliers or sinks, and see what is lost")
    ablate.add_argument("model", help="folder or Hub id of a vision model")
    ablate.add_argument("images", help=f"{IMAGES}; folders of classes give labels")
    ablate.add_argument("--tokens", choices=("registers", "outliers", "sink"), default="registers", help="which")
    ablate.add_argument("--modes", nargs="+", choices=("zero", "mean", "noise", "shuffle"), help="default: all")
    add_pass(ablate)
    add_rule(ablate)

    sinks = add_command(commands, "sinks", _sinks, "attention sinks and outlier channels of a text model")
    sinks.add_argument("model", help="folder or Hub id of a text model")
    sinks.add_argument("--texts", type=Path, required=True, help="UTF-8 file, one text per line")
    add_overwrite(sinks)
    sinks.add_argument("--batch-size", type=int, default=8, help="texts at a time (default: 8)")
    sinks.add_argument("--max-length", type=int, default=64, help="tokens after which a text is cut off (default: 64)")

    dataset = add_command(commands, "dataset", _dataset, "write a dataset to one folder per class, for the others")
    dataset.add_argument("name", nargs="?", help="Hub id, or a folder or file that the datasets library reads")
    dataset.add_argument("--paper", metavar="SET", help="one of the paper's sets (CF10, CUB, ...): train and test")
    dataset.add_argument("--config", help="configuration of the dataset")
    dataset.add_argument("--split", default="test", help="default: test")
    dataset.add_argument("--image-column", default="image", help="default: image")
    dataset.add_argument("--label-column", default="label", help="default: label")
    dataset.add_argument("--at-most", type=int, help="write no more images than this")


def _settings(options: argparse.Namespace) -> tuple[Any, Any]:
    from vitreg_hf.analysis.measure import Pass
    from vitreg_hf.analysis.outliers import OutlierRule

    how = Pass(options.batch_size, options.image_size, options.on_corrupt_image, options.overwrite)
    return how, OutlierRule(options.cutoff, options.cutoff_value, options.layer)


def _analyze(options: argparse.Namespace) -> None:
    from vitreg_hf.analysis.analyze import AnalyzeSettings, analyze
    from vitreg_hf.analysis.artifact_sections import lead

    settings = AnalyzeSettings(*_settings(options), probes=not options.no_probes, pictured=options.pictured)
    print(lead(analyze(options.model, options.images, options.output, settings)))
    _print_report(options.output)


def _compare(options: argparse.Namespace) -> None:
    from vitreg_hf.analysis.analyze import AnalyzeSettings
    from vitreg_hf.analysis.compare import compare_models, lead

    settings = AnalyzeSettings(*_settings(options), probes=False, pictured=options.pictured)
    print(lead(compare_models(options.models, options.images, options.output, settings)))
    _print_report(options.output)


def _probe(options: argparse.Namespace) -> None:
    from vitreg_hf.analysis.studies import probe

    results = probe(options.model, options.images, options.output, *_settings(options), draws=options.draws)
    for name, row in results["sets"].items():
        scores = {kind: row[kind] for kind in ("CLS", "normal", "outlier", "register") if row.get(kind)}
        print(f"{name}: " + ", ".join(f"{kind} {100 * one['accuracy']:.1f} %" for kind, one in scores.items()))
    _print_report(options.output)


def _discover(options: argparse.Namespace) -> None:
    from vitreg_hf.analysis.annotations import read_coco20k, read_voc
    from vitreg_hf.analysis.object_discovery import LostSettings
    from vitreg_hf.analysis.studies import discover

    if options.coco20k is not None:
        annotated = read_coco20k(options.annotations, options.coco20k)
    else:
        annotated = read_voc(options.annotations, options.split, include_hard=not options.no_hard)
    sweep, size = not options.no_sweep, options.resolution
    default = LostSettings(options.feature, options.layer, options.normalize, options.bias)
    results = discover(
        options.model,
        annotated,
        options.output,
        default=default,
        sweep=sweep,
        image_size=size,
        overwrite=options.overwrite,
    )
    for name in ("default", "best_on_the_same_images"):
        score = results[name]
        print(f"{name.replace('_', ' ')}: CorLoc {100 * score['corloc']['mean']:.1f} % ({score['setting']})")
    _print_report(options.output)


def _ablate(options: argparse.Namespace) -> None:
    from vitreg_hf.analysis.ablations import MODES
    from vitreg_hf.analysis.studies import ablate_images

    how, rule = _settings(options)
    modes = options.modes or MODES
    results = ablate_images(options.model, options.images, options.output, how, rule, options.tokens, modes)
    for mode, row in results["modes"].items():
        print(f"{mode}: cosine of the pooled feature {row['ablated']['pooled_cosine']['mean']:.4f}")
    _print_report(options.output)


def _sinks(options: argparse.Namespace) -> None:
    from vitreg_hf.analysis import text_report
    from vitreg_hf.analysis.studies import sinks

    numbers = (options.batch_size, options.max_length, options.overwrite)
    results = sinks(options.model, options.texts, options.output, *numbers)
    print(text_report.lead(results))
    _print_report(options.output)


def _dataset(options: argparse.Namespace) -> None:
    from vitreg_hf.analysis.images import export_dataset
    from vitreg_hf.analysis.paper_datasets import paper_dataset

    if (options.name is None) == (options.paper is None):
        raise ValueError("Expected either the name of a dataset or --paper and one of the paper's sets")
    if options.paper is None:
        columns = (options.image_column, options.label_column, options.config)
        count = export_dataset(options.name, options.output, options.split, *columns, options.at_most)
        print(f"{count} images in {options.output}")
        return
    one = paper_dataset(options.paper)
    for name, split in (("train", one.train_split), ("test", one.test_split)):
        folder = options.output / one.short_name / name
        columns = (one.image_column, one.label_column, one.config)
        count = export_dataset(one.hub_id, folder, split, *columns, options.at_most)
        print(f"{count} images in {folder}")


def _print_report(folder: Path) -> None:
    print(f"report:  {folder / 'report.html'}\nnumbers: {folder / 'results.json'}")
