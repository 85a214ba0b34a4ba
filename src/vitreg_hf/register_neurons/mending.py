# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""`vitreg registers`: a model that was trained without registers, mended without training, and what that changed.

Shapes: B images, P patches, D channels, n images in all.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig

from vitreg_hf.analysis.analyze import AnalyzeSettings
from vitreg_hf.analysis.artifact_pictures import Pictured, look_at, short
from vitreg_hf.analysis.compare import compare
from vitreg_hf.analysis.extract import Subject, load_vision, subject_of
from vitreg_hf.analysis.figures.mended import before_after_figure, trials_figure
from vitreg_hf.analysis.images import ImageFiles, find_images, image_batches, labelled_split, open_upright
from vitreg_hf.analysis.measure import Pass
from vitreg_hf.analysis.outliers import OutlierRule
from vitreg_hf.analysis.report import write_json
from vitreg_hf.analysis.token_norms import cutoff
from vitreg_hf.conversion.convert import convert_checkpoint
from vitreg_hf.model.configuration_vitreg import ViTRegConfig
from vitreg_hf.register_neurons.adding import add_registers, add_test_time_registers
from vitreg_hf.register_neurons.averages import bias_from_images, mean_patch
from vitreg_hf.register_neurons.finding import find_register_neurons, norms_and_pooled
from vitreg_hf.register_neurons.ranking import RegisterNeurons
from vitreg_hf.training.nearest_neighbours import knn_accuracy

METHODS = ("test-time", "attention-bias", "added")
NEURONS, RESULTS, REPORT = "register_neurons.json", "registers.json", "report"
_NEIGHBOURS = (20, 10, 5, 1)
# Of the comparison of both models: attention, which norms do not tell
_OF_COMPARISON = ("first_token_area", "mass_on_registers")


@dataclass(frozen=True)
class MendSettings:
    """How a model is mended.

    Attributes:
        method: `test-time` moves register neurons onto a token of their own; `attention-bias` replaces that token by
            its mean key and value; `added` adds learned registers, which then have to be tuned.
        num_registers: how many registers.
        cls, init: of test-time registers (see `add_test_time_registers`).
        top_k, top_layer: of the search for neurons; None to have them chosen.
        neurons: file of a search that was made before; None to search.
        num_images: at most so many images are searched.
        rule: what an outlier is.
        how: how images are run.
        pictured: images that are drawn.
    """

    method: Literal["test-time", "attention-bias", "added"] = "test-time"
    num_registers: int = 1
    cls: Literal["zero", "keep"] = "zero"
    init: Literal["zero", "mean", "random"] = "zero"
    top_k: int | None = None
    top_layer: int | None = None
    neurons: Path | None = None
    num_images: int = 500
    rule: OutlierRule = field(default_factory=OutlierRule)
    how: Pass = field(default_factory=Pass)
    pictured: int = 4

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"Expected a method of {', '.join(METHODS)}, got {self.method!r}")
        if self.num_registers < 1 or (self.method == "attention-bias" and self.num_registers > 1):
            wanted = "one register" if self.method == "attention-bias" else "one register or more"
            raise ValueError(f"Expected {wanted}, got {self.num_registers}")
        searching = {"top_k": self.top_k, "top_layer": self.top_layer, "neurons": self.neurons}
        told = [name for name, value in searching.items() if value is not None]
        told += [name for name in ("cls", "init") if getattr(self, name) != "zero"]
        if self.method == "added" and told:
            raise ValueError(f"Expected none of {', '.join(told)} for method='added', which moves no neurons")
        if self.neurons is not None and (self.top_layer is not None or self.rule != OutlierRule()):
            raise ValueError(
                "Expected neither top_layer nor a rule of outliers beside neurons, whose search had its own"
            )

    def judged_by(self, neurons: RegisterNeurons | None) -> OutlierRule:
        """What an outlier is before and after: the threshold of the search, if there was one."""
        return self.rule if neurons is None else OutlierRule("fixed", neurons.threshold, neurons.state)


def mend(source: str, images: str | Path, output: str | Path, settings: MendSettings | None = None) -> dict[str, Any]:
    """Mend a model and save it, with a report of before and after.

    Args:
        source: folder or Hub id of a model of this family, or of any that `convert_checkpoint` reads.
        images: folder of images; with one folder per class, accuracy is compared too.
        output: folder of the mended model, loaded by `from_pretrained`; the report is in `report` below it.
        settings: how.

    Returns:
        The content of `registers.json`: the search, and every quantity before and after.

    Raises:
        ValueError: if there are no outliers to be mended (with `added`, registers are added all the same), the folder
            holds a model already, or images or model do not fit.
    """
    settings, folder = settings or MendSettings(), Path(output)
    if (folder / "config.json").exists() and not settings.how.overwrite:
        raise ValueError(
            f"Expected a folder without a model, got {folder}, which holds one (overwrite=True, or --overwrite, "
            "replaces it)"
        )
    before = load_to_mend(source)
    all_files = find_images(images, leave_out=folder)
    files = _readable(all_files, settings.how)
    neurons = None if settings.method == "added" else _neurons(before, files, settings)
    after = _subject(before, _mended(before, files, neurons, settings), settings.method)
    folder.mkdir(parents=True, exist_ok=True)
    how = AnalyzeSettings(settings.how, settings.judged_by(neurons), probes=False, pictured=settings.pictured)
    compared = compare(before, after, all_files, folder / REPORT, how)  # which lists those that are left out
    results = {
        "source": source,
        "method": settings.method,
        "num_registers": settings.num_registers,
        "search": None if neurons is None else neurons.to_dict(),
        "changes": [*_changes(before, after, files, neurons, settings), *_attention_changes(compared)],
    }
    _draw(before, after, files, neurons, settings, folder / REPORT)
    _save(after, folder, neurons, results)
    return results


def load_to_mend(source: str) -> Subject:
    """A model of this family, or one that is converted to it, under analysis.

    Raises:
        ValueError: if it is of no family that converts.
    """
    is_own = Path(source).is_dir() or not Path(source).exists()
    if is_own and _model_type(source) == ViTRegConfig.model_type:
        return load_vision(source)
    converted = convert_checkpoint(source)
    return subject_of(converted.model, converted.processor, Path(source).name)


def _model_type(source: str) -> str | None:
    try:
        return PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    except OSError:  # a folder without config.json, such as shards of a training
        return None


def search_of(results: dict[str, Any]) -> RegisterNeurons | None:
    """The search that a model was mended by; None without one."""
    return None if results["search"] is None else RegisterNeurons.from_dict(results["search"])


def told(results: dict[str, Any]) -> str:
    """The changes as a table to print."""
    rows = [("", "before", "after"), *((r["name"], r["before_text"], r["after_text"]) for r in results["changes"])]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(f"  {row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in rows)


# The model


def _neurons(subject: Subject, files: ImageFiles, settings: MendSettings) -> RegisterNeurons:
    if settings.neurons is not None:
        found = RegisterNeurons.load(settings.neurons)
        return found if settings.top_k is None else found.first(settings.top_k)
    return find_register_neurons(
        subject.model,  # type: ignore[arg-type]  # of this family, see load_to_mend
        files,
        subject.preprocess,
        rule=settings.rule,
        top_layer=settings.top_layer,
        top_k=settings.top_k,
        num_images=settings.num_images,
        batch_size=settings.how.batch_size,
        image_size=settings.how.image_size,
    )


def _readable(files: ImageFiles, how: Pass) -> ImageFiles:
    """The files, but for those that cannot be decoded where these are to be left out."""
    if how.on_corrupt_image == "raise":
        return files
    kept = [index for index, file in enumerate(files.files) if _can_be_read(file)]
    if not kept:
        raise ValueError(f"Expected a readable image in {str(files.root)!r}, got none")
    return files.only(kept)


def _can_be_read(file: Path) -> bool:
    try:
        open_upright(file)
    except ValueError:
        return False
    return True


def _mended(subject: Subject, files: ImageFiles, neurons: RegisterNeurons | None, settings: MendSettings) -> Any:
    model: Any = subject.model
    size: dict[str, Any] = {"batch_size": settings.how.batch_size, "image_size": settings.how.image_size}
    if neurons is None:
        return add_registers(model, settings.num_registers, mean_patch(model, files, subject.preprocess, **size))
    moved = add_test_time_registers(model, neurons, settings.num_registers, cls=settings.cls, init=settings.init)
    if settings.method == "test-time":
        return moved
    return bias_from_images(moved, files, subject.preprocess, **size)


def _subject(before: Subject, model: Any, method: str) -> Subject:
    return subject_of(model, before.preprocess, f"{before.name} + {method}", str(before.device))


def _save(subject: Subject, folder: Path, neurons: RegisterNeurons | None, results: dict[str, Any]) -> None:
    """The model beside its report: written to a folder of a temporary name, then moved, the config last.

    Without a config nothing loads, so a model that is replaced loses its own first.
    """
    made = folder / ".unfinished"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    try:
        model: Any = subject.model
        model.save_pretrained(made)
        subject.preprocess.save_pretrained(made)
        write_json(made / RESULTS, results)
        if neurons is not None:
            neurons.save(made / NEURONS)
        replaced = ("config.json", NEURONS, "conversion.json")  # the last is of the model that is replaced
        for old in (*(folder / name for name in replaced), *folder.glob("model*.safetensors*")):
            old.unlink(missing_ok=True)
        for file in sorted(made.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(made, ignore_errors=True)


# Before and after


def _changes(
    before: Subject, after: Subject, files: ImageFiles, neurons: RegisterNeurons | None, settings: MendSettings
) -> list[dict[str, Any]]:
    """Norms against the cutoff of the original, pooled features, and accuracy where there are labels."""
    rule = settings.judged_by(neurons)
    state = rule.state(len(before.anatomy.blocks))
    first, second = (_looked(subject, files, settings.how, state) for subject in (before, after))
    threshold = cutoff(first[0].flatten().numpy(), rule.rule, rule.value)
    shares = [100 * float((norms > threshold).float().mean()) for norms, _ in (first, second)]
    cosine = float(torch.cosine_similarity(first[1], second[1], dim=1).mean())
    rows = [
        _row("outlier_share", f"patches above the norm {threshold:.4g}", "%", *shares),
        _row("largest_norm", "largest norm of a patch", "", float(first[0].max()), float(second[0].max())),
        _row("pooled_cosine", "cosine of the pooled feature to the original's", "", 1.0, cosine),
    ]
    if files.labels is not None and len(set(files.labels)) > 1:
        accuracy = [_knn(pooled, files) for _, pooled in (first, second)]
        name = f"accuracy of {accuracy[0][0]} nearest neighbours"
        rows.append(_row("knn_accuracy", name, "%", *(100 * value for _, value in accuracy)))
    return rows


def _looked(subject: Subject, files: ImageFiles, how: Pass, state: int) -> tuple[Tensor, Tensor]:
    """Norms of patches `(n, P)` in the state that outliers are judged by, and pooled features `(n, D)`."""
    model: Any = subject.model
    batches = image_batches(files.files, subject.preprocess, how.batch_size, how.image_size)
    return norms_and_pooled(model, batches, state)


def _knn(pooled: Tensor, files: ImageFiles) -> tuple[int, float]:
    """How many neighbours voted, and their accuracy between 0 and 1."""
    split, labels, training = labelled_split(files)  # may be in another order
    pooled = pooled[[files.files.index(file) for file in split.files]]
    known = pooled[training]
    k = next(k for k in _NEIGHBOURS if k <= len(known))
    classes = int(labels.max()) + 1
    scores = knn_accuracy(known, labels[training], pooled[~training], labels[~training], classes, (k,))
    return k, scores[k]


def _attention_changes(compared: dict[str, Any]) -> list[dict[str, Any]]:
    first, second = compared["models"]
    rows = {row["quantity"]: row for row in compared["differences"]}
    chosen = [rows[name] for name in _OF_COMPARISON if name in rows]
    return [_row(r["quantity"], r["name"], r["unit"], r[first]["mean"], r[second]["mean"]) for r in chosen]


def _row(quantity: str, name: str, unit: str, before: float | None, after: float | None) -> dict[str, Any]:
    texts = ["-" if value is None or value != value else f"{value:.4g} {unit}".strip() for value in (before, after)]
    shown = {"before_text": texts[0], "after_text": texts[1]}
    return {"quantity": quantity, "name": name, "unit": unit, "before": before, "after": after, **shown}


def _draw(
    before: Subject,
    after: Subject,
    files: ImageFiles,
    neurons: RegisterNeurons | None,
    settings: MendSettings,
    folder: Path,
) -> None:
    state = settings.judged_by(neurons).state(len(before.anatomy.blocks))
    drawn = files.first(settings.pictured)
    looked = [look_at(subject, drawn, settings.how, state) for subject in (before, after)]
    attention = [_of_cls(one) for one in looked] if before.layout.num_cls else None
    before_after_figure(
        looked[0].seen,
        (looked[0].norms.numpy(), looked[1].norms.numpy()),
        None if attention is None else (attention[0][0], attention[1][0]),
        folder / "before_after.png",
        captions=[short(name) for name in looked[0].names],
        title=f"{before.name}, before and after {_done(neurons, settings)}",
        on_patches=None if attention is None else (attention[0][1], attention[1][1]),
    )
    if neurons is not None and neurons.trials:
        trials: Sequence[dict[str, Any]] = [asdict(trial) for trial in neurons.trials]
        title = f"{before.name}: what moving register neurons does to images with outliers"
        trials_figure(trials, neurons.count, folder / "neurons.png", title=title)


def _of_cls(looked: Pictured) -> tuple[NDArray[np.float32], list[float]]:
    """What CLS attends to as multiples of an even share, `(B, rows, columns)`, and its share on patches, `(B,)`."""
    maps = looked.prefix[:, :, 0].mean(dim=1)
    tokens = looked.prefix.shape[2] + looked.norms[0].numel()
    return (maps * tokens).numpy(), maps.sum(dim=(1, 2)).tolist()


def _done(neurons: RegisterNeurons | None, settings: MendSettings) -> str:
    if neurons is None:
        return f"adding {settings.num_registers} learned registers, not yet tuned"
    registers = "test-time register" + "s" * (settings.num_registers > 1)
    where = {"attention-bias": "a bias of attention", "test-time": f"{settings.num_registers} {registers}"}
    return f"moving {neurons.count} neuron{'s' * (neurons.count > 1)} to {where[settings.method]}"
