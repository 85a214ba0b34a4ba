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
from vitreg_hf.analysis.token_norms import CUTOFF_RULES
from vitreg_hf.hub.cards import check_card, render_card

FACTS = {
    "model": {
        "name": "vitreg-things",
        "parameters": 214474,
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 64,
        "num_register_tokens": 4,
        "weights": "0ad3aa3d6519091a",
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
    "license": "mit",
    "speed": {
        "image_size": [32, 48],
        "flops_per_image": 9103616,
        "weights_megabytes": 0.859944,
        "milliseconds_per_image": 1.150621,
        "images_per_second_in_batches": 6376.23,
        "batch_size": 33,
        "device": "Some CPU @ 2.10GHz",
        "threads": 7,
        "precision": "float32",
    },
}
ARTIFACTS = {
    "model": {"weights": "0ad3aa3d6519091a"},
    "images": {"folder": "/home/me/held_out", "measured": 359, "grid": [5, 6]},
    "outliers": {
        "layer": 9,
        "rule": "median",
        "rule_value": 2.5,
        "cutoff": 72.82762,
        "norm": {"median": 36.41381, "percentile_98": 52.6, "max": 65.46446},
        "share": {"mean": 0.0123, "low": 0.0111, "high": 0.0135, "n": 359},
        "images_with_outliers": 0.1777,
        "largest_over_median": {"mean": 1.2278, "low": 1.1999, "high": 1.2437, "n": 359},
        "two_groups": {
            "p_value": 0.9795,
            "low_mode": 36.3,
            "high_mode": 151.56,
            "high_share": 0.0299,
            "n": 5760,
            "found": False,
            "probably": False,
        },
    },
    "attention": {"cls_on_registers": {"mean": 0.0913, "low": 0.0829, "high": 0.0998, "n": 359}},
    "sinks": {
        "tokens": [{"name": "CLS", "score": [0.1, 0.3456]}, {"name": "register one", "score": [0.2345, 0.0, 0.1]}]
    },
    "units": {"sinks.tokens.score": "share of heads and images in which it gets more than 0.31 of all attention"},
}
PICTURES = ["attention.png", "training_curve.png"]


@pytest.fixture
def facts():
    return copy.deepcopy(FACTS)


@pytest.fixture
def artifacts():
    return copy.deepcopy(ARTIFACTS)


def section(card, title):
    return re.search(rf"## {title}\n(.*?)(?=\n## |\Z)", card.text, re.DOTALL).group(1)


def numbers_in(card):
    """All numbers of the text; code has its own test, and the paper its own."""
    text = re.sub(r"```python.*?```", "", card.text, flags=re.DOTALL)
    return set(re.findall(r"\d+(?:[.,]\d+)*", text[: text.index("## Citation")].replace("2309.16588", "")))


# Metadata and numbers


def test_a_stream_has_an_unknown_number_of_images(facts):
    facts["data"]["train_images"] = None
    card = render_card(facts, "someone/vitreg-things")
    assert "- Training images: unknown number\n" in section(card, "Data")
    assert "trained on an unknown number of images of one source" in section(card, "Limits")


def test_of_many_images_that_were_left_out_a_few_are_named(facts):
    facts["data"]["skipped_images"] = [f"{number}.png" for number in range(23)]
    text = section(render_card(facts, "someone/vitreg-things"), "Data")
    assert "19.png and 3 more (see `results.json`)" in text
    assert "20.png" not in text


def test_metadata(facts):
    data = ModelCard(str(render_card(facts, "someone/vitreg-things"))).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "transformers", "image-classification")
    assert data.datasets == ["someone/things"]
    accuracy, top5 = data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value, accuracy.dataset_split) == ("accuracy", 0.9806, "test")
    assert (top5.metric_type, top5.metric_value) == ("top5_accuracy", 1.0)
    assert accuracy.dataset_type == "someone/things"
    assert data.model_name == "vitreg-things"


def test_data_that_is_not_on_the_hub_is_not_linked(facts):
    facts["data"] |= {"hub_id": None, "source": "/home/me/my photos/train"}
    card = render_card(facts, "a")
    assert card.data.to_dict().get("datasets") is None
    assert card.data.eval_results[0].dataset_type == "home-me-my-photos-train"
    check_card(card)


@pytest.mark.parametrize("verdict", [{}, {"probably": True}, {"found": True}])
def test_every_number_is_a_fact(facts, artifacts, verdict):
    artifacts["outliers"]["two_groups"] |= verdict
    known = set(re.findall(r"\d+(?:\.\d+)*", json.dumps([facts, artifacts])))
    rounded = {"98.06", "100.00", "0.0784", "40", "42", "214,474", "2"}  # %, nats, s, thousands; 2 classes
    rounded |= {"0.86", "9.10", "1.151", "6,376"}  # MB, millions, ms, images per second
    rounded |= {"72.83", "36.41", "65.46", "36.3", "151.6", "0.98"}  # norms, p
    rounded |= {"1.23", "1.11", "1.35", "17.77", "1.20", "1.24", "2.99", "9.13", "8.29", "9.98", "34.56", "23.45"}
    assert numbers_in(render_card(facts, "someone/vitreg-things", artifacts, PICTURES)) <= known | rounded


def test_no_number_stays_when_all_facts_change(facts, artifacts):
    """A number that the text itself brought along would stand in both cards."""

    def changed(value):
        if isinstance(value, dict):
            return {name: changed(one) for name, one in value.items()}
        if isinstance(value, list):
            return [changed(one) for one in value] * 7
        if isinstance(value, str):
            return re.sub(r"\d+", "700077", value)
        return value if value is None or isinstance(value, bool) else 77 * value + 7000

    others = changed(facts), changed(artifacts)
    others[1]["outliers"]["rule"] = "median"
    here, there = render_card(facts, "a", artifacts), render_card(others[0], "a", others[1])
    assert numbers_in(here) & numbers_in(there) - {"5"} == set()  # the name of "Top-5 accuracy"


# What it says


def test_sections_say_what_happened(facts):
    card = render_card(facts, "someone/vitreg-things")
    assert "broken.png" in section(card, "Data")
    assert "no epoch was chosen by looking at these images" in section(card, "Evaluation")
    assert facts["command"] in section(card, "Training procedure")
    assert "ema_decay" not in section(card, "Training procedure")
    assert "0ad3aa3d6519091a" not in section(card, "Training procedure")
    assert "in 2 processes on cpu" in section(card, "Training procedure")
    assert "The weights: mit. The data: cc-by-4.0." in section(card, "Licence")
    assert "in training **and** in inference" in section(card, "Registers")
    assert "was not measured here" in section(card, "Registers")
    assert "2309.16588" in section(card, "Citation")


def test_pictures_come_in_order_with_what_they_show(facts):
    text = render_card(facts, "a", pictures=PICTURES).text
    curve, attention = text.index("![Training curve](training_curve.png)"), text.index("![Attention maps](attention")
    assert curve < attention < text.index("## Use")
    assert "attention.png" not in render_card(facts, "a", pictures=PICTURES[1:]).text
    with pytest.raises(ValueError, match=r"Expected pictures out of training_curve\.png, .*got cat\.png"):
        render_card(facts, "a", pictures=["cat.png", *PICTURES])


def test_early_stopping_is_admitted(facts):
    facts["evaluation"]["stopped_early"] = True
    text = section(render_card(facts, "a"), "Evaluation")
    assert "optimistic" in text
    assert "no epoch was chosen" not in text


def test_a_model_without_registers_says_so(facts, artifacts):
    facts["model"]["num_register_tokens"] = 0
    card = render_card(facts, "a")
    assert "without register tokens" in card.text
    assert "This model has none." in section(card, "Registers")
    assert "has such artifacts was not measured" in section(card, "Registers")
    assert "not measured" not in section(render_card(facts, "a", artifacts), "Registers")


def test_speed_says_what_was_measured_and_where(facts):
    text = section(render_card(facts, "a"), "Speed and size")
    for part in ("9.10 million; a multiply-add counts as two", "6,376 images per second", "in batches of 33"):
        assert part in text
    assert "at 32 x 48 pixels in float32\non Some CPU @ 2.10GHz with 7 CPU threads" in text
    facts["speed"] |= {"flops_per_image": 35.13e9, "threads": 1, "milliseconds_per_image": 12345.6}
    text = section(render_card(facts, "a"), "Speed and size")
    for part in ("35.13 billion", "12,346 ms", "1 CPU thread;"):
        assert part in text


def test_results_of_older_versions_still_make_a_card(facts):
    del facts["speed"], facts["license"], facts["model"]["weights"]
    card = render_card(facts, "a")
    assert "Speed and size" not in card.text
    assert card.data.license is None
    assert "The weights: none is stated." in section(card, "Licence")
    check_card(card)


def test_artifacts_are_told_as_they_were_measured(facts, artifacts):
    text = section(render_card(facts, "a", artifacts), "Artifacts")
    assert "on 359 images (`held_out`) of\n5 x 6 patches" in text
    assert "/home/me" not in text
    assert "| patches above the cutoff, share of an image | 1.23 % [1.11, 1.35] |" in text
    assert "| attention of CLS on registers in the last layer | 9.13 % [8.29, 9.98] |" in text
    assert "more than 0.31 of all attention) | CLS: 34.56 %, register one: 23.45 % |" in text
    assert "The cutoff is a norm of 72.83 (2.5 times the median)" in text
    assert "Artifacts: none found.** The norms of patches form\nno two groups" in text
    artifacts["attention"]["cls_on_registers"] = {"mean": None, "low": None, "high": None, "n": 0}
    assert "CLS on registers" not in section(render_card(facts, "a", artifacts), "Artifacts")
    artifacts["attention"]["cls_on_registers"] = None
    assert "CLS on registers" not in section(render_card(facts, "a", artifacts), "Artifacts")


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        ({"probably": True}, "Artifacts: probably.** Two groups of norms fit better"),
        ({"probably": True, "found": True}, "Artifacts: yes.** The norms of patches fall into two groups"),
    ],
)
def test_artifacts_that_were_found_are_admitted(facts, artifacts, verdict, said):
    artifacts["outliers"]["two_groups"] |= verdict
    text = section(render_card(facts, "a", artifacts), "Artifacts")
    assert said in text
    assert "medians 36.3 and 151.6, the upper one with 2.99 % of the patches" in text
    assert "none found" not in text


@pytest.mark.parametrize("rule", CUTOFF_RULES)
def test_every_rule_of_the_cutoff_has_words(facts, artifacts, rule):
    artifacts["outliers"] |= {"rule": rule, "rule_value": CUTOFF_RULES[rule]}
    assert "The cutoff is a norm of 72.83 (" in section(render_card(facts, "a", artifacts), "Artifacts")


# Mistakes


def test_missing_facts_are_named(facts, artifacts):
    with pytest.raises(ValueError, match=r"results of `vitreg analyze` with images\.grid, sinks, got model"):
        del artifacts["images"]["grid"], artifacts["sinks"]
        render_card(facts, "a", artifacts)
    del facts["seconds"], facts["metrics"]["n"], facts["speed"]["threads"]
    facts["data"] = None
    with pytest.raises(ValueError, match=r"training with data, metrics\.n, seconds, speed\.threads, got model"):
        render_card(facts, "a")


# Code


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
    assert len(blocks) == 3
    for block in blocks:
        exec(block, {})
    printed = capsys.readouterr().out
    assert "'label': 'LABEL_" in printed
    assert printed.count("torch.Size([1, 32, 4, 4])") == 3  # by pipeline, by Auto class, by the backbone
    assert f"({1 + registers}, 4, 4)" in printed
    assert f"torch.Size([1, 4, {1 + registers}, {17 + registers}])" in printed
    with PIL.Image.open("overlay.png") as picture:
        assert picture.width > 100
