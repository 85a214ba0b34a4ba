# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Statistics of a step against plain loops over the same tensors."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from vitreg_hf.model.configuration_vitreg import ViTRegConfig
from vitreg_hf.model.modeling_vitreg import ViTRegForImageClassification
from vitreg_hf.model.token_layout import TokenLayout
from vitreg_hf.training.step_statistics import (
    gradient_norms,
    memory_megabytes,
    norm_of,
    register_statistics,
    token_statistics,
)


def model_with(registers=4, **more):
    torch.manual_seed(0)
    shape = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    return ViTRegForImageClassification(ViTRegConfig(**shape, num_register_tokens=registers, num_labels=3, **more))


def pairwise(tokens):
    """Mean cosine over pairs of `(R, D)`, one pair after the other."""
    count = len(tokens)
    pairs = [(i, j) for i in range(count) for j in range(i)]
    return torch.stack([cosine_similarity(tokens[i], tokens[j], dim=0) for i, j in pairs]).mean()


def test_gradient_norms_of_groups_make_up_that_of_all():
    model = model_with()
    model(pixel_values=torch.randn(2, 3, 16, 16)).logits.square().sum().backward()
    norms = gradient_norms(model)
    groups = ["tokens", "embeddings", "block_1", "block_2", "block_3", "head"]
    assert list(norms) == [f"gradient_norm_{group}" for group in groups]
    assert all(norm.ndim == 0 for norm in norms.values())
    whole = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(torch.stack(list(norms.values())).norm(), whole)
    torch.testing.assert_close(norm_of(p.grad for p in model.parameters() if p.grad is not None), whole)
    embeddings = model.base_model.embeddings
    tokens = [embeddings.register_tokens, embeddings.cls_token, embeddings.position_embeddings]
    expected = torch.cat([p.grad.flatten() for p in tokens]).norm()
    torch.testing.assert_close(norms["gradient_norm_tokens"], expected)


def test_frozen_parts_have_no_gradient_norm():
    model = model_with()
    model.base_model.requires_grad_(False)
    model(pixel_values=torch.randn(2, 3, 16, 16)).logits.sum().backward()
    assert list(gradient_norms(model)) == ["gradient_norm_head"]


def test_blocks_beyond_nine_stay_in_their_order():
    model = model_with()
    model.parameter_layers = lambda: {name: 10 - place % 2 * 8 for place, (name, _) in enumerate(names)}
    names = list(model.named_parameters())
    model.config.num_hidden_layers = 12
    for _, parameter in names:
        parameter.grad = torch.ones_like(parameter)
    assert [name for name in gradient_norms(model) if "block" in name] == [
        "gradient_norm_block_2",
        "gradient_norm_block_10",
    ]


def test_registers_of_the_model():
    model = model_with(4)
    registers = model.base_model.embeddings.register_tokens[0]
    found = register_statistics(model)
    torch.testing.assert_close(found["register_norm"], registers.norm(dim=-1).mean())
    torch.testing.assert_close(found["register_cosine"], pairwise(registers))
    assert not found["register_norm"].requires_grad
    with torch.no_grad():
        registers.copy_(registers[:1].expand(4, -1))
    torch.testing.assert_close(register_statistics(model)["register_cosine"], torch.tensor(1.0))
    assert list(register_statistics(model_with(1))) == ["register_norm"]
    assert register_statistics(model_with(0)) == {}


@pytest.mark.parametrize("before_norm", [False, True])
def test_tokens_of_a_batch(before_norm):
    model = model_with(3).eval()
    outputs = model(pixel_values=torch.randn(2, 3, 16, 16), output_hidden_states=True)
    layout = TokenLayout.from_config(model.config)
    found = token_statistics(outputs, layout if before_norm else None)
    place = "residual" if before_norm else "output"
    tokens = outputs.hidden_states[-1] if before_norm else None
    registers = layout.register_tokens(tokens) if before_norm else outputs.register_tokens
    patches = (layout.patch_tokens(tokens) if before_norm else outputs.patch_tokens).norm(dim=-1)
    cls = layout.cls_token(tokens) if before_norm else outputs.cls_token
    expected = {
        f"{place}_norm_cls": cls.norm(dim=-1).mean(),
        f"{place}_norm_registers": registers.norm(dim=-1).mean(),
        f"{place}_cosine_registers": torch.stack([pairwise(of_image) for of_image in registers]).mean(),
        f"{place}_norm_patches": patches.mean(),
        f"{place}_norm_patches_highest": (patches[0].max() + patches[1].max()) / 2,
    }
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
        assert found[name].ndim == 0
        assert not found[name].requires_grad


def test_before_the_final_norm_is_before_it():
    model = model_with(2).eval()
    outputs = model(pixel_values=torch.randn(1, 3, 16, 16), output_hidden_states=True)
    normed = model.base_model.layernorm(outputs.hidden_states[-1])
    torch.testing.assert_close(TokenLayout.from_config(model.config).patch_tokens(normed), outputs.patch_tokens)


def test_what_a_model_does_not_have_is_missing():
    outputs = SimpleNamespace(cls_token=None, register_tokens=None, patch_tokens=torch.ones(2, 4, 9))
    found = token_statistics(outputs)
    assert found == {"output_norm_patches": torch.tensor(3.0), "output_norm_patches_highest": torch.tensor(3.0)}


def test_memory_is_that_of_the_process():
    before = memory_megabytes(torch.device("cpu"))
    held = torch.ones(25_000_000)  # 100 MB
    after = memory_megabytes(torch.device("cpu"))
    assert held.sum() == 25_000_000
    assert 80 < after - before < 200
