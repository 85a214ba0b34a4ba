# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Register neurons of a model: which were found, how, and what moving more of them does; saved as JSON."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vitreg_hf.model.configuration_checks import MOST_BYTES

VANISHED = 0.05  # outliers have vanished when this share of them is left
_SHOWN = 10


@dataclass(frozen=True)
class RegisterNeuron:
    """One neuron of an MLP.

    Attributes:
        layer: its block, from 0.
        neuron: its number inside the MLP, from 0.
        at_outliers: its mean activation at outliers, mean over images that have some.
        elsewhere: its mean activation at other patches of these images.
    """

    layer: int
    neuron: int
    at_outliers: float
    elsewhere: float


@dataclass(frozen=True)
class Trial:
    """What moving the first neurons of a ranking does to images that have outliers.

    Attributes:
        count: how many.
        outlier_share: share of patches above the cutoff that the ranking was made with.
        largest_norm: largest norm of a patch.
        pooled_cosine: mean cosine between pooled features before and after.
    """

    count: int
    outlier_share: float
    largest_norm: float
    pooled_cosine: float


@dataclass(frozen=True)
class RegisterNeurons:
    """The neurons that write a model's outliers, best first.

    Attributes:
        ranking: more of them than are used.
        count: how many of them are register neurons.
        threshold: norm above which a patch is an outlier, in units of the residual stream.
        rule: how it was chosen.
        state: after how many blocks norms were compared with it.
        top_layer: last block whose neurons were ranked, from 0.
        outlier_share: share of patches above the threshold before anything is moved.
        images: how many images were read.
        reduction: what a register gets of a neuron (`register_neuron_reduction` of the config).
        trials: what moving none, and more and more of them does; empty if the count was given.
    """

    ranking: tuple[RegisterNeuron, ...]
    count: int
    threshold: float
    rule: str
    state: int
    top_layer: int
    outlier_share: float
    images: int
    reduction: str = "max"
    trials: tuple[Trial, ...] = field(default=())

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Pairs of layer and neuron, best first."""
        return iter([(one.layer, one.neuron) for one in self.ranking[: self.count]])

    @property
    def left(self) -> float:
        """Share of the outliers that moving these neurons leaves in the images that were tried; NaN without trials."""
        shares = {trial.count: trial.outlier_share for trial in self.trials}
        return shares[self.count] / shares[0] if self.count in shares else float("nan")

    def first(self, count: int) -> "RegisterNeurons":
        """The same ranking with another number of register neurons; raises ValueError if it is not that long."""
        if not 1 <= count <= len(self.ranking):
            raise ValueError(f"Expected 1 to {len(self.ranking)} register neurons, got {count}")
        return RegisterNeurons(**{**vars(self), "count": count})

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, under a temporary name first."""
        final = Path(path)
        made = final.with_name(f".{final.name}.unfinished")
        made.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        os.replace(made, final)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RegisterNeurons":
        """Read what `save` wrote.

        Raises:
            ValueError: for a file that holds anything else.
        """
        file = Path(path)
        if not file.is_file() or file.stat().st_size > MOST_BYTES:
            raise ValueError(f"Expected a file of register neurons, got {file}")
        try:
            return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"Expected a file of register neurons, got {file}: {error}") from error

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "RegisterNeurons":
        """From what `to_dict` gives; raises ValueError, TypeError or KeyError for anything else."""
        ranking = tuple(RegisterNeuron(**one) for one in saved["ranking"])
        trials = tuple(Trial(**one) for one in saved["trials"])
        whole = cls(**{**saved, "ranking": ranking, "trials": trials})
        for part in (*ranking, *trials, whole):
            _check_types(part)
        if any(one.layer < 0 or one.neuron < 0 for one in ranking):
            raise ValueError("Expected layers and neurons from 0, got a negative one")
        return whole.first(whole.count)

    def __str__(self) -> str:
        lines = [
            f"{self.count} register neurons of {len(self.ranking)} ranked, in blocks 0 to {self.top_layer}, "
            f"from {self.images} images",
            f"  outliers: {100 * self.outlier_share:.2f} % of patches have a norm above {self.threshold:.4g} after "
            f"block {self.state - 1} ({self.rule})",
            f"  {'block':>7} {'neuron':>7} {'at outliers':>12} {'elsewhere':>10}",
        ]
        lines += [
            f"  {one.layer:7} {one.neuron:7} {one.at_outliers:12.3f} {one.elsewhere:10.3f}"
            for one in self.ranking[: min(self.count, _SHOWN)]
        ]
        if self.count > _SHOWN:
            lines.append(f"  and {self.count - _SHOWN} more")
        if self.trials:
            lines.append(f"  {'moved':>7} {'outliers':>10} {'largest norm':>13} {'cosine of pooled feature':>25}")
        for trial in self.trials:
            mark = "  <- chosen" if trial.count == self.count else ""
            share, cosine = f"{100 * trial.outlier_share:.2f} %", f"{trial.pooled_cosine:.4f}"
            lines.append(f"  {trial.count:7} {share:>10} {trial.largest_norm:13.4g} {cosine:>25}{mark}")
        if self.left > VANISHED:
            lines.append(
                f"  Outliers have not vanished, {100 * self.left:.0f} % of them are left: other neurons write them "
                "too, or write them once these do not."
            )
        return "\n".join(lines)


def _check_types(part: Any) -> None:
    """Refuse numbers that are none; raises TypeError."""
    for name, value in vars(part).items():
        kind = type(part).__annotations__[name]
        fits = type(value) is kind or (kind is float and type(value) is int)
        if kind in (int, float, str) and not fits:
            raise TypeError(f"Expected {name} of type {kind.__name__}, got {value!r:.60}")
