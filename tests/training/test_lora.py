# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""LoRA changes nothing until it is trained, trains little, and merges into a plain checkpoint."""

import copy
import sys

import pytest
import torch
from torch.optim import SGD
from transformers import AutoModelForImageClassification

from vitreg_hf import ViTRegConfig, ViTRegForImageClassification
from vitreg_hf.training.lora import add_lora, merge_lora

IMAGES, LABELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 1, 0])


def create(**changes) -> ViTRegForImageClassification:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    return ViTRegForImageClassification(ViTRegConfig(**{**shape, "initializer_range": 0.2, **changes})).eval()


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def logits_of(model):
    return model(IMAGES).logits


def train(model, steps=3):
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IMAGES, labels=LABELS).loss.backward()
        optimizer.step()


def test_nothing_changes_until_it_is_trained():
    model, plain = create(), create()
    add_lora(model, rank=2, alpha=4.0)
    torch.testing.assert_close(logits_of(model), logits_of(plain), rtol=0, atol=0)
    assert isinstance(model, ViTRegForImageClassification)


def test_matrices_and_head_are_trained_and_nothing_else():
    model = create()
    add_lora(model, rank=2, alpha=4.0)
    head = {"classifier.weight", "classifier.bias"}
    matrices = trained_names(model) - head
    assert head < trained_names(model)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in matrices} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    assert len(matrices) == 2 * 4 * 2  # blocks, projections, matrices
    assert model.vitreg.layers[0].attention.q_proj.lora_A["default"].weight.shape == (2, 16)


def test_registers_and_mlp_are_trained_on_request():
    model = create()
    add_lora(model, rank=2, alpha=4.0, mlp=True, registers=True)
    names = trained_names(model)
    assert "vitreg.embeddings.register_tokens" in names
    assert any("up_proj.lora_A" in name for name in names)
    gated = create(use_swiglu_ffn=True)
    add_lora(gated, rank=2, alpha=4.0, mlp=True)
    assert any("gate_proj.lora_B" in name for name in trained_names(gated))
    with pytest.raises(ValueError, match="model with registers"):
        add_lora(create(num_register_tokens=0), rank=2, alpha=4.0, registers=True)


def test_depth_and_decay_know_the_matrices():
    model = create()
    add_lora(model, rank=2, alpha=4.0)
    layers, exempt = model.parameter_layers(), model.no_weight_decay()
    name = "vitreg.layers.1.attention.v_proj.lora_B.default.weight"
    assert layers[name] == 2
    assert name not in exempt


def test_training_moves_the_output_and_not_what_is_frozen():
    model, before = create(), create()
    add_lora(model, rank=2, alpha=4.0)
    train(model)
    assert not torch.allclose(logits_of(model), logits_of(before), atol=1e-2)
    frozen = model.vitreg.layers[0].attention.q_proj.base_layer.weight
    torch.testing.assert_close(frozen, before.vitreg.layers[0].attention.q_proj.weight, rtol=0, atol=0)


def test_the_merged_model_is_a_plain_checkpoint_that_answers_the_same(tmp_path):
    model, plain = create(), create()
    add_lora(model, rank=2, alpha=4.0, mlp=True, registers=True)
    train(model)
    expected = logits_of(model)
    merged = merge_lora(model)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert trained_names(merged) == set(merged.state_dict())
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    loaded, found = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    torch.testing.assert_close(logits_of(loaded.eval()), expected, rtol=1e-5, atol=1e-5)


def test_a_copy_merges_without_the_original():
    """As an average of the weights does at the end of a training."""
    model = create()
    add_lora(model, rank=2, alpha=4.0)
    train(model)
    expected = logits_of(model)
    torch.testing.assert_close(logits_of(merge_lora(copy.deepcopy(model))), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=0)


def test_merging_twice_and_adding_twice_are_refused():
    model = create()
    with pytest.raises(ValueError, match="a model with LoRA"):
        merge_lora(model)
    add_lora(model, rank=2, alpha=4.0)
    with pytest.raises(ValueError, match="a model without LoRA"):
        add_lora(model, rank=2, alpha=4.0)


@pytest.mark.parametrize("options", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}])
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="Expected rank"):
        add_lora(create(), **{"rank": 2, "alpha": 4.0, **options})


def test_without_peft_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"vitreg_hf\[train\]"):
        add_lora(create(), rank=2, alpha=4.0)
