"""Weights in the order of oneDNN: the same outputs, never stale, and out of the way of all that cannot use them."""

import copy
import io

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitreg_hf import ViTRegForImageClassification, ViTRegModel
from vitreg_hf.model.prepacking import PrepackedLinear, can_prepack
from vitreg_hf.training.lora import add_lora, merge_lora

pytestmark = pytest.mark.skipif(not can_prepack(torch.float32), reason="this PyTorch has no oneDNN")
BLOCKS = [
    {},
    {"key_bias": False, "position_embedding_type": "rotary"},
    {"use_swiglu_ffn": True, "mlp_bias": False, "proj_bias": False},
    {"qk_norm": True, "layerscale_value": 0.5},
]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def used(monkeypatch):
    """Counts products by packed weights: equal outputs alone would not show that there were any."""
    counted, product = [], torch.ops.mkldnn._linear_pointwise

    def counting(tokens, *arguments):
        counted.append(tokens.shape)
        return product(tokens, *arguments)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counting)
    return counted


@pytest.fixture
def models(make_model):
    """Two equal models, of which one is prepacked."""

    def make(model_class=ViTRegModel, **fields):
        model = make_model(model_class, **fields)
        prepacked = copy.deepcopy(model)
        prepacked.prepack_projections()
        return model, prepacked

    return make


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("fields", BLOCKS, ids=str)
def test_outputs_are_the_same(models, used, fields, mode):
    model, prepacked = models(**fields)
    prepacked.prepack_projections()  # nothing is left to do
    pixels = torch.randn(2, 3, 32, 48)
    for asked in ({}, {"output_tokens": False}, {"output_attentions": True}):
        used.clear()
        with mode():
            expected, got = model(pixels, **asked), prepacked(pixels, **asked)
        torch.testing.assert_close(got.to_tuple(), expected.to_tuple(), **CLOSE)
        assert len(used) > 6 * (len(model.layers) - 1)


@torch.no_grad()
def test_images_of_many_sizes_and_no_tokens_at_all(models, used):
    model, prepacked = models(ViTRegForImageClassification)
    images = [torch.randn(3, 32, 48), torch.randn(3, 16, 24)]
    torch.testing.assert_close(prepacked(images).logits, model(images).logits, **CLOSE)
    assert used
    used.clear()
    assert prepacked.vitreg.layers[0].mlp.up_proj(torch.randn(2, 0, 32)).shape == (2, 0, 48)
    assert not used


@torch.no_grad()
def test_fused_projections_are_prepacked_too(models, used):
    model, fused = models()
    fused.unpack_projections()
    fused.fuse_qkv_projections()
    fused.prepack_projections()
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(fused(pixels).to_tuple(), model(pixels).to_tuple(), **CLOSE)
    assert len(used) == 4 * len(model.layers)
    fused.unpack_projections()
    fused.unfuse_qkv_projections()
    used.clear()
    torch.testing.assert_close(fused(pixels).to_tuple(), model(pixels).to_tuple(), **CLOSE)
    assert not used


def test_parameters_and_files_do_not_know_of_it(models, tmp_path):
    model, prepacked = models(layerscale_value=0.5)
    own = dict(model.named_parameters())
    assert own.keys() == dict(prepacked.named_parameters()).keys()
    assert list(model.state_dict()) == list(prepacked.state_dict())
    prepacked.save_pretrained(tmp_path)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(tensor, own[name])
    parameter = prepacked.layers[0].mlp.up_proj.weight
    prepacked.unpack_projections()
    assert prepacked.layers[0].mlp.up_proj.weight is parameter
    assert not [m for m in prepacked.modules() if isinstance(m, PrepackedLinear)]


@torch.no_grad()
def test_changed_weights_are_packed_anew(models, make_model, used):
    _, prepacked = models(layerscale_value=0.5)
    pixels = torch.randn(2, 3, 32, 32)

    def check(expected):
        used.clear()
        torch.testing.assert_close(prepacked(pixels).to_tuple(), expected(pixels).to_tuple(), **CLOSE)
        assert used

    other = make_model(ViTRegModel, layerscale_value=0.5)
    prepacked.load_state_dict(other.state_dict())
    check(other)
    prepacked.fold_layer_scale()
    check(other)
    for model in (prepacked, other):
        model.layers[0].mlp.up_proj.weight.data = torch.ones_like(model.layers[0].mlp.up_proj.weight)
    check(other)
    for model in (prepacked, other):
        model.layers[0].mlp.up_proj.weight.data -= 0.5  # in the same memory, and not counted as a change
    check(other)


def test_training_reaches_the_weights_and_evaluation_sees_what_it_did(models, used):
    model, prepacked = models(ViTRegForImageClassification)
    pixels, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    for network in (model, prepacked):
        network.train()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            network(pixels, labels=labels).loss.backward()
            optimizer.step()
    assert not used
    with torch.no_grad():
        torch.testing.assert_close(prepacked.eval()(pixels).logits, model.eval()(pixels).logits, atol=1e-4, rtol=1e-4)
    assert used


@torch.no_grad()
def test_copies_and_pickles_pack_for_themselves(models, used):
    model, prepacked = models()
    pixels, file = torch.randn(2, 3, 32, 32), io.BytesIO()
    torch.save(prepacked, file)
    copies = [copy.deepcopy(prepacked), torch.load(io.BytesIO(file.getvalue()), weights_only=False)]
    for copied in copies:
        used.clear()
        torch.testing.assert_close(copied(pixels).to_tuple(), model(pixels).to_tuple(), **CLOSE)
        assert used
    weights = sum(p.nbytes for p in model.parameters())
    assert len(file.getvalue()) < 1.5 * weights


# by PyTorch's own forward derivatives
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@torch.no_grad()
def test_what_cannot_use_packed_weights_takes_the_others(models, used, monkeypatch):
    model, prepacked = models()
    for network in (model, prepacked):
        network.set_attn_implementation("eager")  # of sdpa PyTorch has no rule for torch.func on CPUs
    pixels = torch.randn(2, 3, 32, 32)
    with FlopCounterMode(display=False) as own:
        model(pixels)
    with FlopCounterMode(display=False) as counted:
        prepacked(pixels)
    assert counted.get_total_flops() == own.get_total_flops() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prepacked(pixels).pooler_output, model(pixels).pooler_output)
    with monkeypatch.context() as patched:
        patched.setattr(torch.backends.mkldnn, "enabled", False)
        assert torch.equal(prepacked(pixels).pooler_output, model(pixels).pooler_output)

    def pooled(network):
        return lambda one: network(one[None]).pooler_output

    by_image = [torch.func.vmap(pooled(network))(pixels) for network in (model, prepacked)]
    torch.testing.assert_close(*by_image)
    tangents = [torch.func.jvp(pooled(network), (pixels[0],), (pixels[1],))[1] for network in (model, prepacked)]
    torch.testing.assert_close(*tangents)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(pixels[0], pixels[1])
        tangent = torch.autograd.forward_ad.unpack_dual(pooled(prepacked)(dual)).tangent
    torch.testing.assert_close(tangent, tangents[0])
    assert not used
    half = prepacked.to(torch.float16)
    assert half(pixels.half()).pooler_output.dtype == torch.float16
    assert not used


@torch.no_grad()
def test_compiled_for_any_size_and_exported(models, count_graphs):
    model, prepacked = models(num_hidden_layers=2)
    compiled, graphs = count_graphs(prepacked)
    for size in [(2, 3, 48, 24), (4, 3, 24, 56), (5, 3, 72, 40)]:
        pixels = torch.randn(*size)
        torch.testing.assert_close(compiled(pixels).pooler_output, model(pixels).pooler_output, **CLOSE)
    assert len(graphs) == 1
    pixels = torch.randn(2, 3, 32, 32)
    exported = torch.export.export(prepacked, (pixels,)).module()
    torch.testing.assert_close(exported(pixels).pooler_output, model(pixels).pooler_output, **CLOSE)


@pytest.mark.skipif(not can_prepack(torch.bfloat16), reason="this processor does not multiply bfloat16")
@torch.no_grad()
def test_bfloat16(make_model, used):
    model = make_model(ViTRegModel).to(torch.bfloat16)
    prepacked = copy.deepcopy(model)
    prepacked.prepack_projections()
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)
    expected, got = model(pixels).pooler_output, prepacked(pixels).pooler_output
    torch.testing.assert_close(got, expected, atol=0.05, rtol=0.05)
    assert used


@torch.no_grad()
def test_adapters_and_hooks_work_on_prepacked_projections(models):
    model, prepacked = models(ViTRegForImageClassification)
    pixels, seen = torch.randn(2, 3, 32, 32), []
    prepacked.vitreg.layers[-1].attention.k_proj.register_forward_hook(lambda *call: seen.append(call[-1]))
    expected = model(pixels, output_tokens=False).logits
    torch.testing.assert_close(prepacked(pixels, output_tokens=False).logits, expected, **CLOSE)
    assert len(seen) == 1
    add_lora(prepacked, rank=2, alpha=2)
    torch.testing.assert_close(prepacked(pixels).logits, expected, **CLOSE)  # the adapter starts at zero
    for name, parameter in prepacked.named_parameters():
        parameter.add_(0.1 * ("lora" in name))
    adapted = prepacked(pixels).logits
    torch.testing.assert_close(merge_lora(prepacked)(pixels).logits, adapted, **CLOSE)
    assert not torch.allclose(adapted, expected, **CLOSE)


class Adapted(nn.Linear):
    """What adapters and quantisation put in the place of a projection."""


def test_what_cannot_be_prepacked_is_refused_before_anything_changes(make_model):
    model = make_model(ViTRegModel)
    model.layers[1].mlp.down_proj = Adapted(64, 32)
    with pytest.raises(ValueError, match=r"Expected nn\.Linear without adapters or hooks to prepack, got Adapted"):
        model.prepack_projections()
    fused = make_model(ViTRegModel)
    fused.fuse_qkv_projections()
    fused.layers[1].attention.qkv_proj = Adapted(32, 96)
    with pytest.raises(ValueError, match=r"Expected the projections of fuse_qkv_projections to prepack, got Adapted"):
        fused.prepack_projections()
    assert not [m for m in fused.modules() if isinstance(m, PrepackedLinear)]
    with pytest.raises(ValueError, match=r"Expected weights on a CPU.*got torch\.float16 on cpu"):
        make_model(ViTRegModel).half().prepack_projections()
    with pytest.raises(ValueError, match=r"Expected weights on a CPU.*got torch\.float32 on meta"):
        make_model(ViTRegModel).to("meta").prepack_projections()
    with torch.inference_mode():
        made_there = make_model(ViTRegModel)
    with pytest.raises(ValueError, match=r"outside of torch\.inference_mode"):
        made_there.prepack_projections()
    assert not [m for m in model.modules() if isinstance(m, PrepackedLinear)]
