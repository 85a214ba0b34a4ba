# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Writes what was measured: numbers as JSON, and one page that holds its pictures, so that it can be sent as it is."""

import base64
import html
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { margin-bottom: 0 } h2 { margin-top: 2.2em; border-bottom: 1px solid #ccc }
img { max-width: 100%; height: auto } figure { margin: 1.2em 0 } figcaption { color: #444; margin-top: .3em }
table { border-collapse: collapse; margin: 1em 0 } th { background: #f3f3f3 }
th, td { border: 1px solid #ccc; padding: .25em .6em; text-align: right }
th:first-child, td:first-child, caption { text-align: left } caption { color: #444 }
.lead { font-size: 1.15em; white-space: pre-line }
"""


@dataclass(frozen=True)
class Picture:
    """A PNG beside the report, and what a reader sees in it."""

    file: Path
    caption: str


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; `caption` says what the numbers are and of how many."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of a report: paragraphs, then tables, then pictures."""

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = field(default=())


def start_report(folder: Path, kind: str, overwrite: bool = False) -> None:
    """Make a folder ready for a report: an older page and its pictures go, so that old and new never mix.

    Args:
        folder: made if it does not exist.
        kind: name of the report, which `write_results` leaves behind.
        overwrite: replace a report of another kind.

    Raises:
        ValueError: if the folder is a file, or holds a report of another kind that is not to be overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"Expected a folder for the report, got the file {str(folder)!r}")
    results, page = folder / "results.json", folder / "report.html"
    found = json.loads(results.read_text()).get("report", "another kind") if results.is_file() else None
    found = found or ("another kind" if page.is_file() else None)
    if found not in (None, kind) and not overwrite:
        raise ValueError(
            f"Expected a folder without another report, got {str(folder)!r} with a report of {found!r}: use another "
            "output folder, or overwrite=True (--overwrite)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for old in [page, results, *folder.glob("*.png")] if found is not None else []:
        old.unlink(missing_ok=True)


def write_results(folder: Path, kind: str, content: dict[str, Any]) -> dict[str, Any]:
    """Write `results.json` into the folder of a report; returns what stands there: its kind, and `content`."""
    named = {"report": kind, **content}
    write_json(folder / "results.json", named)
    return named


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, complete or not at all; numbers that JSON does not know (NaN, infinity) become null."""
    _write(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def write_report(path: Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write a page of HTML that needs no other file, complete or not at all.

    Args:
        path: the file.
        title: its heading.
        lead: the finding in one paragraph.
        sections: in their order.
    """
    body = "\n".join(_section(section) for section in sections)
    _write(
        path,
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n<p class="lead">{html.escape(lead)}'
        f"</p>\n{body}\n</body>\n</html>\n",
    )


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table, from 10^digits to a million whole, never as a power of ten; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.0f}" if 10**digits <= abs(value) < 1e6 else f"{value:.{digits}g}"


def interval(value: dict[str, Any], digits: int = 3, factor: float = 1, unit: str = "") -> str:
    """A mean with its 95 % interval and n, from the dict of an `Interval`; a unit stands behind the mean."""
    if value["n"] == 0 or value["mean"] is None or not math.isfinite(value["mean"]):
        return "- (n = 0)"
    mean = number(factor * value["mean"], digits) + (f" {unit}" if unit else "")
    if value["low"] is None:
        return f"{mean} (n = {value['n']})"
    low, high = number(factor * value["low"], digits), number(factor * value["high"], digits)
    return f"{mean} [{low}, {high}] (n = {value['n']})"


def _section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    parts += [f"<p>{html.escape(text)}</p>" for text in section.text]
    parts += [_table(table) for table in section.tables]
    parts += [_picture(picture) for picture in section.pictures]
    return "\n".join(parts)


def _table(table: Table) -> str:
    def row(cells: Sequence[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    rows = "\n".join([row(table.header, "th"), *(row(cells, "td") for cells in table.rows)])
    return f"<table>\n<caption>{html.escape(table.caption)}</caption>\n{rows}\n</table>"


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.file.read_bytes()).decode("ascii")
    caption = html.escape(picture.caption)
    image = f'<img src="data:image/png;base64,{data}" alt="{caption}">'
    return f"<figure>\n{image}\n<figcaption>{caption}</figcaption>\n</figure>"


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
