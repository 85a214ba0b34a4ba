# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""How many registers? The ablation of "Vision Transformers Need Registers" (arXiv 2309.16588, section 3.3, Fig. 8).

    python examples/register_ablation.py
    python examples/register_ablation.py --num_register_tokens 0 4 --seeds 0 1 -- --num_train_epochs 18
    python examples/register_ablation.py --launch "--num_processes 8" --recipe NAME -- --dataset_name someone/photos

Trains a classifier for every number of registers and every seed (what follows `--` goes to
`train_image_classification.py`), measures all of them in the same way, and writes one table, one picture and
`results.json`. A training that is finished is not repeated, an interrupted one is continued exactly: the same command
goes on, SIGTERM ends it between two steps with exit code 85.

Measured, in `docs/ablation`: without arguments, 18 models of 8 epochs on digits, 8 minutes of one core. None of them
has an outlier, so registers have nothing to repair. Accuracy (means over three seeds of 96.8 to 97.6 %) and the dense
probe (23.5 to 24.7 % mIoU on mosaics of four held-out digits; guessing gives 5 %) show no difference that three seeds
can tell. What registers cost can be told: four beside 16 patches take 23 % more operations and memory and leave 80 %
of the speed. Beside the 196 patches of ViT-B/16 they are the 2 % that the paper says.
"""

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import DataClassType
from transformers.utils.logging import disable_progress_bar

import vitreg_hf  # noqa: F401  # registers the family
from vitreg_hf.analysis.dense_probe import fit_dense_probe
from vitreg_hf.analysis.extract import Subject, load_vision
from vitreg_hf.analysis.figures.register_counts import register_counts_figure
from vitreg_hf.analysis.register_counts import (
    as_markdown,
    compare,
    count_table,
    findings,
    measure_tokens,
    patch_tokens,
)
from vitreg_hf.model.fingerprint import fingerprint
from vitreg_hf.training.augmentation import EvaluationTransform
from vitreg_hf.training.classification_settings import ImageClassificationSettings
from vitreg_hf.training.command_line import parse_settings
from vitreg_hf.training.costs import bytes_saved_per_image, images_per_second
from vitreg_hf.training.data import load_images
from vitreg_hf.training.labelled_images import ImageClassificationData, LabelledImages
from vitreg_hf.training.mosaics import mosaics
from vitreg_hf.training.results import processor_name, versions, write_results
from vitreg_hf.training.running import STOPPED_EXIT_CODE, exit_with_a_sentence
from vitreg_hf.training.segmentation_metrics import MeanIoU
from vitreg_hf.training.settings import expect, listed, option

TRAINING = Path(__file__).with_name("train_image_classification.py")
SMALL = ["--num_train_epochs", "8"]  # what the trainings get where nothing follows `--`
OWN = ("--num_register_tokens", "--seed", "--output_dir", "--resume_from_checkpoint", "--recipe", "--push_to_hub")


@dataclass
class AblationSettings:
    """Which models are compared, and how they are measured."""

    num_register_tokens: list[int] = listed(
        [0, 1, 2, 4, 8, 16], "numbers of registers; others are compared with the first"
    )
    seeds: list[int] = listed([0, 1, 2], "each number is trained with each of these seeds")
    recipe: str | None = option(None, "start from the settings of a recipe, see training/recipes.py")
    launch: str | None = option(None, "train by accelerate launch with these options", nargs="?", const="")
    output_dir: str = option("outputs/ablation", "folder for models, results, table and picture")
    max_measured_images: int = option(512, "held-out images whose norms are measured")
    mosaics: int = option(256, "mosaics of training images that the dense probe learns from; half as many score it")
    measured_batch_size: int = option(32, "images at a time when models are measured and timed")
    timed_seconds: float = option(3.0, "seconds in which the models of a seed take turns at least")

    def __post_init__(self) -> None:
        for name in ("num_register_tokens", "seeds"):
            values = getattr(self, name)
            valid = len(values) == len(set(values)) > 0 and min(values) >= 0
            expect(valid, f"{name} of different numbers of 0 or more", values)
        for name, least in (("max_measured_images", 1), ("mosaics", 2), ("measured_batch_size", 2)):
            expect(getattr(self, name) >= least, f"{name} of {least} or more", getattr(self, name))
        expect(int(os.environ.get("WORLD_SIZE", "1")) == 1, "one process (--launch starts more for each training)",
               os.environ.get("WORLD_SIZE"))  # fmt: skip

    def folder(self, registers: int, seed: int) -> Path:
        """Where a model is."""
        return Path(self.output_dir) / f"R{registers}-seed{seed}"


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is not trained yet, measure what is not measured yet, compare, and write table, picture, results."""
    disable_progress_bar()  # of the weights that are loaded: models are small beside their training
    words = list(sys.argv[1:] if argv is None else argv)
    own, passed = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, SMALL)
    (settings,) = HfArgumentParser(DataClassType(AblationSettings)).parse_args_into_dataclasses(own)
    taken = [word for word in passed if word.partition("=")[0] in OWN]
    expect(not taken, "options of the training after --", f"{', '.join(taken)}, which this script sets")
    models = [(registers, seed) for seed in settings.seeds for registers in settings.num_register_tokens]

    planned = {model: parse(training_options(settings, passed, *model)) for model in models}
    for model, training in planned.items():
        claim(settings.folder(*model), training)
    for registers, seed in tqdm(models, desc="Training", unit="model"):
        if not (settings.folder(registers, seed) / "results.json").is_file():
            train(settings, training_options(settings, passed, registers, seed))
    data = load_images(planned[models[0]])
    measures = {(r, s): measured(settings, r, s, data) for r, s in tqdm(models, desc="Measuring", unit="model")}
    for seed in tqdm(settings.seeds, desc="Timing", unit="seed"):
        for registers, speed in timed(settings, seed).items():
            measures[registers, seed]["images_per_second"] = speed

    runs = {r: [measures[r, seed] for seed in settings.seeds] for r in settings.num_register_tokens}
    compared = compare(runs)
    write(settings, passed, data, runs, compared)


# Training


def training_options(settings: AblationSettings, passed: Sequence[str], registers: int, seed: int) -> list[str]:
    """The command line of one training."""
    folder = settings.folder(registers, seed)
    options = ["--num_register_tokens", str(registers), "--seed", str(seed), "--output_dir", str(folder)]
    options += ["--resume_from_checkpoint", "auto", "--save_every_epochs", "1", "--save_total_limit", "1"]
    return [*options, *([] if settings.recipe is None else ["--recipe", settings.recipe]), *passed]


def parse(options: Sequence[str]) -> ImageClassificationSettings:
    """The settings of one training, checked."""
    return parse_settings(ImageClassificationSettings, "image-classification", argv=options)


def claim(folder: Path, training: ImageClassificationSettings) -> None:
    """Note what is trained in a folder, before anything is.

    Raises:
        ValueError: if the folder holds a model of other settings.
    """
    note, settings = folder / "settings.json", json.loads(json.dumps(training.fixed()))
    if not note.is_file():
        expect(not (folder / "results.json").is_file(), "models of this ablation", f"another one in {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        write_results(settings, note)
        return
    before = json.loads(note.read_text())
    names = sorted(name for name in before.keys() | settings.keys() if before.get(name) != settings.get(name))
    changed = ", ".join(f"{name} {before.get(name)!r} (got {settings.get(name)!r})" for name in names)
    expect(not names, f"the settings that {folder} was begun with, or another --output_dir", changed)


def train(settings: AblationSettings, options: list[str]) -> None:
    """Train one model to its end, in this process or by a launcher; leaves the program if that was stopped."""
    if settings.launch is not None:
        launched(
            [
                sys.executable,
                "-m",
                "accelerate.commands.launch",
                *shlex.split(settings.launch),
                str(TRAINING),
                *options,
            ]
        )
        return
    log = parse(options).output_folder / "training.log"
    try:
        with log.open("a") as lines, redirect_stdout(lines), command_line([str(TRAINING), *options]):
            example().main(options)
    except SystemExit as stopped:
        if stopped.code == STOPPED_EXIT_CODE:
            tqdm.write("stopped   as asked, with a checkpoint; the same command goes on")
        raise


def launched(command: Sequence[str]) -> None:
    """Run a command; SIGTERM is passed on to it, and its exit code is that of this program unless it is 0."""
    process = subprocess.Popen(command)
    before = signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    try:
        code = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if code:
        sys.exit(code if code > 0 else 128 - code)


def example() -> ModuleType:
    """The classification example as a module, wherever this script is run from."""
    name = "vitreg_example_classification"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TRAINING)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@contextmanager
def command_line(words: list[str]) -> Iterator[None]:
    """What a training in this process is to take for its command, which its results quote."""
    before, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = before


# Measuring


def measured(settings: AblationSettings, registers: int, seed: int, data: ImageClassificationData) -> dict[str, float]:
    """The measures of one model but its speed, from its folder if they were taken there before."""
    folder = settings.folder(registers, seed)
    subject, results = load_vision(str(folder)), json.loads((folder / "results.json").read_text())
    how = {"images": settings.max_measured_images, "mosaics": settings.mosaics}
    note = {"of": fingerprint(subject.model.state_dict().items()), **how}
    file = folder / "measures.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    if {name: before.get(name) for name in note} == note:
        return before["measures"]
    batch_size, transform = settings.measured_batch_size, EvaluationTransform(subject.preprocess)
    channels = channels_of(subject)
    train, test = data.train.with_channels(channels), data.evaluation.with_channels(channels)
    chosen = test.sample(min(settings.max_measured_images, len(test)))
    two = transform([chosen[index % len(chosen)][0] for index in range(2)]).to(subject.device)
    measures = {
        "accuracy": results["metrics"]["accuracy"],
        "dense_miou": dense(subject, settings, train, test, len(data.class_names)),
        **measure_tokens(subject, batches(chosen, transform, batch_size)),
        "flops_per_image": results["speed"]["flops_per_image"],
        "training_bytes_per_image": bytes_saved_per_image(subject.model, two),
    }
    write_results({**note, "measures": measures}, file)
    return measures


def channels_of(subject: Subject) -> int:
    """Channels of the images that a model takes."""
    model: Any = subject.model
    return model.config.num_channels


def batches(images: LabelledImages, transform: EvaluationTransform, batch_size: int) -> Iterator[Tensor]:
    """Images as the model gets them, some at a time."""
    for start in range(0, len(images), batch_size):
        yield transform([images[index][0] for index in range(start, min(start + batch_size, len(images)))])


def dense(
    subject: Subject, settings: AblationSettings, train: LabelledImages, test: LabelledImages, num_classes: int
) -> float:
    """mIoU on mosaics of held-out images of a linear probe that learned from mosaics of training images."""
    transform, tokens, labels = EvaluationTransform(subject.preprocess), [], []
    size = settings.measured_batch_size
    for pixels, of_pixels in mosaics(train, transform, settings.mosaics, size):
        tokens.append(patch_tokens(subject, pixels))
        labels.append(of_pixels)
    grid, known = subject.grid(pixels), torch.cat(labels)
    probe = fit_dense_probe(torch.cat(tokens), known, grid, num_classes)
    metric = MeanIoU(num_classes)
    for pixels, of_pixels in mosaics(test, transform, settings.mosaics // 2, size, seed=1):
        predicted = probe.predict(patch_tokens(subject, pixels), grid, (of_pixels.shape[1], of_pixels.shape[2]))
        metric.add_batch(predictions=predicted, references=of_pixels)
    return metric.compute()["mean_iou"]


def timed(settings: AblationSettings, seed: int) -> dict[int, float]:
    """Images per second of the models of a seed, which take turns."""
    subjects = {r: load_vision(str(settings.folder(r, seed))) for r in settings.num_register_tokens}
    first = next(iter(subjects.values()))
    blank = torch.zeros(3, 256, 256, dtype=torch.uint8)[: channels_of(first)]
    batch = EvaluationTransform(first.preprocess)([blank] * settings.measured_batch_size).to(first.device)
    models = {r: subject.model for r, subject in subjects.items()}
    return images_per_second(models, batch, seconds=settings.timed_seconds)


# Writing


def write(
    settings: AblationSettings,
    passed: Sequence[str],
    data: ImageClassificationData,
    runs: dict[int, list[dict[str, float]]],
    compared: dict[str, Any],
) -> None:
    """Write results, table and picture, and say what they say."""
    folder, counts = Path(settings.output_dir), settings.num_register_tokens
    trained = [
        json.loads((settings.folder(r, s) / "results.json").read_text()) for r in counts for s in settings.seeds
    ]
    table, found = as_markdown(count_table(compared, counts, len(settings.seeds))), findings(compared, counts)
    results = {
        "settings": asdict(settings) | {"training": list(passed)},
        "model": {name: value for name, value in trained[0]["model"].items() if name not in ("weights", "parameters")},
        "data": trained[0]["data"],
        "measures": {str(r): dict(zip(map(str, settings.seeds), models)) for r, models in runs.items()},
        "compared": compared,
        "findings": found,
        "seconds": {"training": sum(one["seconds"]["train"] for one in trained)},
        "versions": versions(),
        "hardware": trained[0]["hardware"] | {"processor": processor_name()},
        "command": shlex.join(["python", *sys.argv]),
    }
    write_results(results, folder / "results.json")
    (folder / "ablation.md").write_text("\n\n".join([table, *found]) + "\n")
    register_counts_figure(results, folder / "ablation.png")
    print(table, *found, sep="\n")
    for label, file in (("table", "ablation.md"), ("picture", "ablation.png"), ("results", "results.json")):
        print(f"{label:9} {folder / file}")


if __name__ == "__main__":
    exit_with_a_sentence(main)
