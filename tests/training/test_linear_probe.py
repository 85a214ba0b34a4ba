# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Many linear classifiers on one pass of a frozen backbone learn as each of them would alone."""

import pytest
import torch
import torch.nn.functional as F
from torch.optim import SGD

from vitreg_hf import ViTRegConfig, ViTRegModel
from vitreg_hf.training.linear_probe import (
    Features,
    LinearProbes,
    Probe,
    create_probe_optimizer,
    create_probe_schedule,
    probe_features,
    probe_grid,
    probe_losses,
)

CLASSES, STEPS = 5, 6


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    return ViTRegModel(ViTRegConfig(**shape, initializer_range=0.2, num_register_tokens=3)).eval()


def test_the_grid_is_that_of_dinov2():
    grid = probe_grid()
    assert len(set(grid)) == len(grid) == 52
    assert {probe.features for probe in grid} == {Features(n, mean) for n in (1, 4) for mean in (False, True)}
    assert {probe.learning_rate for probe in grid} == {a * 10**-b for a in (1, 2, 5) for b in range(2, 6)} | {0.1}


def test_features_are_cls_and_patches_after_the_final_norm(model):
    images = torch.randn(2, 3, 32, 32)
    features = probe_features(model, images, (1, 4))
    with torch.no_grad():
        outputs = model(images, output_hidden_states=True)
        cls = [model.layernorm(state)[:, 0] for state in outputs.hidden_states[-4:]]
    mean = outputs.last_hidden_state[:, 4:].mean(dim=1)  # behind CLS and three registers
    torch.testing.assert_close(features[Features(1, False)], outputs.last_hidden_state[:, 0])
    torch.testing.assert_close(features[Features(1, True)], torch.cat([cls[-1], mean], dim=1))
    torch.testing.assert_close(features[Features(4, False)], torch.cat(cls, dim=1))
    torch.testing.assert_close(features[Features(4, True)], torch.cat([*cls, mean], dim=1))
    assert not any(feature.requires_grad for feature in features.values())


def test_a_model_with_fewer_blocks_is_refused(model):
    with pytest.raises(ValueError, match="1 to 5"):
        probe_features(model, torch.randn(1, 3, 32, 32), (1, 6))


def test_initial_weights_are_small_and_biases_zero():
    torch.manual_seed(0)
    probes = LinearProbes(probe_grid(), hidden_size=64, num_classes=100)
    weights = torch.cat([one.weight.flatten() for one in probes.classifiers])
    assert weights.std().item() == pytest.approx(0.01, rel=0.01)
    assert all(one.bias.abs().max() == 0 for one in probes.classifiers)
    assert {one.in_features for one in probes.classifiers} == {64, 128, 256, 320}


def batches(model):
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        images = torch.randn(8, 3, 32, 32, generator=generator)
        yield probe_features(model, images, (1, 4)), torch.randint(CLASSES, (8,), generator=generator)


def learned_alone(model, probe: Probe, weight, bias):
    """The slow reference: one classifier, one loss, one optimizer, and the cosine written out."""
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = SGD([weight, bias], lr=probe.learning_rate * 8 / 256, momentum=0.9)
    for step, (features, labels) in enumerate(batches(model)):
        share = (1 + torch.cos(torch.tensor(torch.pi * step / STEPS, dtype=torch.float64)).item()) / 2
        optimizer.param_groups[0]["lr"] = probe.learning_rate * 8 / 256 * share
        optimizer.zero_grad()
        F.cross_entropy(F.linear(features[probe.features], weight, bias), labels).backward()
        optimizer.step()
    return weight.detach(), bias.detach()


def test_together_they_learn_what_each_learns_alone(model):
    torch.manual_seed(1)
    grid = probe_grid(learning_rates=(1e-2, 0.5, 20.0))
    probes = LinearProbes(grid, 16, CLASSES)
    start = [(one.weight.detach().clone(), one.bias.detach().clone()) for one in probes.classifiers]
    optimizer = create_probe_optimizer(probes, images_per_step=8)
    schedule = create_probe_schedule(optimizer, STEPS)
    for features, labels in batches(model):
        logits = probes(features)
        assert logits.shape == (len(grid), 8, CLASSES)
        probe_losses(logits, labels).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    for probe, one, initial in zip(grid, probes.classifiers, start, strict=True):
        weight, bias = learned_alone(model, probe, *initial)
        assert not torch.equal(weight, initial[0])
        torch.testing.assert_close(one.weight.detach(), weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one.bias.detach(), bias, rtol=1e-4, atol=1e-6)
    assert schedule.get_last_lr() == [0.0] * 3


def test_a_classifier_that_diverges_spoils_no_other():
    probes = LinearProbes(probe_grid((1,), (0.1, 1.0)), 4, 3)
    features = {Features(1, mean): torch.randn(6, 4 * (1 + mean)) for mean in (False, True)}
    with torch.no_grad():
        probes.classifiers[0].weight.fill_(float("inf"))
    losses = probe_losses(probes(features), torch.tensor([0, 1, 2, 0, 1, 2]))
    losses.sum().backward()
    assert losses.isfinite().tolist() == [False, True, True, True]
    assert all(one.weight.grad.isfinite().all() for one in probes.classifiers[1:])
