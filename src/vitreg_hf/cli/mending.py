# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The command that gives registers to a model that was trained without."""

import argparse
from pathlib import Path
from typing import Any

from vitreg_hf.cli.options import IMAGES, add_command, add_pass, add_rule


def add_mending(commands: Any) -> None:
    """Add registers."""
    told = "registers for a model that was trained without them, and what they change"
    mend = add_command(commands, "registers", _registers, told, output=False)
    mend.add_argument("model", help="folder or Hub id, of this family or of any that `vitreg convert` reads")
    mend.add_argument("images", help=f"{IMAGES}; one folder per class compares accuracy too")
    mend.add_argument("out", type=Path, help="folder of the mended model; its report is in report/ below it")
    methods = ("test-time", "attention-bias", "added")
    mend.add_argument("--method", choices=methods, default="test-time", help="default: test-time (docs/registers.md)")
    mend.add_argument("--registers", type=int, default=1, help="how many registers (default: 1)")
    mend.add_argument("--top-k", type=int, help="neurons to move (default: the fewest that make outliers vanish)")
    mend.add_argument("--top-layer", type=int, help="last block searched, from 0 (default: where outliers appear)")
    mend.add_argument("--neurons", type=Path, metavar="FILE", help="register_neurons.json of an earlier search")
    mend.add_argument("--num-images", type=int, default=500, help="images that are searched (default: 500)")
    mend.add_argument("--cls", choices=("zero", "keep"), default="zero", help="register neurons on CLS: default zero")
    mend.add_argument(
        "--init", choices=("zero", "mean", "random"), default="zero", help="of the tokens (default zero)"
    )
    mend.add_argument("--pictured", type=int, default=4, help="images that are drawn (default: 4)")
    add_pass(mend)
    add_rule(mend)


def _registers(options: argparse.Namespace) -> None:
    from vitreg_hf.analysis.measure import Pass
    from vitreg_hf.analysis.outliers import OutlierRule
    from vitreg_hf.register_neurons.mending import REPORT, MendSettings, mend, search_of, told

    settings = MendSettings(
        method=options.method,
        num_registers=options.registers,
        cls=options.cls,
        init=options.init,
        top_k=options.top_k,
        top_layer=options.top_layer,
        neurons=options.neurons,
        num_images=options.num_images,
        rule=OutlierRule(options.cutoff, options.cutoff_value, options.layer),
        how=Pass(options.batch_size, options.image_size, options.on_corrupt_image, options.overwrite),
        pictured=options.pictured,
    )
    results = mend(options.model, options.images, options.out, settings)
    if (neurons := search_of(results)) is not None:
        print(neurons)
    print(told(results))
    report = options.out / REPORT
    print(f"model:   {options.out}\npicture: {report / 'before_after.png'}\nreport:  {report / 'report.html'}")
