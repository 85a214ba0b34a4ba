"""Rotary positions: against loops, DINOv3 of Transformers and RoPE of timm, and in every kind of pass."""

import math

import pytest
import timm
import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from vitreg_hf import (
    ViTRegBackbone,
    ViTRegForImageClassification,
    ViTRegForMaskedImageModeling,
    ViTRegForSemanticSegmentation,
    ViTRegModel,
)
from vitreg_hf.model.packing import Packing
from vitreg_hf.model.position_embedding import RotaryPositions, Rotation, rotated
from vitreg_hf.model.token_layout import packed

ROTARY = {"position_embedding_type": "rotary"}
GRID = {**ROTARY, "rope_coordinates": "grid", "rope_theta": 50.0}
BOTH = [ROTARY, GRID]
AUGMENTED = {**ROTARY, "pos_embed_shift": 0.3, "pos_embed_jitter": 1.5, "pos_embed_rescale": 2.0}
SIZES = [(32, 32), (48, 24), (16, 72)]


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


# Against literal computations


def literal(vector, row, column, grid, config):
    """One query or key turned by the angles of its patch, pair of channels by pair of channels, in Python floats."""
    quarter, reference = config.attention_head_dim // 4, config.position_grid
    angles = []
    for place, count, own in zip((row, column), grid, reference, strict=True):
        centre = 2 * math.pi * ((place + 0.5) / count * 2 - 1)
        coordinate = centre if config.rope_coordinates == "centered" else place / count * own
        angles += [coordinate * config.rope_theta ** -(j / quarter) for j in range(quarter)]
    turned, half = list(vector), 2 * quarter
    for j, angle in enumerate(angles):
        first, second = vector[j], vector[j + half]
        turned[j] = first * math.cos(angle) - second * math.sin(angle)
        turned[j + half] = first * math.sin(angle) + second * math.cos(angle)
    return turned


@pytest.mark.parametrize("fields", BOTH, ids=["centered", "grid"])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 7)])
def test_every_patch_is_turned_by_the_angles_of_its_place(make_config, fields, grid):
    config = make_config(image_size=(32, 48), **fields)
    vectors = torch.randn(1, 1, grid[0] * grid[1], config.attention_head_dim)
    rotation = RotaryPositions(config)(grid, torch.device("cpu"))
    got = rotated(vectors, Rotation(*(part[:, None] for part in rotation)))[0, 0]
    for place, vector in enumerate(vectors[0, 0].double().tolist()):
        expected = literal(vector, place // grid[1], place % grid[1], grid, config)
        close(got[place].double(), torch.tensor(expected, dtype=torch.float64))


def attention_by_hand(layer, tokens, config, grid):
    """Attention of one image `(N, D)` with loops over heads and tokens."""
    attention, size, prefix = layer.attention, config.attention_head_dim, config.num_prefix_tokens
    outputs = []
    for head in range(config.num_attention_heads):
        part = slice(head * size, (head + 1) * size)
        query, key, value = (p(tokens)[:, part] for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        if config.qk_norm:
            query, key = attention.q_norm(query), attention.k_norm(key)
        for turned in (query, key):
            for place in range(grid[0] * grid[1]):
                vector = turned[prefix + place].tolist()
                turned[prefix + place] = torch.tensor(literal(vector, *divmod(place, grid[1]), grid, config))
        outputs.append((query @ key.T / math.sqrt(size)).softmax(dim=-1) @ value)
    return attention.o_proj(torch.cat(outputs, dim=-1))


@pytest.mark.parametrize("fields", [*BOTH, {**ROTARY, "qk_norm": True, "num_attention_heads": 3, "head_dim": 12}])
@torch.no_grad()
def test_attention_turns_patches_and_nothing_else(make_config, fields):
    config = make_config(**fields)
    layer = ViTRegModel(config).eval().layers[0]
    for p in layer.attention.parameters():
        p.copy_(torch.randn_like(p) * 0.3 + (p.ndim == 1))
    grid, tokens = (2, 3), torch.randn(1, 5 + 6, 32)
    rotation = Rotation(*ViTRegModel(config).embeddings(torch.zeros(1, 3, 16, 24)).rotation)
    got = layer.attention(tokens, rotations=[rotation])[0]
    close(got[0], attention_by_hand(layer, tokens[0], config, grid), 1e-4)
    assert (layer.attention(tokens)[0] - got).abs().max() > 0.01


# Against the implementations people use


def dinov3(**fields):
    """A small DINOv3 of Transformers with random weights everywhere."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    model = DINOv3ViTModel(
        DINOv3ViTConfig(image_size=32, patch_size=8, num_register_tokens=3, layerscale_value=0.7, **sizes, **fields)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model


def renamed(weights):
    """Values by the names that ViTReg has for those of DINOv3."""
    names = {"model.layer.": "layers.", "embeddings.patch_embeddings.": "embeddings.patch_embeddings.projection."}
    names["norm."] = "layernorm."
    found = {}
    for name, value in weights.items():
        start = next((start for start in names if name.startswith(start)), "")
        found[names.get(start, "") + name.removeprefix(start)] = value
    return found


def from_dinov3(source, make_config, **fields):
    config = make_config(
        **{"num_attention_heads": 2, "num_register_tokens": 3, "layerscale_value": 1.0, "layer_norm_eps": 1e-5},
        **{"key_bias": False, "use_mask_token": True, **ROTARY, **fields},
    )
    model = ViTRegModel(config)
    model.load_state_dict(renamed(source.state_dict()))
    return model


class TestDinov3:
    @pytest.mark.parametrize("gated", [False, True])
    @torch.no_grad()
    def test_every_hidden_state_at_three_sizes(self, make_config, gated):
        source = dinov3(use_gated_mlp=gated, hidden_act="silu" if gated else "gelu").eval()
        model = from_dinov3(source, make_config, use_swiglu_ffn=gated).eval()
        for size in SIZES:
            pixels = torch.randn(2, 3, *size)
            got, expected = model(pixels, output_hidden_states=True), source(pixels, output_hidden_states=True)
            close(got.last_hidden_state, expected.last_hidden_state)
            close(got.pooler_output, expected.pooler_output)
            assert len(got.hidden_states) == 4
            for mine, theirs in zip(got.hidden_states[:-1], expected.hidden_states[:-1], strict=True):
                close(mine, theirs)
            close(model.layernorm(got.hidden_states[-1]), expected.last_hidden_state)

    def test_gradients_are_the_same(self, make_config):
        source = dinov3().eval()
        model = from_dinov3(source, make_config).eval()
        pixels, weights = torch.randn(2, 3, 24, 40), torch.randn(32)
        for network in (source, model):
            (network(pixels).last_hidden_state * weights).sum().backward()
        expected = renamed({name: p.grad for name, p in source.named_parameters()})
        for name, p in model.named_parameters():
            if name != "embeddings.mask_token":
                assert p.grad.abs().max() > 1e-3
                close(p.grad, expected[name], 1e-4)

    @pytest.mark.parametrize("augmentation", ["shift", "jitter", "rescale"])
    def test_augmentation_draws_the_same_numbers(self, make_config, augmentation):
        names = {"pos_embed_shift": None, "pos_embed_jitter": None, "pos_embed_rescale": None}
        augmented = {**names, f"pos_embed_{augmentation}": 1.7}
        source = dinov3(**augmented).train()
        model = from_dinov3(source, make_config, **augmented).train()
        pixels, outputs = torch.randn(2, 3, 32, 48), []
        for network in (source, model):
            torch.manual_seed(3)
            outputs.append(network(pixels).last_hidden_state)
        close(outputs[1], outputs[0])


def halves(rows, heads, dim):
    """Rows of a projection whose channels turn in neighbouring pairs, as those of one whose halves turn."""
    return rows.view(heads, dim // 2, 2, -1).transpose(1, 2).reshape(rows.shape)


@torch.no_grad()
def test_grid_coordinates_are_those_of_timm(make_config):
    name, heads = "vit_medium_patch16_rope_reg1_gap_256", 2
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": heads, "num_classes": 5, "img_size": 64}
    sizes["ref_feat_shape"] = (4, 4)  # timm takes it apart from the image size; here it follows from it
    source = timm.create_model(name, dynamic_img_size=True, **sizes).eval()
    for p in source.parameters():
        p.normal_(std=0.2)
    config = make_config(
        **{"image_size": 64, "patch_size": 16, "num_hidden_layers": 2, "num_attention_heads": heads},
        **{"intermediate_size": 128, "num_register_tokens": 1, "use_cls_token": False, "pooling": "mean"},
        **{"pooled_norm": True, "key_bias": False, "layerscale_value": 1.0, **ROTARY},
        **{"rope_coordinates": "grid", "rope_theta": 10000.0},
    )
    model, dim = ViTRegForImageClassification(config).eval(), config.attention_head_dim
    backbone = model.vitreg
    copied = [(backbone.embeddings.register_tokens, source.reg_token), (backbone.layernorm, source.fc_norm)]
    copied += [(backbone.embeddings.patch_embeddings.projection, source.patch_embed.proj)]
    copied += [(model.classifier, source.head)]
    for own, theirs in zip(backbone.layers, source.blocks, strict=True):
        query, key, value = theirs.attn.qkv.weight.chunk(3)
        own.attention.q_proj.weight.copy_(halves(query, heads, dim))
        own.attention.q_proj.bias.copy_(halves(theirs.attn.q_bias, heads, dim))
        own.attention.k_proj.weight.copy_(halves(key, heads, dim))
        own.attention.v_proj.weight.copy_(value)
        own.attention.v_proj.bias.copy_(theirs.attn.v_bias)
        copied += [(own.layer_scale1.lambda1, theirs.gamma_1), (own.layer_scale2.lambda1, theirs.gamma_2)]
        copied += [(own.norm1, theirs.norm1), (own.norm2, theirs.norm2), (own.attention.o_proj, theirs.attn.proj)]
        copied += [(own.mlp.up_proj, theirs.mlp.fc1), (own.mlp.down_proj, theirs.mlp.fc2)]
    for own, theirs in copied:
        if isinstance(own, torch.nn.Module):
            own.load_state_dict(theirs.state_dict())
        else:
            own.copy_(theirs)
    for size in [(64, 64), (96, 48), (32, 128)]:
        pixels = torch.randn(2, 3, *size)
        got = model(pixels)
        close(backbone(pixels).last_hidden_state, source.forward_features(pixels))
        close(got.logits, source(pixels))


# Randomness


@pytest.mark.parametrize("training", [True, False])
def test_without_augmentation_training_and_evaluation_are_the_same(make_config, training):
    model, pixels = ViTRegModel(make_config(**ROTARY)).train(training), torch.randn(1, 3, 24, 40)
    assert torch.equal(model(pixels).last_hidden_state, model(pixels).last_hidden_state)
    close(model(pixels).last_hidden_state, model.eval()(pixels).last_hidden_state)


def test_augmentation_is_random_in_training_alone(make_config):
    model, pixels = ViTRegModel(make_config(**AUGMENTED)).train(), torch.randn(1, 3, 24, 40)
    first, second = model(pixels).last_hidden_state, model(pixels).last_hidden_state
    assert (first - second).abs().max() > 1e-3
    plain = ViTRegModel(make_config(**ROTARY)).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(pixels).last_hidden_state, plain(pixels).last_hidden_state)


def test_augmentation_is_within_its_bounds_and_fills_them(make_config):
    config = make_config(**{**ROTARY, "pos_embed_shift": 0.25, "pos_embed_rescale": 2.0})
    positions, axes = RotaryPositions(config), torch.tensor([[-0.5, 0.5]])
    drawn = [positions._augmented([axes, axes]) for _ in range(300)]
    scales = torch.stack([(rows[0, 1] - rows[0, 0]) for rows, _ in drawn])
    shifts = torch.stack([axis.mean() for pair in drawn for axis in pair]) / scales.repeat_interleave(2)
    assert 0.5 <= scales.min() < 0.55
    assert 1.9 < scales.max() <= 2.0
    assert shifts.abs().max() <= 0.25 + 1e-6
    assert shifts.min() < -0.23
    assert shifts.max() > 0.23


# In every kind of pass


def with_random_norms(model):
    """Norms that are not the identity, so that a wrong one shows."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.3)
    return model


@pytest.mark.parametrize("fields", BOTH, ids=["centered", "grid"])
@torch.no_grad()
def test_padded_images_are_what_they_are_alone(make_config, fields):
    model = with_random_norms(ViTRegModel(make_config(qk_norm=True, **fields))).eval()
    sizes = [(32, 40), (24, 16), (8, 40)]
    pixels, mask = torch.randn(3, 3, 32, 40), torch.zeros(3, 32, 40)
    for image, (height, width) in enumerate(sizes):
        mask[image, :height, :width] = 1
    together = model(pixels, pixel_mask=mask, output_prefix_attentions=[1])
    for image, (height, width) in enumerate(sizes):
        alone = model(pixels[image : image + 1, :, :height, :width], output_prefix_attentions=[1])
        close(together.cls_token[image], alone.cls_token[0])
        close(together.register_tokens[image], alone.register_tokens[0])
        patches = together.patch_map[image, :, : height // 8, : width // 8]
        close(patches, alone.patch_map[0])


@pytest.mark.parametrize("fields", [ROTARY, {**GRID, "qk_norm": True}, {**ROTARY, "attn_implementation": "eager"}])
def test_packed_groups_are_what_they_are_apart(make_config, fields):
    model = with_random_norms(ViTRegModel(make_config(**fields))).train()
    groups = [torch.randn(4, 3, 32, 32), torch.randn(6, 3, 16, 16), torch.randn(2, 3, 24, 40)]
    gradients = []
    for outputs in (model.forward_packed(groups), [model(group) for group in groups]):
        model.zero_grad()
        weights = torch.randn(32, generator=torch.Generator().manual_seed(1))
        sum((output.last_hidden_state * weights).mean() for output in outputs).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for together, apart in zip(*gradients, strict=True):
        close(together, apart)
    for together, group in zip(model.forward_packed(groups), groups, strict=True):
        close(together.last_hidden_state, model(group).last_hidden_state)


@pytest.mark.parametrize("masked", [False, True])
def test_kept_patches_keep_their_rotation(make_config, masked):
    model = ViTRegModel(make_config(patch_dropout_rate=0.5, **ROTARY)).train()
    pixels, mask = torch.randn(3, 3, 32, 48), torch.ones(3, 32, 48)
    mask[1, 24:] = 0
    given = {"pixel_mask": mask} if masked else {}
    found = model.embeddings(pixels, **given)
    whole = model.eval().embeddings(pixels, **given)
    layout = model.layout
    same = layout.patch_tokens(found.tokens)[:, :, None] == layout.patch_tokens(whole.tokens)[:, None]
    kept = same.all(-1).int().argmax(-1)  # (3, 12), places on the grid
    for mine, all_patches in zip(found.rotation, whole.rotation, strict=True):
        patches = layout.patch_tokens(all_patches[:, 0]).expand(3, -1, -1)
        expected = patches.take_along_dim(kept[..., None], dim=1)
        assert torch.equal(layout.patch_tokens(mine[:, 0]), expected)
        assert torch.equal(layout.prefix_tokens(mine[:, 0]), layout.prefix_tokens(all_patches[:, 0]).expand(3, -1, -1))


def test_rotations_follow_the_samples_that_stochastic_depth_takes(make_config, monkeypatch):
    """Packed groups, patch dropout and subsets at once: each image of a group has angles of its own."""
    rates = {"drop_path_rate": 0.5, "drop_path_schedule": "uniform", "drop_path_kind": "subset"}
    config = make_config(num_hidden_layers=1, patch_dropout_rate=0.5, **rates, **ROTARY)
    model, chosen = ViTRegModel(config).train(), torch.tensor([2, 0])
    layer = model.layers[0]
    monkeypatch.setattr(Packing, "_kept_of_groups", lambda packing, rate: [chosen] * len(packing.sizes))
    embedded = [model.embeddings(torch.randn(4, 3, *size)) for size in SIZES]
    groups, rotations = tuple(e.tokens for e in embedded), tuple(e.rotation for e in embedded)
    packing = Packing([tuple(group.shape[:2]) for group in groups], groups[0].device, rotations, apart=True)
    got = packing.by_group(layer(packed(groups), packing=packing))
    for tokens, rotation, group in zip(groups, rotations, got, strict=True):
        for image in range(4):
            own = Rotation(*(part[image : image + 1] for part in rotation))
            state = tokens[image : image + 1]
            if image in chosen:
                state = state + 2 * layer.attention(layer.norm1(state), rotations=[own])[0]
                state = state + 2 * layer.mlp(layer.norm2(state))
            close(group[image], state[0])


@pytest.mark.parametrize("fields", [AUGMENTED, {**GRID, "patch_dropout_rate": 0.5, "drop_path_kind": "subset"}])
def test_gradient_checkpointing_repeats_the_same_rotations(make_config, fields):
    model = ViTRegModel(make_config(drop_path_rate=0.3, **fields)).train()
    pixels, gradients = torch.randn(4, 3, 32, 24), []
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        model.zero_grad()
        torch.manual_seed(1)
        model(pixels).last_hidden_state.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        close(checkpointed, plain)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()
def test_every_backend_and_both_kinds_of_maps(make_config, backend):
    model = with_random_norms(ViTRegModel(make_config(qk_norm=True, **ROTARY))).eval()
    pixels = torch.randn(2, 3, 40, 24)
    expected = model(pixels).last_hidden_state
    model.config._attn_implementation = backend
    outputs = model(pixels, output_attentions=True, output_prefix_attentions=True)
    close(outputs.last_hidden_state, expected)
    for full, prefix in zip(outputs.attentions, outputs.prefix_attentions, strict=True):
        close(prefix, model.layout.prefix_queries(full))
    value = model.layers[2].attention.v_proj(
        model.layers[2].norm1(model(pixels, output_hidden_states=True).hidden_states[2])
    )
    by_head = outputs.attentions[2] @ value.unflatten(-1, (4, 8)).transpose(1, 2)
    attended = model.layers[2].attention.o_proj(by_head.transpose(1, 2).flatten(2))
    state = model(pixels, output_hidden_states=True).hidden_states
    after = state[2] + attended
    close(after + model.layers[2].mlp(model.layers[2].norm2(after)), state[3])


@torch.no_grad()
def test_angles_are_of_float32_whatever_lowers_the_rest(make_config):
    model, pixels = ViTRegModel(make_config(qk_norm=True, **ROTARY)).eval(), torch.randn(1, 3, 24, 40)
    expected, exact = model.embeddings(pixels).rotation, model(pixels).last_hidden_state
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.embeddings.rotary._kept._kept.clear()
        lowered, outputs = model.embeddings(pixels).rotation, model(pixels).last_hidden_state
    assert torch.equal(lowered.cos, expected.cos)
    close(outputs.float(), exact, 0.1)
    model.to(torch.bfloat16)
    model.embeddings.rotary._kept._kept.clear()
    assert torch.equal(model.embeddings(pixels).rotation.sin, expected.sin)
    assert model(pixels).last_hidden_state.dtype == torch.bfloat16


def test_angles_are_computed_once_per_size(make_config, monkeypatch):
    computed, compute = [], RotaryPositions._angles
    monkeypatch.setattr(RotaryPositions, "_angles", lambda self, axis: computed.append(axis) or compute(self, axis))
    model = ViTRegModel(make_config(**ROTARY))
    for _ in range(3):
        model(torch.randn(1, 3, 24, 40)).pooler_output.sum().backward()
    assert len(computed) == 2  # one per axis
    with torch.inference_mode():
        model(torch.randn(1, 3, 16, 40))
    model(torch.randn(1, 3, 16, 40)).pooler_output.sum().backward()  # tensors of inference mode take no part
    assert len(computed) == 6


# Heads and files


@pytest.mark.parametrize(
    "model_class",
    [
        *(ViTRegForImageClassification, ViTRegForMaskedImageModeling, ViTRegForSemanticSegmentation),
        *(ViTRegBackbone, ViTRegModel),
    ],
)
@torch.no_grad()
def test_every_head_saves_and_loads(make_config, tmp_path, model_class):
    saved = model_class(make_config(**GRID, pos_embed_rescale=2.0)).eval()
    assert not [name for name, _ in saved.named_parameters() if "position" in name or "rotary" in name]
    assert not [name for name in saved.state_dict() if "position" in name or "freq" in name]
    saved.save_pretrained(tmp_path)
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert loaded.config.to_diff_dict() == saved.config.to_diff_dict()
    pixels = torch.randn(1, 3, 40, 24)
    assert torch.equal(loaded.eval()(pixels).patch_map, saved(pixels).patch_map)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 16}, r"Expected channels per head to be a multiple of 4 for rotary.*got 2"),
        ({"rope_theta": 0.0}, "Expected rope_theta to be a positive finite number, got 0.0"),
        ({"rope_coordinates": "pixels"}, "Expected rope_coordinates to be one of centered, grid, got 'pixels'"),
        ({"position_embedding_type": "sincos"}, "Expected position_embedding_type to be one of learned, rotary"),
        ({"pos_embed_shift": -0.1}, "Expected pos_embed_shift to be None or a finite number of at least 0, got -0.1"),
        ({"pos_embed_jitter": 0.5}, "Expected pos_embed_jitter to be None or a finite number of at least 1, got 0.5"),
        ({"pos_embed_rescale": math.inf}, "Expected pos_embed_rescale to be None or a finite number of at least 1"),
        (
            {"position_embedding_type": "learned", "pos_embed_jitter": 1.1},
            "Expected pos_embed_jitter to be None without rotary positions, got 1.1",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(make_config, fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(**{**ROTARY, **fields})
