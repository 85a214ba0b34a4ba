# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Table and picture of all measured speeds, from `benchmarks/results`: `docs/benchmarks.md`, and the README's table.

    python benchmarks/report.py

Nothing is measured here. Of several peers the fastest is shown, which is the one with the lowest ratio. A goal that is
not reached is marked as such.
"""

import argparse
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from side_by_side import RESULTS

from vitreg_hf.analysis.figures.canvas import new_figure, save

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- from here on rendered by benchmarks/report.py -->"
END = "<!-- to here -->"
Row = Mapping[str, Any]


class Comparison(NamedTuple):
    """One measured ratio."""

    group: str
    setting: str
    peer: str
    ratio: Mapping[str, float]  # median, low and high quartile
    goal: float
    row: Row

    @property
    def reached(self) -> bool:
        """Whether the median is at the goal or above."""
        return self.ratio["median"] >= self.goal


class Benchmark(NamedTuple):
    """A file of results, and how its rows are told."""

    file: str
    group: str
    goal: Callable[[Row], float]
    setting: Callable[[Row], str]
    peers: Sequence[str]
    ratios: Callable[[Row], Mapping[str, Any]] = lambda row: row["speedup_over"]

    def comparisons(self) -> Iterator[Comparison]:
        """Every row of a whole network against its fastest peer, by setting, if the file is there."""
        path = RESULTS / self.file
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        for row in sorted(rows, key=lambda row: by_number(self.setting(row))):
            ratios = {name: ratio for name, ratio in self.ratios(row).items() if name in self.peers}
            if ratios and row.get("layers") in (None, 12):
                fastest = min(ratios, key=lambda name: ratios[name]["median"])
                yield Comparison(self.group, self.setting(row), fastest, ratios[fastest], self.goal(row), row)


def by_number(setting: str) -> list[tuple[int, str]]:
    """What to sort settings by so that 8 comes before 32."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", setting)]


def of_network(row: Row) -> str:
    """Family and size of a row, and how it was run."""
    how = [", compiled"] if row["compile"] else []
    how += [f", {row['device']} {row['dtype']}"] if (row["device"], row["dtype"]) != ("cpu", "float32") else []
    how += [f", {row['threads']} threads"] if row["threads"] != 1 else []
    how += [f", {row['image_size']} px"] if row["image_size"] != 224 else []
    family = {"dinov2": "DINOv2", "dinov3": "DINOv3"}[row.get("family", "dinov2")]
    return f"{family}-{row['size'][0].upper()}{''.join(how)}, batch {row['batch_size']}"


def of_eager(row: Row) -> str:
    """The same for a model of ours that is not compiled."""
    return of_network(row).replace("compiled", "the peer compiled")


def of_step(row: Row) -> str:
    """A step of training and its stochastic depth."""
    rates = {"none": "0", "linear": "0 to 0.3", "uniform": "0.3"}
    return f"{of_network(row)}, drop path {rates[row['schedule']]}"


def of_sizes(row: Row) -> str:
    """A batch of images of many sizes."""
    least, most = min(row["patches"]), max(row["patches"])
    return f"{row['pass']}, {row['batch_size']} images of {least} to {most} patches"


def of_size(row: Row) -> str:
    """The network of a benchmark that has one family alone."""
    return f"DINOv2-{row['size'][0].upper()}"


def of_photos(row: Row) -> str:
    """What photos come as, and what becomes of them."""
    return f"{row['photos']} {row['input']}, {row['setting']}"


def of_analysis(row: Row) -> str:
    """The network and the images of an analysis."""
    return f"ViT-{row['size'][0].upper()}/{row['patch_size']}, {row['image_size']} px"


def of_prepacked(row: Row) -> Mapping[str, Any]:
    """Ratios to our model after `prepack_projections`."""
    return row.get("prepacked_speedup_over", {})


def of_exports(row: Row) -> Mapping[str, Any]:
    """The ratio of two exports."""
    ratio = row.get("onnx_speedup_over_transformers")
    return {} if ratio is None else {"onnx transformers": ratio}


def always(goal: float) -> Callable[[Row], float]:
    """The same goal for every row."""
    return lambda row: goal


PEERS, IN_ONNX = ("transformers", "timm"), ("onnx transformers",)
MANY_SIZES = ("padded", "one by one", "transformers")
STEP_GOALS = {"none": 1.0, "linear": 1.1, "uniform": 1.25}
BENCHMARKS = (
    Benchmark("pooled_features.json", "Pooled feature", always(1.1), of_network, PEERS),
    Benchmark("pooled_features.json", "Pooled feature, ours prepacked", always(1.1), of_eager, PEERS, of_prepacked),
    Benchmark(
        "pooled_features.json",
        "Pooled feature beside Transformers in ONNX Runtime",
        always(1.1),
        of_network,
        IN_ONNX,
    ),
    Benchmark(
        "pooled_features.json",
        "Prepacked, beside Transformers in ONNX Runtime",
        always(1.1),
        of_network,
        IN_ONNX,
        of_prepacked,
    ),
    Benchmark(
        "pooled_features.json", "Pooled feature, both in ONNX Runtime", always(1.1), of_network, IN_ONNX, of_exports
    ),
    Benchmark("loading.json", "Loading, from_pretrained", always(1.0), of_size, ("transformers",)),
    Benchmark("training_step.json", "A step of training", lambda row: STEP_GOALS[row["schedule"]], of_step, PEERS),
    Benchmark(
        "mixed_resolutions.json",
        "Images of many sizes, without padding",
        always(1.5),
        of_sizes,
        MANY_SIZES,
    ),
    Benchmark(
        "mixed_resolutions.json",
        "Images of many sizes, prepacked, for CLS alone",
        always(1.5),
        of_sizes,
        MANY_SIZES,
        of_prepacked,
    ),
    Benchmark("preprocessing.json", "Photos to tensors", always(2.0), of_photos, ("vit", "dinov2")),
    Benchmark(
        "attention_maps.json",
        "Maps of CLS and registers beside full maps, 518 px",
        always(1.0),
        of_size,
        PEERS,
    ),
    Benchmark(
        "attention_maps.json",
        "Maps of CLS and registers beside none (goal 1 / 1.15)",
        always(1 / 1.15),
        of_size,
        ("plain forward pass",),
    ),
    Benchmark(
        "analysis_pass.json",
        "vitreg analyze beside bare passes (goal 1 / 1.3)",
        always(1 / 1.3),
        of_analysis,
        ("forward passes",),
    ),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the picture, write the page, and put the tables into the README and the page on many sizes."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    found = [one for benchmark in BENCHMARKS for one in benchmark.comparisons()]
    picture(found, ROOT / "docs" / "benchmarks.png")
    replace_between(ROOT / "docs" / "benchmarks.md", page(found))
    replace_between(ROOT / "README.md", summary(found))
    replace_between(ROOT / "docs" / "mixed_resolutions.md", many_sizes())
    missed = [one for one in found if not one.reached]
    print(f"{len(found)} comparisons, {len(missed)} below their goal")
    for one in missed:
        print(f"  {one.group}, {one.setting}: {one.ratio['median']:.2f}, goal {one.goal:g}")


# Text


def page(found: Sequence[Comparison]) -> str:
    """Every comparison, as a table for each group, and the machines."""
    lines: list[str] = []
    for group in dict.fromkeys(one.group for one in found):
        lines += [
            "",
            f"### {group}",
            "",
            "| setting | fastest peer | its time / ours | goal | |",
            "|---|---|---|---|---|",
        ]
        for one in (one for one in found if one.group == group):
            reached = "" if one.reached else "missed"
            lines.append(f"| {one.setting} | {one.peer} | {told(one.ratio)} | {one.goal:g} | {reached} |")
    return "\n".join([*lines[1:], "", *machines(found)])


def machines(found: Sequence[Comparison]) -> list[str]:
    """What the numbers come from, each machine once."""
    return ["### Machines", "", *(f"- {one}" for one in dict.fromkeys(described(one.row["machine"]) for one in found))]


def described(machine: Row) -> str:
    """A machine and its versions in one line; its rates, which differ by the minute, are in the results."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} used; {versions}"


def summary(found: Sequence[Comparison]) -> str:
    """One line for each group: the range of medians, and how many goals were reached."""
    lines = ["| what | fastest peer's time / ours, medians | goals reached |", "|---|---|---|"]
    for group in dict.fromkeys(one.group for one in found):
        own = [one for one in found if one.group == group]
        medians = sorted(one.ratio["median"] for one in own)
        span = f"{medians[0]:.2f}" if len(own) == 1 else f"{medians[0]:.2f} to {medians[-1]:.2f}"
        lines.append(f"| {group} | {span} | {sum(one.reached for one in own)} of {len(own)} |")
    return "\n".join(lines)


def many_sizes() -> str:
    """Every ratio of images of many sizes; those below the goal in bold."""
    rows = json.loads((RESULTS / "mixed_resolutions.json").read_text())["rows"]
    lines = [
        f"| largest image | pass | {' | '.join(f'over {name}' for name in MANY_SIZES)} |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["most_patches"], row["pass"])):
        images = f"{row['most_patches']} patches, {row['batch_size']} images, {row['repetitions']} turns"
        kinds = {row["pass"]: row["speedup_over"], f"{row['pass']}, prepacked, CLS alone": of_prepacked(row)}
        for kind, ratios in kinds.items():
            cells = [told(ratios[name], 1.5) for name in MANY_SIZES if name in ratios]
            lines += [f"| {images} | {kind} | {' | '.join(cells)} |"] if cells else []
    return "\n".join(lines)


def told(ratio: Mapping[str, float], goal: float = 0.0) -> str:
    """A median with its quartiles; in bold below a goal."""
    bold = "**" if ratio["median"] < goal else ""
    return f"{bold}{ratio['median']:.2f}{bold} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def replace_between(path: Path, text: str) -> None:
    """Put a text between the two marks of a page.

    Raises:
        ValueError: if the page has no such marks.
    """
    page = path.read_text()
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"Expected the lines {BEGIN} and {END} in {path}, got a page without")
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
    os.replace(unfinished, path)


# Picture


def picture(found: Sequence[Comparison], path: Path) -> None:
    """Every ratio as a dot with its quartiles, its goal as a line; on a logarithmic axis, where 1 is as fast as we."""
    figure = new_figure(9, 1.6 + 0.24 * len(found) + 0.3 * len({one.group for one in found}))
    axes = figure.add_subplot()
    places, labels, place = [], [], 0.0
    for index, one in enumerate(found):
        if index and one.group != found[index - 1].group:
            place += 1.7
        elif index:
            place += 1
        if not index or one.group != found[index - 1].group:
            axes.text(0.01, place - 0.75, one.group, transform=axes.get_yaxis_transform(), weight="bold", va="center")
            place += 0.2
        colour = "tab:blue" if one.reached else "tab:red"
        ratio = one.ratio
        axes.plot([ratio["low"], ratio["high"]], [place, place], color=colour, linewidth=2.5, alpha=0.4)
        axes.plot(ratio["median"], place, "o", color=colour, markersize=5)
        axes.plot([one.goal, one.goal], [place - 0.35, place + 0.35], color="black", linewidth=1)
        places.append(place)
        labels.append(f"{one.setting}  ({one.peer})")
    axes.set_xscale("log")
    axes.axvline(1, color="grey", linewidth=0.8, linestyle=":")
    axes.set_yticks(places, labels, fontsize=8)
    axes.set_ylim(place + 0.8, -1.1)
    ticks = [
        tick for tick in (0.8, 1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16) if tick < 1.2 * max(o.ratio["high"] for o in found)
    ]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("time of the fastest peer / ours: right of 1 we are ahead")
    axes.set_title(
        "dot: median of paired runs, bar: quartiles\nblack line: goal; blue: reached, red: missed", fontsize=10
    )
    save(figure, path)


if __name__ == "__main__":
    main()
