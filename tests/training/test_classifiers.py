# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Classifiers to start from, and checkpoints that are none."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vitreg_hf.model.modeling_vitreg import ViTRegForImageClassification
from vitreg_hf.training.classification_settings import ImageClassificationSettings
from vitreg_hf.training.classifiers import check_model, create_model, create_processor


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A classifier of two classes without a processor."""
    settings = ImageClassificationSettings(num_hidden_layers=1, hidden_size=32)
    create_model(settings, ["a", "b"]).save_pretrained(tmp_path)
    return tmp_path


def remove(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize(
    ("name", "damage", "early"),
    [
        ("config.json", remove, True),
        ("config.json", cut, True),
        ("model.safetensors", remove, False),
        ("model.safetensors", cut, False),
    ],
)
def test_a_broken_checkpoint_is_one_clear_error(
    checkpoint: Path, name: str, damage: Callable[[Path], None], early: bool
) -> None:
    damage(checkpoint / name)
    settings = ImageClassificationSettings(init_from=str(checkpoint))
    expected = f"^Expected [^\\n]* {checkpoint}[^\\n]*$"
    if early:
        with pytest.raises(ValueError, match=expected):
            check_model(settings)
    with pytest.raises(ValueError, match=expected):
        create_model(settings, ["a", "b"])


def test_a_broken_processor_is_one_clear_error(checkpoint: Path) -> None:
    config = ViTRegForImageClassification.from_pretrained(checkpoint).config
    settings = ImageClassificationSettings(init_from=str(checkpoint))
    assert len(create_processor(settings, config).image_mean) == 3  # there need not be one
    (checkpoint / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=f"got {checkpoint}: "):
        create_processor(settings, config)


def test_weights_follow_from_the_seed_alone() -> None:
    one, same, other = (
        create_model(ImageClassificationSettings(num_hidden_layers=1, seed=seed), ["a", "b"]).state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])
