# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Decay, schedule and moving average."""

import pytest
import torch

from vitreg_hf import ViTRegForImageClassification
from vitreg_hf.training.classification_settings import ImageClassificationSettings
from vitreg_hf.training.optim import create_ema, create_optimizer, create_schedule, optimizer_steps, parameter_groups


@pytest.fixture
def model() -> ViTRegForImageClassification:
    torch.manual_seed(0)
    return ViTRegForImageClassification(ImageClassificationSettings(num_hidden_layers=1).model_config())


def test_tokens_positions_biases_and_norms_do_not_decay(model: ViTRegForImageClassification) -> None:
    decayed, exempt = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    exempt_names = {names[id(parameter)] for parameter in exempt["params"]}
    assert all(name.endswith("weight") for name in names.values() if name not in exempt_names)
    for part in ("cls_token", "register_tokens", "position_embeddings", "norm1.weight", "classifier.bias"):
        assert any(name.endswith(part) for name in exempt_names), part
    assert len(decayed["params"]) + len(exempt["params"]) == len(names)


def test_frozen_parameters_are_left_out(model: ViTRegForImageClassification) -> None:
    model.vitreg.embeddings.requires_grad_(False)
    frozen = {id(parameter) for parameter in model.vitreg.embeddings.parameters()}
    for group in create_optimizer(model, 1e-3, 0.1).param_groups:
        assert not frozen & {id(parameter) for parameter in group["params"]}


def test_the_learning_rate_rises_and_falls(model: ViTRegForImageClassification) -> None:
    optimizer = create_optimizer(model, 0.5, 0.0)
    schedule, rates = create_schedule(optimizer, num_steps=20, warmup_ratio=0.2), []
    for _ in range(20):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0, 0.125, 0.25, 0.375, 0.5])
    assert rates[12] == pytest.approx(0.25)
    assert schedule.get_last_lr() == pytest.approx([0.0, 0.0])
    with pytest.raises(ValueError, match="warmup_ratio in"):
        create_schedule(optimizer, 20, 1.0)


def test_a_window_of_accumulation_ends_with_its_epoch() -> None:
    assert optimizer_steps(num_batches=10, accumulation=4, num_epochs=2) == 6
    assert optimizer_steps(num_batches=8, accumulation=4, num_epochs=2) == 4


def test_the_average_starts_as_the_weights_and_moves_slowly(model: ViTRegForImageClassification) -> None:
    ema = create_ema(model, 0.9)
    with torch.no_grad():
        model.classifier.bias.fill_(1.0)
        ema.update_parameters(model)
        torch.testing.assert_close(ema.module.classifier.bias, torch.ones_like(model.classifier.bias))
        model.classifier.bias.fill_(2.0)
        ema.update_parameters(model)
    torch.testing.assert_close(ema.module.classifier.bias, torch.full_like(model.classifier.bias, 1.1))
    with pytest.raises(ValueError, match="ema_decay in"):
        create_ema(model, 1.0)


def test_the_average_computes_like_the_model(model: ViTRegForImageClassification) -> None:
    ema, pixels = create_ema(model, 0.9).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        outputs = ema(pixel_values=pixels, output_prefix_attentions=True, output_hidden_states=True)
        expected = model.eval()(pixel_values=pixels, output_prefix_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(outputs.logits, expected.logits)
    torch.testing.assert_close(outputs.prefix_attentions, expected.prefix_attentions)
    torch.testing.assert_close(outputs.hidden_states, expected.hidden_states)
