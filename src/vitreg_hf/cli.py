# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `vitreg`: reads arguments, calls one function, prints what it found and where the report is.

Functions are imported by the command that calls them: most need the extra `analysis`; `card` and `push` do not.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_IMAGES = "folder of images, searched with its subfolders"
_TRAINED = "folder that an example wrote: model, image processor, results.json"
_OUTPUT = "folder of the report (default: outputs/ and the command)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; or after one sentence on stderr: 2 for a mistake of the user's, 1 for a Hub that refused or did not answer,
        130 for an interruption. After 1 and 130 the same command goes on.
    """
    options = parser().parse_args(argv)
    if "output" in options:
        options.output = options.output or Path("outputs") / options.command
    try:
        options.run(options)
    except ConnectionError as error:  # a Hub that refuses or does not answer
        print(f"vitreg {options.command}: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"vitreg {options.command}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"vitreg {options.command}: {error}: pip install 'vitreg_hf[analysis]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vitreg {options.command}: interrupted{_kept(options)}", file=sys.stderr)
        return 130
    return 0


def _kept(options: argparse.Namespace) -> str:
    if options.command == "push":
        return ": nothing here was changed, the same command completes it"
    measured = "output" in options and (options.output / "records").is_dir()
    return ": what was measured is kept, the same command goes on" if measured else ""


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="vitreg", description="Vision Transformers with registers")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    one = _command(commands, "analyze", _analyze, "measure and draw artifacts, registers and sinks of a vision model")
    one.add_argument("model", help="folder or Hub id of a vision model")
    one.add_argument("images", help=f"{_IMAGES}; one folder per class adds the paper's Table 1")
    _add_pass(one)
    _add_rule(one)
    one.add_argument("--no-probes", action="store_true", help="train no probes, which takes most of the time on a CPU")
    one.add_argument("--pictured", type=int, default=5, help="images that are drawn (default: 5)")

    two = _command(commands, "compare", _compare, "two models on the same images, with intervals")
    two.add_argument("first", help="folder or Hub id of a vision model")
    two.add_argument("second", help="folder or Hub id of another one")
    two.add_argument("images", help=_IMAGES)
    _add_pass(two)
    _add_rule(two)
    two.add_argument("--pictured", type=int, default=5, help="images that are drawn (default: 5)")

    probe = _command(commands, "probe", _probe, "the paper's Table 1: classify images from one token")
    probe.add_argument("model", help="folder or Hub id of a vision model")
    probe.add_argument("images", nargs="+", help="folders with one folder per class, or with train and test of those")
    _add_pass(probe)
    _add_rule(probe)
    probe.add_argument("--draws", type=int, default=5, help="random tokens per image and kind (default: 5)")

    discover = _command(commands, "discover", _discover, "object discovery with LOST, and its CorLoc")
    discover.add_argument("model", help="folder or Hub id of a vision model")
    discover.add_argument("annotations", type=Path, help="VOCdevkit/VOC2007 or alike, or the folder of COCO train2014")
    discover.add_argument("--split", default="trainval", help="of VOC (default: trainval)")
    discover.add_argument("--no-hard", action="store_true", help="leave difficult and truncated objects of VOC out")
    discover.add_argument("--coco20k", type=Path, metavar="LIST", help="file with the names of COCO20k; not VOC then")
    discover.add_argument("--no-sweep", action="store_true", help="the setting of the next four options alone")
    _add_overwrite(discover)
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

    ablate = _command(commands, "ablate", _ablate, "replace registers, outliers or sinks, and see what is lost")
    ablate.add_argument("model", help="folder or Hub id of a vision model")
    ablate.add_argument("images", help=f"{_IMAGES}; folders of classes give labels")
    ablate.add_argument("--tokens", choices=("registers", "outliers", "sink"), default="registers", help="which")
    ablate.add_argument("--modes", nargs="+", choices=("zero", "mean", "noise", "shuffle"), help="default: all")
    _add_pass(ablate)
    _add_rule(ablate)

    sinks = _command(commands, "sinks", _sinks, "attention sinks and outlier channels of a text model")
    sinks.add_argument("model", help="folder or Hub id of a text model")
    sinks.add_argument("--texts", type=Path, required=True, help="UTF-8 file, one text per line")
    _add_overwrite(sinks)
    sinks.add_argument("--batch-size", type=int, default=8, help="texts at a time (default: 8)")
    sinks.add_argument("--max-length", type=int, default=64, help="tokens after which a text is cut off (default: 64)")

    dataset = _command(commands, "dataset", _dataset, "write a dataset to one folder per class, for the others")
    dataset.add_argument("name", nargs="?", help="Hub id, or a folder or file that the datasets library reads")
    dataset.add_argument("--paper", metavar="SET", help="one of the paper's sets (CF10, CUB, ...): train and test")
    dataset.add_argument("--config", help="configuration of the dataset")
    dataset.add_argument("--split", default="test", help="default: test")
    dataset.add_argument("--image-column", default="image", help="default: image")
    dataset.add_argument("--label-column", default="label", help="default: label")
    dataset.add_argument("--at-most", type=int, help="write no more images than this")

    card = _command(commands, "card", _card, "write the model card of a trained model from its results", output=False)
    card.add_argument("folder", type=Path, help=_TRAINED)
    card.add_argument("--model-id", help="what readers will load: a Hub id (default: the folder)")
    card.add_argument("--license", help="licence of the weights, as the Hub spells it (default: that of the results)")
    card.add_argument("--overwrite", action="store_true", help="replace a card that was edited by hand")

    push = _command(commands, "push", _push, "publish a trained model on the Hub, in one commit", output=False)
    push.add_argument("folder", type=Path, help=_TRAINED)
    push.add_argument("repo_id", help="NAME/MODEL, or MODEL under your own name; made if there is none")
    push.add_argument("--private", action="store_true", help="make a repository that only you see")
    push.add_argument("--revision", help="branch, made if there is none (default: main)")
    push.add_argument("--create-pr", action="store_true", help="open a pull request rather than commit")
    push.add_argument("--tag", help="tag the commit, v1.0 or alike")
    push.add_argument("--with-code", action="store_true", help="add the model's code, for trust_remote_code=True")
    push.add_argument("--license", help="licence of the weights, as the Hub spells it (default: that of the results)")
    push.add_argument("--message", help="of the commit")
    return top


def _command(commands: Any, name: str, run: Any, summary: str, output: bool = True) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    command.set_defaults(run=run)
    if output:
        command.add_argument("--output", type=Path, help=_OUTPUT)
    return command


def _add_pass(command: argparse.ArgumentParser) -> None:
    command.add_argument("--batch-size", type=int, default=8, help="images at a time (default: 8)")
    command.add_argument("--image-size", type=int, help="side in pixels in place of the image processor's size")
    command.add_argument(
        "--on-corrupt-image", choices=("raise", "skip"), default="raise", help="stop, or leave it out and list it"
    )
    _add_overwrite(command)


def _add_overwrite(command: argparse.ArgumentParser) -> None:
    told = "replace records and reports of something else in the output folder"
    command.add_argument("--overwrite", action="store_true", help=told)


def _add_rule(command: argparse.ArgumentParser) -> None:
    rules = ("median", "sigma", "percentile", "mixture", "fixed")
    command.add_argument("--cutoff", choices=rules, default="median", help="rule for outliers (default: 2 x median)")
    command.add_argument("--cutoff-value", type=float, help="number of that rule")
    command.add_argument("--layer", type=int, default=-1, help="judge norms after this layer (default: -1, the last)")


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
    from vitreg_hf.analysis.compare import compare, lead

    settings = AnalyzeSettings(*_settings(options), probes=False, pictured=options.pictured)
    print(lead(compare(options.first, options.second, options.images, options.output, settings)))
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


def _card(options: argparse.Namespace) -> None:
    from vitreg_hf.hub.cards import card_of, is_rendered, save_card

    if (options.folder / "README.md").exists() and not is_rendered(options.folder) and not options.overwrite:
        raise ValueError(
            f"Expected no card that a person edited, got {options.folder}/README.md: --overwrite replaces it"
        )
    card = card_of(options.folder, options.model_id or str(options.folder), options.license)
    print(f"card: {save_card(card, options.folder)}")


def _push(options: argparse.Namespace) -> None:
    from vitreg_hf.hub.publish import publish

    published = publish(
        options.folder,
        options.repo_id,
        private=options.private,
        revision=options.revision,
        create_pr=options.create_pr,
        tag=options.tag,
        with_code=options.with_code,
        model_license=options.license,
        message=options.message,
    )
    print(published)


def _print_report(folder: Path) -> None:
    print(f"report:  {folder / 'report.html'}\nnumbers: {folder / 'results.json'}")


if __name__ == "__main__":
    sys.exit(main())
