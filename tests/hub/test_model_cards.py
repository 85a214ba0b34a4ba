"""Every card in `model_cards/` is what its facts render to: none was edited by hand, none is out of date."""

import json
import pathlib
import re

import pytest
from huggingface_hub import ModelCard

from vitreg_hf.hub.cards import card_of, check_card, is_rendered

FOLDERS = sorted(p for p in (pathlib.Path(__file__).parents[2] / "model_cards").iterdir() if p.is_dir())


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


def test_cards_render_identically(folder):
    text = (folder / "README.md").read_text()
    model_id = re.search(r'model="([^"]+)"', text).group(1)
    facts = json.loads((folder / "results.json").read_text())
    own_license = None if "license" in facts else ModelCard(text).data.license
    assert str(card_of(folder, model_id, own_license)) == text
    assert is_rendered(folder)


def test_cards_are_what_the_hub_accepts(folder):
    check_card(ModelCard.load(folder / "README.md"))


def test_measurements_beside_a_card_stand_in_it(folder):
    """They would be left out, silently, if they were about other weights."""
    measured = (folder / "artifacts" / "results.json").exists()
    assert ("## Artifacts" in (folder / "README.md").read_text()) == measured


def test_there_are_cards():
    assert FOLDERS
