# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What the number of registers changes: measures of one model, and models with other numbers beside it.

The question is that of Darcet et al., Vision Transformers Need Registers (arXiv 2309.16588), section 3.3 and Fig. 8.
Shapes: B images, P patches, R registers, D channels; k numbers of registers, n seeds.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitreg_hf.analysis.extract import Subject, normed, read
from vitreg_hf.analysis.recorder import Readers
from vitreg_hf.analysis.report import Table
from vitreg_hf.analysis.seed_intervals import differences_to_first, mean_over_seeds
from vitreg_hf.analysis.token_norms import cutoff, patch_norms


@dataclass(frozen=True)
class Quantity:
    """One number of a trained model.

    Attributes:
        title: what it is, for pictures; "" if it is not drawn.
        column: the same, short, for tables.
        unit: of the numbers that are shown, or "".
        factor: from the number in `results.json` to the one that is shown.
        of_first: compared as a share of what it is with the first number of registers, and each seed with itself: its
            models were measured at one time on one machine.
        better: `more`, `less`, or "" where neither is.
    """

    title: str
    column: str
    unit: str = ""
    factor: float = 1.0
    of_first: bool = False
    better: str = ""


_SHARE = "% of the first"
_ROUNDING = 1e-9  # of what is equal for all seeds

QUANTITIES = {
    "accuracy": Quantity("Held-out images classified correctly", "accuracy", "%", 100, better="more"),
    "dense_miou": Quantity("Dense: mIoU of a linear probe on patches", "dense mIoU", "%", 100, better="more"),
    "largest_over_median": Quantity("Artifacts: largest patch norm / median", "max / median norm", better="less"),
    "outlier_share": Quantity("Artifacts: patches above two median norms", "outliers", "%", 100, better="less"),
    "outlier_share_before_last": Quantity("", "outliers, block before", "%", 100, better="less"),
    "register_norm": Quantity("Norm of registers / median patch norm", "register norm"),
    "register_norm_spread": Quantity("", "max / min register"),
    "register_similarity": Quantity("Cosine between two registers", "register cosine"),
    "images_per_second": Quantity("Speed of a forward pass", "speed", _SHARE, 100, of_first=True, better="more"),
    "flops_per_image": Quantity("Operations per image", "operations", _SHARE, 100, of_first=True, better="less"),
    "training_bytes_per_image": Quantity(
        "Memory that a training image takes", "memory", _SHARE, 100, of_first=True, better="less"
    ),
}


# One model


def measure_tokens(subject: Subject, batches: Iterable[Tensor]) -> dict[str, float]:
    """Norms and registers of a model on some images.

    Args:
        subject: a vision model.
        batches: images `(B, C, H, W)` each.

    Returns:
        After the last block, before the final norm: `largest_over_median` norm of an image's patches, mean over
        images; `outlier_share` of patches above twice the median of all, and `outlier_share_before_last` after the
        block before the last (some models shrink norms in the last). With registers `register_norm`, their mean norm
        in medians of patches, and `register_norm_spread`, the largest mean norm of a register over the smallest. With
        several `register_similarity`, the mean cosine of two of them after the final norm.
    """
    layout, last = subject.layout, len(subject.anatomy.blocks)
    readers = Readers(hidden=lambda layer, state: state if layer >= last - 1 else None)
    norms: dict[int, list[Tensor]] = {last - 1: [], last: []}
    registers, cosines = [], []
    for pixel_values in batches:
        states = read(subject, pixel_values, readers).hidden
        for layer, kept in norms.items():
            kept.append(patch_norms(states[layer], layout).cpu())
        tokens = layout.register_tokens(states[last])
        if tokens is not None:
            registers.append(tokens.float().norm(dim=-1).cpu())
            # Normed with all others: registers may have another final norm than patches.
            in_output = cast(Tensor, layout.register_tokens(normed(subject, states[last])))
            cosines.append(_mean_cosine(in_output.float()).cpu())
    before, after_last = (torch.cat(norms[layer]) for layer in (last - 1, last))
    measured = {
        "largest_over_median": float((after_last.amax(dim=1) / after_last.median(dim=1).values).mean()),
        "outlier_share": _share_of_outliers(after_last),
        "outlier_share_before_last": _share_of_outliers(before),
    }
    if registers:
        each = torch.cat(registers).mean(dim=0)
        measured["register_norm"] = float(each.mean() / after_last.median())
        measured["register_norm_spread"] = float(each.max() / each.min())
    if registers and registers[0].shape[1] > 1:
        measured["register_similarity"] = float(torch.cat(cosines).mean())
    return measured


def patch_tokens(subject: Subject, pixel_values: Tensor) -> Tensor:
    """Patch tokens `(B, P, D)` of the last block after the final norm, on the CPU."""
    last = len(subject.anatomy.blocks)
    state = read(subject, pixel_values, Readers(hidden=lambda layer, state: state if layer == last else None)).hidden
    return subject.layout.patch_tokens(normed(subject, state[last])).float().cpu()


def _share_of_outliers(norms: Tensor) -> float:
    values = norms.numpy()
    return float((values > cutoff(values.ravel())).mean())


def _mean_cosine(tokens: Tensor) -> Tensor:
    """Mean cosine of two different tokens of an image, `(B,)`; NaN of a single one."""
    unit, count = F.normalize(tokens, dim=-1), tokens.shape[1]
    return (
        (unit.sum(dim=1).square().sum(dim=-1) - count) / (count * (count - 1))
        if count > 1
        else unit[:, 0, 0] * torch.nan
    )


# All models


def compare(runs: Mapping[int, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Means over seeds of every quantity, and differences to the first number of registers.

    Args:
        runs: for each number of registers the measures of its models, one per seed, in the same order of seeds.

    Returns:
        By quantity (those of `QUANTITIES` that some models have): `mean`, by number of registers, an interval of 95 %
        of the mean over seeds; `change`, by number of registers but the first, an interval of the difference to the
        first, all of which hold together with 95 %, and `verdict`: `higher`, `lower`, `equal` (in all runs), `no
        difference that <n> seeds can tell`, or `one seed tells no difference from noise`.
    """
    return {name: _compare_one(runs, name) for name in QUANTITIES if any(name in r[0] for r in runs.values())}


def _compare_one(runs: Mapping[int, Sequence[Mapping[str, float]]], name: str) -> dict[str, Any]:
    have = {count: np.array([run[name] for run in models]) for count, models in runs.items() if name in models[0]}
    first = next(iter(runs))
    if QUANTITIES[name].of_first:
        usual = np.mean(list(have.values()), axis=0)
        have = {count: values / usual / np.mean(have[first] / usual) for count, values in have.items()}
    compared: dict[str, Any] = {
        "mean": {str(count): asdict(mean_over_seeds(values)) for count, values in have.items()},
        "values": {str(count): values.tolist() for count, values in have.items()},
    }
    if first in have and len(have) > 1:
        changes = differences_to_first(np.stack(list(have.values())))
        compared["change"] = {
            str(count): asdict(change) | {"verdict": _verdict(change)}
            for count, change in zip(list(have)[1:], changes, strict=True)
        }
    return compared


def _verdict(change: Any) -> str:
    if change.low is None:
        return "one seed tells no difference from noise"
    if change.low == change.high == 0:
        return "equal"
    if not change.excludes_zero:
        return f"no difference that {change.n} seeds can tell"
    return "higher" if change.mean > 0 else "lower"


def count_table(compared: Mapping[str, Any], counts: Sequence[int], seeds: int) -> Table:
    """One row per number of registers, means over seeds; `*` marks a difference to the first."""
    columns = [name for name in QUANTITIES if name in compared]
    rows = [(str(count), *(_cell(compared[name], name, str(count)) for name in columns)) for count in counts]
    header = ("R", *(_header(QUANTITIES[name]) for name in columns))
    return Table(header, rows, f"Numbers of registers: means over {seeds} seeds, ± half of a 95 % interval")


def _header(quantity: Quantity) -> str:
    return f"{quantity.column}, {quantity.unit}" if quantity.unit else quantity.column


def _cell(of_quantity: Mapping[str, Any], name: str, count: str) -> str:
    if count not in of_quantity["mean"]:
        return "-"
    mean, factor = of_quantity["mean"][count], QUANTITIES[name].factor
    half = None if mean["low"] is None else factor * (mean["high"] - mean["low"]) / 2
    text = f"{factor * mean['mean']:.4g}" + (f" ± {half:.2g}" if half and half > _ROUNDING * abs(mean["high"]) else "")
    change = of_quantity.get("change", {}).get(count)
    return text + " *" if change is not None and change["verdict"] in ("higher", "lower") else text


def as_markdown(table: Table) -> str:
    """A table for people and for pages in Markdown."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return f"{table.caption}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def findings(compared: Mapping[str, Any], counts: Sequence[int]) -> list[str]:
    """One sentence per quantity: which numbers of registers differ from the first, and which cannot be told apart.

    Before them, whether there is anything to repair: registers remove outliers, and many models have none.
    """
    found = [
        _finding(QUANTITIES[name].column, compared[name]["change"], counts[0])
        for name in QUANTITIES
        if "change" in compared.get(name, {})
    ]
    outliers = [compared.get(name, {}).get("values", {}) for name in ("outlier_share", "outlier_share_before_last")]
    if all(values and not any(values[str(counts[0])]) for values in outliers):
        found.insert(
            0, f"No patch of a model with R = {counts[0]} is an outlier: registers have nothing to repair here."
        )
    return found


def _finding(title: str, changes: Mapping[str, Any], first: int) -> str:
    by_verdict: dict[str, list[str]] = {}
    for count, change in changes.items():
        by_verdict.setdefault(change["verdict"], []).append(count)
    told = "; ".join(f"R = {', '.join(found)}: {verdict}" for verdict, found in by_verdict.items())
    return f"{title}, against R = {first}: {told}."
