# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Recipes name settings that exist, say where they come from, and give way to the command line."""

import shlex
from dataclasses import FrozenInstanceError, dataclass, fields
from typing import Any

import pytest

from vitreg_hf.training.classification_settings import ImageClassificationSettings
from vitreg_hf.training.command_line import parse_settings, settings_of
from vitreg_hf.training.dino_settings import DinoSettings
from vitreg_hf.training.feature_settings import FeatureSettings
from vitreg_hf.training.recipes import RECIPES, Recipe, recipe

SCRIPTS: dict[str, tuple[type[Any], tuple[Any, ...]]] = {
    "train_image_classification.py": (ImageClassificationSettings, ("image-classification",)),
    "pretrain_dino.py": (DinoSettings, ("self-supervision",)),
    "evaluate_features.py": (FeatureSettings, ("linear-probe", "knn")),
}


@pytest.fixture(params=RECIPES.values(), ids=lambda one: one.name)
def one(request: pytest.FixtureRequest) -> Recipe:
    return request.param


def of_command(one: Recipe) -> Any:
    """The settings that the command of a recipe makes."""
    launcher, options = one.command.split(" examples/")
    assert launcher.startswith("accelerate launch --num_processes ")
    script, *words = shlex.split(options)
    settings, tasks = SCRIPTS[script]
    return parse_settings(settings, *tasks, argv=words)


def test_the_command_runs_with_the_settings_of_the_recipe(one):
    made = of_command(one)
    assert {name: getattr(made, name) for name in one.settings} == dict(one.settings)
    assert made.recipe == one.name
    assert made.train_dir == "imagenet/train"


def test_the_model_of_the_recipe_can_be_built(one):
    made = of_command(one)
    if one.task in ("image-classification", "self-supervision") and not one.required:
        assert made.model_config().num_register_tokens == 4


def test_the_total_batch_is_that_of_the_source():
    totals = {"deit3_small": 2048, "deit3_base": 2048, "deit3_large": 2048, "vit_small_90ep": 1024}
    totals |= {"linear_probe_dinov2": 1024, "dinov2_short": 2048, "finetune_dinov2": 512}
    for name, total in totals.items():
        processes = int(recipe(name).command.split("--num_processes ")[1].split()[0])
        assert processes * recipe(name).settings["per_device_train_batch_size"] == total


def test_every_recipe_says_what_is_known_of_it(one):
    text = one.describe()
    for part in (one.name, one.paper, one.command, one.cost, one.expected.metric, "not run here at full scale"):
        assert part in text
    assert all(f"{name} = {value}" in text for name, value in one.settings.items())
    assert ("no number known" in text) is (one.name == "finetune_dinov2")


def test_recipes_are_data_that_nothing_changes(one):
    with pytest.raises(TypeError):
        one.settings["seed"] = 1
    with pytest.raises(FrozenInstanceError):
        one.name = "mine"


def test_an_unknown_name_gets_the_list_and_the_nearest():
    with pytest.raises(ValueError, match=r"deit3_small, deit3_base, .*, got 'deit3_smal'; did you mean deit3_small\?"):
        recipe("deit3_smal")


class TestCommandLine:
    def parse(self, *words: str) -> ImageClassificationSettings:
        return parse_settings(ImageClassificationSettings, "image-classification", argv=words)

    def test_what_is_written_wins_over_the_recipe_and_the_recipe_over_the_defaults(self):
        made = self.parse("--learning_rate", "1e-3", "--recipe", "deit3_small", "--three_augment", "false")
        assert (made.learning_rate, made.three_augment) == (1e-3, False)
        assert (made.hidden_size, made.optimizer, made.loss) == (384, "lamb", "bce")
        assert made.seed == ImageClassificationSettings().seed

    def test_a_value_that_is_the_default_is_written_all_the_same(self):
        default = ImageClassificationSettings().learning_rate
        assert self.parse("--recipe", "deit3_small", "--learning_rate", str(default)).learning_rate == default

    def test_without_a_recipe_there_are_the_defaults(self):
        assert self.parse() == ImageClassificationSettings()
        assert self.parse("--seed=3").seed == 3

    def test_a_list_of_a_recipe_is_not_shared(self):
        made = parse_settings(DinoSettings, "self-supervision", argv=["--recipe", "dinov2_short"])
        made.mask_ratio.append(3.0)
        assert recipe("dinov2_short").settings["mask_ratio"] == [0.1, 0.5]

    def test_recipes_of_other_tasks_are_refused(self):
        with pytest.raises(ValueError, match="recipe for image-classification, got knn_dinov2 for knn"):
            self.parse("--recipe", "knn_dinov2")

    def test_what_only_the_command_line_can_say_is_asked_for(self):
        with pytest.raises(ValueError, match="init_from with the recipe finetune_dinov2"):
            self.parse("--recipe", "finetune_dinov2")
        assert self.parse("--recipe", "finetune_dinov2", "--init_from", "outputs/digits").layer_decay == 0.75

    def test_unknown_options_are_refused(self):
        with pytest.raises(ValueError, match="--learning_rates"):
            self.parse("--recipe", "deit3_small", "--learning_rates", "1")

    def test_help_shows_the_recipe(self, capsys):
        with pytest.raises(SystemExit):
            self.parse("--recipe", "deit3_large", "--help")
        assert "0.45" in capsys.readouterr().out

    def test_a_setting_that_does_not_exist_is_named(self):
        @dataclass
        class Little:
            recipe: str | None = None

        assert len(fields(Little)) == 1
        with pytest.raises(ValueError, match=r"settings of Little in the recipe knn_dinov2, got .*neighbours"):
            settings_of(recipe("knn_dinov2"), Little)
