# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Report what a trained model makes of artifacts, registers and sinks, and how a second model differs.

    python examples/artifacts.py --model_dir outputs/digits --compare_with outputs/digits-plain
    python examples/artifacts.py --model_dir outputs/photos --images photos/val

Without `--images` it writes the 360 held-out digits to a folder per class and takes those. It writes `artifacts/` (and
`comparison/`) beside the model, each with `report.html`, `results.json` and pictures. About 40 seconds on one CPU core
for the two digits models. `vitreg analyze` and `vitreg compare` do the same for any model.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import PIL.Image

import vitreg_hf  # noqa: F401 - registers the model family with Transformers
from vitreg_hf.analysis import compare as comparison
from vitreg_hf.analysis.analyze import AnalyzeSettings, analyze
from vitreg_hf.analysis.artifact_sections import lead
from vitreg_hf.analysis.measure import Pass
from vitreg_hf.training.data import load_digits


def main(argv: Sequence[str] | None = None) -> None:
    """Analyse one model, and compare it with another if there is one."""
    options = parse(argv)
    folder = Path(options.output_dir or options.model_dir)
    images = options.images or write_digits(folder / "held_out")
    settings = AnalyzeSettings(how=Pass(batch_size=64, overwrite=True))  # a model trained anew replaces the last

    results = analyze(options.model_dir, images, folder / "artifacts", settings)
    print(f"{lead(results)}\nreport: {folder / 'artifacts' / 'report.html'}")

    if options.compare_with:
        output = folder / "comparison"
        differences = comparison.compare(options.compare_with, options.model_dir, images, output, settings)
        print(f"{comparison.lead(differences)}\nreport: {output / 'report.html'}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", default="outputs/digits", help="folder of a trained model")
    parser.add_argument("--compare_with", help="folder of another model, for the same images")
    parser.add_argument("--images", help="folder of images; default: the held-out digits")
    parser.add_argument("--output_dir", help="folder of the reports; default: that of the model")
    options = parser.parse_args(argv)
    for name in ("model_dir", "compare_with"):
        folder = getattr(options, name)
        if folder is not None and not (Path(folder) / "config.json").is_file():
            parser.error(f"expected a folder with a trained model in --{name}, got {folder!r}")
    return options


def write_digits(folder: Path) -> Path:
    """The held-out digits as PNGs, one folder per class."""
    test = load_digits().evaluation
    for index in range(len(test)):
        pixels, label = test[index]
        file = folder / test.class_names[label] / f"{index:03d}.png"
        if file.is_file():
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels.movedim(0, -1).numpy()).save(file)
    return folder


if __name__ == "__main__":
    main()
