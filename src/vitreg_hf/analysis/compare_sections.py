# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What the page of a comparison says: its title, the finding, tables, and captions of its pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitreg_hf.analysis.differences import COMPARED, fewest_images, rows_by_model
from vitreg_hf.analysis.report import Picture, Section, Table, interval, number

_DIFFERS = {True: "differs", False: "no difference", None: "too few images"}
_WIDE = "Earlier models have wider lines, so that equal ones do not hide one another."
CAPTIONS = {
    "differences": "Red where the images tell a difference; grey where they do not: the interval holds 0, or too few "
    "images have the quantity.",
    "norms": f"Norms of patches of each model; each has a cutoff of its own. {_WIDE}",
    "layers": f"Norms and outliers after every layer of each model. {_WIDE}",
    "channels": f"Large values of the residual stream of each model. {_WIDE}",
    "maps": "Norms of patches on the image, in multiples of the median norm of each model: artifacts are bright.",
    "attention": "What the first token attends to in the last layer, as multiples of an even share, on one scale.",
}


def title(results: dict[str, Any]) -> str:
    """The models, as a reader would list them."""
    *before, last = results["models"]
    return f"{', '.join(before)} and {last}"


def lead(results: dict[str, Any]) -> str:
    """What differs and what does not: one paragraph for two models, else a line per model after the first."""
    first, *others = results["models"]
    rows, fewest = rows_by_model(results), fewest_images(1 + len(others))
    images = f"On the same {results['images']['measured']} images,"
    if len(others) == 1:
        (second,) = others
        told = [f"{r['name']}: {interval(r['difference'], unit=r['unit'])}" for r in rows[second] if r["differs"]]
        finding = f"{second} differs from {first} in: {'; '.join(told)}." if told else ""
        return f"{images} {_told(rows[second], finding, f'{first} and {second}', fewest)}"
    lines = []
    for name in others:  # intervals stand in the table: with them, several models would be no lead
        told = [f"{r['name']} ({_signed(r['difference']['mean'])} {r['unit']})" for r in rows[name] if r["differs"]]
        lines.append(_told(rows[name], f"{name} differs in: {'; '.join(told)}." if told else "", name, fewest))
    return "\n".join([f"{images} compared with {first}:", *lines])


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{number(value)}"


def _told(rows: Sequence[dict[str, Any]], finding: str, models: str, fewest: int) -> str:
    """Sentences on one pair of models: the finding, or that there is none, and what could not be told."""
    same = [row["name"] for row in rows if row["differs"] is False]
    none = [row["name"] for row in rows if row["difference"]["n"] == 0]
    few = [row["name"] for row in rows if row["differs"] is None and row["difference"]["n"] > 0]
    if finding:
        parts = [finding]
        parts += [f"No difference that they could tell in: {'; '.join(same)}."] if same else []
    else:
        parts = [f"{models}: {'no difference' if same else 'nothing that could be told'}."]
    parts += [f"Too few images (under {fewest}) have: {'; '.join(few)}."] if few else []
    parts += [f"Not in both models: {'; '.join(none)}."] if none else []
    return " ".join(parts)


def sections(results: dict[str, Any], folder: Path) -> list[Section]:
    """Means and differences, then all models side by side."""
    shown = {n: Picture(folder / f"{n}.png", text) for n, text in CAPTIONS.items() if (folder / f"{n}.png").is_file()}
    of_differences = [shown.pop("differences")] if "differences" in shown else []
    return [
        Section("Differences", [], [_means(results), _differences(results)], of_differences),
        Section("Side by side", [], [_about(results)], list(shown.values())),
    ]


def _means(results: dict[str, Any]) -> Table:
    names = list(results["models"])
    means: dict[str, dict[str, str]] = {key: {} for key in COMPARED}
    for row in results["differences"]:
        means[row["quantity"]] |= {name: interval(row[name]) for name in names if name in row}
    rows = [(_quantity(key), *(found.get(name, "-") for name in names)) for key, found in means.items() if found]
    return Table(("per image", *names), rows, "Means with 95 % bootstrap intervals over images.")


def _differences(results: dict[str, Any]) -> Table:
    first, *others = results["models"]
    cells = {
        (row["quantity"], name): f"{interval(row['difference'])}: {_DIFFERS[row['differs']]}"
        if row["difference"]["n"]
        else "not in both"
        for name, rows in rows_by_model(results).items()
        for row in rows
    }
    keys = [key for key in COMPARED if any((key, name) in cells for name in others)]
    rows = [(_quantity(key), *(cells.get((key, name), "not in both") for name in others)) for key in keys]
    caption = (
        f"Differences to {first} of the same image, with intervals that all hold together in 95 % of comparisons."
    )
    return Table(("per image", *(f"{name} minus {first}" for name in others)), rows, caption)


def _quantity(key: str) -> str:
    name, unit, _ = COMPARED[key]
    return f"{name} ({unit})"


def _about(results: dict[str, Any]) -> Table:
    rows = [
        (
            name,
            model["family"],
            str(model["layers"]),
            str(model["registers"]),
            number(results["summaries"][name]["outliers"]["cutoff"]),
            "yes" if results["summaries"][name]["outliers"]["two_groups"]["found"] else "no",
        )
        for name, model in results["models"].items()
    ]
    header = ("model", "family", "layers", "registers", "cutoff of norms", "two groups of norms")
    return Table(header, rows, "A cutoff is in units of its own model: norms of two models do not compare.")
