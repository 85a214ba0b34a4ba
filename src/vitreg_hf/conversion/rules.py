# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What becomes of tensors between a source's layout and this family's, in both directions.

A layout is a table: names of this family (left), names of the source (right). `*` stands for the number of a block; a
name without ending holds for `.weight` and `.bias` alike; several names on the left are one tensor of the source.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Table = Mapping[str | tuple[str, ...], str]
_ENDINGS = ("", ".weight", ".bias")


class Rule(Protocol):
    """What is done to the tensors of a row; reading what was written gives back the same bits."""

    @property
    def word(self) -> str:
        """For reports: what happens to the source's tensor."""

    def read(self, foreign: Tensor) -> list[Tensor]:
        """Tensors of this family from that of the source; raises ValueError if they would say something else."""

    def write(self, own: Sequence[Tensor]) -> Tensor:
        """The source's tensor from those of this family."""


@dataclass(frozen=True)
class Row:
    """One tensor of the source, the tensors of this family that hold it, and what is done between them."""

    own: tuple[str, ...]
    foreign: str
    rule: Rule


@dataclass(frozen=True)
class Same:
    """The tensor as it is."""

    word: str = "renamed"

    def read(self, foreign: Tensor) -> list[Tensor]:
        return [foreign]

    def write(self, own: Sequence[Tensor]) -> Tensor:
        return own[0]


@dataclass(frozen=True)
class Reshaped:
    """The same values in another shape: tokens without batch dimension, for instance.

    Args:
        own_shape: shape here.
        foreign_shape: shape in the source.
    """

    own_shape: tuple[int, ...]
    foreign_shape: tuple[int, ...]
    word: str = "reshaped"

    def read(self, foreign: Tensor) -> list[Tensor]:
        if tuple(foreign.shape) != self.foreign_shape:
            raise ValueError(f"Expected the shape {self.foreign_shape}, got {tuple(foreign.shape)}")
        return [foreign.reshape(self.own_shape)]

    def write(self, own: Sequence[Tensor]) -> Tensor:
        return own[0].reshape(self.foreign_shape)


@dataclass(frozen=True)
class Stacked:
    """Equal parts behind one another along the first dimension: queries, keys and values, or gate and value.

    Args:
        present: which of the parts this family has. One that it lacks, as the bias of keys in DINOv3, must be zero.
        masked: the source multiplies what this family lacks by zero, whatever it is.
    """

    present: tuple[bool, ...]
    masked: bool = False
    word: str = "split"

    def read(self, foreign: Tensor) -> list[Tensor]:
        if foreign.ndim == 0 or foreign.shape[0] % len(self.present):
            raise ValueError(f"Expected {len(self.present)} equal parts, got the shape {tuple(foreign.shape)}")
        parts = foreign.chunk(len(self.present))
        for part, present in zip(parts, self.present, strict=True):
            if not (present or self.masked or part.is_meta) and bool(part.count_nonzero()):
                raise ValueError("Expected zeros for the part that this layout has no parameter for, got other values")
        return [part for part, present in zip(parts, self.present, strict=True) if present]

    def write(self, own: Sequence[Tensor]) -> Tensor:
        given = iter(own)
        return torch.cat([next(given) if present else torch.zeros_like(own[0]) for present in self.present])


@dataclass(frozen=True)
class HalvesOfPairs:
    """Rotary channels in two halves here, in neighbouring pairs in the source; of stacked queries, keys and values.

    Values, which are not rotated, stay as they are, and so does every product of a query and a key.

    Args:
        head_dim: channels per head.
        parts: what is stacked: of `q`, `k` and `v`.
    """

    head_dim: int
    parts: str = "qkv"
    word: str = "split, rotary channels reordered"

    def read(self, foreign: Tensor) -> list[Tensor]:
        return self._reordered(self._stacked.read(foreign), self._halves)

    def write(self, own: Sequence[Tensor]) -> Tensor:
        return self._stacked.write(self._reordered(own, self._pairs))

    @property
    def _stacked(self) -> Stacked:
        return Stacked((True,) * len(self.parts))

    def _reordered(self, tensors: Sequence[Tensor], order: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return [one if part == "v" else order(one) for part, one in zip(self.parts, tensors, strict=True)]

    def _halves(self, part: Tensor) -> Tensor:
        return part.unflatten(0, (-1, self.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)

    def _pairs(self, part: Tensor) -> Tensor:
        return part.unflatten(0, (-1, 2, self.head_dim // 2)).transpose(1, 2).flatten(0, 2)


@dataclass(frozen=True)
class LinearPatches:
    """The projection of patches as a matrix over pixels, channels last, in the source.

    Args:
        patch_size: height and width of a patch.
    """

    patch_size: tuple[int, int]
    word: str = "reshaped"

    def read(self, foreign: Tensor) -> list[Tensor]:
        return [foreign.unflatten(1, (*self.patch_size, -1)).permute(0, 3, 1, 2)]

    def write(self, own: Sequence[Tensor]) -> Tensor:
        return own[0].permute(0, 2, 3, 1).flatten(1)


# From tables to rows


def rows_of(table: Table, own_names: Iterable[str], rules: Mapping[str, Rule] | None = None) -> list[Row]:
    """The rows that a table has for the parameters of a model.

    Args:
        table: see above; an entry with a full name goes before one without ending.
        own_names: names of the parameters of this family that are to be held.
        rules: rules for single names of the source, as the table writes them, in place of those that follow from it.

    Raises:
        ValueError: naming parameters that the table has no place for.
    """
    left = dict.fromkeys(own_names)
    rows: list[Row] = []
    for own, foreign in sorted(table.items(), key=lambda entry: _is_general(entry[0])):
        rule = None if rules is None else rules.get(foreign)
        rows += _expanded((own,) if isinstance(own, str) else own, foreign, left, rule)
    if left:
        names = ", ".join(list(left)[:3])
        raise ValueError(f"Expected parameters that this layout has a place for, got {names} ({len(left)} in all)")
    return rows


def _is_general(own: str | tuple[str, ...]) -> bool:
    return not any(name.endswith((".weight", ".bias")) for name in ([own] if isinstance(own, str) else own))


def _expanded(own: tuple[str, ...], foreign: str, left: dict[str, None], rule: Rule | None) -> list[Row]:
    """Rows of one entry of a table, for every block and ending; takes their names out of `left`."""
    rows = []
    for block in _blocks(own[0], left):
        stems = [name.replace("*", block) for name in own]
        for ending in _ENDINGS:
            names = [stem + ending for stem in stems]
            present = tuple(name in left for name in names)
            if not any(present):
                continue
            taken = tuple(name for name, there in zip(names, present, strict=True) if there)
            for name in taken:
                del left[name]
            rows.append(Row(taken, foreign.replace("*", block) + ending, rule or _default(present)))
    return rows


def _default(present: tuple[bool, ...]) -> Rule:
    return Same() if len(present) == 1 else Stacked(present)


def _blocks(own: str, names: Iterable[str]) -> list[str]:
    """Numbers of the blocks that an entry of a table stands for; one empty text for an entry outside blocks."""
    if "*" not in own:
        return [""]
    before = own.split("*")[0]
    pattern = re.compile(re.escape(before) + r"(\d+)\.")
    found = {match[1] for match in map(pattern.match, names) if match}
    return sorted(found, key=int)
