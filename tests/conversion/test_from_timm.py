"""Models of timm: every architecture with registers is converted with equal outputs, or refused with a reason."""

import json
import pathlib
import re

import numpy as np
import pytest
import timm
import timm.data
import timm.models
import torch
from PIL import Image
from timm.layers import SwiGLUPacked
from torch import nn

from vitreg_hf.conversion.convert import convert_checkpoint

SMALL = {"embed_dim": 64, "depth": 2, "num_heads": 4}
NAMES = re.compile(r"reg\d|dinov3|radio|naflexvit|lingbot|sapiens2|^test_vit|_rope_")
LIKE_VIT = ("vision_transformer", "eva", "naflexvit")  # files of timm whose models may have registers

# Why architectures that the pattern finds are refused; some of them have no registers.
REFUSED = {
    "naflexvit_base_patch16_map": "attention pooling",
    "naflexvit_base_patch16_par_gap": "keep the aspect ratio",
    "naflexvit_base_patch16_parfac_gap": "factorised",
    "naflexvit_base_patch16_radio_v3": "keep the aspect ratio",
    "naflexvit_base_patch16_siglip": "attention pooling",
    "naflexvit_giant_patch16_radio_v3": "keep the aspect ratio",
    "naflexvit_huge_patch16_radio_v3": "keep the aspect ratio",
    "naflexvit_huge_patch16_radio_v4": "keep the aspect ratio",
    "naflexvit_large_patch16_radio_v3": "keep the aspect ratio",
    "naflexvit_so150m2_patch16_reg1_map": "attention pooling",
    "naflexvit_so400m_patch16_radio_v4": "keep the aspect ratio",
    "naflexvit_so400m_patch16_siglip": "attention pooling",
    "test_vit3": "attention pooling",
    "test_vit4": "RmsNorm",
    "test_vit_relpos": "VisionTransformerRelPos",
    "vit_5b_patch16_sapiens2": "RmsNorm",
    "vit_base_patch16_rope_224": "RotaryEmbeddingCat",
    "vit_base_patch16_rope_ape_224": "got both",
    "vit_base_patch16_rope_mixed_224": "RotaryEmbeddingMixed",
    "vit_base_patch16_rope_mixed_ape_224": "got both",
    "vit_base_patch16_sapiens2": "RmsNorm",
    "vit_dlittle_patch16_reg1_gap_256": "differential attention",
    "vit_dpwee_patch16_reg1_gap_256": "side by side",
    "vit_dwee_patch16_reg1_gap_256": "differential attention",
    "vit_giant_patch16_sapiens2": "RmsNorm",
    "vit_huge_patch16_sapiens2": "RmsNorm",
    "vit_large_patch16_rope_224": "RotaryEmbeddingCat",
    "vit_large_patch16_rope_ape_224": "got both",
    "vit_large_patch16_rope_mixed_224": "RotaryEmbeddingMixed",
    "vit_large_patch16_rope_mixed_ape_224": "got both",
    "vit_large_patch16_sapiens2": "RmsNorm",
    "vit_pwee_patch16_reg1_gap_256": "side by side",
    "vit_small_patch16_rope_224": "RotaryEmbeddingCat",
    "vit_small_patch16_rope_ape_224": "got both",
    "vit_small_patch16_rope_mixed_224": "RotaryEmbeddingMixed",
    "vit_small_patch16_rope_mixed_ape_224": "got both",
    "vit_so150m_patch16_reg4_map_256": "attention pooling",
}
CONVERTED = [name for name in timm.list_models() if NAMES.search(name) and name not in REFUSED]
WITHOUT_REGISTERS = [
    "deit3_small_patch16_224",
    "vit_base_patch16_224",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_clip_quickgelu_224",
    "vit_base_patch16_siglip_gap_224",
    "vit_small_patch14_dinov2",
]


def small_arguments(name, **arguments):
    """Arguments of a small model; a gated MLP needs an even width inside, sapiens2 a number per block."""
    own = {"mlp_ratio": 4} if "giant_patch14" in name else {}
    own |= {"num_kv_heads": [2, 2]} if "sapiens2" in name else {}
    return {**SMALL, **own, **arguments}


def made(name, arguments, num_classes=5):
    """A model of timm that takes images of any size; NaFlex always does."""
    any_size = {} if name.startswith("naflex") or "relpos" in name else {"dynamic_img_size": True}
    return timm.create_model(name, **arguments, num_classes=num_classes, **any_size)


def config_of(name, model, arguments, **fields):
    """`config.json` beside the weights of timm on the Hub."""
    content = {"architecture": name, "num_classes": model.num_classes, "global_pool": model.global_pool}
    return {**content, "model_args": arguments, **fields}


def outputs_of(model):
    """What a model of timm says of images, by the names of the comparison."""
    prefix = model.num_prefix_tokens
    has_cls = getattr(model, "embeds", model).cls_token is not None

    def run(pixels):
        tokens, taken = model.forward_intermediates(pixels, return_prefix_tokens=True, output_fmt="NLC")
        joined = [torch.cat([one[1], one[0]], 1) if isinstance(one, tuple) else one for one in taken]
        found = {
            "blocks": joined,
            "cls": tokens[:, 0] if has_cls else None,
            "registers": tokens[:, has_cls:prefix] if prefix > has_cls else None,
            "patches": tokens[:, prefix:],
        }
        if isinstance(model.head, nn.Linear):
            return {**found, "logits": model(pixels)}
        return {**found, "last_hidden_state": tokens, "pooled": model(pixels)}

    return run


def sizes_of(config):
    """The table's own size, one that is not square, and one that is larger in both directions."""
    patch, (rows, columns) = config.patch_size, config.position_grid
    larger = ((rows + 2) * patch, (columns + 1) * patch)
    return [(rows * patch, columns * patch), (6 * patch, 4 * patch), *([larger] if rows < 20 else [])]


# The registry


@pytest.mark.parametrize("name", [*CONVERTED, *WITHOUT_REGISTERS])
def test_every_output_is_that_of_the_source(name, filled, save_source, assert_same_outputs):
    arguments = small_arguments(name)
    model = filled(made(name, arguments))
    converted = convert_checkpoint(save_source(model, config_of(name, model, arguments)))
    assert_same_outputs(outputs_of(model), converted.model, sizes_of(converted.config), images=1)


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_what_the_family_does_not_have_is_refused_with_the_reason(name, reason, save_source, tmp_path):
    arguments = small_arguments(name)
    model = made(name, arguments)
    source = save_source(model, config_of(name, model, arguments))
    with pytest.raises(ValueError, match=f"^Expected .*{reason}"):
        convert_checkpoint(source, tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_no_architecture_with_registers_escapes_the_tests_above():
    """Every model of the three files is built; the names of those with registers must match the pattern."""
    found = []
    for name in (name for module in LIKE_VIT for name in timm.list_models(module=module)):
        arguments = {**small_arguments(name), "depth": 1, "mlp_ratio": 4}
        if "num_kv_heads" in arguments:
            arguments["num_kv_heads"] = [2]
        if name == "vit_base_mci_224":  # has convolutions before its blocks, whose width has to match
            arguments.pop("embed_dim")
        with torch.device("meta"):
            model = timm.create_model(name, **arguments)
        token = getattr(getattr(model, "embeds", model), "reg_token", None)
        found += [name] if token is not None else []
    assert len(found) > 70
    assert [name for name in found if not NAMES.search(name)] == []


def test_no_other_file_of_timm_has_registers():
    files = pathlib.Path(timm.models.__file__).parent.glob("*.py")
    naming = {file.stem for file in files if re.search(r"reg_token|register_token", file.read_text())}
    assert naming == set(LIKE_VIT)


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch14_reg4_dinov2",
        "vit_medium_patch16_reg4_gap_256",
        "vit_small_patch16_dinov3",
        "naflexvit_base_patch16_gap",
        "vit_base_patch16_clip_224",
        "vit_base_patch16_siglip_gap_224",
    ],
)
def test_backbones_pool_as_the_source_does(name, filled, save_source, assert_same_outputs):
    arguments = small_arguments(name)
    model = filled(made(name, arguments, num_classes=0))
    converted = convert_checkpoint(save_source(model, config_of(name, model, arguments)))
    assert type(converted.model).__name__ == "ViTRegModel"
    assert_same_outputs(outputs_of(model), converted.model, sizes_of(converted.config), images=1)


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch14_reg4_dinov2",
        "vit_small_patch16_dinov3",
        "vit_medium_patch16_rope_reg1_gap_256",
        "vit_so150m2_patch16_reg1_gap_256",
    ],
)
def test_gradients_of_images_and_of_a_weight_are_those_of_the_source(name, filled, save_source, assert_same_gradients):
    arguments = small_arguments(name)
    model = filled(made(name, arguments))
    own = convert_checkpoint(save_source(model, config_of(name, model, arguments))).model
    assert_same_gradients(
        model,
        model.blocks[0].mlp.fc1.weight,
        lambda pixels: own(pixels).logits,
        own.vitreg.layers[0].mlp.up_proj.weight,
        (6 * own.config.patch_size, 4 * own.config.patch_size),
    )


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_betwixt_patch16_reg4_gap_256"])
def test_intermediate_layers_are_those_of_the_source(name, filled, save_source):
    arguments = small_arguments(name)
    model = filled(made(name, arguments, num_classes=0))
    own = convert_checkpoint(save_source(model, config_of(name, model, arguments))).model
    pixels = torch.randn(1, 3, 6 * own.config.patch_size, 4 * own.config.patch_size)
    with torch.no_grad():
        theirs = model.get_intermediate_layers(pixels, n=2, reshape=True, return_prefix_tokens=True, norm=True)
        found = own.get_intermediate_layers(pixels, n=2, reshape=True)
    for (maps, _), patches in zip(theirs, found, strict=True):
        torch.testing.assert_close(patches, maps, atol=1e-4, rtol=0)


def test_a_folder_that_timm_itself_writes(filled, tmp_path, assert_same_outputs):
    """Arguments and settings as `timm.models.save_for_hf` records them."""
    name = "vit_medium_patch16_reg4_gap_256"
    model = filled(made(name, small_arguments(name)))
    timm.models.save_for_hf(model, str(tmp_path / "source"), safe_serialization="both")
    converted = convert_checkpoint(tmp_path / "source")
    assert_same_outputs(outputs_of(model), converted.model, sizes_of(converted.config), images=1)


# Checkpoints that say less than timm needs to know

GATED = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "init_values": 1e-5}


def saved_without(model, architecture, arguments, save_source, **fields):
    config = {"architecture": architecture, "model_args": arguments, "num_features": 64, **fields}
    return save_source(model, config)


def test_virchow2(filled, save_source, assert_same_outputs):
    """Positions on registers too; the user states the packed SwiGLU in code, so that no file does."""
    stated = {
        **SMALL,
        "img_size": 56,
        "init_values": 1e-5,
        "num_classes": 0,
        "mlp_ratio": 5.3375,
        "reg_tokens": 4,
        "global_pool": "",
        "dynamic_img_size": True,
    }
    model = filled(timm.create_model("vit_huge_patch14_224", **{**stated, **GATED, "mlp_ratio": 5.34375}))
    assert model.pos_embed.shape[1] == 1 + 4 + 16
    converted = convert_checkpoint(saved_without(model, "vit_huge_patch14_224", stated, save_source))
    config = converted.config
    assert (config.use_swiglu_ffn, config.intermediate_size) == (True, 171)
    assert (config.register_position_embeddings, config.cls_position_embedding) == (True, True)
    theirs = outputs_of(model)
    tokens_alone = lambda pixels: {k: v for k, v in theirs(pixels).items() if k != "pooled"}  # noqa: E731
    assert_same_outputs(tokens_alone, converted.model, sizes_of(config))


def uni2(filled):
    return filled(
        timm.create_model(
            "vit_giant_patch14_224",
            **{**SMALL, "embed_dim": 128, "num_heads": 2},
            img_size=56,
            mlp_ratio=2.66667 * 2,
            num_classes=0,
            no_embed_class=True,
            reg_tokens=8,
            dynamic_img_size=True,
            **GATED,
        )
    )


def test_uni2(filled, save_source, assert_same_outputs):
    """Eight registers, no positions on them or CLS, SwiGLU; width, depth and heads of its own in no file."""
    model = uni2(filled)
    converted = convert_checkpoint(saved_without(model, "vit_giant_patch14_224", {}, save_source, global_pool="token"))
    config = converted.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_register_tokens) == (128, 2, 8)
    assert config.num_attention_heads == 2, "one per 64 channels, not the 16 of the architecture"
    assert any("heads" in note for note in converted.report.notes)
    assert (config.register_position_embeddings, config.cls_position_embedding) == (False, False)
    assert_same_outputs(outputs_of(model), converted.model, sizes_of(config))


def test_heads_that_are_told_go_before_a_guess(filled, save_source, assert_same_outputs):
    model = filled(
        timm.create_model("vit_giant_patch14_224", **SMALL, img_size=56, num_classes=0, dynamic_img_size=True)
    )
    source = saved_without(model, "vit_giant_patch14_224", {}, save_source, global_pool="token")
    converted = convert_checkpoint(source, num_attention_heads=4)
    assert not any("heads" in note for note in converted.report.notes)
    assert_same_outputs(outputs_of(model), converted.model, sizes_of(converted.config))


def test_h_optimus(filled, save_source, assert_same_outputs):
    """The giant of DINOv2 with registers at 224 pixels, arguments as its config states them."""
    stated = {**small_arguments("vit_giant_patch14"), "img_size": 56, "init_values": 1e-5, "dynamic_img_size": False}
    model = filled(made("vit_giant_patch14_reg4_dinov2", {k: v for k, v in stated.items() if "dynamic" not in k}, 0))
    converted = convert_checkpoint(
        saved_without(model, "vit_giant_patch14_reg4_dinov2", stated, save_source, global_pool="token", num_classes=0)
    )
    assert converted.config.use_swiglu_ffn
    assert_same_outputs(outputs_of(model), converted.model, sizes_of(converted.config))


def test_other_channels_and_patches_are_told_by_shapes(filled, save_source, assert_same_outputs):
    name = "vit_small_patch14_reg4_dinov2"
    model = filled(made(name, {**SMALL, "in_chans": 1, "patch_size": 8, "img_size": 64}))
    converted = convert_checkpoint(saved_without(model, name, SMALL, save_source))
    assert (converted.config.num_channels, converted.config.patch_size) == (1, 8)
    assert_same_outputs(outputs_of(model), converted.model, sizes_of(converted.config), channels=1)


@pytest.mark.parametrize("layout", ["packed", "apart"])
def test_gate_and_value_of_swiglu_keep_their_places(layout, filled, save_source):
    """Both packings of timm: fc1 of gate and value, and fc1_g and fc1_x."""
    packed = layout == "packed"
    name = "vit_giant_patch14_reg4_dinov2" if packed else "vit_huge_plus_patch16_dinov3"
    arguments = small_arguments(name)
    model = filled(made(name, arguments))
    own = convert_checkpoint(save_source(model, config_of(name, model, arguments))).model
    mlp, theirs = own.vitreg.layers[1].mlp, model.blocks[1].mlp
    gate, value = theirs.fc1.weight.chunk(2) if packed else (theirs.fc1_g.weight, theirs.fc1_x.weight)
    assert torch.equal(mlp.gate_proj.weight, gate)
    assert torch.equal(mlp.up_proj.weight, value)


def deit3_names(weights):
    return {re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): tensor for name, tensor in weights.items()}


def test_files_of_deit3_itself(filled, save_source, assert_same_outputs):
    """`{"model": ...}` with `gamma_1`, and no word of the architecture."""
    model = filled(made("deit3_small_patch16_224", {**SMALL, "img_size": 64}))
    weights = deit3_names(model.state_dict())
    assert "blocks.0.gamma_1" in weights
    file = save_source({"model": weights}, file="deit_3_small_224_1k.pth")
    with pytest.raises(ValueError, match="name the layout"):
        convert_checkpoint(file)
    converted = convert_checkpoint(file, architecture="deit3_small_patch16_224", num_attention_heads=4)
    assert_same_outputs(outputs_of(model), converted.model, sizes_of(converted.config))


# Refusals


def test_an_unknown_architecture_is_refused(save_source):
    source = save_source({"cls_token": torch.zeros(1, 1, 8)}, {"architecture": "vit_of_tomorrow"})
    with pytest.raises(
        ValueError, match=rf"Expected an architecture of timm {timm.__version__}, got 'vit_of_tomorrow'"
    ):
        convert_checkpoint(source)


def test_weights_of_another_architecture_are_refused_with_shapes(save_source, tmp_path):
    name = "vit_small_patch14_reg4_dinov2"
    weights = made(name, SMALL).state_dict()
    weights["blocks.1.attn.proj.weight"] = torch.zeros(64, 63)
    source = save_source(weights, {"architecture": name, "model_args": SMALL})
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.proj\.weight \(64, 63\), not \(64, 64\)"):
        convert_checkpoint(source, tmp_path / "own")
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("blocks.1.norm2.bias"), "no blocks.1.norm2.bias"),
        (lambda weights: weights.update(extra=torch.zeros(3)), "also extra"),
    ],
)
def test_missing_and_unknown_tensors_are_refused_by_name(change, message, save_source):
    name = "vit_small_patch14_reg4_dinov2"
    weights = made(name, SMALL).state_dict()
    change(weights)
    with pytest.raises(ValueError, match=re.escape(message)):
        convert_checkpoint(save_source(weights, {"architecture": name, "model_args": SMALL}))


# Labels


def test_classes_of_imagenet_are_named(save_source):
    name = "vit_medium_patch16_reg4_gap_256"
    model = made(name, SMALL, num_classes=1000)
    config = convert_checkpoint(save_source(model, config_of(name, model, SMALL))).config
    assert config.id2label[207] == "golden retriever"
    assert len(set(config.id2label.values())) == 1000
    assert config.label2id["golden retriever"] == 207


def test_labels_that_a_checkpoint_names_are_kept(save_source):
    name = "vit_medium_patch16_reg4_gap_256"
    model = made(name, SMALL, num_classes=3)
    saved = config_of(name, model, SMALL, label_names=["owl", "cat", "newt"])
    assert convert_checkpoint(save_source(model, saved)).config.id2label == {0: "owl", 1: "cat", 2: "newt"}


# Processors

SETTINGS = {
    "dinov2": {"input_size": [3, 98, 98], "crop_pct": 1.0, "interpolation": "bicubic"},
    "searched baselines": {
        "input_size": [3, 128, 128],
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    },
    "tips, which does not normalise": {
        "input_size": [3, 112, 112],
        "crop_pct": 1.0,
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
    },
    "bilinear": {"input_size": [3, 112, 112], "crop_pct": 0.875, "interpolation": "bilinear"},
    "squashed": {"input_size": [3, 112, 112], "crop_pct": 1.0, "crop_mode": "squash"},
    "squashed to what is not square": {"input_size": [3, 112, 84], "crop_pct": 1.0, "crop_mode": "squash"},
    "squashed, then cropped": {"input_size": [3, 112, 112], "crop_pct": 0.9, "crop_mode": "squash"},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_pixels_are_those_of_timm_s_own_transform(kind, save_source, photo, assert_same_pixels):
    name = "vit_small_patch14_reg4_dinov2"
    model = made(name, SMALL)
    converted = convert_checkpoint(save_source(model, config_of(name, model, SMALL, pretrained_cfg=SETTINGS[kind])))
    data = timm.data.resolve_data_config(pretrained_cfg={**model.pretrained_cfg, **SETTINGS[kind]})
    pixels = timm.data.create_transform(**data, is_training=False)(photo)[None]
    assert not [note for note in converted.report.notes if "pads" in note]
    assert_same_pixels(pixels, converted.processor)


def test_pixels_without_settings_are_those_of_the_architecture(save_source, photo, assert_same_pixels):
    name = "vit_small_patch16_dinov3"
    model = made(name, SMALL)
    converted = convert_checkpoint(save_source(model, config_of(name, model, SMALL)))
    data = timm.data.resolve_model_data_config(model)
    assert_same_pixels(timm.data.create_transform(**data)(photo)[None], converted.processor)


def test_padding_to_a_square_is_said_to_differ(save_source):
    name = "vit_small_patch14_reg4_dinov2"
    model = made(name, SMALL)
    saved = config_of(name, model, SMALL, pretrained_cfg={"crop_mode": "border"})
    assert any(
        "pads images to a square" in note for note in convert_checkpoint(save_source(model, saved)).report.notes
    )


# Towers of timm in OpenCLIP

OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 8,
        "vision_cfg": {"timm_model_name": "vit_small_patch14_reg4_dinov2", "timm_pool": "avg"},
    },
    "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "resize_mode": "squash", "size": [112, 112]},
}


@pytest.fixture
def open_clip(filled, save_source):
    """A tower of timm with what OpenCLIP has around it, and its folder."""
    model = filled(made("vit_small_patch14_reg4_dinov2", {**SMALL, "img_size": 112}, num_classes=0))
    model.reset_classifier(0, global_pool="avg")
    weights = {f"visual.trunk.{name}": tensor for name, tensor in model.state_dict().items()}
    weights |= {"visual.head.proj.weight": torch.zeros(8, 64), "logit_scale": torch.zeros(())}
    weights |= {"text.token_embedding.weight": torch.zeros(3, 8), "logit_bias": torch.zeros(())}
    folder = save_source(weights, file="open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    return model, folder


def test_a_tower_of_timm_in_open_clip(open_clip, assert_same_outputs):
    model, folder = open_clip
    converted = convert_checkpoint(folder, num_attention_heads=4)
    assert "timm_model_name" in converted.report.why
    assert set(converted.report.dropped) == {
        *("visual.head.proj.weight", "logit_scale", "logit_bias", "text.token_embedding.weight")
    }
    assert_same_outputs(outputs_of(model), converted.model, sizes_of(converted.config))


def test_a_tower_of_timm_in_open_clip_sees_what_open_clip_shows_it(open_clip, photo, assert_same_pixels):
    processor = convert_checkpoint(open_clip[1], num_attention_heads=4).processor
    squashed = photo.resize((112, 112), Image.Resampling.BICUBIC)
    pixels = torch.tensor(np.array(squashed)).permute(2, 0, 1) / 255
    statistics = OPEN_CLIP["preprocess_cfg"]
    mean, std = (torch.tensor(statistics[name])[:, None, None] for name in ("mean", "std"))
    assert_same_pixels(((pixels - mean) / std)[None], processor)
