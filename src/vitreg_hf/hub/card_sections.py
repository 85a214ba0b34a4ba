# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The text of a model card, section by section, from facts alone.

`facts` is the content of a training's `results.json`, `artifacts` that of an analysis. No number stands here but for
those of the citation.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

METRIC_NAMES = {"accuracy": "Accuracy", "top5_accuracy": "Top-5 accuracy"}
PICTURES = {
    "training_curve.png": ("Training curve", "Loss and accuracy after each epoch."),
    "augmentations.png": ("Training samples", "Training images, and what the model was shown of them."),
    "attention.png": (
        "Attention maps",
        "What the tokens named above each column attend to in the last layer; one image per row.",
    ),
}
_NAMED = 20  # more would drown the card; config.json and results.json name all

_PIPELINE_CODE = """\
```python
import vitreg_hf  # registers the model family and its pipelines with Transformers
from transformers import pipeline

classify = pipeline("image-classification", model={model_id})
print(classify("image.png"))
```"""

_TOKENS_CODE = """\
```python
import vitreg_hf
from transformers import pipeline

features = pipeline("image-feature-extraction", model={model_id}, tokens="patch_map", return_tensors=True)
print(features("image.png").shape)  # batch, channels, rows, columns of patches

attention = pipeline("attention-maps", model={model_id})("image.png")
print(attention["tokens"], attention["maps"].shape)  # tokens, rows, columns of patches
attention["overlay"].save("overlay.png")
```"""

_AUTO_CLASS_CODE = """\
```python
import torch
import vitreg_hf
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

backbone = vitreg_hf.ViTRegBackbone.from_pretrained({model_id}).eval()  # for dense tasks
print(backbone(**inputs).feature_maps[-1].shape)
```"""

_AUTO_BACKBONE = """\
`AutoBackbone` loads the same backbone, but only from the Hub and with a connection: it asks there before each load."""

_PAPER = "[Vision Transformers Need Registers](https://arxiv.org/abs/2309.16588) (Darcet et al.)"

_WHY_REGISTERS = f"""\
{_PAPER}
reports that large Vision Transformers come to store global information in patches of uninformative background, which
then disturb attention maps and dense features; registers give it a place of its own."""

_WITH_REGISTERS = f"""\
Registers are learned tokens between CLS and the patches, the same for all images. They have no position and no loss
of their own, and they take part in every block in training **and** in inference; after the last block, only a pooling
that names them reads them.

{_WHY_REGISTERS}
Whether this model, of its size and on its data, would show such artifacts without registers was not measured here."""

_NOT_MEASURED = "Whether this model has such artifacts was not measured."

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

_CUTOFF_RULES = {
    "median": "{value} times the median",
    "sigma": "mean + {value} standard deviations",
    "percentile": "percentile {value}",
    "mixture": "where the upper of two groups of norms becomes the likelier",
    "fixed": "a given number",
}


def introduction(facts: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """What the model is, and the pictures beside the card."""
    model, data = facts["model"], facts["data"]
    count = model["num_register_tokens"]
    registers = "without register tokens" if count == 0 else f"with {count} register token{'s' if count > 1 else ''}"
    text = (
        f"# {model['name']}\n\nA Vision Transformer {registers} ({model['parameters']:,} parameters) that sorts\n"
        f"images into {len(data['classes'])} classes. {_origin(facts)} on `{data['source']}`;\n"
        f"{_percent(facts['metrics']['accuracy'])} of {facts['metrics']['n']} held-out images are classified right."
    )
    shown = [f"![{PICTURES[name][0]}]({name})\n*{PICTURES[name][1]}*" for name in PICTURES if name in pictures]
    return "\n\n".join([text, *shown])


def sections(facts: Mapping[str, Any], model_id: str, artifacts: Mapping[str, Any] | None) -> dict[str, str]:
    """All sections below the introduction, by title and in order; those without facts are left out."""
    found = {
        "Use": _usage(model_id),
        "Registers": _registers(facts["model"]["num_register_tokens"], artifacts),
        "Data": _data(facts["data"]),
        "Training procedure": _procedure(facts),
        "Evaluation": _evaluation(facts),
        "Artifacts": _artifacts(artifacts),
        "Speed and size": _speed(facts),
        "Limits": _LIMITS.format(train_images=facts["data"]["train_images"] or "an unknown number of"),
        "Licence": f"The weights: {facts.get('license') or 'none is stated'}. {_data_license(facts['data'])}",
        "Citation": _CITATION,
    }
    return {title: text for title, text in found.items() if text}


def _usage(model_id: str) -> str:
    quoted = json.dumps(model_id)
    one, two, three = (code.format(model_id=quoted) for code in (_PIPELINE_CODE, _TOKENS_CODE, _AUTO_CLASS_CODE))
    return (
        "The Python package `vitreg_hf` has to be installed, with its extra `analysis` for the overlay picture.\n"
        "Without it, where `modeling_vitreg.py` lies beside the weights, `trust_remote_code=True` loads the model\n"
        "with the Auto classes, and `pipeline` classifies.\n\n"
        f"{one}\n\nFeatures by name, and what CLS and registers attend to:\n\n{two}\n\n"
        f"With the Auto classes:\n\n{three}\n\n{_AUTO_BACKBONE}"
    )


def _registers(count: int, artifacts: Mapping[str, Any] | None) -> str:
    if count:
        return _WITH_REGISTERS
    text = f"This model has none. {_WHY_REGISTERS}"
    return text if artifacts is not None else f"{text}\n{_NOT_MEASURED}"


def _data(data: Mapping[str, Any]) -> str:
    named = ", ".join(data["classes"][:_NAMED])
    rest = ", and others (see `config.json`)" if len(data["classes"]) > _NAMED else ""
    lines = [
        f"- Source: `{data['source']}`",
        f"- Training images: {data['train_images'] or 'unknown number'}",
        f"- Held-out images: {data['evaluation_images']} ({data['held_out_by']})",
        f"- Classes: {named}{rest}",
    ]
    if data["skipped_images"]:
        lines.append(f"- Left out because they could not be decoded: {_listed(data['skipped_images'])}")
    return "\n".join(lines)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more (see `results.json`)" if more > 0 else "")


def _procedure(facts: Mapping[str, Any]) -> str:
    hardware, seconds = facts["hardware"], facts["seconds"]
    processes = "one process" if hardware["processes"] == 1 else f"{hardware['processes']} processes"
    settings = {**facts["model"], **facts["hyperparameters"]}
    rows = [(name, value) for name, value in settings.items() if value is not None and name != "weights"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return (
        f"```bash\n{facts['command']}\n```\n\n"
        f"{_optimisation(settings)}; linear warm-up, then\n"
        f"cosine decay. Training with its evaluations took {seconds['train']:.0f} s ({seconds['total']:.0f} s with\n"
        f"start and end) in {processes} on {hardware['device']} ({hardware['processor']}), mixed precision:\n"
        f"{hardware['mixed_precision']}.\n\n{_table('setting', 'value', rows)}\n\nVersions: {versions}."
    )


def _origin(facts: Mapping[str, Any]) -> str:
    source = facts["hyperparameters"].get("init_from")
    return "Trained from random weights" if source is None else f"Fine-tuned from `{source}`"


def _optimisation(settings: Mapping[str, Any]) -> str:
    """Loss, optimizer and what it decays; what older results do not say was so when they were written."""
    loss = "Binary cross-entropy of every class" if settings.get("loss") == "bce" else "Cross-entropy"
    optimizer = "LAMB" if settings.get("optimizer") == "lamb" else "AdamW"
    exempt = "biases and norms" if settings.get("decay_tokens") else "tokens, positions, biases and norms"
    return f"{loss}; {optimizer} without weight decay on {exempt}"


def _evaluation(facts: Mapping[str, Any]) -> str:
    metrics, evaluation = facts["metrics"], facts["evaluation"]
    rows = [(name, _percent(metrics[key])) for key, name in METRIC_NAMES.items() if key in metrics]
    rows.append(("Cross-entropy (nats)", f"{metrics['loss']:.4f}"))
    return (
        f"On {metrics['n']} held-out images ({facts['data']['held_out_by']}), with the saved image processor\n"
        f"and the {evaluation['weights']}:\n\n{_table('metric', 'value', rows)}\n\n"
        + (_STOPPED_EARLY if evaluation["stopped_early"] else _LAST_EPOCH)
    )


def _artifacts(artifacts: Mapping[str, Any] | None) -> str:
    """What `vitreg analyze` measured; empty if it did not."""
    if artifacts is None:
        return ""
    images, found = artifacts["images"], artifacts["outliers"]
    norm = f"norm of a patch after layer {found['layer']}, before the final norm"
    rows = [
        ("patches above the cutoff, share of an image", _interval(found["share"], percent=True)),
        ("images with at least one", _percent(found["images_with_outliers"])),
        (f"median {norm}", _short(found["norm"]["median"])),
        (f"largest {norm}", _short(found["norm"]["max"])),
        ("largest norm of an image / its median", _interval(found["largest_over_median"])),
        *_attention_rows(artifacts["attention"]["cls_on_registers"]),
        *_sink_rows(artifacts["sinks"]["tokens"], artifacts["units"]["sinks.tokens.score"]),
    ]
    value = found["rule_value"]
    rule = _CUTOFF_RULES[found["rule"]].format(value="" if value is None else _short(value))
    return (
        f"Measured with `vitreg analyze` on {images['measured']} images (`{PurePath(images['folder']).name}`) of\n"
        f"{' x '.join(str(side) for side in images['grid'])} patches. {_verdict(found['two_groups'])}\n\n"
        f"{_table('quantity', 'value', rows)}\n\n"
        f"The cutoff is a norm of {_short(found['cutoff'])} ({rule}). Brackets hold bootstrap intervals over images,\n"
        "as `artifacts/results.json` describes them: they tell of other images of this kind, not of other kinds."
    )


def _verdict(groups: Mapping[str, Any]) -> str:
    """Whether the norms of patches fall into two groups, which is what artifacts look like."""
    test = f"dip test: p = {groups['p_value']:.2g} over {groups['n']} patches"
    if not (groups["found"] or groups["probably"]):
        return (
            "**Artifacts: none found.** The norms of patches form\n"
            f"no two groups that are far apart ({test}). Artifacts too rare to show in them are not ruled out."
        )
    apart = (
        f"medians {_short(groups['low_mode'])} and {_short(groups['high_mode'])}, the upper one with "
        f"{_percent(groups['high_share'])} of the patches"
    )
    if groups["found"]:
        return f"**Artifacts: yes.** The norms of patches fall into two groups\n({apart}; {test})."
    return (
        "**Artifacts: probably.** Two groups of norms fit better than one\n"
        f"({apart}), but the test does not tell them from one group ({test})."
    )


def _attention_rows(on_registers: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if on_registers is None or on_registers["mean"] is None:  # no CLS, or no registers
        return []
    return [("attention of CLS on registers in the last layer", _interval(on_registers, percent=True))]


def _sink_rows(tokens: Sequence[Mapping[str, Any]], definition: str) -> list[tuple[str, str]]:
    scores = [f"{token['name']}: {_percent(max(token['score']))}" for token in tokens]
    return [(f"sink score, the highest of all layers ({definition})", ", ".join(scores))]


def _speed(facts: Mapping[str, Any]) -> str:
    """What one forward pass costs; empty in results of versions that did not measure it."""
    if "speed" not in facts:
        return ""
    speed = facts["speed"]
    rows = [
        ("parameters", f"{facts['model']['parameters']:,}"),
        ("weights", f"{speed['weights_megabytes']:,.2f} MB"),
        ("floating-point operations per image", f"{_large(speed['flops_per_image'])}; a multiply-add counts as two"),
        ("one image at a time", f"{_short(speed['milliseconds_per_image'])} ms per image"),
        (f"in batches of {speed['batch_size']}", f"{speed['images_per_second_in_batches']:,.0f} images per second"),
    ]
    size, threads = " x ".join(str(side) for side in speed["image_size"]), speed["threads"]
    return (
        f"{_table('quantity', 'value', rows)}\n\nThe model alone, without reading and preparing images, at {size} "
        f"pixels in {speed['precision']}\non {speed['device']} with {threads} CPU thread{'s' if threads > 1 else ''}; "
        "medians of a few passes."
    )


def _table(first: str, second: str, rows: Sequence[tuple[str, Any]]) -> str:
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows]
    return "\n".join([f"| {first} | {second} |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|")


def _data_license(data: Mapping[str, Any]) -> str:
    if data["license"] is None:
        return "The licence of the data is not recorded; it may restrict what the weights may be used for."
    return f"The data: {data['license']}."


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _interval(values: Mapping[str, Any], percent: bool = False) -> str:
    """Mean and interval, such as `9.13 % [8.29, 9.98]`."""
    mean, low, high = ((100 if percent else 1) * values[key] for key in ("mean", "low", "high"))
    return f"{mean:.2f}{' %' if percent else ''} [{low:.2f}, {high:.2f}]"


def _large(number: float) -> str:
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.2f} {name}"
    return f"{number:,.0f}"


def _short(number: float) -> str:
    """Four significant digits, and no exponent for what is large."""
    return f"{number:,.0f}" if abs(number) >= 10_000 else f"{number:.4g}"
