# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Commands that publish: the card of a trained model, and its way to the Hub."""

import argparse
from pathlib import Path
from typing import Any

from vitreg_hf.cli.options import add_command

_TRAINED = "folder that an example wrote: model, image processor, results.json"


def add_publishing(commands: Any) -> None:
    """Add card and push."""
    card = add_command(
        commands, "card", _card, "write the model card of a trained model from its results", output=False
    )
    card.add_argument("folder", type=Path, help=_TRAINED)
    card.add_argument("--model-id", help="what readers will load: a Hub id (default: the folder)")
    card.add_argument("--license", help="licence of the weights, as the Hub spells it (default: that of the results)")
    card.add_argument("--overwrite", action="store_true", help="replace a card that was edited by hand")

    push = add_command(commands, "push", _push, "publish a trained model on the Hub, in one commit", output=False)
    push.add_argument("folder", type=Path, help=_TRAINED)
    push.add_argument("repo_id", help="NAME/MODEL, or MODEL under your own name; made if there is none")
    push.add_argument("--private", action="store_true", help="make a repository that only you see")
    push.add_argument("--revision", help="branch, made if there is none (default: main)")
    push.add_argument("--create-pr", action="store_true", help="open a pull request rather than commit")
    push.add_argument("--tag", help="tag the commit, v1.0 or alike")
    push.add_argument("--with-code", action="store_true", help="add the model's code, for trust_remote_code=True")
    push.add_argument("--license", help="licence of the weights, as the Hub spells it (default: that of the results)")
    push.add_argument("--message", help="of the commit")


def _card(options: argparse.Namespace) -> None:
    from vitreg_hf.hub.cards import card_of, is_rendered, save_card

    if (options.folder / "README.md").exists() and not is_rendered(options.folder) and not options.overwrite:
        raise ValueError(
            f"Expected no card that a person edited, got {options.folder}/README.md: --overwrite replaces it"
        )
    card = card_of(options.folder, options.model_id or str(options.folder), options.license)
    print(f"card: {save_card(card, options.folder)}")


def _push(options: argparse.Namespace) -> None:
    from vitreg_hf.hub.publish import publish

    published = publish(
        options.folder,
        options.repo_id,
        private=options.private,
        revision=options.revision,
        create_pr=options.create_pr,
        tag=options.tag,
        with_code=options.with_code,
        model_license=options.license,
        message=options.message,
    )
    print(published)
