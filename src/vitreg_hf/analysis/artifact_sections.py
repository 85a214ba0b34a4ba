# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What a reader of an analysis reads: the finding, tables, and what each picture shows. All from `results.json`."""

from pathlib import Path
from typing import Any

from vitreg_hf.analysis.paper_datasets import PAPER_DATASETS
from vitreg_hf.analysis.report import Picture, Section, Table, interval, number
from vitreg_hf.analysis.token_probes import SAME_IMAGES

_ENOUGH_PATCHES = 8_000  # from which the dip test finds a group of 2 % (tests/analysis/test_token_norms.py)
_WRITES = 0.5  # of a value, that an FFN has to add to be called its writer

CAPTIONS = {
    "norms": "Norms of all patches (Fig. 3 of the paper). Artifacts are a second group far to the right; the dashed "
    "line is the cutoff of this report.",
    "norm_maps": "Norms on the image (Fig. 21): artifacts are single bright patches on background.",
    "layers": "Left: norms after every layer (Fig. 4a). Right: patches above the cutoff; where the curve rises, "
    "outliers come into being.",
    "positions": "Share of images with an outlier at each position (appendix A).",
    "neighbours": "How alike neighbouring patches are before the first layer (Fig. 5a). In the paper, artifacts sit "
    "on redundant patches: their curve lies further right.",
    "attention": "Attention of CLS and each register (Fig. 9 and 19), on one colour scale.",
    "heads_of_tokens": "One image: what each token (row) attends to in each head (column).",
    "heads": "Heads one by one (appendix F, where artifacts show in all heads).",
    "average_attention": "Average maps (Fig. 16): whether registers come to attend to regions of their own.",
    "cls_mass": "What is not on patches does not show in attention maps over the image, however clean they look.",
    "rollout": "Rollout multiplies attention over layers: which input patches can reach the output, with what "
    "registers "
    "gathered flowing on, and with that way cut.",
    "components": "Components of patch features (Fig. 20), over all these images together: artifacts stand out as "
    "speckles that no object explains.",
    "objects": "Object discovery (Fig. 13) with its authors' default. It takes the patch that is like the fewest "
    "others "
    "for the object, so artifacts and busy backgrounds mislead it.",
    "sinks": "Left: attention that a token gets from all others against an even share. Right: share of heads in which "
    "it is a sink. Of many patches, the one that gets most is above 1 in any model.",
    "channels": "Few channels with huge values show as a large maximum, a kurtosis far above 3 and many values beyond "
    "six standard deviations.",
}


def lead(results: dict[str, Any]) -> str:
    """The finding in one paragraph."""
    found, model = results["outliers"], results["model"]
    registers = f"{model['registers']} registers" if model["registers"] != 1 else "1 register"
    share, groups = interval(found["share"], factor=100, unit="%"), found["two_groups"]
    p_value, count = _probability(groups["p_value"]), groups["n"]
    if groups["found"]:
        verdict = f"Artifacts: yes. Norms fall into two groups, {_apart(groups)} (dip test p {p_value})"
    elif groups["probably"]:
        verdict = (
            f"Artifacts: probably. Two groups of norms, {_apart(groups)}, fit better than one, but the dip test "
            "cannot "
            f"tell them from one group with {count} patches (p {p_value}): take more images"
        )
    else:
        verdict = (
            "Artifacts: none found. Norms do not fall into two groups at least three-fold apart (the best split: "
            f"{_apart(groups)}, dip test p {p_value}, {count} patches)"
        )
    if not groups["found"] and count < _ENOUGH_PATCHES:
        verdict += "; with so few, the test finds only groups that are large"
    verdict = f"{verdict}. {share} of an image's patches are above the cutoff."
    return (
        f"{model['name']} ({model['family']}, {model['layers']} layers, {registers}) on "
        f"{results['images']['measured']} "
        f"images of {results['images']['grid'][0]} x {results['images']['grid'][1]} patches. {verdict}"
    )


def _probability(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {number(value)}"


def _apart(groups: dict[str, Any]) -> str:
    known = groups["high_share"] > 0 and groups["high_mode"] is not None
    return f"{number(groups['high_mode'] / groups['low_mode'])}-fold apart" if known else "all in one group"


def sections(results: dict[str, Any], folder: Path) -> list[Section]:
    """All parts of the report; pictures that are not in the folder are left out."""

    def shown(*names: str) -> list[Picture]:
        return [Picture(folder / f"{n}.png", CAPTIONS[n]) for n in names if (folder / f"{n}.png").is_file()]

    return [
        Section("Outliers", _rule(results), [_outlier_table(results)], shown("norms", "norm_maps")),
        Section(
            "From which layer, where, on what", [], [_layer_table(results)], shown("layers", "positions", "neighbours")
        ),
        *_what_they_hold(results),
        Section(
            "Attention of CLS and registers",
            _attention_text(results),
            _attention_tables(results),
            shown("attention", "heads", "heads_of_tokens", "average_attention", "cls_mass", "rollout"),
        ),
        Section("Patch features and objects", [], [], shown("components", "objects")),
        Section(
            "Sinks and outlier channels", _sink_text(results), [_share_table(results)], shown("sinks", "channels")
        ),
        Section("How this was measured", _method(results)),
    ]


def _rule(results: dict[str, Any]) -> list[str]:
    found = results["outliers"]
    words = {
        "median": f"{number(found['rule_value'])} times the median",
        "sigma": f"mean + {number(found['rule_value'])} standard deviations",
        "percentile": f"the {number(found['rule_value'])}th percentile",
        "mixture": "where the upper of two Gaussians over log norms becomes the likelier",
        "fixed": "a given number",
    }[found["rule"]]
    return [
        f"An outlier is a patch whose norm after layer {found['layer']}, before the final norm, is above "
        f"{number(found['cutoff'])} ({words}). The paper's cutoff of 150 was chosen by hand for DINOv2-g; norms of "
        "different models do not compare."
    ]


def _outlier_table(results: dict[str, Any]) -> Table:
    found = results["outliers"]
    groups, similar = found["two_groups"], found["neighbour_similarity"]
    rows = [
        ("patches above the cutoff (% of an image)", interval(found["share"], factor=100)),
        ("images with at least one (%)", number(100 * found["images_with_outliers"])),
        ("largest norm of an image / its median", interval(found["largest_over_median"])),
        ("norm: median, 98th percentile, largest", ", ".join(number(value) for value in found["norm"].values())),
        (
            "two groups of norms",
            f"{'yes' if groups['found'] else 'no'}: medians {number(groups['low_mode'])} and "
            f"{number(groups['high_mode'])}, {number(100 * groups['high_share'])} % in the upper one",
        ),
        (
            "dip test",
            f"p {_probability(groups['p_value'])}, BIC gain of two Gaussians {number(groups['bic_gain'])} "
            f"(n = {groups['n']} patches)",
        ),
        (
            "first layer with half of the final share of outliers",
            "-" if found["first_layer"] is None else str(found["first_layer"]),
        ),
        ("on the border (% of outliers; of all patches)", _border(found)),
        ("similarity to neighbours, outliers", interval(similar["outlier"])),
        ("similarity to neighbours, normal patches", interval(similar["normal"])),
    ]
    caption = "Means over images with 95 % bootstrap intervals over n images, where not said otherwise."
    return Table(("quantity", "value"), rows, caption)


def _border(found: dict[str, Any]) -> str:
    share = "-" if found["on_border"] is None else number(100 * found["on_border"])
    return f"{share}; {number(100 * found['border_patches'])}"


def _layer_table(results: dict[str, Any]) -> Table:
    keys = ("norm_median", "norm_percentile_98", "norm_max", "infinity_norm", "kurtosis", "sigma_outliers")
    rows = [
        (str(state["layer"]), number(100 * state["outlier_share"]), *(number(state[key]) for key in keys))
        for state in results["layers"]
    ]
    header = ["after layer", "above cutoff (%)", "median norm", "98th percentile", "largest norm"]
    header += ["largest value", "kurtosis", "values beyond 6 sigma"]
    caption = f"Residual stream, {results['images']['measured']} images; the last three are means over images."
    return Table(header, rows, caption)


def _what_they_hold(results: dict[str, Any]) -> list[Section]:
    tables = []
    if results["probes"] is not None:
        tables.append(_local_table(results["probes"], results["images"]["grid"]))
    if results["classification"] is not None:
        tables.append(global_table(results["classification"]))
    text = [
        "Linear models read position and pixels off single patches (the paper's Fig. 5b), and the class of the "
        "image off "
        "one token (its Table 1). In the paper, artifacts lack the former and hold the latter."
    ]
    return [Section("What outliers hold", text, tables)] if tables else []


def _local_table(probes: dict[str, Any], grid: list[int]) -> Table:
    rows = [
        (
            kind,
            interval(scores["position_top1"], factor=100),
            interval(scores["position_distance"]),
            interval(scores["reconstruction_error"]),
        )
        for kind, scores in probes.items()
    ]
    header = ("patches", "position, top-1 (%)", "position, distance (patches)", "pixels, L2 error (RGB 0 to 1)")
    caption = (
        "Scored on images that the probes were not trained on; 95 % intervals over images. Guessing a position "
        f"gives {number(100 / (grid[0] * grid[1]))} %; the error is the norm over all pixels and colours of a patch."
    )
    return Table(header, rows, caption)


def global_table(scores: dict[str, Any]) -> Table:
    """Accuracy from one token, by kind, of one set of images: what `token_probes.token_table` returned."""
    rows = []
    for kind in ("CLS", "normal", "outlier", SAME_IMAGES, "register"):
        row = scores.get(kind)
        if row is None and kind in scores:
            rows.append((kind, "-", "too few images have one"))
        elif row is not None:
            spread = f" ± {number(100 * row['std'], 2)}" if len(row["accuracies"]) > 1 else ""
            counts = f"{row['train_images']} / {row['test_images']} / {row['images_without']}"
            rows.append((kind, f"{number(100 * row['accuracy'])}{spread}", counts))
    caption = (
        f"Logistic regression on one token per image, {scores['classes']} classes; the most frequent class alone "
        "gives "
        f"{number(100 * scores['chance'])} %. ± is the standard deviation over {_draws(scores)} draws of the token."
    )
    return Table(("token", "accuracy (%)", "images trained on / scored / without such a token"), rows, caption)


def _draws(scores: dict[str, Any]) -> int:
    return len(scores["normal"]["accuracies"]) if scores["normal"] else 0


def _attention_text(results: dict[str, Any]) -> list[str]:
    attention = results["attention"]
    if not attention["tokens"]:
        return ["The model has neither CLS nor registers, so there is no map of theirs."]
    text = []
    if results["model"]["registers"] and results["model"]["cls_tokens"]:
        text.append(
            f"In the last layer CLS spends {interval(attention['cls_on_registers'], factor=100, unit='%')} of its "
            "attention on "
            "registers (mean of heads): the part of its input that no map over patches shows."
        )
    if attention["patch_only_cka"] is not None:
        count = attention["patch_only_cka_images"]
        text.append(
            f"What CLS takes in the last layer agrees with what it takes from patches alone by a linear CKA of "
            f"{number(attention['patch_only_cka'])} over {count} images (1: the same but for scale and rotation; over "
            "fewer images than channels it comes out high in any model)."
        )
    return text


def _attention_tables(results: dict[str, Any]) -> list[Table]:
    tokens = results["attention"]["tokens"]
    if not tokens:
        return []
    rows = [
        (
            token["name"],
            interval(token["entropy"]),
            interval(token["area"], factor=100),
            ", ".join(number(part, 2) for part in token["centre"]),
            " / ".join(number(100 * part) for part in token["mass"]),
            interval(token["norm"]),
        )
        for token in tokens
    ]
    header = ["token", "entropy (nats)", "area (% of the image)", "centre (row, column)"]
    header += ["on CLS / registers / patches (%)", "norm"]
    caption = "Last layer, mean of heads; centre from 0 (top, left) to 1; 95 % intervals over images."
    names = [token["name"] for token in tokens]
    overlap = [
        (name, *(number(value, 2) for value in row)) for name, row in zip(names, results["attention"]["overlap"])
    ]
    said = "Overlap of maps: attention that two tokens spend on the same patches, 1 for equal maps; mean over images."
    return [Table(header, rows, caption), Table(("", *names), overlap, said)]


def _sink_text(results: dict[str, Any]) -> list[str]:
    sinks, writer = results["sinks"], results["sinks"]["writer"]
    text = [
        "In the last layer an outlier patch gets "
        f"{interval(sinks['outlier_patches_times_uniform'])} times an even share of attention, a normal one "
        f"{interval(sinks['normal_patches_times_uniform'])} times. Massive activations (above 100 and 1,000 times the "
        "median) per image, after the layer that has most: "
        f"{number(max(s['massive'] for s in results['layers']))}; by "
        f"the relative rule alone: {number(max(s['relatively_massive'] for s in results['layers']))}."
    ]
    last = results["layers"][-1]["peak"]
    text.append(
        f"After the last layer the largest value of an image stands most often in channel {last['channel']} of "
        f"{last['token']} ({number(100 * last['agreement'])} % of images)."
    )
    if writer is not None and writer["share"] >= _WRITES:
        text.append(
            f"The largest value of an image stands in channel {writer['channel']} of {writer['token']} in "
            f"{number(100 * writer['agreement'])} % of {writer['images']} images; the FFN of layer {writer['layer']} "
            f"does most for it: {number(100 * writer['share'])} % of the value (median over those images)."
        )
    return text


def _share_table(results: dict[str, Any]) -> Table:
    shares, peaks = results["sinks"]["shares"], results["layers"][1:]
    rows = [
        (
            str(layer + 1),
            *(number(100 * of_kind[layer]) for of_kind in shares.values()),
            f"channel {peaks[layer]['peak']['channel']} of {peaks[layer]['peak']['token']} "
            f"({number(100 * peaks[layer]['peak']['agreement'])} %)",
        )
        for layer in range(len(peaks))
    ]
    header = ("layer", *(f"on {kind} (%)" for kind in shares), "largest value (% of images)")
    caption = (
        "Share of all attention that each kind of token gets, mean of heads and queries, "
        f"{results['images']['measured']} "
        "images; and where the largest value of the residual stream after the layer stands most often."
    )
    return Table(header, rows, caption)


def _method(results: dict[str, Any]) -> list[str]:
    model, images = results["model"], results["images"]
    skipped = (
        f" Left out because they could not be decoded: {', '.join(images['skipped'])}." if images["skipped"] else ""
    )
    return [
        f"Weights {model['weights']}, {model['parameters']:,} parameters, on {model['device']}. Images of "
        f"{images['folder']}, as the model's image processor makes them.{skipped} Units of all numbers stand in "
        "results.json. Intervals are percentile bootstraps over images (2,000 resamples): they tell how other "
        "images of "
        "the same kind would come out, not other kinds of images."
    ]


def paper_table(rows: dict[str, dict[str, Any]]) -> Table:
    """Table 1 over several sets: accuracy from one token, beside what the paper reports for DINOv2-g."""
    kinds = ("CLS", "normal", "outlier", "register")
    reported = {dataset.short_name.lower(): dataset.reported for dataset in PAPER_DATASETS}
    lines = []
    for name, scores in rows.items():
        cells = [number(100 * scores[kind]["accuracy"]) if scores.get(kind) else "-" for kind in kinds]
        paper = reported.get(name.lower())
        told = "-" if paper is None else f"{paper.cls} / {paper.normal} / {paper.outlier}"
        lines.append((name, *cells, told))
    caption = "Accuracy (%) of image classification from one token; last column: reported for DINOv2-g (Table 1)."
    return Table(("images", *kinds, "reported: CLS / normal / outlier"), lines, caption)
