# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Model cards from the facts of a training, as `results.json` holds them.

A card states what the facts say: no number stands in it that is not in them, but for those of the citation. It ends
with a code of its own text, in a comment that no page shows, so that a card which a person has edited is told from
one that can be rendered anew.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vitreg_hf.hub.card_checks import check_card, check_license
from vitreg_hf.hub.card_sections import METRIC_NAMES, PICTURES, introduction, sections

_TASK = "image-classification"
_REQUIRED: dict[str, tuple[str, ...]] = {
    "model": ("name", "parameters", "num_register_tokens", "image_size", "patch_size", "hidden_size"),
    "data": (
        *("source", "hub_id", "license", "classes", "train_images"),
        *("evaluation_images", "evaluation_split", "held_out_by", "skipped_images"),
    ),
    "hyperparameters": (),
    "metrics": ("accuracy", "loss", "n"),
    "evaluation": ("weights", "stopped_early"),
    "curve": (),
    "versions": (),
    "hardware": ("device", "processor", "processes", "mixed_precision"),
    "seconds": ("train", "total"),
    "command": (),
}
_REQUIRED_OF_SPEED: dict[str, tuple[str, ...]] = {
    "speed": (
        *("image_size", "flops_per_image", "weights_megabytes", "milliseconds_per_image"),
        *("images_per_second_in_batches", "batch_size", "device", "threads", "precision"),
    )
}
_REQUIRED_OF_ARTIFACTS: dict[str, tuple[str, ...]] = {
    "images": ("folder", "measured", "grid"),
    "outliers": (
        *("layer", "rule", "rule_value", "cutoff", "norm", "share", "images_with_outliers"),
        *("largest_over_median", "two_groups"),
    ),
    "attention": ("cls_on_registers",),
    "sinks": ("tokens",),
    "units": ("sinks.tokens.score",),
}
_MARK = re.compile(r"\n<!-- vitreg_hf card ([0-9a-f]{16}) -->\s*\Z")


def render_card(
    facts: Mapping[str, Any],
    model_id: str,
    artifacts: Mapping[str, Any] | None = None,
    pictures: Sequence[str] = (),
) -> ModelCard:
    """Write the model card of an image classifier.

    Args:
        facts: content of its `results.json`. `license` (of the weights, as the Hub spells it; None states none) and
            `speed` may be missing, as they are in results of older versions.
        model_id: what a reader passes to `from_pretrained`: an id on the Hub, or a folder.
        artifacts: content of the `results.json` of `vitreg analyze` about the same weights, if there is one.
        pictures: names of the pictures beside the card, out of `card_sections.PICTURES`.

    Returns:
        The card, with the evaluation as `model-index` in its metadata.

    Raises:
        ValueError: naming the facts that are missing, or pictures that are unknown.
    """
    _expect_facts(facts, _REQUIRED | (_REQUIRED_OF_SPEED if "speed" in facts else {}), "facts of a training")
    if artifacts is not None:
        _expect_facts(artifacts, _REQUIRED_OF_ARTIFACTS, "results of `vitreg analyze`")
    if unknown := [name for name in pictures if name not in PICTURES]:
        raise ValueError(f"Expected pictures out of {', '.join(PICTURES)}, got {', '.join(unknown)}")
    parts = sections(facts, model_id, artifacts)
    body = "\n\n".join([introduction(facts, pictures), *(f"## {title}\n\n{text}" for title, text in parts.items())])
    text = str(ModelCard(f"---\n{_metadata(facts).to_yaml()}\n---\n\n{body}\n"))
    return ModelCard(f"{text}\n<!-- vitreg_hf card {_code_of(text)} -->\n")


def save_card(card: ModelCard, folder: Path) -> Path:
    """Write `README.md` into a folder, complete or not at all, and return its path."""
    path, unfinished = folder / "README.md", folder / ".README.md.unfinished"
    unfinished.write_text(str(card), encoding="utf-8")
    os.replace(unfinished, path)
    return path


def card_of(folder: Path, model_id: str, model_license: str | None = None) -> ModelCard:
    """Render the card of what a training left in a folder.

    `artifacts/results.json` of `vitreg analyze` goes into it if it is about the weights that the training describes,
    and so do the pictures that are there.

    Args:
        folder: with `results.json`.
        model_id: what a reader passes to `from_pretrained`.
        model_license: licence of the weights, as the Hub spells it; None: that of `results.json`.

    Raises:
        ValueError: without `results.json`, for one that lacks facts, and for a licence that the Hub does not know.
    """
    if model_license is not None:
        check_license(model_license)
    path = folder / "results.json"
    if not path.is_file():
        raise ValueError(
            f"Expected results.json of a training in {folder}, got none: a card is rendered from its facts. Train "
            "with examples/train_image_classification.py, or write README.md yourself"
        )
    facts = _read_results(path)
    if model_license is not None:
        facts = {**facts, "license": model_license}
    pictures = [name for name in PICTURES if (folder / name).is_file()]
    return render_card(facts, model_id, _artifacts_of(folder, facts), pictures)


def is_rendered(folder: Path) -> bool:
    """Whether `README.md` is there and still as this package rendered it, so that nothing is lost by a new one."""
    path = folder / "README.md"
    return path.is_file() and _is_unchanged(path.read_text(encoding="utf-8"))


def readme_to_publish(folder: Path, model_id: str, model_license: str | None = None) -> str:
    """Text of the card that belongs into a repository on the Hub; nothing in the folder changes.

    A card that nobody edited, or a missing one, is rendered for the id of the repository; one that a person edited
    stays as it is.

    Args:
        folder: of the model.
        model_id: of the repository, with its owner.
        model_license: licence of the weights; None: that of the card, else that of `results.json`.

    Raises:
        ValueError: for a card that the Hub would refuse or that does not load the model from the repository, for an
            edited card with another licence than asked for, and where there is neither a card nor `results.json`.
    """
    path = folder / "README.md"
    if not path.is_file():
        text = str(card_of(folder, model_id, model_license))
    else:
        text = path.read_text(encoding="utf-8")
        stated = cast(ModelCardData, _parsed(text, path).data).license
        if _is_unchanged(text):
            text = str(card_of(folder, model_id, stated if model_license is None else model_license))
        elif model_license not in (None, stated):
            raise ValueError(f"Expected licence {model_license} in {path}, which was edited by hand, got {stated}")
    card = _parsed(text, path)
    check_card(card, model_id)
    if cast(ModelCardData, card.data).pipeline_tag is None:
        raise ValueError(
            f"Expected metadata with the task on top of {path}, as `pipeline` reads it there, got none: begin it with "
            "the lines ---, library_name: transformers, pipeline_tag: image-classification (or "
            "image-feature-extraction, image-segmentation), and ---"
        )
    return text


def _code_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_unchanged(text: str) -> bool:
    mark = _MARK.search(text)
    return mark is not None and _code_of(text[: mark.start()]) == mark.group(1)


def _parsed(text: str, path: Path) -> ModelCard:
    try:
        return ModelCard(text)
    except (ValueError, TypeError, yaml.YAMLError) as error:  # TypeError: metadata that is no name
        raise ValueError(f"Expected metadata that the Hub reads on top of {path}, got: {error}") from error


def _read_results(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Expected JSON in {path}, got a file that is damaged: {error}") from error
    if not isinstance(results, dict):
        raise ValueError(f"Expected a JSON object in {path}, got {type(results).__name__}")
    return results


def _artifacts_of(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was measured of the weights that the facts are about; other weights may have stood in the folder before."""
    path, weights = folder / "artifacts" / "results.json", _weights_of(facts)
    if weights is None or not path.is_file():
        return None
    artifacts = _read_results(path)
    return artifacts if _weights_of(artifacts) == weights else None


def _weights_of(results: Mapping[str, Any]) -> str | None:
    """Fingerprint of the weights that results are about; those of older versions have none."""
    model = results.get("model")
    return model.get("weights") if isinstance(model, Mapping) else None


def _expect_facts(facts: Mapping[str, Any], required: Mapping[str, Sequence[str]], kind: str) -> None:
    missing = []
    for section, names in required.items():
        if section not in facts or (names and not isinstance(facts[section], Mapping)):
            missing.append(section)
        else:
            missing += [f"{section}.{name}" for name in names if name not in facts[section]]
    if missing:
        raise ValueError(f"Expected the {kind} with {', '.join(missing)}, got {', '.join(facts) or 'none'}")


def _metadata(facts: Mapping[str, Any]) -> ModelCardData:
    model, data, metrics = facts["model"], facts["data"], facts["metrics"]
    results = [
        EvalResult(
            task_type=_TASK,
            dataset_type=data["hub_id"] or _as_id(data["source"]),
            dataset_name=data["source"],
            dataset_split=data["evaluation_split"],
            metric_type=metric,
            metric_name=name,
            metric_value=metrics[metric],
        )
        for metric, name in METRIC_NAMES.items()
        if metric in metrics
    ]
    return ModelCardData(
        license=facts.get("license"),
        library_name="transformers",
        pipeline_tag=_TASK,
        tags=["vision", "vision-transformer", "register-tokens", "vitreg"],
        datasets=[data["hub_id"]] if data["hub_id"] else None,
        metrics=["accuracy"],
        model_name=model["name"],
        base_model=model.get("base_model"),
        eval_results=results,
    )


def _as_id(source: str) -> str:
    """A path in the letters that an id of the Hub may have."""
    return re.sub(r"[^\w.-]+", "-", source, flags=re.ASCII).strip("-.") or "images"
