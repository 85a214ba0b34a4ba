# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Model cards from the facts of a training, as `results.json` holds them.

A card states what the facts say: no number stands in it that is not in them, but for those of the citation.
"""

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

_REQUIRED = {
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
    "hardware": (),
    "seconds": ("train", "total"),
    "command": (),
}
_METRIC_NAMES = {"accuracy": "Accuracy", "top5_accuracy": "Top-5 accuracy"}
_CLASSES_NAMED = 20  # more would drown the card; config.json names all

_PIPELINE_CODE = """\
```python
import vitreg_hf  # registers the model family with Transformers
from transformers import pipeline

classify = pipeline("image-classification", model={model_id})
print(classify("image.png"))
```"""

_AUTO_CLASS_CODE = """\
```python
import torch
import vitreg_hf  # registers the model family with Transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained({model_id})
model = AutoModelForImageClassification.from_pretrained({model_id}).eval()
inputs = processor(Image.open("image.png"), return_tensors="pt")
with torch.inference_mode():
    outputs = model(**inputs, output_prefix_attentions=True)
print(model.config.id2label[outputs.logits.argmax(-1).item()])
print(outputs.patch_map.shape)  # features: batch, channels, rows, columns of patches
print(outputs.prefix_attentions[-1].shape)  # batch, heads, CLS and registers, all tokens
```"""

_PAPER = "[Vision Transformers Need Registers](https://arxiv.org/abs/2309.16588) (Darcet et al.)"

_WHY_REGISTERS = f"""\
{_PAPER} reports that large Vision Transformers come to store global information in patches of uninformative
background, which then disturb attention maps and dense features; registers give it a place of its own."""

_WITH_REGISTERS = f"""\
Registers are learned tokens between CLS and the patches, the same for all images. They have no position and no loss
of their own, and they take part in every block in training **and** in inference; after the last block, only a pooling
that names them reads them.

{_WHY_REGISTERS}
Whether this model, of its size and on its data, would show such artifacts without registers was not measured here."""

_STOPPED_EARLY = """\
Training was stopped by looking at these same images (early stopping), so these numbers are a little optimistic: they
are no estimate on images that no decision depended on."""

_LAST_EPOCH = "The last epoch is reported; no epoch was chosen by looking at these images."

_LIMITS = """\
The model was trained on {train_images} images of one source and evaluated on images of the same source: nothing is
known of its accuracy on others. It sorts any image, whatever it shows, into one of its classes. Probabilities are not
calibrated, and biases of the data were not examined. It is no basis for decisions about people."""

_CITATION = """\
```bibtex
@inproceedings{darcet2024registers,
  title     = {Vision Transformers Need Registers},
  author    = {Darcet, Timoth{\\'e}e and Oquab, Maxime and Mairal, Julien and Bojanowski, Piotr},
  booktitle = {International Conference on Learning Representations},
  year      = {2024},
  url       = {https://arxiv.org/abs/2309.16588}
}
```"""


def render_card(
    facts: dict[str, Any], model_id: str, model_license: str | None = None, training_curve: str | None = None
) -> ModelCard:
    """Write the model card of an image classifier.

    Args:
        facts: content of its `results.json`.
        model_id: what a reader passes to `from_pretrained`: an id on the Hub, or a folder.
        model_license: licence of the weights, as the Hub spells it; None states none.
        training_curve: name of the picture beside the card, if there is one.

    Returns:
        The card, with the evaluation as `model-index` in its metadata.

    Raises:
        ValueError: naming the facts that are missing.
    """
    _check(facts)
    sections = {
        "": _introduction(facts, training_curve),
        "Use": _usage(model_id),
        "Registers": _registers(facts["model"]["num_register_tokens"]),
        "Data": _data(facts["data"]),
        "Evaluation": _evaluation(facts),
        "Training procedure": _procedure(facts),
        "Limits": _LIMITS.format(train_images=facts["data"]["train_images"]),
        "Licence": f"The weights: {model_license or 'none is stated'}. {_data_license(facts['data'])}",
        "Citation": _CITATION,
    }
    metadata = _metadata(facts, model_license)
    body = "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in sections.items())
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n")


def save_card(card: ModelCard, folder: Path) -> Path:
    """Write `README.md` into a folder, complete or not at all, and return its path."""
    path, unfinished = folder / "README.md", folder / ".README.md.unfinished"
    unfinished.write_text(str(card), encoding="utf-8")
    os.replace(unfinished, path)
    return path


def _check(facts: dict[str, Any]) -> None:
    missing = [section for section in _REQUIRED if section not in facts]
    for section, names in _REQUIRED.items():
        missing += [f"{section}.{name}" for name in names if section in facts and name not in facts[section]]
    if missing:
        raise ValueError(
            f"Expected the facts of a training with {', '.join(missing)}, got {', '.join(facts) or 'none'}"
        )


def _metadata(facts: dict[str, Any], model_license: str | None) -> ModelCardData:
    model, data, metrics = facts["model"], facts["data"], facts["metrics"]
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=data["source"],
            dataset_name=data["source"],
            dataset_split=data["evaluation_split"],
            metric_type=metric,
            metric_name=name,
            metric_value=metrics[metric],
        )
        for metric, name in _METRIC_NAMES.items()
        if metric in metrics
    ]
    return ModelCardData(
        license=model_license,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["vision", "vision-transformer", "register-tokens", "vitreg"],
        datasets=[data["hub_id"]] if data["hub_id"] else None,
        metrics=["accuracy"],
        model_name=model["name"],
        eval_results=results,
    )


def _introduction(facts: dict[str, Any], training_curve: str | None) -> str:
    model, data = facts["model"], facts["data"]
    count = model["num_register_tokens"]
    registers = "without register tokens" if count == 0 else f"with {count} register token{'s' if count > 1 else ''}"
    text = (
        f"# {model['name']}\n\nA Vision Transformer {registers} ({model['parameters']:,} parameters) that sorts\n"
        f"images into {len(data['classes'])} classes. Trained from random weights on `{data['source']}`;\n"
        f"{_percent(facts['metrics']['accuracy'])} of {facts['metrics']['n']} held-out images are classified right."
    )
    return text if training_curve is None else f"{text}\n\n![Training curve]({training_curve})"


def _usage(model_id: str) -> str:
    quoted = json.dumps(model_id)
    pipeline, auto_classes = _PIPELINE_CODE.format(model_id=quoted), _AUTO_CLASS_CODE.format(model_id=quoted)
    return (
        f"The Python package `vitreg_hf` has to be installed.\n\n{pipeline}\n\n"
        f"With the Auto classes, and with features and attention by name:\n\n{auto_classes}"
    )


def _registers(count: int) -> str:
    return _WITH_REGISTERS if count else f"This model has none. {_WHY_REGISTERS}"


def _data(data: dict[str, Any]) -> str:
    named = ", ".join(data["classes"][:_CLASSES_NAMED])
    rest = ", and others (see `config.json`)" if len(data["classes"]) > _CLASSES_NAMED else ""
    lines = [
        f"- Source: `{data['source']}`",
        f"- Training images: {data['train_images']}",
        f"- Held-out images: {data['evaluation_images']} ({data['held_out_by']})",
        f"- Classes: {named}{rest}",
    ]
    if data["skipped_images"]:
        lines.append(f"- Left out because they could not be decoded: {', '.join(data['skipped_images'])}")
    return "\n".join(lines)


def _evaluation(facts: dict[str, Any]) -> str:
    metrics, evaluation = facts["metrics"], facts["evaluation"]
    rows = [f"| {name} | {_percent(metrics[key])} |" for key, name in _METRIC_NAMES.items() if key in metrics]
    rows.append(f"| Cross-entropy (nats) | {metrics['loss']:.4f} |")
    return (
        f"On {metrics['n']} held-out images ({facts['data']['held_out_by']}), with the saved image processor\n"
        f"and the {evaluation['weights']}:\n\n{_table('metric', 'value', rows)}\n\n"
        + (_STOPPED_EARLY if evaluation["stopped_early"] else _LAST_EPOCH)
    )


def _procedure(facts: dict[str, Any]) -> str:
    hardware, seconds = facts["hardware"], facts["seconds"]
    processes = "one process" if hardware["processes"] == 1 else f"{hardware['processes']} processes"
    settings = {**facts["model"], **facts["hyperparameters"]}
    rows = [f"| {name} | {_cell(value)} |" for name, value in settings.items() if value is not None]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return (
        f"```bash\n{facts['command']}\n```\n\n"
        "Cross-entropy; AdamW without weight decay on tokens, positions, biases and norms; linear warm-up, then\n"
        f"cosine decay. Training with its evaluations took {seconds['train']:.0f} s ({seconds['total']:.0f} s with\n"
        f"start and end) in {processes} on {hardware['device']} ({hardware['processor']}), mixed precision:\n"
        f"{hardware['mixed_precision']}.\n\n{_table('setting', 'value', rows)}\n\nVersions: {versions}."
    )


def _table(first: str, second: str, rows: list[str]) -> str:
    return "\n".join([f"| {first} | {second} |", "|---|---|", *rows])


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|")


def _data_license(data: dict[str, Any]) -> str:
    if data["license"] is None:
        return "The licence of the data is not recorded; it may restrict what the weights may be used for."
    return f"The data: {data['license']}."


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
