# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Decay, learning rate by depth, schedule and moving average."""

import builtins
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from vitreg_hf import ViTRegForImageClassification
from vitreg_hf.training.classification_settings import ImageClassificationSettings
from vitreg_hf.training.optim import create_ema, create_optimizer, create_schedule, one_kernel, parameter_groups


@pytest.fixture
def model() -> ViTRegForImageClassification:
    torch.manual_seed(0)
    return ViTRegForImageClassification(ImageClassificationSettings(num_hidden_layers=1).model_config())


def test_tokens_positions_biases_and_norms_do_not_decay(model: ViTRegForImageClassification) -> None:
    decayed, exempt = parameter_groups(model, ImageClassificationSettings(weight_decay=0.3))
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.3, 0.0)
    assert decayed["lr"] == exempt["lr"] == ImageClassificationSettings().learning_rate
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    exempt_names = {names[id(parameter)] for parameter in exempt["params"]}
    assert all(name.endswith("weight") for name in names.values() if name not in exempt_names)
    for part in ("cls_token", "register_tokens", "position_embeddings", "norm1.weight", "classifier.bias"):
        assert any(name.endswith(part) for name in exempt_names), part
    assert len(decayed["params"]) + len(exempt["params"]) == len(names)


# Of the model of one layer: how deep each parameter lies, and whether it is a matrix, a token, or neither.
DEPTHS = {
    "vitreg.embeddings.cls_token": (0, "token"),
    "vitreg.embeddings.register_tokens": (0, "token"),
    "vitreg.embeddings.position_embeddings": (0, "token"),
    "vitreg.embeddings.patch_embeddings.projection.weight": (0, "matrix"),
    "vitreg.embeddings.patch_embeddings.projection.bias": (0, "other"),
    **{f"vitreg.layers.0.norm{n}.{part}": (1, "other") for n in (1, 2) for part in ("weight", "bias")},
    **{f"vitreg.layers.0.attention.{n}_proj.weight": (1, "matrix") for n in "qkvo"},
    **{f"vitreg.layers.0.attention.{n}_proj.bias": (1, "other") for n in "qkvo"},
    **{f"vitreg.layers.0.mlp.{n}_proj.weight": (1, "matrix") for n in ("up", "down")},
    **{f"vitreg.layers.0.mlp.{n}_proj.bias": (1, "other") for n in ("up", "down")},
    **{f"vitreg.layers.0.layer_scale{n}.lambda1": (1, "other") for n in (1, 2)},
    **{f"vitreg.layernorm.{part}": (2, "other") for part in ("weight", "bias")},
    "classifier.weight": (2, "matrix"),
    "classifier.bias": (2, "other"),
}


@pytest.mark.parametrize("decay_tokens", [False, True])
def test_learning_rate_and_decay_of_every_parameter(model: ViTRegForImageClassification, decay_tokens: bool) -> None:
    settings = ImageClassificationSettings(
        learning_rate=0.1, layer_decay=0.5, weight_decay=0.3, decay_tokens=decay_tokens
    )
    found = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in create_optimizer(model, settings).param_groups:
        found |= {names[id(p)]: (group["lr"], group["weight_decay"]) for p in group["params"]}
    decaying = {"matrix", "token"} if decay_tokens else {"matrix"}
    assert {name: rate for name, (rate, _) in found.items()} == pytest.approx(
        {name: 0.1 * 0.5 ** (2 - depth) for name, (depth, _) in DEPTHS.items()}
    )
    assert {name: decay for name, (_, decay) in found.items()} == {
        name: 0.3 if kind in decaying else 0.0 for name, (_, kind) in DEPTHS.items()
    }


def test_frozen_parameters_are_left_out(model: ViTRegForImageClassification) -> None:
    model.vitreg.embeddings.requires_grad_(False)
    frozen = {id(parameter) for parameter in model.vitreg.embeddings.parameters()}
    for group in create_optimizer(model, ImageClassificationSettings()).param_groups:
        assert not frozen & {id(parameter) for parameter in group["params"]}


def test_the_learning_rate_rises_and_falls(model: ViTRegForImageClassification) -> None:
    settings = ImageClassificationSettings(learning_rate=0.5, warmup_ratio=0.2)
    optimizer = create_optimizer(model, settings)
    schedule, rates = create_schedule(optimizer, 20, settings), []
    for _ in range(20):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0, 0.125, 0.25, 0.375, 0.5])
    assert rates[12] == pytest.approx(0.25)
    assert schedule.get_last_lr() == pytest.approx([0.0, 0.0])


def test_warm_up_and_end_may_have_a_learning_rate_of_their_own(model: ViTRegForImageClassification) -> None:
    settings = ImageClassificationSettings(
        learning_rate=0.5, warmup_steps=4, warmup_learning_rate=0.1, min_learning_rate=0.05, layer_decay=0.5
    )
    optimizer = create_optimizer(model, settings)
    schedule, rates = create_schedule(optimizer, 10, settings), []
    for _ in range(11):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    top = [rate[-1] for rate in rates]
    assert top[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert top[10] == pytest.approx(0.05)
    assert [rate[0] for rate in rates] == pytest.approx([rate * 0.25 for rate in top])  # the lowest layer, always
    with pytest.raises(ValueError, match="warmup_steps of at most the 3 steps of the training, got 4"):
        create_schedule(optimizer, 3, settings)


def test_lamb_is_that_of_timm(model: ViTRegForImageClassification, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ImageClassificationSettings(optimizer="lamb", weight_decay=0.02)
    timm = pytest.importorskip("timm")
    optimizer = create_optimizer(model, settings)
    assert isinstance(optimizer, timm.optim.Lamb)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.02}
    real = builtins.__import__

    def without_timm(name, *args, **kwargs):
        if name.startswith("timm"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_timm)
    with pytest.raises(ValueError, match="Expected timm for the optimizer lamb"):
        create_optimizer(model, settings)


def test_the_average_starts_as_the_weights_and_moves_slowly(model: ViTRegForImageClassification) -> None:
    ema = create_ema(model, 0.9)
    with torch.no_grad():
        model.classifier.bias.fill_(1.0)
        ema.update_parameters(model)
        torch.testing.assert_close(ema.module.classifier.bias, torch.ones_like(model.classifier.bias))
        model.classifier.bias.fill_(2.0)
        ema.update_parameters(model)
    torch.testing.assert_close(ema.module.classifier.bias, torch.full_like(model.classifier.bias, 1.1))
    with pytest.raises(ValueError, match=r"ema_decay in \(0, 1\)"):
        create_ema(model, 1.0)


def test_the_average_computes_like_the_model(model: ViTRegForImageClassification) -> None:
    ema, pixels = create_ema(model, 0.9).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        outputs = ema(pixel_values=pixels, output_prefix_attentions=True, output_hidden_states=True)
        expected = model.eval()(pixel_values=pixels, output_prefix_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(outputs.logits, expected.logits)
    torch.testing.assert_close(outputs.prefix_attentions, expected.prefix_attentions)
    torch.testing.assert_close(outputs.hidden_states, expected.hidden_states)


@pytest.mark.parametrize(("precision", "fused"), [("no", True), ("bf16", True), ("fp16", None)])
def test_one_kernel_updates_all_but_in_fp16(precision: str, fused: bool | None) -> None:
    assert one_kernel(cast(Accelerator, SimpleNamespace(mixed_precision=precision))) is fused


def test_a_step_that_overflows_in_fp16_is_seen_to_be_left_out(model: ViTRegForImageClassification) -> None:
    """With the fused kernel Accelerate would take it for a step like any other."""
    launch = cast(Accelerator, SimpleNamespace(mixed_precision="fp16"))
    Accelerator(cpu=True)  # the wrapped optimizer asks for its state
    scaler = torch.amp.GradScaler("cpu")
    optimizer = create_optimizer(model, ImageClassificationSettings(), one_kernel(launch))
    wrapped = AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)
    before = model.classifier.weight.detach().clone()
    scaler.scale(model(pixel_values=torch.randn(2, 3, 32, 32)).logits.sum() * float("inf")).backward()
    wrapped.step()
    assert wrapped.step_was_skipped
    torch.testing.assert_close(model.classifier.weight.detach(), before, rtol=0, atol=0)
