# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Model cards: every number is a fact, the code in them runs, and their metadata is what the Hub reads."""

import copy
import json
import re

import numpy as np
import PIL.Image
import pytest
from huggingface_hub import ModelCard

import vitreg_hf
from vitreg_hf.hub.cards import render_card, save_card

FACTS = {
    "model": {
        "name": "vitreg-things",
        "parameters": 214474,
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 64,
        "num_register_tokens": 4,
    },
    "data": {
        "source": "someone/things",
        "hub_id": "someone/things",
        "license": "cc-by-4.0",
        "classes": ["thing", "other"],
        "train_images": 1437,
        "evaluation_images": 360,
        "evaluation_split": "test",
        "held_out_by": "a fifth of the images",
        "skipped_images": ["broken.png"],
    },
    "hyperparameters": {"learning_rate": 0.002, "ema_decay": None, "random_resized_crop_scale": [0.08, 1.0]},
    "metrics": {"accuracy": 0.9806, "loss": 0.07841, "n": 360, "top5_accuracy": 1.0},
    "evaluation": {"epoch": 16, "weights": "weights of the last epoch", "stopped_early": False},
    "curve": [{"epoch": 16}],
    "versions": {"python": "3.11.7", "torch": "2.15.0"},
    "hardware": {"device": "cpu", "processor": "Some CPU @ 2.10GHz", "processes": 2, "mixed_precision": "no"},
    "seconds": {"train": 40.123, "total": 42.456},
    "command": "python examples/train_image_classification.py --seed 3",
}


@pytest.fixture
def facts():
    return copy.deepcopy(FACTS)


def section(card, title):
    return re.search(rf"## {title}\n(.*?)(?=\n## |\Z)", card.text, re.DOTALL).group(1)


def test_metadata(facts):
    data = ModelCard(str(render_card(facts, "someone/vitreg-things", model_license="mit"))).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "transformers", "image-classification")
    assert data.datasets == ["someone/things"]
    accuracy, top5 = data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value, accuracy.dataset_split) == ("accuracy", 0.9806, "test")
    assert (top5.metric_type, top5.metric_value) == ("top5_accuracy", 1.0)
    assert data.model_name == "vitreg-things"


def test_data_that_is_not_on_the_hub_is_not_linked(facts):
    facts["data"]["hub_id"] = None
    assert render_card(facts, "a").data.to_dict().get("datasets") is None


def test_every_number_is_a_fact(facts):
    text = render_card(facts, "someone/vitreg-things", training_curve="training_curve.png").text
    text = re.sub(r"```python.*?```", "", text, flags=re.DOTALL)  # code has its own test
    text = text[: text.index("## Citation")].replace("https://arxiv.org/abs/2309.16588", "").replace("apache-2.0", "")
    numbers = set(re.findall(r"\d+(?:[.,]\d+)*", text))
    known = set(re.findall(r"\d+(?:\.\d+)*", json.dumps(facts)))
    rounded = {"98.06", "100.00", "0.0784", "40", "42", "214,474", "2"}  # %, nats, s, thousands; 2 classes
    assert numbers <= known | rounded


def test_sections_say_what_happened(facts):
    card = render_card(facts, "someone/vitreg-things", training_curve="training_curve.png")
    assert "![Training curve](training_curve.png)" in card.text
    assert "broken.png" in section(card, "Data")
    assert "no epoch was chosen by looking at these images" in section(card, "Evaluation")
    assert facts["command"] in section(card, "Training procedure")
    assert "ema_decay" not in section(card, "Training procedure")
    assert "in 2 processes on cpu" in section(card, "Training procedure")
    assert "mit" not in section(card, "Licence")
    assert "cc-by-4.0" in section(card, "Licence")
    assert "in training **and** in inference" in section(card, "Registers")
    assert "2309.16588" in section(card, "Citation")


def test_early_stopping_is_admitted(facts):
    facts["evaluation"]["stopped_early"] = True
    text = section(render_card(facts, "a"), "Evaluation")
    assert "optimistic" in text
    assert "no epoch was chosen" not in text


def test_a_model_without_registers_says_so(facts):
    facts["model"]["num_register_tokens"] = 0
    card = render_card(facts, "a")
    assert "without register tokens" in card.text
    assert "This model has none." in section(card, "Registers")


def test_missing_facts_are_named(facts):
    del facts["seconds"], facts["metrics"]["n"]
    with pytest.raises(ValueError, match=r"facts of a training with seconds, metrics\.n, got model"):
        render_card(facts, "a")


def test_the_card_is_written_whole(facts, tmp_path):
    card = render_card(facts, "a")
    path = save_card(card, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]
    assert ModelCard.load(path).text.strip() == card.text.strip()


@pytest.mark.parametrize("registers", [4, 0])
def test_code_in_the_card_runs(facts, make_config, tmp_path, monkeypatch, capsys, registers):
    model = vitreg_hf.ViTRegForImageClassification(make_config(num_register_tokens=registers))
    model.save_pretrained(tmp_path / 'a "model"')
    whole = {"size": {"height": 32, "width": 32}, "do_center_crop": False}
    vitreg_hf.ViTRegImageProcessor(**whole).save_pretrained(tmp_path / 'a "model"')
    PIL.Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    facts["model"]["num_register_tokens"] = registers
    blocks = re.findall(r"```python\n(.*?)```", render_card(facts, 'a "model"').text, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {})
    printed = capsys.readouterr().out
    assert "'label': 'LABEL_" in printed
    assert f"torch.Size([1, 4, {1 + registers}, {17 + registers}])" in printed
