# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from torch import nn

from vitreg_hf import ViTRegModel
from vitreg_hf.training import costs
from vitreg_hf.training.costs import bytes_saved_per_image, images_per_second


class Square(nn.Module):
    """Saves its input once, in float32."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, pixel_values):
        return (pixel_values * self.weight).sum()


def test_what_autograd_keeps_is_counted_once_and_without_weights():
    assert bytes_saved_per_image(Square(), torch.randn(3, 1, 4, 5)) == 4 * 5 * 4


def test_more_tokens_take_more_memory_in_proportion(make_config):
    images = torch.randn(2, 3, 32, 32)
    few, some, many = (
        bytes_saved_per_image(ViTRegModel(make_config(num_register_tokens=count)), images) for count in (1, 2, 3)
    )
    assert few < some < many
    assert many - some == pytest.approx(some - few, rel=0.05)


def test_a_model_is_left_as_it_was(make_config):
    model = ViTRegModel(make_config()).eval()
    bytes_saved_per_image(model, torch.randn(2, 3, 32, 32))
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        bytes_saved_per_image(model, torch.randn(1, 3, 32, 32))


def test_models_take_turns_and_slow_rounds_do_not_count(monkeypatch):
    """The machine is ten times slower in two of six rounds; the second model takes twice as long as the first."""
    calls = []

    def seconds(model, pixel_values):
        turn = max(len(calls) - 2, 0) // 2
        calls.append(model.name)
        return {"one": 1.0, "two": 2.0}[model.name] * (10 if turn in (1, 2) else 1)

    monkeypatch.setattr(costs, "_seconds", seconds)
    models = {1: nn.Module(), 2: nn.Module()}
    models[1].name, models[2].name = "one", "two"
    speeds = images_per_second(models, torch.zeros(8, 1), rounds=6, seconds=0)
    assert speeds[1] / speeds[2] == pytest.approx(2)
    assert speeds[1] == pytest.approx(8)
    assert calls[2:6] == ["one", "two", "two", "one"]  # after one pass each that does not count


def test_speeds_of_real_models_are_positive(make_config):
    models = {count: ViTRegModel(make_config(num_register_tokens=count)).eval() for count in (0, 4)}
    speeds = images_per_second(models, torch.randn(2, 3, 32, 32), rounds=2, seconds=0)
    assert min(speeds.values()) > 0
    with pytest.raises(ValueError, match="1 model and 1 round"):
        images_per_second({}, torch.randn(2, 3, 32, 32))
