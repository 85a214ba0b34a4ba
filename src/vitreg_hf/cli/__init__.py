# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `vitreg`: reads arguments, calls one function, prints what it found and where the report is.

Functions are imported by the command that calls them: most need an extra.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vitreg_hf.cli.converting import add_converting
from vitreg_hf.cli.measuring import add_measuring
from vitreg_hf.cli.mending import add_mending
from vitreg_hf.cli.publishing import add_publishing

# Extras that bring the packages that commands need beside the core, where it is not `analysis`
_EXTRAS = {"timm": "convert"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; or after one sentence on stderr: 2 for a mistake of the user's, 1 for a Hub that refused or did not answer,
        130 for an interruption. After 1 and 130 the same command goes on.
    """
    options = parser().parse_args(argv)
    if "output" in options:
        options.output = options.output or Path("outputs") / options.command
    try:
        options.run(options)
    except ConnectionError as error:  # a Hub that refuses or does not answer
        print(f"vitreg {options.command}: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"vitreg {options.command}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").split(".")[0], "analysis")
        print(f"vitreg {options.command}: {error}: pip install 'vitreg_hf[{extra}]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vitreg {options.command}: interrupted{_kept(options)}", file=sys.stderr)
        return 130
    return 0


def _kept(options: argparse.Namespace) -> str:
    if options.command == "convert":
        return ": nothing was written"
    if options.command == "push":
        return ": nothing here was changed, the same command completes it"
    measured = "output" in options and any(options.output.glob("records*"))  # compare has one folder per model
    return ": what was measured is kept, the same command goes on" if measured else ""


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="vitreg", description="Vision Transformers with registers")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_measuring, add_converting, add_mending, add_publishing):
        add(commands)
    return top
