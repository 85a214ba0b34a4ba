"""DINOv2's own files: every output, gradient and logit is that of another implementation with the same weights."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import checkpoint_filter_fn

from vitreg_hf import ViTRegForImageClassification, ViTRegImageProcessor
from vitreg_hf.conversion.convert import convert_checkpoint

from .reference_files import SIZES, dinov2_file, dinov2_source, tokens_of

KINDS = {
    "registers": {"registers": 4},
    "eight registers": {"registers": 8},
    "registers, SwiGLU": {"registers": 4, "use_swiglu_ffn": True},
    "none": {"registers": 0},
    "none, SwiGLU": {"registers": 0, "use_swiglu_ffn": True},
}


def interpolated(table, rows, columns):
    """Positions of models without registers, as the reference adapts them: by a factor, without antialiasing."""
    cls, patches = table[:, :1], table[:, 1:]
    side = int(patches.shape[1] ** 0.5)
    if rows == columns == side:
        return table
    maps = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factors = ((rows + 0.1) / side, (columns + 0.1) / side)
    maps = F.interpolate(maps, scale_factor=factors, mode="bicubic")
    assert maps.shape[-2:] == (rows, columns)
    return torch.cat([cls, maps.permute(0, 2, 3, 1).reshape(1, rows * columns, -1)], dim=1)


@pytest.fixture
def make(filled, save_source):
    """A source by its kind, and the path of its file; without registers, positions follow the reference's rule."""

    def build(kind, std=0.2, name="source", **fields):
        source = filled(dinov2_source(**KINDS[kind], **fields), std)
        if not KINDS[kind]["registers"]:  # Transformers interpolates these by size
            table = source.embeddings.position_embeddings
            source.embeddings.interpolate_pos_encoding = lambda tokens, height, width: interpolated(
                table, height // 14, width // 14
            )
        return source, save_source(dinov2_file(source), name=name, file="dinov2_vits14_pretrain.pth")

    return build


@pytest.mark.parametrize("kind", KINDS)
def test_every_output_is_that_of_the_source(kind, make, assert_same_outputs):
    source, path = make(kind)
    converted = convert_checkpoint(path)
    assert converted.report.layout == "dinov2"
    assert_same_outputs(tokens_of(source), converted.model, [*SIZES, (14, 140)])


def test_the_rule_without_registers_is_another_than_by_size(make):
    """Else the test above could not tell them apart."""
    source, _ = make("none")
    table = source.embeddings.position_embeddings[:, 1:]
    maps = table.reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    by_size = F.interpolate(maps, size=(7, 7), mode="bicubic").permute(0, 2, 3, 1).reshape(1, 49, -1)
    assert (by_size - interpolated(source.embeddings.position_embeddings, 7, 7)[:, 1:]).abs().max() > 0.01


def name_here(name):
    """Name of a parameter here, from that of a model of Transformers."""
    for theirs, own in {"encoder.layer.": "layers.", ".fc1.": ".up_proj.", ".fc2.": ".down_proj."}.items():
        name = name.replace(theirs, own)
    return name


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_images_and_of_every_weight_are_those_of_the_source(kind, make):
    source, path = make(kind)
    model = convert_checkpoint(path).model
    pixels, found = torch.randn(2, 3, 42, 84), []
    signs = None
    for network in (source, model):
        images = pixels.clone().requires_grad_()
        tokens = network(images).last_hidden_state
        signs = torch.randn_like(tokens) if signs is None else signs
        (tokens * signs).sum().backward()
        found.append({**{name: p.grad for name, p in network.named_parameters()}, "images": images.grad})
    theirs, own = ({name_here(name): gradient for name, gradient in named.items()} for named in found)
    theirs.pop("embeddings.mask_token")
    assert theirs.keys() == own.keys()
    for name, gradient in theirs.items():
        assert gradient.abs().max() > 0
        assert (gradient - own[name]).abs().max() <= 1e-4 * max(gradient.abs().max(), 1), name


@pytest.mark.parametrize("is_gated", [False, True], ids=["MLP", "SwiGLU"])
def test_every_output_is_that_of_timm_by_its_own_converter(is_gated, make, assert_same_outputs):
    source, path = make("registers, SwiGLU" if is_gated else "registers")
    gated = {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU, "mlp_ratio": 2 * 344 / 128} if is_gated else {}
    sizes = {"img_size": 56, "embed_dim": 128, "depth": 4, "num_heads": 2, "num_classes": 0}
    peer = timm.create_model("vit_small_patch14_reg4_dinov2", dynamic_img_size=True, **sizes, **gated).eval()
    peer.load_state_dict(checkpoint_filter_fn(dinov2_file(source), peer), strict=True)

    def outputs_of(pixels):
        tokens = peer.forward_features(pixels)
        return {"cls": tokens[:, 0], "registers": tokens[:, 1:5], "patches": tokens[:, 5:]}

    assert_same_outputs(outputs_of, convert_checkpoint(path).model, SIZES)


def test_a_file_of_real_size(make, assert_same_outputs):
    """ViT-S/14 with a table for 518 pixels, run at 224 and at a wide size."""
    shape = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518}
    source, path = make("registers", std=0.04, **shape)
    converted = convert_checkpoint(path)
    assert converted.config.num_attention_heads == 6
    assert converted.config.image_size == 518
    assert_same_outputs(tokens_of(source), converted.model, [(224, 224), (140, 280)], images=1)


# Intermediate layers


@pytest.mark.parametrize("kind", ["registers", "none"])
@pytest.mark.parametrize("n", [1, 3, [0], [1, 3]], ids=str)
@pytest.mark.parametrize("norm", [True, False], ids=["normed", "not normed"])
def test_intermediate_layers_are_those_of_the_reference(kind, n, norm, make):
    source, path = make(kind)
    model, prefix = convert_checkpoint(path).model, 1 + KINDS[kind]["registers"]
    pixels = torch.randn(2, 3, 42, 84)
    with torch.no_grad():
        states = source(pixels, output_hidden_states=True).hidden_states[1:]  # of blocks, before the final norm
        states = states[-n:] if isinstance(n, int) else [states[index] for index in n]
        expected = [source.layernorm(state) if norm else state for state in states]
        plain = model.get_intermediate_layers(pixels, n=n, norm=norm)
        with_cls = model.get_intermediate_layers(pixels, n=n, return_class_token=True, norm=norm)
        maps = model.get_intermediate_layers(pixels, n=n, reshape=True, norm=norm)
    assert len(plain) == len(with_cls) == len(maps) == len(expected)
    for tokens, one, (patches, cls), map_ in zip(expected, plain, with_cls, maps, strict=True):
        torch.testing.assert_close(one, tokens[:, prefix:], atol=1e-4, rtol=0)
        torch.testing.assert_close(patches, tokens[:, prefix:], atol=1e-4, rtol=0)
        torch.testing.assert_close(cls, tokens[:, 0], atol=1e-4, rtol=0)
        reshaped = tokens[:, prefix:].reshape(2, 3, 6, -1).permute(0, 3, 1, 2)
        torch.testing.assert_close(map_, reshaped, atol=1e-4, rtol=0)


# Linear heads


def logits_of(source, weight, bias, layers):
    """The reference's linear classifier: CLS of the last layers and the mean patch of the last, each normed."""
    registers = getattr(source.config, "num_register_tokens", 0)

    def run(pixels):
        states = source(pixels, output_hidden_states=True).hidden_states[-layers:]
        normed = [source.layernorm(state) for state in states]
        read = [state[:, 0] for state in normed] + [normed[-1][:, 1 + registers :].mean(dim=1)]
        return {"logits": F.linear(torch.cat(read, dim=1), weight, bias)}

    return run


@pytest.mark.parametrize("kind", ["registers", "none"])
@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("place", ["file of its own", "wrapper"])
def test_linear_heads_of_one_and_four_layers(kind, layers, place, make, save_source, tmp_path, assert_same_outputs):
    source, path = make(kind)
    head = {"weight": torch.randn(7, (1 + layers) * 128) / 10, "bias": torch.randn(7)}
    if place == "wrapper":  # as torch.hub's classifiers save themselves
        file = {f"backbone.{name}": tensor for name, tensor in dinov2_file(source).items()}
        file |= {f"linear_head.{name}": tensor for name, tensor in head.items()}
        converted = convert_checkpoint(save_source(file, name="wrapper", file="lc.pth"), tmp_path / "converted")
    else:
        of_head = save_source(head, name="head", file="dinov2_vits14_reg4_linear4_head.pth")
        converted = convert_checkpoint(path, tmp_path / "converted", head=of_head)
    assert converted.config.num_classifier_layers == layers
    assert converted.config.pooling == "cls_mean"
    loaded = ViTRegForImageClassification.from_pretrained(tmp_path / "converted").eval()
    for model in (converted.model, loaded):
        assert_same_outputs(logits_of(source, head["weight"], head["bias"], layers), model, SIZES)


def test_gradients_through_a_head_of_four_layers(make, save_source, assert_same_gradients):
    source, path = make("registers")
    head = {"weight": torch.randn(7, 5 * 128) / 10, "bias": torch.randn(7)}
    model = convert_checkpoint(path, head=save_source(head, name="head", file="head.pth")).model
    theirs, own = source.encoder.layer[0].attention.q_proj.weight, model.vitreg.layers[0].attention.q_proj.weight
    run = logits_of(source, head["weight"], head["bias"], 4)
    assert_same_gradients(lambda x: run(x)["logits"], theirs, lambda x: model(x).logits, own, (42, 84))


def test_a_thousand_classes_are_named_as_those_of_imagenet(make, save_source):
    _, path = make("registers")
    head = save_source({"weight": torch.randn(1000, 256), "bias": torch.randn(1000)}, name="head", file="head.pth")
    config = convert_checkpoint(path, head=head).config
    assert config.id2label[0].startswith("tench")
    assert len(set(config.id2label.values())) == 1000


# What the file says


def test_values_are_the_same_bits(make):
    source, path = make("registers, SwiGLU")
    file, model = dinov2_file(source), convert_checkpoint(path).model
    layer = model.layers[2]
    assert torch.equal(layer.attention.q_proj.weight, file["blocks.2.attn.qkv.weight"][:128])
    assert torch.equal(layer.attention.k_proj.weight, file["blocks.2.attn.qkv.weight"][128:256])
    assert torch.equal(layer.attention.v_proj.bias, file["blocks.2.attn.qkv.bias"][256:])
    assert torch.equal(layer.mlp.gate_proj.weight, file["blocks.2.mlp.w12.weight"][:344])
    assert torch.equal(layer.mlp.up_proj.weight, file["blocks.2.mlp.w12.weight"][344:])
    assert torch.equal(model.embeddings.register_tokens, file["register_tokens"])
    assert torch.equal(model.embeddings.position_embeddings, file["pos_embed"])


def test_the_config_says_what_the_reference_does_without_saying_so(make):
    for kind, antialias, offset in (("registers", True, 0.0), ("none", False, 0.1)):
        config = convert_checkpoint(make(kind, name=kind)[1]).config
        assert config.position_interpolation_antialias is antialias
        assert config.position_interpolation_offset == offset
        assert config.layer_norm_eps == 1e-6
        assert config.num_register_tokens == KINDS[kind]["registers"]


def test_images_are_prepared_as_for_the_reference_evaluation(make):
    _, path = make("registers")
    processor = convert_checkpoint(path).processor
    assert isinstance(processor, ViTRegImageProcessor)
    assert (processor.size["shortest_edge"], processor.crop_size["height"]) == (256, 224)
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    assert processor.resample == 3  # bicubic


def test_the_mask_token_is_left_out_with_a_reason_or_kept_when_asked(make):
    source, path = make("registers")
    converted = convert_checkpoint(path)
    assert list(converted.report.dropped) == ["mask_token"]
    assert "training" in converted.report.dropped["mask_token"]
    kept = convert_checkpoint(path, use_mask_token=True)
    assert not kept.report.dropped
    assert torch.equal(kept.model.embeddings.mask_token[0], source.embeddings.mask_token)


def test_every_tensor_of_the_file_is_accounted_for(make):
    source, path = make("registers")
    report = convert_checkpoint(path).report.to_dict()
    assert report["used"].keys() | report["dropped"].keys() == dinov2_file(source).keys()


def test_heads_are_one_per_64_channels_unless_told(make, assert_same_outputs):
    source, path = make("registers", num_attention_heads=4)
    assert convert_checkpoint(path).config.num_attention_heads == 2
    told = convert_checkpoint(path, num_attention_heads=4)
    assert told.config.num_attention_heads == 4
    assert_same_outputs(tokens_of(source), told.model, SIZES)


def test_files_without_biases(filled, save_source, assert_same_outputs):
    source = filled(dinov2_source())
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if re.search(r"layer\.\d+\.(attention|mlp)\..*bias$", name):
                parameter.zero_()
    file = {name: t for name, t in dinov2_file(source).items() if not re.search(r"(attn|mlp)\..*bias$", name)}
    converted = convert_checkpoint(save_source(file, file="without.pth"))
    assert (converted.config.qkv_bias, converted.config.proj_bias, converted.config.mlp_bias) == (False,) * 3
    assert_same_outputs(tokens_of(source), converted.model, SIZES)
