# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Attention sinks and outlier channels of a text model: one pass over texts, then numbers, pictures and a report.

Numbers go to disk for every 64 texts and are renamed when complete, so an interrupted run goes on after them. Of each
text a number per layer and kind of token is kept, of everything else only sums.

Shapes: n texts, L layers, h heads, S tokens of the texts whose logits are averaged. Layers and heads count from 0 here
and from 1 in results, where state 0 of the residual stream is what layer 1 gets.
"""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from vitreg_hf.analysis import text_report
from vitreg_hf.analysis.extract import Subject
from vitreg_hf.analysis.figures.sinks import (
    head_at_rest,
    kind_curves,
    kind_heads,
    logit_maps,
    outlier_tokens,
    text_channel_curves,
    text_sink_curves,
)
from vitreg_hf.analysis.records import Records
from vitreg_hf.analysis.report import Picture, start_report, write_report, write_results
from vitreg_hf.analysis.text_batches import (
    Numbers,
    follow_largest,
    mean_logits,
    measure_batch,
    measure_logits,
    merge,
    pattern,
    read_head,
    text_batch,
    tokenize,
)
from vitreg_hf.model.fingerprint import fingerprint

_TEXTS_PER_RECORD = 64  # what an interruption can cost; it decides nothing else
_FEWEST_TOKENS = 2  # a text of one token leaves attention no choice
_TRACED_TEXTS = 16  # those with the largest activations, one forward pass each
_READABLE_TOKENS = 32  # on the axes of a picture
_DRAWN_LAYERS = 6  # all, or the second and evenly spaced ones
_DRAWN_HEADS = 8  # small maps side by side


def read_texts(file: Path) -> list[str]:
    """Read texts from a UTF-8 file, one per line; blank lines are skipped.

    Raises:
        ValueError: if there is no such file, it is not UTF-8, or holds no text.
    """
    if not file.is_file():
        raise ValueError(f"Expected a file of texts, one per line, got {str(file)!r}, which is no file")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected UTF-8 in {str(file)!r}, got another encoding: {error}") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ValueError(f"Expected at least one line of text in {str(file)!r}, got none")
    return texts


def analyze_text(
    subject: Subject,
    texts: Sequence[str],
    output: Path,
    *,
    batch_size: int = 8,
    max_length: int = 64,
    logit_length: int = 16,
    logit_texts: int = 256,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measure the attention sinks and outlier channels of a text model, draw and report them.

    Args:
        subject: a text model with its tokenizer, of `extract.load_text`; neither is changed.
        texts: the texts; a line break inside one is a token of its own to many models.
        output: folder for `results.json`, `report.html`, pictures, and `records` to go on from after an interruption.
        batch_size: texts at a time; decides nothing but speed and memory.
        max_length: tokens, special ones included, after which a text is cut off. The sink score's paper has 64.
        logit_length: tokens of the texts whose logits are averaged; 16 in StreamingLLM.
        overwrite: replace records of something else, and a report of another kind, in the output folder.
        logit_texts: the first so many texts that are long enough for that; 256 in StreamingLLM.

    Returns:
        What stands in `results.json`.

    Raises:
        ValueError: for a vision model or one without tokenizer, no text of two tokens, a value out of range, or if
            `output` holds records of something else.
    """
    _check(subject, texts, batch_size, max_length, logit_length, logit_texts)
    start_report(output, "sinks", overwrite)
    # A tokenizer remembers how it was called last.
    subject = replace(subject, preprocess=copy.deepcopy(subject.preprocess))
    lengths = {"max_length": max_length, "logit_length": logit_length, "logit_texts": logit_texts}
    numbers = merge(measure_texts(subject, texts, output / "records", batch_size, overwrite=overwrite, **lengths))
    if "length" not in numbers:
        raise ValueError(f"Expected at least one text of {_FEWEST_TOKENS} tokens or more, got none in {len(texts)}")
    results = {"model": _facts(subject, numbers), **text_report.summarize(numbers)}
    results["texts"]["max_length"] = max_length
    results["logits"]["positions"] = _positions(subject, numbers["logit_ids"])
    results["massive"] = _massive(subject, texts, numbers, max_length)
    results["no_op"], drawn = _idle_head(subject, texts, numbers, max_length)
    pictures = draw(results, mean_logits(numbers), drawn, output)
    results = write_results(output, "sinks", results)
    title = f"Attention sinks of {results['model']['name']}"
    write_report(output / "report.html", title, text_report.lead(results), text_report.sections(results, pictures))
    return results


def _check(subject: Subject, texts: Sequence[str], batch_size: int, max_length: int, *logits: int) -> None:
    if subject.anatomy.layout is not None or not callable(subject.preprocess):
        raise ValueError(f"Expected a text model with its tokenizer, got {subject.name!r} without: see load_text")
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("Expected a list of texts, got a single string, nothing, or something that is no string")
    if min(batch_size, max_length - 1, logits[0] - 1, logits[1]) < 1:
        got = f"{batch_size}, {max_length}, {logits[0]} and {logits[1]}"
        raise ValueError(f"Expected batch size and number of texts of 1 or more, lengths of 2 or more, got {got}")
    positions = getattr(subject.anatomy.backbone.config, "max_position_embeddings", max_length)
    longest = min(subject.preprocess.model_max_length, positions)
    if max(max_length, logits[0]) > longest:
        raise ValueError(
            f"Expected texts of at most {longest} tokens for this model, got {max(max_length, logits[0])}"
        )


# All texts


def measure_texts(
    subject: Subject,
    texts: Sequence[str],
    folder: Path,
    batch_size: int,
    *,
    max_length: int,
    logit_length: int,
    logit_texts: int,
    overwrite: bool = False,
) -> Records:
    """Measure every text, or those that an interrupted run has not measured yet; arguments as of `analyze_text`.

    Raises:
        ValueError: if the folder holds records of another model, tokenizer, other texts or lengths.
    """
    records, tokenizer = Records(folder), subject.preprocess
    lengths = {"max_length": max_length, "logit_length": logit_length, "logit_texts": logit_texts}
    vocabulary = [type(tokenizer).__name__, len(tokenizer), str(tokenizer.special_tokens_map)]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    model = {
        "model": subject.name,
        "weights": fingerprint(subject.model.state_dict().items()),
        "tokenizer": vocabulary,
    }
    records.claim({"measured": "texts", **model, "texts": digest, **lengths}, overwrite)
    wanted = logit_texts - sum(int(record["sum_logit_texts"]) for record in records)
    with tqdm(total=len(texts), desc=f"Measuring {subject.name}", unit="text") as bar:
        for start in range(0, len(texts), _TEXTS_PER_RECORD):
            some = texts[start : start + _TEXTS_PER_RECORD]
            if records.holds(start):
                bar.update(len(some))
                continue
            measured = _measure_some(subject, tokenize(tokenizer, some, max_length), start, batch_size, bar)
            cut = tokenize(tokenizer, some, logit_length)
            logits = measure_logits(subject, cut, logit_length, wanted, batch_size)
            wanted -= int(logits["sum_logit_texts"])
            records.save(start, {**measured, **logits})
    return records


def _measure_some(subject: Subject, ids: list[list[int]], start: int, batch_size: int, bar: Any) -> Numbers:
    kept = [index for index, one in enumerate(ids) if len(one) >= _FEWEST_TOKENS]
    parts: list[Numbers] = [{"sum_skipped": np.array(len(ids) - len(kept))}]
    for first in range(0, len(kept), batch_size):
        chosen = kept[first : first + batch_size]
        measured = measure_batch(subject, text_batch(subject, [ids[index] for index in chosen]))
        parts.append({name: value.numpy() for name, value in measured.items()})
        parts[-1]["text"] = np.array([start + index for index in chosen])
        bar.update(len(chosen))
    bar.update(len(ids) - len(kept))
    return merge(parts)


def _facts(subject: Subject, numbers: Numbers) -> dict[str, Any]:
    anatomy, (layers, heads, _) = subject.anatomy, numbers["sum_head_share"].shape
    name = Path(subject.name).name if Path(subject.name).is_dir() else subject.name
    return {"name": name, "family": anatomy.family, "layers": layers, "heads": heads, "causal": anatomy.causal}


def _positions(subject: Subject, ids: NDArray[np.int64]) -> list[str]:
    """What stands at each position: a token if it is that of all texts, otherwise the position."""
    same = (ids == ids[:1]).all(axis=0) & (len(ids) > 1)
    tokens = subject.preprocess.convert_ids_to_tokens(ids[0].tolist()) if len(ids) else []
    return [token if fixed else str(place) for place, (token, fixed) in enumerate(zip(tokens, same))]


# Single texts


def _massive(subject: Subject, texts: Sequence[str], numbers: Numbers, max_length: int) -> dict[str, Any]:
    """Where the largest value of all texts comes from, and of how many other texts with large values that holds."""
    largest = np.argsort(-numbers["state_infinity_norm"].max(axis=1), kind="stable")[:_TRACED_TEXTS]
    chosen = [texts[index] for index in numbers["text"][largest]]
    traced = [follow_largest(subject, ids) for ids in tokenize(subject.preprocess, chosen, max_length)]
    same = {name: sum(one[name] == traced[0][name] for one in traced) for name in ("ffn_layer", "channel")}
    return {**traced[0], "traced": len(traced), **{f"same_{name}": count for name, count in same.items()}}


def _idle_head(
    subject: Subject, texts: Sequence[str], numbers: Numbers, max_length: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The head that idles most after the FFN that writes the strongest outlier channel, and what to draw of it.

    The last layer's FFN is left out: no attention reads it.
    """
    count, idle = len(numbers["length"]), numbers["sum_no_op"]
    found = text_report.strongest_channel(numbers["rows_ffn"], len(idle) - 1, count)
    ffn_layer, channel = (None, None) if found is None else (found["layer"] - 1, found["channel"])
    layer = int(idle.max(axis=1).argmax()) if ffn_layer is None else ffn_layer + 1
    head = int(idle[layer].argmax())
    outliers = numbers["ffn_sigma_outliers"][:, 0 if ffn_layer is None else ffn_layer]
    # Most outliers among texts that fit on an axis; the shortest text if none does.
    shown = int(np.where(numbers["length"] <= _READABLE_TOKENS, outliers, -numbers["length"]).argmax())
    index = int(numbers["text"][shown])
    (ids,) = tokenize(subject.preprocess, [texts[index]], max_length)
    example, drawn = read_head(subject, ids, layer, head, ffn_layer, channel)
    return {
        "ffn_layer": None if found is None else found["layer"],
        "channel": channel,
        "variance": None if found is None else found["variance"],
        "layer": layer + 1,
        "head": head + 1,
        "no_op_share": float(idle[layer, head] / count),
        "example": {"text": index, **example},
        "pattern": pattern(example),
    }, drawn


# Pictures


def draw(
    results: dict[str, Any], logits: NDArray[np.float64] | None, drawn: dict[str, Any], folder: Path
) -> dict[str, list[Picture]]:
    """Draw all pictures into a folder, by the section of the report that shows them.

    Args:
        results: what `analyze_text` returns.
        logits: mean logits `(L, h, S, S)`, None if there are none.
        drawn: arrays of one head in one text, of `text_batches.read_head`.
        folder: where PNGs go.
    """
    about = f"{results['model']['name']}, {results['texts']['n']} texts"
    kinds = {name: results["kinds"][name] for name in text_report.present_kinds(results)}
    sinks = {name: results["sinks"]["tokens"][name] for name in text_report.present_sinks(results)}
    places = {"FFN output": results["channels"]["ffn"], "residual stream": results["channels"]["residual"]}
    heads = {name: np.array(kind["heads"]) for name, kind in kinds.items()}
    kind_curves(kinds, folder / "kinds.png", title=about)
    kind_heads(heads, folder / "kinds_by_head.png", title=about)
    text_sink_curves(sinks, results["sinks"]["epsilon"], folder / "sinks.png", title=about)
    text_channel_curves(places, folder / "channels.png", title=about)
    return {
        "kinds": [
            Picture(folder / "kinds.png", "Share of attention on each kind of token, per layer."),
            Picture(folder / "kinds_by_head.png", "The same share for each head."),
        ],
        "sinks": [Picture(folder / "sinks.png", "Heads with a sink, and attention over an even share, per layer.")],
        "channels": [Picture(folder / "channels.png", "Outliers of the FFN output and of the residual stream.")],
        "logits": [] if logits is None else _draw_logits(results, logits, folder),
        "no_op": _draw_idle_head(results, drawn, folder),
    }


def _draw_logits(results: dict[str, Any], logits: NDArray[np.float64], folder: Path) -> list[Picture]:
    layers, heads = logits.shape[:2]
    spaced = np.linspace(0, layers - 1, _DRAWN_LAYERS - 1).round().astype(int).tolist()
    some = range(layers) if layers <= _DRAWN_LAYERS else sorted({1, *spaced})
    few = sorted({0, layers // 2, layers - 1})
    found = results["logits"]
    about = (
        f"{results['model']['name']}: attention logits, mean over {found['texts']} texts of {found['length']} tokens"
    )
    by_layer = {f"layer {layer + 1}": logits[layer].mean(axis=0) for layer in some}
    by_head = {f"layer {i + 1}, head {j + 1}": logits[i, j] for i in few for j in range(heads)}
    columns = max(number for number in range(1, _DRAWN_HEADS + 1) if heads % number == 0)
    positions = found["positions"]
    logit_maps(
        by_layer,
        folder / "logits.png",
        columns=min(3, len(some)),
        positions=positions,
        title=f"{about} and over heads",
    )
    logit_maps(by_head, folder / "logits_by_head.png", columns=columns, positions=positions, title=about)
    difference = np.array(found["first_minus_others"]).mean(axis=1)
    most = int(difference.argmax())
    return [
        Picture(
            folder / "logits.png",
            f"Mean of heads. The first token's logit stands out most in layer {most + 1}, {difference[most]:.2f} "
            f"above the mean of the others, and least in layer {int(difference.argmin()) + 1}, "
            f"by {difference.min():.2f}.",
        ),
        Picture(folder / "logits_by_head.png", "All heads of the first, the middle and the last layer."),
    ]


def _draw_idle_head(results: dict[str, Any], drawn: dict[str, Any], folder: Path) -> list[Picture]:
    found, pictures = results["no_op"], []
    name, text = results["model"]["name"], f"text {found['example']['text'] + 1} of {results['texts']['n']}"
    if drawn["sigmas"] is not None:
        title = f"{name}: FFN output of layer {found['ffn_layer']} for {text}"
        outlier_tokens(drawn["sigmas"], drawn["tokens"], found["channel"], folder / "outliers.png", title=title)
        caption = f"Values beyond 6 standard deviations in the FFN output of layer {found['ffn_layer']} for one text."
        pictures.append(Picture(folder / "outliers.png", caption))
    head_at_rest(
        drawn["attention"],
        drawn["value_norms"],
        drawn["output_norms"],
        drawn["tokens"],
        folder / "idle_head.png",
        title=f"{name}: layer {found['layer']}, head {found['head']}, {text}",
    )
    return [*pictures, Picture(folder / "idle_head.png", text_report.no_op_text(found))]
