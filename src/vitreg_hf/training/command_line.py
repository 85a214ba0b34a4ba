# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Settings from a command line: the defaults of a script, replaced by a recipe, replaced by what is written."""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from transformers import HfArgumentParser
from transformers.hf_argparser import DataClassType

from vitreg_hf.training.recipes import Recipe, Task, recipe
from vitreg_hf.training.settings import expect, option

Settings = TypeVar("Settings")


@dataclass
class _Choice:
    recipe: str | None = option(None, "start from the settings of a recipe")


def parse_settings(settings: type[Settings], *tasks: Task, argv: Sequence[str] | None = None) -> Settings:
    """Read settings off a command line. `--recipe NAME --help` shows those of the recipe.

    Args:
        settings: a dataclass with a field `recipe`.
        tasks: kinds of recipes that the script can follow.
        argv: words of the command line; None for those of this process.

    Raises:
        ValueError: for a recipe that does not exist, is of another task or needs more than is written; as making the
            settings does.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    chooser = HfArgumentParser(DataClassType(_Choice), add_help=False)
    name = chooser.parse_known_args(words)[0].recipe
    parser = HfArgumentParser(DataClassType(settings))
    if name is not None:
        chosen = recipe(name)
        wanted = f"a recipe for {' or '.join(tasks)}" if tasks else "no recipe, as there is none for this script"
        expect(chosen.task in tasks, wanted, f"{name} for {chosen.task}")
        parser.set_defaults(**settings_of(chosen, settings))
    (made,) = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    if name is not None:
        missing = [one for one in recipe(name).required if getattr(made, one) is None]
        expect(not missing, f"{' and '.join(missing)} with the recipe {name}", "none")
    return made


def settings_of(chosen: Recipe, settings: type[Any]) -> dict[str, Any]:
    """What a recipe says, checked against the fields of settings.

    Raises:
        ValueError: naming what the settings do not have.
    """
    names = {one.name for one in fields(settings)}
    foreign = sorted(chosen.settings.keys() - names)
    expect(not foreign, f"settings of {settings.__name__} in the recipe {chosen.name}", ", ".join(foreign))
    return copy.deepcopy(dict(chosen.settings))  # lists of a recipe are nobody's own
