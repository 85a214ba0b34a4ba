"""What the paper and its released code say a ViT with registers is, and what a plain ViT is."""

import pytest
import torch
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, ViTConfig
from transformers.models.vit.modeling_vit import ViTModel

from vitreg_hf import ViTRegForImageClassification, ViTRegModel

SIZES = [(32, 32), (48, 24), (16, 56)]


def copy_weights(source, target, renames):
    """Load the weights of a Transformers model into ours; every weight on both sides is used."""
    renamed = {}
    for key, value in source.state_dict().items():
        for old, new in renames.items():
            key = key.replace(old, new)
        renamed[key] = value
    renamed.pop("embeddings.mask_token", None)
    target.load_state_dict(renamed, strict=True)


def initialised(model):
    """Weights far from special values such as ones and zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.eval()


VIT_RENAMES = {
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}
DINOV2_RENAMES = {
    "encoder.layer.": "layers.",
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
    # names of the oldest supported Transformers
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


@pytest.mark.parametrize("size", SIZES)
def test_without_registers_it_is_exactly_a_plain_vit(make_config, size):
    config = make_config(num_register_tokens=0, position_interpolation_antialias=False)
    shared = [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "image_size",
        "patch_size",
    ]
    fields = {name: getattr(config, name) for name in [*shared, "layer_norm_eps"]}
    peer = initialised(ViTModel(ViTConfig(**fields), add_pooling_layer=False))
    ours = ViTRegModel(config).eval()
    copy_weights(peer, ours, VIT_RENAMES)
    pixels = torch.randn(2, 3, *size)
    expected = peer(pixels, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(ours(pixels).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_with_registers_it_equals_the_register_model_of_transformers(make_config, size):
    config = make_config(layerscale_value=1.0, num_register_tokens=3)
    shared = [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
        "num_register_tokens",
    ]
    fields = {name: getattr(config, name) for name in shared}
    peer = initialised(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(mlp_ratio=2, **fields)))
    config.intermediate_size = 2 * config.hidden_size
    ours = ViTRegModel(config).eval()
    copy_weights(peer, ours, DINOV2_RENAMES)
    pixels = torch.randn(2, 3, *size)
    theirs = peer(pixels, output_hidden_states=True)
    mine = ours(pixels, output_hidden_states=True)
    torch.testing.assert_close(mine.last_hidden_state, theirs.last_hidden_state, atol=1e-5, rtol=1e-5)
    for own, other in zip(mine.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)


def test_registers_have_no_position(make_config):
    model = ViTRegModel(make_config()).eval()
    with torch.no_grad():
        before = model(torch.randn(1, 3, 32, 32), output_hidden_states=True).hidden_states[0]
        torch.testing.assert_close(model.layout.register_tokens(before), model.embeddings.register_tokens)
        model.embeddings.position_embeddings.add_(1.0)
        after = model(torch.randn(1, 3, 32, 32), output_hidden_states=True).hidden_states[0]
    assert torch.equal(model.layout.register_tokens(before), model.layout.register_tokens(after))
    assert not torch.allclose(model.layout.cls_token(before), model.layout.cls_token(after))


def test_registers_are_the_same_at_any_image_size(make_config):
    model = ViTRegModel(make_config()).eval()
    states = [model(torch.randn(1, 3, *size), output_hidden_states=True).hidden_states[0] for size in SIZES]
    for state in states:
        torch.testing.assert_close(model.layout.register_tokens(state), model.embeddings.register_tokens)


@pytest.mark.parametrize("training", [True, False])
def test_registers_take_part_in_every_block(make_config, training):
    """Changing a register changes what patches become, in training and in inference."""
    model = ViTRegModel(make_config()).train(training)
    pixels = torch.randn(1, 3, 32, 32)
    before = model(pixels, output_hidden_states=True)
    with torch.no_grad():
        model.embeddings.register_tokens[:, 0] += torch.randn(32)
    after = model(pixels, output_hidden_states=True)
    for old, new in zip(before.hidden_states[1:], after.hidden_states[1:], strict=True):
        assert (model.layout.patch_tokens(old) - model.layout.patch_tokens(new)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("pooling", "reads_registers"), [("cls", False), ("mean", False), ("cls_mean", False), ("cls_register_mean", True)]
)
def test_heads_read_registers_only_if_the_pooling_says_so(make_config, pooling, reads_registers):
    """With one block whose attention output is zero, registers can reach the head only by being read."""
    model = ViTRegForImageClassification(make_config(pooling=pooling, num_hidden_layers=1)).eval()
    with torch.no_grad():
        model.vitreg.layers[0].attention.o_proj.weight.zero_()
        pixels = torch.randn(1, 3, 32, 32)
        before = model(pixels).logits
        model.vitreg.embeddings.register_tokens.mul_(torch.randn(1, 4, 32))
        after = model(pixels).logits
    assert torch.equal(before, after) is not reads_registers


def spread_of_registers(model, registers, steps=20):
    """Largest distance between two registers after some steps of AdamW on a fixed task."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pixels, targets = torch.randn(8, 3, 32, 32), torch.randn(8, 32)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(pixels).pooler_output - targets).square().mean().backward()
        optimizer.step()
    return torch.cdist(registers[0], registers[0]).max().item()


def test_registers_trained_from_scratch_differ_unlike_those_of_transformers(make_config):
    ours = ViTRegModel(make_config(token_initializer_range=0.02, initializer_range=0.02))
    start = torch.cdist(ours.embeddings.register_tokens[0], ours.embeddings.register_tokens[0])
    assert start[~torch.eye(4, dtype=torch.bool)].min() > 0.05
    peer = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, mlp_ratio=2, image_size=32, patch_size=8
        )
    )
    assert spread_of_registers(peer, peer.embeddings.register_tokens) == 0.0
    assert spread_of_registers(ours, ours.embeddings.register_tokens) > 0.05


def test_models_without_cls(make_config):
    model = ViTRegForImageClassification(make_config(use_cls_token=False, pooling="mean")).eval()
    outputs = model(torch.randn(2, 3, 32, 32))
    assert outputs.logits.shape == (2, 5)
    assert outputs.cls_token is None
    assert outputs.register_tokens.shape == (2, 4, 32)
    assert model.vitreg(torch.randn(2, 3, 32, 32)).last_hidden_state.shape == (2, 4 + 16, 32)


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls_mean", "cls_register_mean"])
def test_poolings_read_what_they_say(make_config, pooling):
    model = ViTRegForImageClassification(make_config(pooling=pooling)).eval()
    pixels = torch.randn(2, 3, 32, 32)
    base = model.vitreg(pixels)
    parts = {
        "cls": [base.cls_token],
        "mean": [base.patch_tokens.mean(1)],
        "cls_mean": [base.cls_token, base.patch_tokens.mean(1)],
        "cls_register_mean": [base.cls_token, base.register_tokens.mean(1)],
    }[pooling]
    torch.testing.assert_close(model(pixels).logits, model.classifier(torch.cat(parts, dim=-1)))
    assert base.pooler_output.shape == (2, 32)
    assert torch.equal(base.pooler_output, parts[0])


def test_swiglu_is_silu_of_the_gate_times_up(make_config):
    mlp = ViTRegModel(make_config(use_swiglu_ffn=True)).layers[0].mlp
    x = torch.randn(2, 5, 32)
    gate = mlp.gate_proj(x)
    torch.testing.assert_close(mlp(x), mlp.down_proj(gate * torch.sigmoid(gate) * mlp.up_proj(x)))
    assert mlp.up_proj.out_features == 48


def test_layer_scale_scales_both_branches(make_config):
    model = ViTRegModel(make_config(layerscale_value=1e-5))
    assert torch.equal(model.layers[0].layer_scale1.lambda1, torch.full((32,), 1e-5))
    states = model.eval()(torch.randn(1, 3, 32, 32), output_hidden_states=True).hidden_states
    assert 0 < (states[-1] - states[0]).abs().max() < 1e-2
    assert not any("layer_scale" in name for name, _ in ViTRegModel(make_config()).named_parameters())


def test_biases_per_projection(make_config):
    attention = ViTRegModel(make_config(qkv_bias=False, value_bias=True, proj_bias=False)).layers[0].attention
    assert attention.q_proj.bias is None
    assert attention.k_proj.bias is None
    assert attention.v_proj.bias is not None
    assert attention.o_proj.bias is None
    mlp = ViTRegModel(make_config(mlp_bias=False)).layers[0].mlp
    assert mlp.up_proj.bias is None
    assert mlp.down_proj.bias is None


def test_head_dim_of_its_own(make_config):
    model = ViTRegModel(make_config(num_attention_heads=3, head_dim=16))
    assert model.layers[0].attention.q_proj.out_features == 48
    assert model(torch.randn(1, 3, 32, 32)).last_hidden_state.shape == (1, 21, 32)


class TestDropPath:
    def test_whole_samples_are_dropped_and_the_rest_scaled(self, make_config):
        drop = ViTRegModel(make_config(drop_path_rate=0.5, drop_path_schedule="uniform")).layers[0].drop_path.train()
        dropped = drop(torch.ones(400, 3, 2))
        per_sample = dropped.flatten(1)
        assert set(per_sample.unique().tolist()) == {0.0, 2.0}
        assert torch.equal(per_sample.amin(1), per_sample.amax(1))
        assert 0.4 < (per_sample[:, 0] > 0).float().mean() < 0.6

    def test_rates_follow_the_schedule_and_evaluation_drops_nothing(self, make_config):
        model = ViTRegModel(make_config(drop_path_rate=0.4))
        assert [layer.drop_path.rate for layer in model.layers] == pytest.approx([0.0, 0.2, 0.4])
        model.eval()
        pixels = torch.randn(1, 3, 32, 32)
        assert torch.equal(model(pixels).last_hidden_state, model(pixels).last_hidden_state)


def test_no_weight_decay_names_tokens_positions_biases_and_norms(make_config):
    model = ViTRegForImageClassification(make_config(layerscale_value=1.0, use_mask_token=True))
    names = model.no_weight_decay()
    tokens = {f"vitreg.embeddings.{n}" for n in ("cls_token", "register_tokens", "mask_token", "position_embeddings")}
    assert tokens <= names
    weights = {name for name, p in model.named_parameters() if p.ndim >= 2} - tokens
    assert not weights & names
    assert names | weights == {name for name, _ in model.named_parameters()}
