"""One more key and value per head against softmax by hand, head by head, and in every kind of pass."""

import importlib.util
import json
import math
import pathlib
import sys

import pytest
import torch
from torch.export import Dim
from transformers import modeling_flash_attention_utils as flash_utils

from vitreg_hf import ViTRegBackbone, ViTRegForImageClassification, ViTRegModel
from vitreg_hf.model.configuration_checks import count_parameters

BIASED = {"attention_bias_kv": True}
NO_CLS = {"use_cls_token": False, "pooling": "mean"}
OWN_HEADS = {"num_attention_heads": 3, "head_dim": 12, "qkv_bias": False}
ROTARY = {"position_embedding_type": "rotary", "qk_norm": True}
MOVED = {"num_test_time_registers": 1, "register_neurons": [[0, 3], [1, 5], [2, 7]]}
VARIANTS = [{}, NO_CLS, {"num_register_tokens": 0}, OWN_HEADS, {"qk_norm": True, "layerscale_value": 0.5}, MOVED]
pixels = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(3))


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def biased(make_config, model_class=ViTRegModel, **fields):
    """With biases large enough to take a good part of every softmax."""
    model = model_class(make_config(**BIASED, **fields)).eval()
    for layer in model.base_model.layers:
        layer.attention.bias_k.normal_()
        layer.attention.bias_v.normal_()
    return model


def attention_by_hand(attention, tokens, config):
    """Output `(N, D)` and probabilities `(h, N, N)` of one image `(N, D)`, query by query."""
    size, outputs, maps = config.attention_head_dim, [], []
    for head in range(config.num_attention_heads):
        part = slice(head * size, (head + 1) * size)
        query, key, value = (p(tokens)[:, part] for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        query, key = attention.q_norm(query), attention.k_norm(key)
        mixed, shares = [], []
        for one in query:
            weights = [math.exp(one @ other / math.sqrt(size)) for other in [*key, attention.bias_k[head]]]
            total, values = sum(weights), [*value, attention.bias_v[head]]
            mixed.append(sum(weight / total * other for weight, other in zip(weights, values, strict=True)))
            shares.append([weight / total for weight in weights[:-1]])
        outputs.append(torch.stack(mixed))
        maps.append(torch.tensor(shares))
    return attention.o_proj(torch.cat(outputs, dim=-1)), torch.stack(maps)


def states_by_hand(model, state):
    """Hidden states and attention of one image from what the first block gets, `(N, D)`."""
    states, maps = [state], []
    for layer in model.layers:
        attended, attention = attention_by_hand(layer.attention, layer.norm1(state), model.config)
        state = state + layer.layer_scale1(attended)
        state = state + layer.layer_scale2(layer.mlp(layer.norm2(state)[None])[0])
        states.append(state)
        maps.append(attention)
    return states, maps


FLAGS = {"output_hidden_states": True, "output_attentions": True, "output_prefix_attentions": True}


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@torch.no_grad()
def test_equal_to_softmax_by_hand(make_config, fields):
    model = biased(make_config, **fields)
    prefix = model.config.num_prefix_tokens
    for backend in ("eager", "sdpa"):
        model.config._attn_implementation = backend
        outputs = model(pixels, **FLAGS)
        for image in range(2):
            states, maps = states_by_hand(model, outputs.hidden_states[0][image])
            for got, expected in zip(outputs.hidden_states, states, strict=True):
                close(got[image], expected)
            for full, part, expected in zip(outputs.attentions, outputs.prefix_attentions, maps, strict=True):
                close(full[image], expected)
                close(part[image], expected[:, :prefix])


@torch.no_grad()
def test_flex_attention_gives_the_same(make_config):
    model = biased(make_config)
    expected = model(pixels, **FLAGS)
    model.config._attn_implementation = "flex_attention"
    outputs = model(pixels, **FLAGS)
    for name in FLAGS:
        for mine, theirs in zip(*(o[name.removeprefix("output_")] for o in (outputs, expected)), strict=True):
            close(mine, theirs)


@torch.no_grad()
def test_flash_attention_gives_the_same(make_config, monkeypatch):
    path = pathlib.Path(__file__).with_name("flash_attn_reference.py")
    spec = importlib.util.spec_from_file_location("flash_attn_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, stand_in in module.FlashAttnReference().modules().items():
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setattr(flash_utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    model = biased(make_config).bfloat16()
    expected = model(pixels.bfloat16()).last_hidden_state
    model.config._attn_implementation = "flash_attention_2"
    close(model(pixels.bfloat16()).last_hidden_state.float(), expected.float(), 6e-2)


@torch.no_grad()
def test_what_is_missing_to_one_is_on_the_bias(make_config):
    model = biased(make_config)
    attention, query = model.layers[0].attention, torch.randn(2, 4, 5, 8)
    key = torch.randn(2, 4, 20, 8)
    logits = torch.cat([query @ key.transpose(2, 3), (query * attention.bias_k[None, :, None]).sum(-1, True)], -1)
    probabilities = (logits / 8**0.5).softmax(-1)
    got = attention._probabilities(query, key, None)
    close(got, probabilities[..., :-1])
    close(1 - got.sum(-1), probabilities[..., -1])
    for maps in (model(pixels, **FLAGS).attentions, model(pixels, **FLAGS).prefix_attentions):
        for weights in maps:
            assert 0 < weights.sum(-1).min() < weights.sum(-1).max() < 1


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@torch.no_grad()
def test_a_key_that_nobody_asks_for_changes_nothing(make_config, backend):
    model, plain = biased(make_config, attn_implementation=backend), ViTRegModel(make_config()).eval()
    for layer in model.layers:
        attention = layer.attention
        attention.bias_v.zero_()
        attention.bias_k.zero_()
        attention.bias_k[:, 0] = -1e4
        asked = attention.q_proj.weight.view(4, 8, 32)[:, 0], attention.q_proj.bias.view(4, 8)[:, 0]
        asked[0].zero_()
        asked[1].fill_(1.0)  # what every query asks of the first channel of its head
    plain.load_state_dict({name: p for name, p in model.state_dict().items() if ".bias_" not in name})
    close(model(pixels).last_hidden_state, plain(pixels).last_hidden_state, 1e-6)
    for mine, theirs in zip(model(pixels, **FLAGS).attentions, plain(pixels, **FLAGS).attentions, strict=True):
        close(mine, theirs, 1e-6)


@torch.no_grad()
def test_it_is_a_token_that_only_gives(make_config):
    """Removing a token and keeping its key and value as biases leaves the attention of all others as it was."""
    attention = biased(make_config).layers[0].attention
    plain = ViTRegModel(make_config()).layers[0].attention
    plain.load_state_dict({name: p for name, p in attention.state_dict().items() if not name.startswith("bias_")})
    tokens = torch.randn(1, 9, 32)
    attention.bias_k.copy_(plain.k_proj(tokens[0, -1]).view(4, 8))
    attention.bias_v.copy_(plain.v_proj(tokens[0, -1]).view(4, 8))
    close(attention(tokens[:, :-1])[0], plain(tokens)[0][:, :-1])


# Padding


@pytest.fixture
def batch():
    images = [torch.randn(3, *size) for size in ((40, 24), (48, 48), (16, 40))]
    padded, mask = torch.randn(3, 3, 48, 48) * 30, torch.zeros(3, 48, 48)
    for index, image in enumerate(images):
        height, width = image.shape[-2:]
        padded[index, :, :height, :width], mask[index, :height, :width] = image, 1
    return images, padded, mask


@pytest.mark.parametrize("fields", [{}, ROTARY, MOVED], ids=str)
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@torch.no_grad()
def test_padded_images_are_as_they_are_alone(make_config, batch, backend, fields):
    images, padded, mask = batch
    model = biased(make_config, attn_implementation=backend, **fields)
    together = model(padded, pixel_mask=mask, **FLAGS)
    for index, image in enumerate(images):
        alone = model(image[None], **FLAGS)
        rows, columns = alone.patch_map.shape[-2:]
        close(together.cls_token[index], alone.cls_token[0])
        close(together.patch_map[index, :, :rows, :columns], alone.patch_map[0])
        real = model.layout.token_mask(together.patch_mask)[index]
        for mine, theirs in zip(together.prefix_attentions, alone.prefix_attentions, strict=True):
            close(mine[index][..., real], theirs[0])
            assert (mine[index][..., ~real] == 0).all()
        for mine, theirs in zip(together.attentions, alone.attentions, strict=True):
            close(mine[index][:, real][..., real], theirs[0])


@pytest.mark.parametrize("backend", ["flex_attention", "flash_attention_2"])
@torch.no_grad()
def test_backends_whose_masks_have_no_room_refuse_padding(make_config, batch, backend):
    model = biased(make_config)
    model.config._attn_implementation = backend
    message = f"Expected eager or sdpa attention for padded images with attention_bias_kv=True, got '{backend}'"
    with pytest.raises(ValueError, match=message):
        model(batch[1], pixel_mask=batch[2])


# Training


def weighted(outputs):
    """A sum of all tokens with random weights, the same in every call; squares behind a norm would be constant."""
    generator = torch.Generator().manual_seed(5)
    tokens = [output.last_hidden_state for output in outputs]
    return sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).mean() for t in tokens)


def gradients_of(model, run):
    model.zero_grad()
    torch.manual_seed(5)
    weighted(run()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_gradients_reach_both(make_config):
    model = biased(make_config, attn_implementation="sdpa").double()
    images, step = pixels[:1].double(), 1e-4
    gradients = gradients_of(model, lambda: [model(images)])
    for name in ("bias_k", "bias_v"):
        for number, layer in enumerate(model.layers):
            bias = getattr(layer.attention, name)
            direction, losses = torch.randn_like(bias), []
            for sign in (1, -1):
                with torch.no_grad():
                    bias.add_(direction, alpha=sign * step)
                    losses.append(weighted([model(images)]).item())
                    bias.sub_(direction, alpha=sign * step)
            slope = (gradients[f"layers.{number}.attention.{name}"] * direction).sum().item()
            assert abs(slope) > 1e-5
            assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=1e-3)
    model.config._attn_implementation = "eager"
    for name, gradient in gradients_of(model, lambda: [model(images)]).items():
        close(gradient, gradients[name])


@pytest.mark.parametrize("fields", [{}, ROTARY], ids=str)
def test_packed_groups_are_passes_of_their_own(make_config, fields):
    model = biased(make_config, **fields).train()
    groups = [torch.randn(4, 3, 32, 32), torch.randn(3, 3, 16, 16), torch.randn(1, 3, 24, 40)]
    together, apart = model.forward_packed(groups), [model(group) for group in groups]
    for one, other in zip(together, apart, strict=True):
        close(one.last_hidden_state, other.last_hidden_state)
    expected = gradients_of(model, lambda: [model(group) for group in groups])
    for name, gradient in gradients_of(model, lambda: model.forward_packed(groups)).items():
        close(gradient, expected[name])


RATES = {"drop_path_rate": 0.5, "drop_path_schedule": "uniform", "patch_dropout_rate": 0.5}


@pytest.mark.parametrize("kind", ["mask", "subset"])
def test_gradient_checkpointing_changes_no_gradient(make_config, kind):
    model = biased(make_config, drop_path_kind=kind, attention_probs_dropout_prob=0.1, **RATES).train()
    images = torch.randn(4, 3, 32, 32)
    expected = gradients_of(model, lambda: [model(images)])
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    for name, gradient in gradients_of(model, lambda: [model(images)]).items():
        close(gradient, expected[name])


def test_subsets_keep_their_masks(make_config, batch):
    """What padding holds must not matter, whichever samples were kept."""
    model = biased(make_config, drop_path_kind="subset", **RATES).train()
    _, padded, mask = batch
    found = []
    for filling in (0.0, 100.0):
        torch.manual_seed(3)
        found.append(model(padded.where(mask[:, None].bool(), filling), pixel_mask=mask).cls_token)
    close(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_and_autocast(make_config, batch, dtype):
    model = biased(make_config)
    exact = model(batch[1], pixel_mask=batch[2]).cls_token
    with torch.autocast("cpu", dtype=dtype):
        lowered = model(batch[1], pixel_mask=batch[2]).cls_token
    half = model.to(dtype)(batch[1].to(dtype), pixel_mask=batch[2]).cls_token
    assert half.dtype == dtype
    for rounded in (lowered, half):
        assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


# Parameters


def test_two_parameters_per_block_and_no_others(make_config):
    plain, model = ViTRegForImageClassification(make_config()), biased(make_config, ViTRegForImageClassification)
    added = {f"vitreg.layers.{i}.attention.{name}" for i in range(3) for name in ("bias_k", "bias_v")}
    assert model.state_dict().keys() - plain.state_dict().keys() == added
    assert not plain.state_dict().keys() - model.state_dict().keys()
    assert all(model.get_parameter(name).shape == (4, 8) for name in added)
    assert plain.vitreg.layers[0].attention.bias_k is plain.vitreg.layers[0].attention.bias_v is None
    assert added <= model.no_weight_decay()
    assert model.no_weight_decay() - added == plain.no_weight_decay()
    assert {model.parameter_layers()[name] for name in added} == {1, 2, 3}


@pytest.mark.parametrize("fields", [{}, OWN_HEADS, {**ROTARY, "use_swiglu_ffn": True}, MOVED], ids=str)
def test_parameters_are_counted(make_config, fields):
    config = make_config(**BIASED, **fields)
    model = ViTRegForImageClassification(config)
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())


def test_initial_values_are_spread_as_those_of_tokens(make_config):
    model = ViTRegModel(make_config(**BIASED, hidden_size=512, token_initializer_range=0.3))
    for layer in model.layers:
        for bias in (layer.attention.bias_k, layer.attention.bias_v):
            assert bias.std().item() == pytest.approx(0.3, rel=0.2)


@pytest.mark.parametrize("fields", [{}, {"qk_norm": True}, MOVED], ids=["plain", "norms of heads", "register neurons"])
def test_tensor_parallel_plans_leave_attention_whole(make_config, fields):
    plan = set(biased(make_config, **fields).tp_plan)
    parts = {f"layers.*.mlp.{name}_proj" for name in ("up", "down")}
    assert plan == (set() if "register_neurons" in fields else parts)


@pytest.mark.parametrize("model_class", [ViTRegForImageClassification, ViTRegBackbone])
def test_saved_and_loaded_bit_by_bit(make_config, tmp_path, model_class):
    model = biased(make_config, model_class)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["attention_bias_kv"] is True
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded.eval()(pixels).patch_tokens, model(pixels).patch_tokens)


def test_checkpoints_without_are_loaded_and_the_new_parameters_reported(make_config, tmp_path):
    ViTRegModel(make_config()).save_pretrained(tmp_path)
    loaded, report = ViTRegModel.from_pretrained(tmp_path, attention_bias_kv=True, output_loading_info=True)
    assert report["missing_keys"] == {f"layers.{i}.attention.bias_{kind}" for i in range(3) for kind in "kv"}
    assert all(loaded.get_parameter(name).std() > 0.1 for name in report["missing_keys"])


# Compiled and exported


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
class TestCompiled:
    def test_at_several_sizes_with_padding_and_gradients(self, make_config):
        model = biased(make_config, num_hidden_layers=1).train()
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        for batch_size, height, width in ((2, 48, 24), (3, 24, 56)):
            images, mask = torch.randn(batch_size, 3, height, width), torch.ones(batch_size, height, width)
            mask[1, :, 16:] = 0
            found = []
            for network in (model, compiled):
                model.zero_grad()
                outputs = network(images, pixel_mask=mask, output_prefix_attentions=True)
                outputs.cls_token.square().sum().backward()
                grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
                found.append((outputs.cls_token, outputs.prefix_attentions[0], *grads))
            for eager, traced in zip(*found, strict=True):
                close(traced, eager, 1e-4)


@torch.no_grad()
def test_exported_and_in_onnx_at_other_sizes(make_config, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    model, path = biased(make_config, num_hidden_layers=2), str(tmp_path / "model.onnx")
    axes = {"pixel_values": {0: Dim("batch", max=64), 2: 8 * Dim("rows", max=64), 3: 8 * Dim("columns", max=64)}}
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    program = torch.export.export(model, (), inputs, dynamic_shapes=axes)
    torch.onnx.export(program, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in [(2, 3, 32, 32), (3, 3, 48, 24), (1, 3, 72, 40)]:
        images = torch.randn(*size)
        expected = model(images).last_hidden_state
        close(program.module()(pixel_values=images).last_hidden_state, expected)
        (first, *_) = session.run(None, {"pixel_values": images.numpy()})
        close(torch.from_numpy(first), expected, 1e-4)
