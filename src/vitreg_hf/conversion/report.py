# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What became of every tensor of a source, as data and as a table to read."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vitreg_hf.conversion.rules import Row

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        source: what was converted.
        layout: name of its layout.
        why: how the layout was recognised.
        rows: what was used, and how.
        dropped: names that were left out on purpose, each with its reason.
        notes: what a user should know.
    """

    source: str
    layout: str
    why: str
    rows: tuple[Row, ...]
    dropped: dict[str, str]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: every tensor by name."""
        used = {row.foreign: {"what": _word(row), "to": list(row.own)} for row in self.rows}
        named = {"source": self.source, "layout": self.layout, "recognised_by": self.why}
        return {**named, "notes": list(self.notes), "used": used, "dropped": self.dropped}

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.layout} ({self.why})"]
        lines += [f"  note: {note}" for note in self.notes]
        used = _grouped((row.foreign, (_together(row.own), _word(row))) for row in self.rows)
        left = _grouped((name, (why, "")) for name, why in self.dropped.items())
        width = max((len(foreign) for foreign, _, _ in (*used, *left)), default=0)
        for foreign, count, (own, word) in used:
            told = f"{word}, {count} times" if count > 1 else word
            lines.append(f"  {foreign:{width}}  ->  {own}  ({told})")
        for foreign, count, (reason, _) in left:
            lines.append(f"  {foreign:{width}}  left out: {reason}" + (f" ({count} times)" if count > 1 else ""))
        lines.append(
            f"  {len(self.rows)} tensors used, {len(self.dropped)} left out on purpose, none unknown or missing"
        )
        return "\n".join(lines)


def _word(row: Row) -> str:
    return "as it is" if row.rule.word == "renamed" and row.own == (row.foreign,) else row.rule.word


def _together(names: Sequence[str]) -> str:
    """Names that differ in one part as one: `attention.q_proj.bias` and so on as `attention.{q_proj,k_proj}.bias`."""
    parts = [list(dict.fromkeys(part)) for part in zip(*(name.split(".") for name in names), strict=True)]
    return ".".join(part[0] if len(part) == 1 else f"{{{','.join(part)}}}" for part in parts)


def _grouped(entries: Iterable[tuple[str, tuple[str, str]]]) -> Sequence[tuple[str, int, tuple[str, str]]]:
    """Entries of all blocks as one, with a star for the number of the block, and how many they are."""
    counts: dict[tuple[str, tuple[str, str]], int] = {}
    for name, (text, word) in entries:
        key = (_NUMBER.sub("*", name), (_NUMBER.sub("*", text), word))
        counts[key] = counts.get(key, 0) + 1
    return [(name, count, texts) for (name, texts), count in counts.items()]
