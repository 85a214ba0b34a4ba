"""`output_tokens=False`: the last layer of what the pooling reads is the same as that of all tokens."""

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vitreg_hf import (
    ViTRegBackbone,
    ViTRegConfig,
    ViTRegForImageClassification,
    ViTRegForMaskedImageModeling,
    ViTRegForSemanticSegmentation,
    ViTRegModel,
)
from vitreg_hf.model import inference
from vitreg_hf.model.embeddings import ViTRegEmbeddings

POOLINGS = {"cls": 1, "cls_register_mean": 5, "mean": None, "cls_mean": None}  # tokens of the last layer
BLOCKS = [
    {},
    {"layerscale_value": 0.5, "use_swiglu_ffn": True},
    {"position_embedding_type": "rotary", "qk_norm": True},
    {"separate_cls_norm": True},
    {"attention_bias_kv": True},
    {"num_test_time_registers": 1, "register_neurons": [[0, 3]]},
    {"num_hidden_layers": 1, "pooled_norm": True},
]


def tokens_of_the_last_layer(model, *args, **kwargs):
    """How many tokens leave it."""
    seen = []
    hook = model.base_model.layers[-1].register_forward_hook(lambda *call: seen.append(call[-1].shape[1]))
    model(*args, **kwargs)
    hook.remove()
    return seen[0]


@pytest.fixture
def padded():
    mask = torch.ones(3, 32, 48, dtype=torch.long)
    mask[0, :, 24:] = 0
    mask[1, 16:] = 0
    return mask


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("pooling", POOLINGS)
@torch.no_grad()
def test_logits_are_those_of_all_tokens(make_config, pooling, backend):
    model = ViTRegForImageClassification(make_config(pooling=pooling)).eval()
    model.set_attn_implementation(backend)
    pixels = torch.randn(3, 3, 32, 48)
    whole, alone = model(pixels), model(pixels, output_tokens=False)
    torch.testing.assert_close(alone.logits, whole.logits, atol=1e-5, rtol=1e-5)
    computed = tokens_of_the_last_layer(model, pixels, output_tokens=False)
    assert computed == (POOLINGS[pooling] or 1 + 4 + 24)


@pytest.mark.parametrize("fields", BLOCKS, ids=str)
@torch.no_grad()
def test_every_kind_of_block(make_config, fields, padded):
    config = make_config(**fields)
    model = ViTRegForImageClassification(config).eval()
    for parameter in model.parameters():  # bias of attention starts at zero
        parameter.add_(0.1 * torch.randn_like(parameter))
    pixels = torch.randn(3, 3, 32, 48)
    for inputs in ({}, {"pixel_mask": padded}):
        whole, alone = model(pixels, **inputs), model(pixels, output_tokens=False, **inputs)
        torch.testing.assert_close(alone.logits, whole.logits, atol=1e-5, rtol=1e-5)
        assert tokens_of_the_last_layer(model, pixels, output_tokens=False, **inputs) == 1


@pytest.mark.parametrize(("backend", "computed"), [("eager", 1), ("sdpa", 1), ("flex_attention", 29)])
@torch.no_grad()
def test_padding(make_config, padded, backend, computed):
    model = ViTRegForImageClassification(make_config()).eval()
    model.set_attn_implementation(backend)
    pixels = torch.randn(3, 3, 32, 48)
    whole = model(pixels, pixel_mask=padded).logits
    alone = model(pixels, pixel_mask=padded, output_tokens=False).logits
    torch.testing.assert_close(alone, whole, atol=1e-5, rtol=1e-5)
    assert tokens_of_the_last_layer(model, pixels, pixel_mask=padded, output_tokens=False) == computed


@torch.no_grad()
def test_register_neurons_of_the_last_layer_read_all_tokens(make_config):
    config = make_config(num_test_time_registers=1, register_neurons=[[2, 3], [2, 9]])
    model, pixels = ViTRegForImageClassification(config).eval(), torch.randn(2, 3, 32, 32)
    assert tokens_of_the_last_layer(model, pixels, output_tokens=False) == 1 + 4 + 1 + 16
    torch.testing.assert_close(model(pixels, output_tokens=False).logits, model(pixels).logits)


@pytest.mark.parametrize("pooling", POOLINGS)
@torch.no_grad()
def test_what_was_not_computed_is_none_and_all_else_equal(make_config, pooling):
    model, pixels = ViTRegModel(make_config(pooling=pooling)).eval(), torch.randn(2, 3, 32, 32)
    whole, alone = model(pixels), model(pixels, output_tokens=False)
    tokens = {"last_hidden_state", "register_tokens", "patch_tokens", "patch_map"}
    missing = {"cls": tokens, "cls_register_mean": tokens - {"register_tokens"}}.get(pooling, set())
    assert whole.keys() - alone.keys() == missing
    for name in alone.keys():  # noqa: SIM118  # iterating over an output gives no names
        torch.testing.assert_close(alone[name], whole[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions", "output_prefix_attentions"])
@torch.no_grad()
def test_what_is_recorded_is_of_all_tokens(make_config, asked):
    model, pixels = ViTRegForImageClassification(make_config()).eval(), torch.randn(2, 3, 32, 32)
    whole, alone = (model(pixels, output_tokens=tokens, **{asked: True}) for tokens in (True, False))
    for name in (asked.removeprefix("output_"), "patch_tokens"):
        torch.testing.assert_close(alone[name], whole[name])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["mask", "subset"])
def test_gradients_in_training(make_config, kind, checkpointing):
    """With stochastic depth, whose choice of samples is the same from the same seed."""
    model = ViTRegForImageClassification(make_config(drop_path_rate=0.4, drop_path_kind=kind, layerscale_value=0.5))
    model.train()
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    pixels, labels, found = torch.randn(4, 3, 32, 48), torch.tensor([0, 1, 2, 3]), []
    for tokens in (True, False):
        model.zero_grad()
        torch.manual_seed(5)
        model(pixels, labels=labels, output_tokens=tokens).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("head", [ViTRegForMaskedImageModeling, ViTRegForSemanticSegmentation, ViTRegBackbone])
@torch.no_grad()
def test_heads_that_read_patches_compute_them(make_config, head):
    model, pixels = head(make_config()).eval(), torch.randn(2, 3, 32, 32)
    whole, alone = model(pixels), model(pixels, output_tokens=False)
    assert alone.keys() == whole.keys()
    torch.testing.assert_close(alone.to_tuple()[0], whole.to_tuple()[0])


@torch.no_grad()
def test_compiled_and_exported_with_dynamic_sizes(make_config):
    torch.compiler.reset()
    model = ViTRegForImageClassification(make_config(num_hidden_layers=2)).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    size = {0: torch.export.Dim("batch"), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    example = (torch.randn(2, 3, 32, 32),)
    exported = torch.export.export(LogitsAlone(model), example, dynamic_shapes=(size,)).module()
    for shape in [(2, 3, 32, 32), (3, 3, 48, 24)]:
        pixels = torch.randn(*shape)
        expected = model(pixels).logits
        torch.testing.assert_close(compiled(pixels, output_tokens=False).logits, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(exported(pixels), expected, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


class LogitsAlone(torch.nn.Module):
    """Without keyword arguments, of which versions of PyTorch name the sizes in different ways."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values, output_tokens=False).logits


def test_a_twelfth_of_the_operations_is_not_done():
    """ViT-S and ViT-B with four registers, 224 px: at least 8 % less, as of the last layer next to nothing is left."""
    for width in (384, 768):
        config = ViTRegConfig(hidden_size=width, num_attention_heads=width // 64, intermediate_size=4 * width)
        counts = []
        with torch.device("meta"):
            model, pixels = ViTRegForImageClassification(config).eval(), torch.randn(1, 3, 224, 224)
            for tokens in (True, False):
                with FlopCounterMode(display=False) as counter, torch.no_grad():
                    model(pixels, output_tokens=tokens)
                counts.append(counter.get_total_flops())
        assert counts[1] < 0.92 * counts[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_the_way_by_weights_is_exact(make_config, dtype):
    """In float64 to its rounding; in half precision no further from float64 than the way by keys and values."""
    config = make_config(pooling="cls_register_mean")
    model = ViTRegForImageClassification(config).eval().double()
    pixels = torch.randn(4, 3, 48, 48, dtype=torch.float64)
    exact = model(pixels).logits
    model, pixels = model.to(dtype), pixels.to(dtype)
    whole, alone = (
        (model(pixels, output_tokens=tokens).logits.double() - exact).abs().max() for tokens in (True, False)
    )
    assert alone <= max(3 * whole, 1e-12)


@pytest.mark.parametrize("part", ["k_proj", "v_proj"])
@torch.no_grad()
def test_a_projection_that_is_watched_runs_and_gives_the_same(make_config, part):
    """A hook may record keys, or be an adapter that changes them."""
    model, pixels = ViTRegForImageClassification(make_config()).eval(), torch.randn(2, 3, 32, 32)
    by_weights, seen = model(pixels, output_tokens=False).logits, []
    projection = getattr(model.vitreg.layers[-1].attention, part)
    hook = projection.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    torch.testing.assert_close(model(pixels, output_tokens=False).logits, by_weights, atol=1e-5, rtol=1e-5)
    assert seen == [(2, 21, 32)]
    hook.remove()
    projection.forward = lambda tokens: torch.zeros(*tokens.shape[:-1], 32)  # as Accelerate puts its own in place
    changed = model(pixels, output_tokens=False).logits
    torch.testing.assert_close(changed, model(pixels).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(changed, by_weights, atol=1e-4)


@torch.no_grad()
def test_attention_that_a_user_registered_is_called_in_every_layer(make_config):
    calls = []

    def own(module, query, *args, **kwargs):
        calls.append(query.shape[2])
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register("counted", own)
    model, pixels = ViTRegForImageClassification(make_config()).eval(), torch.randn(2, 3, 32, 32)
    expected = model(pixels, output_tokens=False).logits
    model.set_attn_implementation("counted")
    torch.testing.assert_close(model(pixels, output_tokens=False).logits, expected, atol=1e-5, rtol=1e-5)
    assert calls == [21, 21, 1]


@pytest.mark.parametrize("fields", [{}, {"hidden_act": "gelu_pytorch_tanh"}, {"use_swiglu_ffn": True}], ids=str)
@torch.no_grad()
def test_neurons_written_over_are_those_that_are_not(make_config, fields):
    mlp, tokens = ViTRegModel(make_config(**fields)).layers[0].mlp, torch.randn(2, 5, 32)
    before = tokens.clone()
    fast = mlp(tokens)
    projections = [getattr(mlp, name) for name in ("gate_proj", "up_proj") if hasattr(mlp, name)]
    seen = {}
    hooks = [one.register_forward_hook(lambda m, i, output: seen.update({m: output})) for one in projections]
    assert torch.equal(mlp(tokens), fast)
    for one in projections:  # what a hook keeps is not written over
        assert torch.equal(seen[one], one(before))
    for hook in hooks:
        hook.remove()
    with torch.enable_grad():
        slow = mlp(tokens)
    assert slow.requires_grad
    assert torch.equal(slow, fast)
    assert torch.equal(tokens, before)


@torch.no_grad()
def test_what_a_hook_of_all_modules_keeps_is_not_written_over(make_config):
    model, pixels, kept = ViTRegModel(make_config()).eval(), torch.randn(2, 3, 32, 32), {}
    hook = register_module_forward_hook(lambda module, inputs, output: kept.update({module: (inputs, output)}))
    model(pixels, output_tokens=False)
    hook.remove()
    for layer in model.layers:
        for projection in (layer.mlp.up_proj, layer.attention.k_proj, layer.attention.v_proj):
            (inputs,), output = kept[projection]
            torch.testing.assert_close(output, projection(inputs))


@torch.no_grad()
def test_an_activation_that_was_put_in_place_is_used(make_config):
    mlp, tokens = ViTRegModel(make_config()).layers[0].mlp, torch.randn(2, 5, 32)
    mlp.act_fn = torch.nn.ReLU()
    assert torch.equal(mlp(tokens), mlp.down_proj(mlp.up_proj(tokens).relu()))


@pytest.mark.parametrize("pooling", ["cls", "cls_register_mean"])
@torch.no_grad()
def test_a_batch_too_large_for_the_caches_is_computed_in_pieces(make_config, padded, pooling, monkeypatch):
    model = ViTRegForImageClassification(make_config(pooling=pooling, use_mask_token=True)).eval()
    pixels, mask = torch.randn(7, 3, 32, 48), padded[[0, 1, 2, 0, 1, 2, 0]]
    masked, sizes = torch.rand(7, 24) < 0.3, []
    embed = ViTRegEmbeddings.forward

    def counted(self, pixel_values, *args, **kwargs):
        sizes.append(len(pixel_values))
        return embed(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(ViTRegEmbeddings, "forward", counted)
    for inputs in ({}, {"pixel_mask": mask}, {"pixel_mask": mask, "bool_masked_pos": masked}):
        run = model if "bool_masked_pos" not in inputs else model.vitreg
        monkeypatch.setattr(inference, "_FEWEST_TOKENS", 1024)
        at_once = run(pixels, output_tokens=False, **inputs)
        monkeypatch.setattr(inference, "_CACHED_BYTES", 3 * 29 * 4 * model.config.intermediate_size)  # three images
        monkeypatch.setattr(inference, "_FEWEST_TOKENS", 1)
        sizes.clear()
        in_pieces = run(pixels, output_tokens=False, **inputs)
        assert sizes == [3, 3, 1]
        assert in_pieces.keys() == at_once.keys()
        torch.testing.assert_close(in_pieces.to_tuple(), at_once.to_tuple(), atol=1e-5, rtol=1e-5)


def test_what_is_seen_is_computed_at_once(make_config, monkeypatch):
    """By a hook, with a gradient, in training, or where tokens are given back."""
    monkeypatch.setattr(inference, "_CACHED_BYTES", 1)
    monkeypatch.setattr(inference, "_FEWEST_TOKENS", 1)
    model, pixels, seen = ViTRegForImageClassification(make_config()).eval(), torch.randn(4, 3, 32, 32), []
    at_once = model.vitreg._images_at_once
    with torch.no_grad():
        assert at_once(pixels) == 1
        hook = model.vitreg.layers[1].register_forward_hook(lambda *call: seen.append(len(call[-1])))
        model(pixels, output_tokens=False)
        assert seen == [4]
        hook.remove()
        assert at_once(pixels[:1]) is None
        model.train()
        assert at_once(pixels) is None
        model.eval()
        model.config.pooling = "mean"
        assert at_once(pixels) is None
        model.config.pooling = "cls"
    assert at_once(pixels) is None


@pytest.mark.parametrize(
    ("images", "tokens", "width", "at_once"),
    [
        (1, 261, 384, 1),
        (8, 261, 384, 4),  # ViT-S/14 at 224 px: 8 MB hold what five images become
        (32, 261, 384, 5),
        (8, 261, 768, 4),  # ViT-B: of two images, but these have too few tokens
        (4, 1374, 768, 1),  # 518 px
    ],
)
def test_pieces_are_of_nearly_one_size(images, tokens, width, at_once, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert inference.in_cache(images, tokens, 4 * width * 4) == at_once
