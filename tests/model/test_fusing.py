"""One product for queries, keys and values, and LayerScale in projections: outputs and files stay what they were."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vitreg_hf import ViTRegForImageClassification, ViTRegModel
from vitreg_hf.training.lora import add_lora

BLOCKS = [
    {},
    {"qkv_bias": False},
    {"key_bias": False, "position_embedding_type": "rotary"},  # as in DINOv3: a bias of some
    {"qk_norm": True},
    {"attention_bias_kv": True},
    {"use_swiglu_ffn": True, "layerscale_value": 0.5},
]


@pytest.mark.parametrize("fields", BLOCKS, ids=str)
@torch.no_grad()
def test_fused_projections_give_the_same_outputs(make_model, fields):
    model = make_model(ViTRegModel, **fields)
    fused = copy.deepcopy(model)
    fused.fuse_qkv_projections()
    fused.fuse_qkv_projections()  # nothing is left to do
    assert not any(isinstance(m, nn.Linear) and "q_proj" in name for name, m in fused.named_modules())
    pixels = torch.randn(2, 3, 32, 48)
    for asked in ({}, {"output_tokens": False}, {"output_attentions": True}):
        whole, got = model(pixels, **asked), fused(pixels, **asked)
        torch.testing.assert_close(got.to_tuple(), whole.to_tuple(), atol=1e-5, rtol=1e-5)
    fused.unfuse_qkv_projections()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, fused.get_parameter(name))


@pytest.mark.parametrize("fields", BLOCKS, ids=str)
@torch.no_grad()
def test_a_fused_model_is_saved_and_loaded_as_three_projections(make_model, fields, tmp_path):
    model = make_model(ViTRegModel, **fields)
    fused = copy.deepcopy(model)
    fused.fuse_qkv_projections()
    fused.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert names == set(model.state_dict())
    assert list(model.state_dict()) == list(fused.state_dict())  # in this order, of which a fingerprint is made
    loaded = ViTRegModel.from_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name))

    other = make_model(ViTRegModel, **fields)
    fused.load_state_dict(other.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(fused(pixels).pooler_output, other(pixels).pooler_output, atol=1e-5, rtol=1e-5)


def test_a_state_that_lacks_a_part_is_reported(make_config):
    model = ViTRegModel(make_config())
    state = model.state_dict()
    del state["layers.0.attention.k_proj.weight"]
    model.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match=r"qkv_proj\.weight"):
        model.load_state_dict(state)


def test_gradients_of_fused_projections(make_model):
    model = make_model(ViTRegForImageClassification, drop_path_rate=0.3, drop_path_kind="subset").train()
    fused = copy.deepcopy(model)
    fused.fuse_qkv_projections()
    pixels, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    for network in (model, fused):
        torch.manual_seed(0)
        network(pixels, labels=labels).loss.backward()
    for own, joined in zip(model.vitreg.layers, fused.vitreg.layers, strict=True):
        separate = [getattr(own.attention, name).weight.grad for name in ("q_proj", "k_proj", "v_proj")]
        torch.testing.assert_close(joined.attention.qkv_proj.weight.grad, torch.cat(separate), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("fields", [BLOCKS[1], BLOCKS[2], {"value_bias": False, "qk_norm": True}], ids=str)
def test_a_part_without_a_bias_has_none_after_training_either(make_model, fields, tmp_path):
    model = make_model(ViTRegForImageClassification, **fields)
    model.fuse_qkv_projections()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.randn(4, 3, 32, 32), labels=torch.arange(4)).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        loaded, expected = ViTRegForImageClassification.from_pretrained(tmp_path), model(pixels).logits
        torch.testing.assert_close(loaded(pixels).logits, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model(pixels, output_tokens=False).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("part", ["q_proj.weight", "v_proj.bias"])
def test_a_part_that_alone_is_frozen_is_refused(make_config, part):
    model = ViTRegModel(make_config())
    model.layers[1].attention.get_parameter(part).requires_grad_(False)
    with pytest.raises(ValueError, match=f"all trained or all frozen to fuse, got .*'{part}': False"):
        model.fuse_qkv_projections()
    assert all(layer.attention.qkv_proj is None for layer in model.layers)


@torch.no_grad()
def test_a_fused_projection_that_is_watched_runs(make_model):
    model, pixels = make_model(ViTRegModel), torch.randn(2, 3, 32, 32)
    model.fuse_qkv_projections()
    expected, seen = model(pixels, output_tokens=False).pooler_output, []
    model.layers[-1].attention.qkv_proj.register_forward_hook(lambda *call: seen.append(call[-1].shape))
    got = model(pixels, output_tokens=False).pooler_output
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert (2, 21, 3 * 32) in seen


def test_what_stands_in_the_place_of_a_fused_projection_is_named(make_config):
    model = ViTRegModel(make_config())
    model.fuse_qkv_projections()
    model.layers[0].attention.qkv_proj = Adapted(32, 96)
    with pytest.raises(ValueError, match="Expected the projections of fuse_qkv_projections, got Adapted"):
        model.state_dict()


def test_adapters_are_not_put_beside_fused_projections(make_config):
    model = ViTRegForImageClassification(make_config())
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"Expected a model with three projections for LoRA, got a fused one"):
        add_lora(model, rank=2, alpha=2)


@torch.no_grad()
def test_fused_projections_compile_for_any_size(make_model, count_graphs):
    model = make_model(ViTRegForImageClassification, num_hidden_layers=2)
    model.fuse_qkv_projections()
    model.fold_layer_scale()
    compiled, graphs = count_graphs(model)
    for size in [(2, 3, 48, 24), (4, 3, 24, 56), (5, 3, 72, 40)]:
        pixels = torch.randn(*size)
        got, expected = compiled(pixels, output_tokens=False).logits, model(pixels).logits
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize("fields", [{}, {"proj_bias": False, "mlp_bias": False}, {"use_swiglu_ffn": True}], ids=str)
@torch.no_grad()
def test_folded_layer_scale_is_another_model_with_the_same_outputs(make_model, fields, tmp_path):
    model = make_model(ViTRegForImageClassification, layerscale_value=0.5, **fields)
    pixels = torch.randn(2, 3, 32, 48)
    expected = model(pixels, output_hidden_states=True)
    model.fold_layer_scale()
    model.fold_layer_scale()
    assert model.config.layerscale_value is None
    model.save_pretrained(tmp_path)
    for network in (model, ViTRegForImageClassification.from_pretrained(tmp_path)):
        got = network(pixels, output_hidden_states=True)
        torch.testing.assert_close(got.hidden_states, expected.hidden_states, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "lambda1" in name]


class Adapted(nn.Linear):
    """What adapters and quantisation put in the place of a projection."""


@pytest.mark.parametrize("place", ["attention.k_proj", "attention.o_proj", "mlp.down_proj"])
@pytest.mark.parametrize("how", ["adapted", "hook"])
def test_what_is_more_than_its_weights_is_refused_before_anything_changes(make_config, place, how):
    model = ViTRegModel(make_config(layerscale_value=0.5))
    parent = model.layers[2].get_submodule(place.rpartition(".")[0])
    name = place.rpartition(".")[2]
    if how == "adapted":
        setattr(parent, name, Adapted(32, 32))
    else:
        getattr(parent, name).register_forward_hook(lambda *call: None)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"Expected nn\.Linear without adapters or hooks to (fuse|fold)"):
        (model.fuse_qkv_projections if name == "k_proj" else model.fold_layer_scale)()
    assert before.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.config.layerscale_value == 0.5
