# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Batches of a broken step come back as they were, and a replay names what broke."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitreg_hf.model.configuration_vitreg import ViTRegConfig
from vitreg_hf.model.modeling_vitreg import ViTRegForImageClassification
from vitreg_hf.training import replay as module
from vitreg_hf.training.replay import load_replay, replay, save_for_replay
from vitreg_hf.training.sampling import SampleKey


class Crops(NamedTuple):
    large: torch.Tensor
    small: torch.Tensor | None


def test_what_is_kept_comes_back(tmp_path):
    images, labels = torch.randn(4, 3, 8, 8).transpose(2, 3), torch.arange(4)
    batches = [
        {"pixel_values": images, "labels": labels, "keys": [SampleKey(3, 0), SampleKey(1, 0)], "skipped": ["a.png"]},
        Crops(images.to(torch.bfloat16), None),
        {"crops": [images, images[:, :, :4, :4]]},
    ]
    folder = save_for_replay(tmp_path / "replay" / "step-3", batches, {"step": 3, "loss": float("nan"), "seed": 0})
    loaded, facts = load_replay(folder)
    assert facts["step"] == 3
    assert facts["loss"] != facts["loss"]
    torch.testing.assert_close(loaded[0]["pixel_values"], images, rtol=0, atol=0)
    torch.testing.assert_close(loaded[0]["labels"], labels)
    assert loaded[0]["keys"] == [SampleKey(3, 0)._asdict(), SampleKey(1, 0)._asdict()]
    assert loaded[0]["skipped"] == ["a.png"]
    assert loaded[1]["large"].dtype == torch.bfloat16
    assert loaded[1]["small"] is None
    assert [tuple(crop.shape) for crop in loaded[2]["crops"]] == [(4, 3, 8, 8), (4, 3, 4, 4)]


def test_a_write_that_fails_leaves_the_replay_that_was_there(tmp_path, monkeypatch):
    folder = tmp_path / "step-1"
    save_for_replay(folder, [{"x": torch.zeros(2)}], {"step": 1})

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_for_replay(folder, [{"x": torch.ones(2)}], {"step": 2})
    assert load_replay(folder)[1] == {"step": 1}
    monkeypatch.undo()
    save_for_replay(folder, [{"x": torch.ones(2)}], {"step": 2})
    assert load_replay(folder)[1] == {"step": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_a_folder_without_a_replay_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"batch\.safetensors and replay\.json, got .*nothing"):
        load_replay(tmp_path / "nothing")


def small_model():
    torch.manual_seed(0)
    shape = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTRegForImageClassification(ViTRegConfig(**shape, num_register_tokens=2, num_labels=3)).train()


def loss_of(model, batch):
    return F.cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"], reduction="none")


def batch_of(images=4):
    return {"pixel_values": torch.randn(images, 3, 16, 16), "labels": torch.arange(images) % 3}


def test_a_healthy_batch_has_a_loss_per_image_and_a_norm_per_parameter():
    model, batch = small_model(), batch_of()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = replay(model, batch, loss_of)
    torch.testing.assert_close(torch.tensor(report.losses), loss_of(model, batch).detach())
    loss_of(model, batch).mean().backward()
    expected = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    assert {name: norm for name, norm in report.gradients.items() if norm is not None} == pytest.approx(expected)
    assert report.first_broken is None
    assert "nothing, all of it is finite" in report.table()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_an_image_that_is_not_finite_is_named_first():
    batch = batch_of()
    batch["pixel_values"][2, 0, 0, 0] = float("inf")
    report = replay(small_model(), batch, loss_of)
    assert "convolution" in report.first_broken
    assert "patch_embeddings" in report.first_broken
    assert [loss == loss for loss in report.losses] == [True, True, False, True]
    assert "  nan          image 2\n" in report.table(most=1)


def test_a_weight_that_was_broken_before_is_named():
    model = small_model()
    with torch.no_grad():
        model.classifier.bias[1] = float("nan")
    assert replay(model, batch_of(), loss_of).first_broken == "weight classifier.bias, before the pass"


def test_the_module_whose_output_overflows_is_named():
    model = small_model()
    with torch.no_grad():
        model.classifier.weight.fill_(3e38)
    assert "ViTRegForImageClassification.classifier" in replay(model, batch_of(), loss_of).first_broken


class Root(nn.Module):
    """Its value is finite at 0; its slope is not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return (self.weight * x).sqrt()


def test_a_gradient_that_breaks_where_the_loss_is_fine_is_named():
    report = replay(Root(), {"x": torch.ones(2)}, lambda model, batch: model(batch["x"]))
    assert report.losses == [0.0, 0.0]
    assert report.gradients["weight"] != 0
    assert "backward" in report.first_broken
