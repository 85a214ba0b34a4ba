# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What several commands share: how a command is added, and options of a pass over images."""

import argparse
from pathlib import Path
from typing import Any

IMAGES = "folder of images, searched with its subfolders"
_OVERWRITE = "replace records and reports of something else in the output folder"
_OUTPUT = "folder of the report (default: outputs/ and the command)"


def add_command(commands: Any, name: str, run: Any, summary: str, output: bool = True) -> argparse.ArgumentParser:
    """Add a command that calls `run` with its options; with `output`, an option for the folder of its report."""
    command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    command.set_defaults(run=run)
    if output:
        command.add_argument("--output", type=Path, help=_OUTPUT)
    return command


def add_pass(command: argparse.ArgumentParser) -> None:
    """Options of a pass over images."""
    command.add_argument("--batch-size", type=int, default=8, help="images at a time (default: 8)")
    command.add_argument("--image-size", type=int, help="side in pixels in place of the image processor's size")
    command.add_argument(
        "--on-corrupt-image", choices=("raise", "skip"), default="raise", help="stop, or leave it out and list it"
    )
    add_overwrite(command)


def add_overwrite(command: argparse.ArgumentParser, told: str = _OVERWRITE) -> None:
    """Whether what is in the output folder may be replaced; `told` says what that is."""
    command.add_argument("--overwrite", action="store_true", help=told)


def add_rule(command: argparse.ArgumentParser) -> None:
    """Options of the rule for outliers."""
    rules = ("median", "sigma", "percentile", "mixture", "fixed")
    command.add_argument("--cutoff", choices=rules, default="median", help="rule for outliers (default: 2 x median)")
    command.add_argument("--cutoff-value", type=float, help="number of that rule")
    command.add_argument("--layer", type=int, default=-1, help="judge norms after this layer (default: -1, the last)")
