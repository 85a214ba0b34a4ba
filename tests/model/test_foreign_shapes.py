"""Shapes that other projects' checkpoints have: each against its source, or against the computation spelt out."""

import pytest
import timm
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from vitreg_hf import (
    ViTRegBackbone,
    ViTRegForImageClassification,
    ViTRegForSemanticSegmentation,
    ViTRegModel,
)
from vitreg_hf.analysis.extract import Readers, normed, read, subject_of
from vitreg_hf.model.configuration_checks import count_parameters


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def randomized(model):
    """Random values everywhere, also in norms, so that none is the identity."""
    for p in model.parameters():
        p.normal_(std=0.2)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.weight.add_(1.0)
    return model.eval()


# Sources


def from_clip(source, make_config):
    config = make_config(
        **{"num_hidden_layers": 2, "num_register_tokens": 0, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"},
        **{"patch_bias": False, "embedding_norm": True, "pooled_norm": True},
    )
    model = ViTRegModel(config).eval()
    names = {
        "embeddings.class_embedding": "embeddings.cls_token",
        "embeddings.patch_embedding": "embeddings.patch_embeddings.projection",
        "embeddings.position_embedding.weight": "embeddings.position_embeddings",
        "pre_layrnorm": "embeddings.norm",
        "post_layernorm": "layernorm",
        "encoder.layers": "layers",
        "self_attn": "attention",
        "out_proj": "o_proj",
        "layer_norm": "norm",
        "fc1": "up_proj",
        "fc2": "down_proj",
    }
    state, own = {}, model.state_dict()
    for name, weight in source.state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        state[name] = weight.reshape(own[name].shape)
    model.load_state_dict(state)
    return model


class TestClip:
    @pytest.fixture
    def pair(self, make_config):
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        source = randomized(CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=8, **sizes)))
        return source, from_clip(source, make_config)

    @torch.no_grad()
    def test_every_hidden_state_and_the_pooled_vector(self, pair):
        source, model = pair
        pixels = torch.randn(3, 3, 32, 32)
        got, expected = model(pixels, output_hidden_states=True), source(pixels, output_hidden_states=True)
        close(got.pooler_output, expected.pooler_output)
        close(got.last_hidden_state, expected.last_hidden_state)
        assert len(got.hidden_states) == len(expected.hidden_states) == 3
        for mine, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
            close(mine, theirs)

    def test_gradients(self, pair):
        source, model = pair
        pixels, weights = torch.randn(2, 3, 32, 32), torch.randn(32)
        for network in pair:
            (network(pixels).pooler_output * weights).sum().backward()
        close(model.embeddings.norm.weight.grad, source.pre_layrnorm.weight.grad, 1e-4)
        close(model.layernorm.bias.grad, source.post_layernorm.bias.grad, 1e-4)
        theirs = source.embeddings.position_embedding.weight.grad[None]
        close(model.embeddings.position_embeddings.grad, theirs, 1e-4)


def copied_blocks(model, source):
    """Weights of timm's blocks, whatever stands around them."""
    backbone, pairs = model.vitreg, []
    for own, theirs in zip(backbone.layers, source.blocks, strict=True):
        for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
            projection = getattr(own.attention, name)
            projection.weight.copy_(theirs.attn.qkv.weight.chunk(3)[i])
            if projection.bias is not None:
                projection.bias.copy_(theirs.attn.qkv.bias.chunk(3)[i])
        pairs += [(own.norm1, theirs.norm1), (own.norm2, theirs.norm2), (own.attention.o_proj, theirs.attn.proj)]
        pairs += [(own.mlp.up_proj, theirs.mlp.fc1), (own.mlp.down_proj, theirs.mlp.fc2)]
        pairs += [(own.attention.q_norm, theirs.attn.q_norm), (own.attention.k_norm, theirs.attn.k_norm)]
        for scale, foreign in ((own.layer_scale1, theirs.ls1), (own.layer_scale2, theirs.ls2)):
            if hasattr(foreign, "gamma"):
                scale.lambda1.copy_(foreign.gamma)
    embeddings = backbone.embeddings
    pairs += [(embeddings.patch_embeddings.projection, source.patch_embed.proj), (model.classifier, source.head)]
    pairs += [(embeddings.norm, source.norm_pre)]
    norm = source.norm if isinstance(source.fc_norm, torch.nn.Identity) else source.fc_norm
    for own, theirs in [*pairs, (backbone.layernorm, norm)]:
        own.load_state_dict(theirs.state_dict())
    tokens = {"cls_token": source.cls_token, "register_tokens": source.reg_token}
    for name, token in {**tokens, "position_embeddings": source.pos_embed}.items():
        own = getattr(embeddings, name)
        assert (own is None) == (token is None)
        if token is not None:
            own.copy_(token)


CLS_NONE = {"use_cls_token": False, "pooling": "mean"}
TIMM = {
    "register with a position, no CLS, norm of the mean": (
        {"reg_tokens": 1, "class_token": False, "global_pool": "avg", "fc_norm": True},
        {"num_register_tokens": 1, "register_position_embeddings": True, "pooled_norm": True, **CLS_NONE},
    ),
    "registers and CLS with positions": (
        {"reg_tokens": 3},
        {"num_register_tokens": 3, "register_position_embeddings": True},
    ),
    "CLS without a position, as DeiT-III": (
        {"no_embed_class": True, "init_values": 0.3},
        {"num_register_tokens": 0, "cls_position_embedding": False, "layerscale_value": 1.0},
    ),
    "registers and CLS without positions": (
        {"reg_tokens": 4, "no_embed_class": True},
        {"cls_position_embedding": False},
    ),
    "mean of patches beside CLS, then a norm": (
        {"global_pool": "avg"},
        {"num_register_tokens": 0, "pooling": "mean", "pooled_norm": True},
    ),
    "norm before the blocks, bare projection of patches": (
        {"pre_norm": True},
        {"num_register_tokens": 0, "embedding_norm": True, "patch_bias": False},
    ),
    "normed queries and keys": (
        {"qk_norm": True, "reg_tokens": 2, "no_embed_class": True},
        {"num_register_tokens": 2, "cls_position_embedding": False, "qk_norm": True},
    ),
}


@pytest.mark.parametrize(("theirs", "ours"), TIMM.values(), ids=TIMM)
@torch.no_grad()
def test_shapes_of_timm(make_config, theirs, ours):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 1.5}
    source = randomized(timm.models.vision_transformer.VisionTransformer(num_classes=5, **sizes, **theirs))
    model = ViTRegForImageClassification(make_config(num_hidden_layers=2, **ours)).eval()
    copied_blocks(model, source)
    pixels = torch.randn(3, 3, 32, 32)
    close(model.vitreg(pixels).last_hidden_state, source.forward_features(pixels))
    close(model(pixels).logits, source(pixels))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in source.parameters())


@torch.no_grad()
def test_positions_at_other_sizes_are_resized_for_patches_alone(make_config):
    source = timm.create_model(
        "vit_so150m2_patch16_reg1_gap_256", embed_dim=32, depth=2, num_heads=4, img_size=64, dynamic_img_size=True
    )
    source = randomized(source)
    config = make_config(
        **{"image_size": 64, "patch_size": 16, "num_hidden_layers": 2, "num_register_tokens": 1, "qkv_bias": False},
        **{"intermediate_size": source.blocks[0].mlp.fc1.out_features, "layerscale_value": 1.0, "num_labels": 1000},
        **{"register_position_embeddings": True, "pooled_norm": True, **CLS_NONE},
    )
    model = ViTRegForImageClassification(config).eval()
    copied_blocks(model, source)
    for size in [(64, 64), (96, 48)]:
        pixels = torch.randn(2, 3, *size)
        close(model.vitreg(pixels).last_hidden_state, source.forward_features(pixels))
        close(model(pixels).logits, source(pixels))


# Final norms


@torch.no_grad()
def test_a_separate_norm_of_cls_and_registers(make_config):
    model = randomized(ViTRegBackbone(make_config(separate_cls_norm=True, out_indices=[1, 3])))
    pixels, layout = torch.randn(2, 3, 32, 40), model.layout
    outputs = ViTRegModel.forward(model, pixels, output_hidden_states=True)

    def expected(state):
        return torch.cat([model.cls_norm(state[:, :5]), model.layernorm(state[:, 5:])], dim=1)

    final = expected(outputs.hidden_states[-1])
    assert torch.equal(outputs.last_hidden_state, final)
    assert torch.equal(outputs.pooler_output, final[:, 0])
    assert (final - model.layernorm(outputs.hidden_states[-1])).abs().max() > 0.1
    first = layout.patch_map(expected(outputs.hidden_states[1]), (4, 5))
    assert torch.equal(model(pixels).feature_maps[0], first)
    ((patches, cls),) = model.get_intermediate_layers(pixels, n=[0], reshape=True, return_class_token=True)
    assert torch.equal(patches, first)
    assert torch.equal(cls, expected(outputs.hidden_states[1])[:, 0])
    for packed, group in zip(model.forward_packed([pixels, pixels[:1, :, :16]]), (pixels, pixels[:1, :, :16])):
        close(packed.last_hidden_state, ViTRegModel.forward(model, group).last_hidden_state)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@torch.no_grad()
def test_a_norm_of_the_pooled_vector_leaves_tokens_as_they_are(make_config, pooling):
    config = make_config(pooled_norm=True, pooling=pooling, out_indices=[1, 3])
    model = randomized(ViTRegBackbone(config))
    pixels, mask = torch.randn(2, 3, 32, 32), torch.ones(2, 32, 32)
    mask[1, 16:] = 0
    outputs = ViTRegModel.forward(model, pixels, pixel_mask=mask, output_hidden_states=True)
    assert torch.equal(outputs.last_hidden_state, outputs.hidden_states[-1])
    pooled = outputs.cls_token if pooling == "cls" else outputs.patch_tokens.clone()
    if pooling == "mean":
        pooled = torch.stack([pooled[0].mean(0), pooled[1, :8].mean(0)])
    close(outputs.pooler_output, model.layernorm(pooled))
    states = ViTRegModel.forward(model, pixels, output_hidden_states=True).hidden_states
    first = model.layout.patch_map(states[1], (4, 4))
    assert torch.equal(model(pixels).feature_maps[0], first)
    assert torch.equal(model.get_intermediate_layers(pixels, n=[0], reshape=True)[0], first)
    packed = model.forward_packed([pixels])[0]
    close(packed.pooler_output, ViTRegModel.forward(model, pixels).pooler_output)


@pytest.mark.parametrize(
    "fields", [{}, {"separate_cls_norm": True}, {"pooled_norm": True, "pooling": "mean"}, {"embedding_norm": True}]
)
@pytest.mark.parametrize("model_class", [ViTRegModel, ViTRegForSemanticSegmentation])
def test_analysis_reads_tokens_as_they_leave_the_model(make_config, fields, model_class):
    model = randomized(model_class(make_config(**fields)))
    pixels, subject = torch.randn(2, 3, 32, 32), subject_of(model, device="cpu")
    recorded = read(subject, pixels, Readers(hidden=lambda index, tokens: tokens))
    backbone = model.base_model
    with torch.inference_mode():
        outputs = backbone(pixels, output_hidden_states=True)
    assert torch.equal(normed(subject, recorded.hidden[-1]), outputs.last_hidden_state)
    assert torch.equal(recorded.hidden[0], outputs.hidden_states[0])


# Heads on several layers


class TestClassifierLayers:
    @pytest.mark.parametrize("layers", [1, 2, 4])
    @pytest.mark.parametrize("fields", [{}, {"separate_cls_norm": True}])
    def test_logits_and_gradients_are_those_of_the_computation_spelt_out(self, make_config, layers, fields):
        config = make_config(num_hidden_layers=4, pooling="cls_mean", num_classifier_layers=layers, **fields)
        model = randomized(ViTRegForImageClassification(config))
        assert model.classifier.in_features == config.classifier_input_size == (layers + 1) * 32
        pixels, labels = torch.randn(3, 3, 24, 40), torch.tensor([0, 3, 1])
        tokens = model.vitreg.get_intermediate_layers(pixels, n=layers, return_class_token=True)
        joined = torch.cat([*(cls for _, cls in tokens), tokens[-1][0].mean(dim=1)], dim=1)
        expected = model.classifier(joined)
        outputs = model(pixels, labels=labels)
        close(outputs.logits, expected)
        names, parameters = zip(*model.named_parameters(), strict=True)
        theirs = torch.autograd.grad(torch.nn.functional.cross_entropy(expected, labels), parameters)
        for name, mine, other in zip(names, torch.autograd.grad(outputs.loss, parameters), theirs, strict=True):
            close(mine, other, 1e-4)
            assert other.abs().max() > 0, name

    @pytest.fixture
    def model(self, make_config):
        config = make_config(num_hidden_layers=3, pooling="cls_mean", num_classifier_layers=2)
        return randomized(ViTRegForImageClassification(config))

    def test_hidden_states_come_only_if_asked_for(self, model):
        pixels = torch.randn(1, 3, 32, 32)
        plain = model(pixels)
        assert "hidden_states" not in plain
        assert plain.hidden_states is None
        asked = model(pixels, output_hidden_states=True)
        assert len(asked.hidden_states) == 4
        assert torch.equal(asked.logits, plain.logits)
        assert len(model(pixels, return_dict=False)) == len(plain.to_tuple())
        model.config.output_hidden_states = True
        assert len(model(pixels).hidden_states) == 4

    def test_padding_takes_no_part(self, model):
        pixels, mask = torch.randn(2, 3, 32, 32), torch.ones(2, 32, 32)
        mask[1, :, 16:] = 0
        close(model(pixels, pixel_mask=mask).logits[1:], model(pixels[1:, :, :, :16]).logits)

    def test_gradient_checkpointing_and_compilation(self, model):
        pixels, gradients = torch.randn(2, 3, 32, 32), []
        model.train()
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        for kind in ("plain", "compiled", "checkpointed"):
            if kind == "checkpointed":
                enable()
            run = torch.compile(model, fullgraph=True, backend="aot_eager") if kind == "compiled" else model
            model.zero_grad()
            run(pixels).logits.square().sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        torch.compiler.reset()
        for other in gradients[1:]:
            for mine, expected in zip(other, gradients[0], strict=True):
                close(mine, expected, 1e-4)


# All of them


ROTARY = {"position_embedding_type": "rotary"}
SHAPES = [
    {**ROTARY, "qk_norm": True},
    {"cls_position_embedding": False, "patch_bias": False},
    {"register_position_embeddings": True, "embedding_norm": True},
    {"register_position_embeddings": True, "use_cls_token": False, "pooling": "mean", "pooled_norm": True},
    {"separate_cls_norm": True, "qk_norm": True, "head_dim": 12},
    {"pooling": "cls_mean", "num_classifier_layers": 3, **ROTARY, "separate_cls_norm": True, "patch_bias": False},
]


@pytest.mark.parametrize("fields", SHAPES, ids=str)
class TestEveryShape:
    def test_parameters_are_counted_and_initialized(self, make_config, fields):
        config = make_config(**fields)
        model = ViTRegForImageClassification(config)
        assert count_parameters(config) == sum(p.numel() for p in model.parameters())
        for name, p in model.named_parameters():
            if "norm" in name:
                assert (p == float(name.endswith("weight"))).all(), name
        assert all(module.eps == 1e-6 for module in model.modules() if isinstance(module, torch.nn.LayerNorm))

    def test_saves_and_loads(self, make_config, tmp_path, fields):
        saved = randomized(ViTRegForImageClassification(make_config(**fields)))
        saved.save_pretrained(tmp_path)
        loaded, report = ViTRegForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values())
        pixels, own = torch.randn(1, 3, 40, 24), saved.state_dict()
        assert all(torch.equal(weight, own[name]) for name, weight in loaded.state_dict().items())
        close(loaded(pixels).logits, saved(pixels).logits)

    def test_groups_of_parameters_know_the_new_ones(self, make_config, fields):
        model = ViTRegForImageClassification(make_config(**fields))
        depths, kept, names = model.parameter_layers(), model.no_weight_decay(), dict(model.named_parameters())
        for name in names:
            if "norm" in name or name.endswith("bias") or "position" in name:
                assert name in kept
            if ".embeddings." in name:
                assert depths[name] == 0
            elif ".layers." in name:
                assert depths[name] == int(name.split(".")[2]) + 1
            else:
                assert depths[name] == 4
        tokens = {"cls_token", "register_tokens", "position_embeddings"}
        assert {name.rsplit(".", 1)[-1] for name in model.token_parameters()} <= tokens

    def test_plans_name_modules_that_are_there(self, make_config, fields):
        model = ViTRegForImageClassification(make_config(**fields))
        modules = {name for name, _ in model.named_modules()}
        for plan in (model.tp_plan, model._fsdp_plan):
            assert not [pattern for pattern in plan if pattern.replace("*", "0") not in modules]
        assert ("vitreg.layers.*.attention.q_norm" in model.tp_plan) == bool(fields.get("qk_norm"))
        assert ("vitreg.cls_norm" in model._fsdp_plan) == bool(fields.get("separate_cls_norm"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pooled_norm": True, "pooling": "cls_mean"}, "Expected pooling to be cls or mean for pooled_norm=True.*got"),
        ({"pooled_norm": True, "pooling": "cls_register_mean"}, "Expected pooling to be cls or mean for pooled_norm"),
        ({"pooled_norm": True, "separate_cls_norm": True}, "Expected separate_cls_norm to be False for pooled_norm"),
        (
            {"separate_cls_norm": True, "num_register_tokens": 0, "use_cls_token": False, "pooling": "mean"},
            "Expected CLS and registers to be at least one token for separate_cls_norm=True, got 0",
        ),
        ({"num_classifier_layers": 2}, "Expected pooling to be cls_mean for num_classifier_layers > 1, got 'cls'"),
        ({"num_classifier_layers": 0}, "Expected num_classifier_layers to be a positive integer, got 0"),
        (
            {"num_classifier_layers": 4, "pooling": "cls_mean"},
            r"Expected num_classifier_layers to be at most num_hidden_layers \(3\), got 4",
        ),
    ],
)
def test_combinations_that_cannot_be_built_are_refused(make_config, fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(**fields)
