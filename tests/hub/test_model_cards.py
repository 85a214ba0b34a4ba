"""Every card in `model_cards/` is what its facts render to: none was edited by hand, none is out of date."""

import json
import pathlib
import re

import pytest

from vitreg_hf.hub.cards import render_card

FOLDERS = sorted(p for p in (pathlib.Path(__file__).parents[2] / "model_cards").iterdir() if p.is_dir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_cards_render_identically(folder):
    card = (folder / "README.md").read_text()
    facts = json.loads((folder / "results.json").read_text())
    model_id = re.search(r'model="([^"]+)"', card).group(1)
    picture = "training_curve.png" if (folder / "training_curve.png").exists() else None
    own_license = re.search(r"^license: (.+)$", card, re.MULTILINE).group(1)
    assert str(render_card(facts, model_id, own_license, training_curve=picture)) == card


def test_there_are_cards():
    assert FOLDERS
