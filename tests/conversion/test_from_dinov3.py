"""DINOv3's own files: every output and gradient is that of another implementation with the same weights."""

from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.eva import checkpoint_filter_fn

from vitreg_hf import ViTRegModel
from vitreg_hf.conversion.back import export_checkpoint
from vitreg_hf.conversion.convert import convert_checkpoint
from vitreg_hf.conversion.from_dinov3 import Dinov3Layout
from vitreg_hf.conversion.layout import Told
from vitreg_hf.conversion.reference_names import heads_of
from vitreg_hf.conversion.stored import Source, stored

from .reference_files import SIZES_OF_16 as SIZES, dinov3_file, dinov3_source, tokens_of

GATED = {"use_gated_mlp": True}
WITHOUT_BIAS = {"query_bias": False, "value_bias": False}
KINDS = {
    "small": {},
    "plus": GATED,
    "no registers": {"registers": 0},
    "base of 50": {"rope_theta": 50.0},
    "7B": {**GATED, **WITHOUT_BIAS},
    "wide heads": {"hidden_size": 256, **GATED},
}


@pytest.fixture
def make(filled, save_source):
    """A source by its kind, its state dict, and how to save it after `change` has had it."""

    def build(kind, change=lambda file: None, file="dinov3_vits16_pretrain_lvd1689m.pth"):
        source = filled(dinov3_source(**KINDS[kind]), std=0.1)
        weights = dinov3_file(source)
        change(weights)
        return source, save_source(weights, file=file)

    return build


@pytest.mark.parametrize("kind", KINDS)
def test_every_output_is_that_of_the_source(kind, make, tmp_path, assert_same_outputs):
    source, path = make(kind)
    converted = convert_checkpoint(path, tmp_path / "converted", num_attention_heads=2)
    assert converted.report.layout == "dinov3"
    loaded = ViTRegModel.from_pretrained(tmp_path / "converted").eval()
    for model in (converted.model, loaded):
        assert_same_outputs(tokens_of(source), model, SIZES)


@pytest.mark.parametrize("kind", ["small", "7B"])
@pytest.mark.parametrize("what", ["q_proj", "v_proj", "o_proj"])
def test_gradients_are_those_of_the_source(kind, what, make, assert_same_gradients):
    source, path = make(kind)
    model = convert_checkpoint(path).model
    theirs, own = (getattr(layers[0].attention, what).weight for layers in (source.model.layer, model.layers))
    assert_same_gradients(lambda x: source(x)[0], theirs, lambda x: model(x)[0], own, (48, 96))


@pytest.mark.parametrize("kind", ["small", "plus"])
def test_every_output_is_that_of_timm_by_its_own_converter(kind, make, assert_same_outputs):
    source, path = make(kind)
    name = f"vit_small{'_plus' if kind == 'plus' else ''}_patch16_dinov3_qkvb"
    sizes = {"img_size": 64, "embed_dim": 128, "depth": 4, "num_heads": 2, "num_classes": 0, "mlp_ratio": 1.5}
    if kind == "plus":
        sizes["swiglu_align_to"] = 1
    peer = timm.create_model(name, **sizes).eval()
    peer.load_state_dict(checkpoint_filter_fn(dinov3_file(source), peer), strict=True)

    def outputs_of(pixels):
        tokens = peer.forward_features(pixels)
        return {"cls": tokens[:, 0], "registers": tokens[:, 1:5], "patches": tokens[:, 5:]}

    assert_same_outputs(outputs_of, convert_checkpoint(path).model, SIZES)


def test_intermediate_layers_are_those_of_the_reference(make):
    source, path = make("small")
    model, pixels = convert_checkpoint(path).model, torch.randn(2, 3, 48, 96)
    with torch.no_grad():
        states = source(pixels, output_hidden_states=True).hidden_states[1:]
        expected = [source.norm(states[index]) for index in (1, 3)]
        found = model.get_intermediate_layers(pixels, n=[1, 3], reshape=True, return_class_token=True)
    for tokens, (patches, cls) in zip(expected, found, strict=True):
        torch.testing.assert_close(cls, tokens[:, 0], atol=1e-4, rtol=0)
        maps = tokens[:, 5:].reshape(2, 3, 6, -1).permute(0, 3, 1, 2)
        torch.testing.assert_close(patches, maps, atol=1e-4, rtol=0)


# Norms of their own


def with_norm(file, name):
    file |= {f"{name}.weight": 1 + torch.randn(128) / 5, f"{name}.bias": torch.randn(128) / 5}


def test_cls_and_registers_can_have_a_norm_of_their_own(make, assert_same_outputs):
    norm = {}
    source, path = make("small", lambda file: (with_norm(file, "cls_norm"), norm.update(file)))
    converted = convert_checkpoint(path)
    assert converted.config.separate_cls_norm

    def outputs_of(pixels):
        states = source(pixels, output_hidden_states=True).hidden_states
        prefix = F.layer_norm(states[-1][:, :5], (128,), norm["cls_norm.weight"], norm["cls_norm.bias"], eps=1e-5)
        patches = source.norm(states[-1][:, 5:])
        return {"hidden_states": states, "cls": prefix[:, 0], "registers": prefix[:, 1:], "patches": patches}

    assert_same_outputs(outputs_of, converted.model, SIZES)


def test_the_norm_of_local_crops_is_left_out_with_a_reason(make, assert_same_outputs):
    source, path = make("7B", partial(with_norm, name="local_cls_norm"))
    converted = convert_checkpoint(path)
    assert not converted.config.separate_cls_norm
    assert "local crops" in converted.report.dropped["local_cls_norm.weight"]
    assert_same_outputs(tokens_of(source), converted.model, SIZES)


@pytest.mark.parametrize("has_local_norm", [True, False])
def test_the_way_back_gives_the_names_and_shapes_of_the_file(has_local_norm, make, tmp_path):
    """So that the reference implementation loads it strictly."""
    change = partial(with_norm, name="local_cls_norm") if has_local_norm else lambda file: None
    _, path = make("small", change)
    convert_checkpoint(path, tmp_path / "converted")
    written = torch.load(export_checkpoint(tmp_path / "converted", tmp_path / "back"), weights_only=True)
    file = torch.load(path, weights_only=True)
    assert {name: t.shape for name, t in written.items()} == {name: t.shape for name, t in file.items()}
    for name, tensor in written.items():
        if name != "mask_token" and "local" not in name and "qkv.bias" not in name:
            torch.testing.assert_close(tensor, file[name], atol=0, rtol=1e-6)


# The bias of keys


def test_the_masked_bias_of_keys_is_left_out(make):
    _, path = make("small")
    converted = convert_checkpoint(path)
    assert converted.config.key_bias is False
    assert converted.model.layers[0].attention.k_proj.bias is None
    assert converted.model.layers[0].attention.q_proj.bias is not None
    assert len([name for name in converted.report.dropped if name.endswith("bias_mask")]) == 4


def test_without_a_mask_the_bias_of_keys_counts(make, assert_same_outputs):
    """As trainings without `mask_k_bias` save it."""

    def unmask(file):
        for name in [name for name in file if name.endswith("bias_mask")]:
            del file[name]

    source, path = make("small", unmask)
    converted = convert_checkpoint(path)
    for own, theirs in zip(converted.model.layers, source.model.layer, strict=True):
        theirs.attention.k_proj.bias = torch.nn.Parameter(own.attention.k_proj.bias.detach())
    assert converted.model.layers[0].attention.k_proj.bias.abs().max() > 0.1
    assert_same_outputs(tokens_of(source), converted.model, SIZES)


def zeroes_a_query(mask):
    mask[3] = 0


def keeps_a_key(mask):
    mask[130] = 1


def is_unset(mask):
    mask.fill_(float("nan"))  # as the reference makes it before its weights are initialised


@pytest.mark.parametrize("damage", [zeroes_a_query, keeps_a_key, is_unset])
@pytest.mark.parametrize("block", [0, 3])
def test_a_mask_of_anything_else_is_refused(damage, block, make):
    _, path = make("small", lambda file: damage(file[f"blocks.{block}.attn.qkv.bias_mask"]))
    with pytest.raises(ValueError, match=rf"mask that zeroes the bias of keys alone.*blocks\.{block}\.attn"):
        convert_checkpoint(path)


@pytest.mark.parametrize("block", [0, 3])
def test_a_mask_in_some_blocks_alone_is_refused(block, make):
    _, path = make("small", lambda file: file.pop(f"blocks.{block}.attn.qkv.bias_mask"))
    with pytest.raises(ValueError, match=rf"mask.*in every block or in none.*blocks\.{block}\.attn"):
        convert_checkpoint(path)


def test_a_mask_of_another_shape_is_refused(make):
    _, path = make("small", lambda file: file.update({"blocks.1.attn.qkv.bias_mask": torch.ones(7)}))
    with pytest.raises(ValueError, match="mask that zeroes the bias of keys alone"):
        convert_checkpoint(path)


# Rotary positions


@pytest.mark.parametrize(
    ("theta", "dtype"),
    [
        *((theta, torch.float32) for theta in (100.0, 50.0, 10000.0, 37.5, 1.25)),
        *((theta, torch.float16) for theta in (100.0, 50.0, 10000.0)),
        *((theta, torch.bfloat16) for theta in (100.0, 50.0, 10000.0)),
    ],
)
def test_the_base_follows_from_stored_periods_also_in_half_precision(theta, dtype, make):
    def store(file):
        file["rope_embed.periods"] = (theta ** (torch.arange(16) / 16)).to(dtype)

    _, path = make("small", store)
    converted = convert_checkpoint(path)
    assert converted.config.rope_theta == theta
    assert converted.report.dropped["rope_embed.periods"] == "follows from rope_theta"


def test_outputs_are_those_of_the_base_when_its_periods_were_rounded(make, assert_same_outputs):
    def store(file):
        file["rope_embed.periods"] = file["rope_embed.periods"].bfloat16()

    source, path = make("small", store)
    converted = convert_checkpoint(path)
    assert converted.config.rope_theta == 100.0
    assert any("periods are in bfloat16" in note for note in converted.report.notes)
    assert_same_outputs(tokens_of(source), converted.model, SIZES)


@pytest.mark.parametrize(
    ("periods", "message"),
    [
        (torch.linspace(1, 75, 16), "periods that follow from one base"),
        (2 * 100 ** (torch.arange(16) / 16), "periods that follow from one base"),
        (torch.full((16,), float("nan")), "periods that follow from one base"),
        (-torch.ones(16), "periods that follow from one base"),
        (100 ** (torch.arange(8) / 8), "16 periods for heads of 64 channels, got .8,"),
        (torch.ones(4, 4), "16 periods"),
        (torch.tensor(1.0), "16 periods"),
        (torch.arange(16), "16 periods"),
    ],
    ids=["linear", "doubled", "nan", "negative", "of other heads", "matrix", "number", "whole numbers"],
)
def test_periods_of_no_base_are_refused(periods, message, make):
    _, path = make("small", lambda file: file.update({"rope_embed.periods": periods}))
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(path)


def test_without_periods_the_published_base_is_taken(make, assert_same_outputs):
    source, path = make("small", lambda file: file.pop("rope_embed.periods"))
    assert_same_outputs(tokens_of(source), convert_checkpoint(path).model, SIZES)


# Names and sizes


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1280, 20), (1536, 24), (4096, 32)])
def test_heads_of_published_widths(width, heads):
    assert heads_of(width, Told()) == heads


def test_vit_7b_is_read_with_its_heads_and_its_linear_head():
    """By shapes alone: 40 blocks of width 4096, registers, SwiGLU, a head on CLS and the mean patch."""
    width, inner = 4096, 8192
    shapes = {"cls_token": (1, 1, width), "storage_tokens": (1, 4, width), "mask_token": (1, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,)}
    for index in range(40):
        of_block = {"attn.qkv.weight": (3 * width, width), "attn.proj.weight": (width, width), "ls1.gamma": (width,)}
        of_block |= {"mlp.w1.weight": (inner, width), "mlp.w1.bias": (inner,), "mlp.w3.weight": (width, inner)}
        shapes |= {f"blocks.{index}.{name}": shape for name, shape in of_block.items()}
    shapes |= {"linear_head.weight": (1000, 2 * width), "linear_head.bias": (1000,)}
    tensors = {name: stored(torch.empty(shape, device="meta")) for name, shape in shapes.items()}
    tensors["rope_embed.periods"] = stored(100 ** (torch.arange(32) / 32))  # 128 channels per head
    reading = Dinov3Layout().read(Source("dinov3_vit7b16_pretrain_lvd1689m.pth", tensors), Told())
    config = reading.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.attention_head_dim) == (40, 32, 128)
    assert (config.intermediate_size, config.rope_theta, config.qkv_bias) == (inner, 100.0, False)
    assert reading.has_head
    assert (config.pooling, config.num_classifier_layers, config.num_labels) == ("cls_mean", 1, 1000)


def test_a_linear_head_on_cls_and_the_mean_patch(make, save_source, assert_same_outputs):
    source, path = make("7B")
    head = {"weight": torch.randn(7, 256) / 10, "bias": torch.randn(7)}
    model = convert_checkpoint(path, head=save_source(head, name="head", file="linear_head.pth")).model

    def outputs_of(pixels):
        tokens = source(pixels).last_hidden_state
        read = torch.cat([tokens[:, 0], tokens[:, 5:].mean(dim=1)], dim=1)
        return {"logits": F.linear(read, head["weight"], head["bias"])}

    assert_same_outputs(outputs_of, model, SIZES)


@pytest.mark.parametrize(
    ("file", "mean", "notes"),
    [
        ("dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth", [0.485, 0.456, 0.406], 0),
        ("dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth", [0.430, 0.411, 0.296], 1),
    ],
)
def test_statistics_of_pixels_follow_from_the_name_of_the_file(file, mean, notes, make):
    _, path = make("small", file=file)
    converted = convert_checkpoint(path)
    assert list(converted.processor.image_mean) == mean
    assert len(converted.report.notes) == notes
    assert (converted.processor.size["height"], converted.processor.do_center_crop) == (256, False)


def test_the_name_of_a_folder_says_nothing_of_its_file(filled, save_source):
    source = filled(dinov3_source())
    path = save_source(dinov3_file(source), name="beside-sat493m", file="dinov3_vitl16_pretrain_lvd1689m.pth")
    assert list(convert_checkpoint(path).processor.image_mean) == [0.485, 0.456, 0.406]


def test_every_tensor_of_the_file_is_accounted_for(make):
    source, path = make("plus")
    report = convert_checkpoint(path).report.to_dict()
    assert report["used"].keys() | report["dropped"].keys() == dinov3_file(source).keys()


def test_projectors_of_a_distillation_are_left_out_with_a_reason(make):
    """As EUPE's files have them beside the backbone."""
    _, path = make("small", lambda file: file.update({"projectors.0.weight": torch.ones(3, 3)}))
    assert "distillation" in convert_checkpoint(path).report.dropped["projectors.0.weight"]
