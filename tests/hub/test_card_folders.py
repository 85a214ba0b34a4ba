# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Cards of folders: what goes into them, whether a person edited one, and what a repository gets."""

import json
import pathlib

import pytest
from huggingface_hub import ModelCard

from vitreg_hf.hub.cards import card_of, is_rendered, readme_to_publish, save_card

RESULTS = pathlib.Path(__file__).parents[2] / "model_cards" / "vitreg-digits" / "results.json"
SHARE = {"mean": 0.01, "low": 0.0, "high": 0.02, "n": 3}
GROUPS = {"p_value": 0.5, "n": 48, "found": False, "probably": False}


@pytest.fixture
def facts():
    facts = json.loads(RESULTS.read_text())
    return facts | {"model": facts["model"] | {"weights": "0ad3aa3d6519091a"}, "license": "mit"}


@pytest.fixture
def folder(facts, tmp_path):
    """What a training leaves, but for the model."""
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "results.json").write_text(json.dumps(facts))
    return tmp_path / "trained"


@pytest.fixture
def artifacts():
    """What an analysis says, as far as a card reads it."""
    outliers = {"layer": 4, "rule": "fixed", "rule_value": None, "cutoff": 70.0, "norm": {"median": 1.0, "max": 2.0}}
    outliers |= {"share": SHARE, "images_with_outliers": 0.0, "largest_over_median": SHARE, "two_groups": GROUPS}
    return {
        "model": {"weights": "0ad3aa3d6519091a"},
        "images": {"folder": "held_out", "measured": 3, "grid": [4, 4]},
        "outliers": outliers,
        "attention": {"cls_on_registers": SHARE},
        "sinks": {"tokens": [{"name": "CLS", "score": [0.1]}]},
        "units": {"sinks.tokens.score": "share of heads"},
    }


def measure(folder, artifacts):
    (folder / "artifacts").mkdir(exist_ok=True)
    (folder / "artifacts" / "results.json").write_text(json.dumps(artifacts))


def test_a_folder_without_results_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"Expected results\.json of a training in .*got none.*Train with"):
        card_of(tmp_path, "a")
    (tmp_path / "results.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"Expected JSON in .*results\.json"):
        card_of(tmp_path, "a")
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match=r"Expected a JSON object in .*got list"):
        card_of(tmp_path, "a")
    (tmp_path / "results.json").write_text('{"model": []}')
    with pytest.raises(ValueError, match="facts of a training with model, data"):
        card_of(tmp_path, "a")


def test_a_folder_gives_the_card_all_that_is_in_it(folder, artifacts):
    assert "## Artifacts" not in card_of(folder, "a").text
    measure(folder, artifacts)
    (folder / "attention.png").touch()
    card = card_of(folder, "a", "apache-2.0")
    assert "## Artifacts" in card.text
    assert "attention.png" in card.text
    assert "training_curve.png" not in card.text
    assert card.data.license == "apache-2.0"
    with pytest.raises(ValueError, match="did you mean apache"):
        card_of(folder, "a", "Apache 2.0")


def test_measurements_of_other_weights_do_not_count(folder, artifacts, facts):
    measure(folder, artifacts | {"model": {"weights": "another"}})
    assert "## Artifacts" not in card_of(folder, "a").text
    measure(folder, {"report": "compare"})
    assert "## Artifacts" not in card_of(folder, "a").text
    del facts["model"]["weights"]
    (folder / "results.json").write_text(json.dumps(facts))
    assert "## Artifacts" not in card_of(folder, "a").text


def test_the_card_is_written_whole(folder, tmp_path):
    card = card_of(folder, "a")
    (tmp_path / "other").mkdir()
    path = save_card(card, tmp_path / "other")
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["README.md"]
    assert ModelCard.load(path).text.strip() == card.text.strip()


def test_a_card_that_was_edited_is_known(folder):
    assert not is_rendered(folder)
    path = save_card(card_of(folder, "a"), folder)
    rendered = path.read_text()
    assert is_rendered(folder)
    path.write_bytes(rendered.replace("\n", "\r\n").encode())  # as git may check it out
    assert is_rendered(folder)
    for edited in (
        rendered.replace("license: mit", "license: gpl-3.0"),
        rendered.replace("held-out images are", "images are"),
        rendered + "\nMore.\n",
        rendered[: rendered.index("<!--")],
        "mine",
    ):
        assert edited != rendered
        path.write_text(edited)
        assert not is_rendered(folder)


def test_a_card_that_nobody_edited_is_rendered_for_the_repository(folder, artifacts):
    save_card(card_of(folder, "outputs/things", "apache-2.0"), folder)
    before = (folder / "README.md").read_text()
    measure(folder, artifacts)  # after the card was written, as `make demo` does
    text = readme_to_publish(folder, "alice/things")
    assert "outputs/things" not in text
    assert "## Artifacts" in text
    assert 'model="alice/things"' in text
    assert ModelCard(text).data.license == "apache-2.0"
    assert ModelCard(readme_to_publish(folder, "alice/things", "bsd")).data.license == "bsd"
    assert (folder / "README.md").read_text() == before
    (folder / "README.md").write_text(text)
    assert readme_to_publish(folder, "alice/things") == text


def test_a_missing_card_is_rendered(folder):
    assert readme_to_publish(folder, "alice/things") == str(card_of(folder, "alice/things"))
    assert not (folder / "README.md").exists()


def test_a_card_that_was_edited_is_published_as_it_is(tmp_path):
    mine = "---\nlicense:   mit   # mine\npipeline_tag: image-classification\n---\nMy model.\n"
    (tmp_path / "README.md").write_text(mine)
    assert readme_to_publish(tmp_path, "alice/things") == mine
    assert readme_to_publish(tmp_path, "alice/things", "mit") == mine
    with pytest.raises(ValueError, match=r"Expected licence bsd in .*README\.md, which was edited by hand, got mit"):
        readme_to_publish(tmp_path, "alice/things", "bsd")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("---\nlicense: [\n---\n", "Expected metadata that the Hub reads"),
        ("---\n- 1\n---\n", "metadata block should be a dict"),
        ("---\n1: 2\n---\n", "Expected metadata that the Hub reads"),
        ("---\nmodel-index: 5\n---\n", "Expected metadata that the Hub reads"),
        ("---\nlicense: MIT\n---\n", "did you mean mit"),
        ('AutoModel.from_pretrained("outputs/things")', "code that loads 'outputs/things' and never 'alice/things'"),
    ],
)
def test_an_edited_card_that_the_hub_would_refuse_is_refused(tmp_path, text, said):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match=said):
        readme_to_publish(tmp_path, "alice/things")
