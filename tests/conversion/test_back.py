"""Back to the source's own layout: it loads in the source's own class and says what the source said, bit by bit."""

import json
import re

import pytest
import timm
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from timm.layers import SwiGLUPacked
from torch import nn

from vitreg_hf import ViTRegConfig, ViTRegForImageClassification, ViTRegForSemanticSegmentation, ViTRegModel
from vitreg_hf.conversion.back import export_checkpoint
from vitreg_hf.conversion.convert import convert_checkpoint

TOLERANCE = 1e-5  # outputs are bit-equal as a rule
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
WITH_MLP = {**SMALL, "intermediate_size": 48}
ANY_SIZE = {"interpolate_pos_encoding": True}
LABELS = {0: "owl", 1: "cat", 2: "newt"}
LABELLED = {"id2label": LABELS, "label2id": {name: index for index, name in LABELS.items()}}

TRANSFORMERS = {
    "dinov2 with registers": lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**SMALL)),
    "dinov2 with registers, SwiGLU, head": lambda: hf.Dinov2WithRegistersForImageClassification(
        hf.Dinov2WithRegistersConfig(use_swiglu_ffn=True, **LABELLED, **SMALL)
    ),
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**SMALL)),
    "dinov2, SwiGLU, head": lambda: hf.Dinov2ForImageClassification(
        hf.Dinov2Config(use_swiglu_ffn=True, **LABELLED, **SMALL)
    ),
    "dinov3": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(num_register_tokens=4, rope_theta=37.0, **WITH_MLP)),
    "dinov3, gated, other biases": lambda: hf.DINOv3ViTModel(
        hf.DINOv3ViTConfig(
            use_gated_mlp=True, hidden_act="silu", query_bias=False, key_bias=True, mlp_bias=False, **WITH_MLP
        )
    ),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**WITH_MLP), add_pooling_layer=False),
    "vit, head": lambda: hf.ViTForImageClassification(hf.ViTConfig(qkv_bias=False, **LABELLED, **WITH_MLP)),
    "clip": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**WITH_MLP)),
}
PROCESSORS = {
    "dinov2": hf.BitImageProcessor(
        size={"shortest_edge": 70}, crop_size={"height": 56, "width": 56}, resample=3, image_mean=[0.1, 0.2, 0.3]
    ),
    "dinov3": hf.DINOv3ViTImageProcessor(size={"height": 56, "width": 56}),
    "vit": hf.ViTImageProcessor(size={"height": 56, "width": 70}),
    "clip": hf.CLIPImageProcessor(size={"shortest_edge": 70}, crop_size={"height": 56, "width": 56}),
}


def said_by(model, pixels):
    """The last thing that a model of Transformers or this family says: logits, or tokens."""
    is_adapting = model.config.model_type in ("vit", "clip_vision_model")
    with torch.no_grad():
        out = model.eval()(pixels, **(ANY_SIZE if is_adapting else {}))
    return out.logits if "logits" in out else out.last_hidden_state


def assert_says_the_same(theirs, again):
    assert theirs.shape == again.shape
    assert (theirs - again).abs().max() <= TOLERANCE


@pytest.fixture
def through(tmp_path):
    """Convert a folder, save, and export: gives the folder in the source's layout."""

    def convert_and_export(source, layout=None, architecture=None, told=None):
        convert_checkpoint(source, tmp_path / "own", **(told or {}))
        return export_checkpoint(tmp_path / "own", tmp_path / "back", layout=layout, architecture=architecture).parent

    return convert_and_export


@pytest.fixture
def save_own(tmp_path):
    """Save a model of this family that was not converted from anything, with large random weights."""

    def save(cls=ViTRegModel, **fields):
        config = ViTRegConfig(**{**WITH_MLP, "initializer_range": 0.2, "token_initializer_range": 0.5, **fields})
        cls(config).save_pretrained(tmp_path / "own")
        return tmp_path / "own"

    return save


# Transformers


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_a_model_of_transformers_comes_back_to_its_own_class(family, filled, tmp_path, through):
    model = filled(TRANSFORMERS[family]())
    model.save_pretrained(tmp_path / "source")
    without_pooler = {"add_pooling_layer": False} if family == "vit" else {}  # which no config can say
    folder = through(tmp_path / "source")
    again, loading = type(model).from_pretrained(folder, output_loading_info=True, **without_pooler)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    pixels = torch.randn(2, 3, 70, 42)
    assert_says_the_same(said_by(model, pixels), said_by(again, pixels))
    if "head" in family:
        assert again.config.id2label == LABELS


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_names_and_values_that_come_back_are_those_of_the_source(family, filled, tmp_path, through):
    """But for the mask token of a model that is not trained on masked patches, which was left out."""
    filled(TRANSFORMERS[family]()).save_pretrained(tmp_path / "source")
    theirs = load_file(tmp_path / "source" / "model.safetensors")
    again = load_file(through(tmp_path / "source") / "model.safetensors")
    left_out = {name for name in theirs if name.endswith("mask_token")}
    assert theirs.keys() - left_out == again.keys() - left_out
    assert [name for name in theirs.keys() - left_out if not torch.equal(theirs[name], again[name])] == []


@pytest.mark.parametrize("family", PROCESSORS)
def test_the_processor_comes_back(family, filled, tmp_path, through, photo):
    filled(TRANSFORMERS[family]()).save_pretrained(tmp_path / "source")
    PROCESSORS[family].save_pretrained(tmp_path / "source")
    again = hf.AutoImageProcessor.from_pretrained(through(tmp_path / "source"))
    assert type(again).__name__.removesuffix("Fast") == type(PROCESSORS[family]).__name__.removesuffix("Fast")
    before, after = (one(photo, return_tensors="pt")["pixel_values"] for one in (PROCESSORS[family], again))
    assert torch.equal(before, after)


def test_a_mask_token_that_was_kept_comes_back(filled, tmp_path, through):
    model = filled(hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**SMALL)))
    model.save_pretrained(tmp_path / "source")
    again = hf.Dinov2WithRegistersModel.from_pretrained(through(tmp_path / "source", told={"use_mask_token": True}))
    assert torch.equal(again.embeddings.mask_token, model.embeddings.mask_token)


def test_hibou_goes_to_the_layout_that_transformers_has_code_for(filled, tmp_path, through):
    model = filled(hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(use_swiglu_ffn=True, **SMALL)))
    model.save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "model_type": "dinov2"}))
    with pytest.raises(ValueError, match="the layout dinov2_with_registers holds them"):
        through(tmp_path / "source")
    back = export_checkpoint(tmp_path / "own", tmp_path / "back", layout="dinov2_with_registers").parent
    pixels = torch.randn(1, 3, 70, 42)
    again = hf.Dinov2WithRegistersModel.from_pretrained(back)
    assert_says_the_same(said_by(model, pixels), said_by(again, pixels))


# timm

OF_TIMM = [
    *("vit_small_patch14_reg4_dinov2", "vit_giant_patch14_reg4_dinov2", "vit_base_patch14_reg1_tipsv2"),
    *("vit_medium_patch16_reg4_gap_256", "vit_so150m2_patch16_reg1_gap_256", "vit_base_patch16_radio_v3"),
    *("vit_small_patch16_dinov3", "vit_huge_plus_patch16_dinov3_qkvb", "vit_medium_patch16_rope_reg1_gap_256"),
    *("vit_mediumd_patch16_rope_reg1_gap_256", "vit_small_patch16_lingbot", "test_vit2"),
    *("naflexvit_base_patch16_gap", "naflexvit_so150m2_patch16_reg1_gap"),
    *("vit_small_patch14_dinov2", "deit3_small_patch16_224", "vit_base_patch16_clip_224"),
    *("vit_base_patch16_clip_quickgelu_224", "vit_base_patch16_224", "vit_base_patch16_siglip_gap_224"),
]


def made(name, arguments, num_classes):
    any_size = {} if name.startswith("naflex") else {"dynamic_img_size": True}
    return timm.create_model(name, **arguments, num_classes=num_classes, **any_size)


def from_timm(name, filled, save_source, num_classes=3):
    """A small model of an architecture, and its folder."""
    arguments = {"embed_dim": 64, "depth": 2, "num_heads": 4, **({"mlp_ratio": 4} if "giant_patch14" in name else {})}
    model = filled(made(name, arguments, num_classes))
    config = {"architecture": name, "num_classes": num_classes, "global_pool": model.global_pool}
    return model, save_source(model, {**config, "model_args": arguments, "pretrained_cfg": {"crop_pct": 0.9}})


def timm_of(folder):
    """What timm makes of a folder, strictly."""
    config = json.loads((folder / "config.json").read_text())
    model = made(config["architecture"], config["model_args"], config["num_classes"])
    assert model.global_pool == config["global_pool"]
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model.eval()


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("name", OF_TIMM)
def test_a_model_of_timm_comes_back_to_its_own_class_bit_by_bit(name, num_classes, filled, save_source, through):
    model, source = from_timm(name, filled, save_source, num_classes)
    again = timm_of(through(source))
    theirs, weights = model.state_dict(), again.state_dict()
    assert [key for key in theirs if not torch.equal(theirs[key], weights[key])] == []
    patch = 14 if "patch14" in name else 16
    pixels = torch.randn(1, 3, 6 * patch, 4 * patch)
    with torch.no_grad():
        assert_says_the_same(model(pixels), again(pixels))


def test_what_timm_s_users_give_by_hand_is_left_to_them(filled, tmp_path, save_source, through):
    """Virchow2: timm takes the class of the MLP as a class, which no file can hold."""
    by_hand = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    stated = {"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": 56, "init_values": 1e-5, "reg_tokens": 4}
    model = filled(made("vit_huge_patch14_224", {**stated, **by_hand, "mlp_ratio": 5.34375}, 0))
    config = {"architecture": "vit_huge_patch14_224", "model_args": stated, "num_classes": 0, "global_pool": "token"}
    folder = through(save_source(model, config))
    arguments = json.loads((folder / "config.json").read_text())["model_args"]
    assert "mlp_layer" not in arguments
    again = made("vit_huge_patch14_224", {**arguments, **by_hand}, 0).eval()
    again.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    pixels = torch.randn(1, 3, 84, 56)
    with torch.no_grad():
        assert_says_the_same(model(pixels), again(pixels))


def test_settings_of_images_come_back_to_timm(filled, save_source, through):
    _, source = from_timm("vit_small_patch14_reg4_dinov2", filled, save_source)
    settings = json.loads((through(source) / "config.json").read_text())["pretrained_cfg"]
    assert settings["crop_pct"] == 0.9
    assert list(settings["input_size"]) == [3, 518, 518]


def test_files_of_deit3_itself_come_back_by_the_names_of_timm(filled, tmp_path, through):
    arguments = {"embed_dim": 64, "depth": 2, "num_heads": 1, "img_size": 64}
    model = filled(made("deit3_small_patch16_224", arguments, 3))
    weights = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": weights}, tmp_path / "deit3.pth")
    again = timm_of(through(tmp_path / "deit3.pth", told={"architecture": "deit3_small_patch16_224"}))
    pixels = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        assert_says_the_same(model(pixels), again(pixels))


# OpenCLIP


def test_a_tower_of_open_clip_comes_back(tmp_path, through):
    """Through timm's tower by name, as there is no class of OpenCLIP here."""
    torch.manual_seed(3)
    own = ViTRegModel(ViTRegConfig(**OPEN_CLIP))
    own.save_pretrained(tmp_path / "first")
    export_checkpoint(tmp_path / "first", tmp_path / "source", layout="open_clip")
    theirs = torch.load(tmp_path / "source" / "visual.pth", weights_only=True)
    assert theirs["visual.class_embedding"].shape == (64,)
    assert theirs["visual.transformer.resblocks.1.attn.in_proj_weight"].shape == (192, 64)
    back = torch.load(through(tmp_path / "source" / "visual.pth") / "visual.pth", weights_only=True)
    assert theirs.keys() == back.keys()
    assert all(torch.equal(theirs[name], back[name]) for name in theirs)


OPEN_CLIP = {
    **{**WITH_MLP, "hidden_size": 64, "num_attention_heads": 1},
    "num_register_tokens": 0,
    "layer_norm_eps": 1e-5,
    "patch_bias": False,
    "embedding_norm": True,
    "initializer_range": 0.2,
}

# From one layout to another


def test_timm_s_dinov2_with_registers_goes_to_transformers(filled, save_source, through):
    """timm has added the position of CLS to CLS: here it gets an entry of zeros in the table."""
    model, source = from_timm("vit_small_patch14_reg4_dinov2", filled, save_source, num_classes=0)
    again = hf.Dinov2WithRegistersModel.from_pretrained(through(source, layout="dinov2_with_registers"))
    assert not again.embeddings.position_embeddings[:, 0].any()
    pixels = torch.randn(2, 3, 84, 56)
    with torch.no_grad():
        assert_says_the_same(model.forward_features(pixels), again(pixels).last_hidden_state)


def test_transformers_dinov2_with_registers_goes_to_timm(filled, tmp_path, through):
    """At real size, as an architecture is all that can be told. The position of CLS is added to CLS."""
    shape = {
        "hidden_size": 384,
        "num_attention_heads": 6,
        "num_hidden_layers": 12,
        "image_size": 518,
        "patch_size": 14,
    }
    model = filled(hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**shape)), std=0.04)
    model.save_pretrained(tmp_path / "source")
    again = timm_of(through(tmp_path / "source", layout="timm", architecture="vit_small_patch14_reg4_dinov2"))
    pixels = torch.randn(1, 3, 84, 56)
    with torch.no_grad():
        assert_says_the_same(model(pixels).last_hidden_state, again.forward_features(pixels))


def test_timm_s_dinov3_goes_to_transformers(filled, save_source, through):
    model, source = from_timm("vit_small_patch16_dinov3", filled, save_source, num_classes=0)
    again = hf.DINOv3ViTModel.from_pretrained(through(source, layout="dinov3_vit"))
    pixels = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        assert_says_the_same(model.forward_features(pixels), again(pixels).last_hidden_state)


@pytest.mark.parametrize("registers", [0, 4])
def test_a_model_that_was_trained_here_goes_to_transformers(registers, save_own, tmp_path):
    """With the rule of interpolation that Transformers has for it."""
    source = save_own(
        num_register_tokens=registers,
        intermediate_size=64,
        layerscale_value=0.5,
        position_interpolation_antialias=registers > 0,
        layer_norm_eps=1e-6,
    )
    layout, cls = {
        0: ("transformers_dinov2", hf.Dinov2Model),
        4: ("dinov2_with_registers", hf.Dinov2WithRegistersModel),
    }[registers]
    again = cls.from_pretrained(export_checkpoint(source, tmp_path / "back", layout=layout).parent)
    pixels = torch.randn(2, 3, 70, 42)
    assert_says_the_same(said_by(ViTRegModel.from_pretrained(source), pixels), said_by(again, pixels))


# Refusals: they name the field and leave nothing

LIKE_DINOV2 = {"layerscale_value": 0.1, "intermediate_size": 64}
CANNOT = {
    "rotary positions in DINOv2": (
        "dinov2_with_registers",
        {**LIKE_DINOV2, "position_embedding_type": "rotary"},
        "position_embedding_type|position_embeddings",
    ),
    "a norm for CLS in DINOv3": (
        "dinov3_vit",
        {"position_embedding_type": "rotary", "separate_cls_norm": True, "layerscale_value": 0.1},
        "cls_norm",
    ),
    "norms of queries and keys in DINOv3": (
        "dinov3_vit",
        {"position_embedding_type": "rotary", "qk_norm": True, "layerscale_value": 0.1},
        "q_norm",
    ),
    "another way to count coordinates in DINOv3": (
        "dinov3_vit",
        {"position_embedding_type": "rotary", "rope_coordinates": "grid", "layerscale_value": 0.1},
        "rope_coordinates='grid', which would be 'centered'",
    ),
    "a learned table in DINOv3": (
        "dinov3_vit",
        {"layerscale_value": 0.1},
        "position_embedding_type='rotary', as DINOv3ViTModel has it, got 'learned'",
    ),
    "an inner width that no ratio gives": (
        "dinov2_with_registers",
        {"layerscale_value": 0.1, "intermediate_size": 65},
        "intermediate_size that follows from a whole mlp_ratio, got 65 for 32",
    ),
    "registers in DINOv2 without": ("transformers_dinov2", LIKE_DINOV2, "num_register_tokens=0"),
    "registers in ViT": ("vit", {}, "num_register_tokens=0"),
    "registers in CLIP": ("clip", {}, "num_register_tokens=0"),
    "positions on registers in DINOv2": (
        "dinov2_with_registers",
        {**LIKE_DINOV2, "register_position_embeddings": True},
        "register_position_embeddings|image_size|embeddings.position_embeddings",
    ),
    "the rule of DINOv2 without registers": (
        "dinov2_with_registers",
        {**LIKE_DINOV2, "position_interpolation_antialias": False, "position_interpolation_offset": 0.1},
        "position_interpolation_antialias=False, which would be True",
    ),
    "no CLS": ("dinov2_with_registers", {**LIKE_DINOV2, "use_cls_token": False, "pooling": "mean"}, "cls_token"),
    "a norm after pooling in ViT": ("vit", {"num_register_tokens": 0, "pooled_norm": True}, "pooled_norm=True"),
    "no bias after attention in DINOv2": (
        "dinov2_with_registers",
        {**LIKE_DINOV2, "proj_bias": False},
        "no tensor .*attention.output.dense.bias",
    ),
    "test-time registers in DINOv2": (
        "dinov2_with_registers",
        {**LIKE_DINOV2, "num_test_time_registers": 1, "register_neurons": [[0, 3]]},
        "num_test_time_registers=1, which would be 0",
    ),
}


@pytest.mark.parametrize("kind", CANNOT)
def test_what_a_layout_cannot_hold_is_refused_by_its_name(kind, save_own, tmp_path):
    layout, fields, message = CANNOT[kind]
    with pytest.raises(ValueError, match=message):
        export_checkpoint(save_own(**fields), tmp_path / "back", layout=layout)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


@pytest.mark.parametrize("layout", ["dinov3_vit", "clip", "open_clip"])
def test_a_classifier_is_refused_by_layouts_without(layout, save_own, tmp_path):
    with pytest.raises(ValueError, match="Expected a backbone for"):
        export_checkpoint(save_own(ViTRegForImageClassification), tmp_path / "back", layout=layout)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        ("dinov2_with_registers", {"pooling": "cls"}),
        ("dinov2_with_registers", {"pooling": "mean"}),
        ("dinov2_with_registers", {"pooling": "cls_mean", "num_classifier_layers": 2}),
        ("transformers_dinov2", {"pooling": "cls", "num_register_tokens": 0}),
        ("vit", {"pooling": "mean", "num_register_tokens": 0}),
    ],
    ids=str,
)
def test_a_classifier_on_something_else_is_refused(layout, fields, save_own, tmp_path):
    """It would be read as another one, or not at all."""
    source = save_own(ViTRegForImageClassification, **LIKE_DINOV2, **fields)
    reads = {"vit": "cls"}.get(layout, "cls_mean")
    with pytest.raises(ValueError, match=f"Expected pooling='{reads}' of one layer.* got '{fields['pooling']}' of"):
        export_checkpoint(source, tmp_path / "back", layout=layout)
    assert not (tmp_path / "back").exists()


def test_another_architecture_of_timm_is_refused(filled, save_source, through, tmp_path):
    _, source = from_timm("vit_small_patch14_reg4_dinov2", filled, save_source)
    with pytest.raises(ValueError, match=r"hidden_size=64, which would be 384|of timm's vit_small_patch16_224"):
        through(source, architecture="vit_small_patch16_224")
    assert not (tmp_path / "back").exists()


def test_a_layout_has_to_be_named_for_what_was_not_converted(save_own, tmp_path):
    with pytest.raises(ValueError, match=r"Expected the name of a layout, as .* was not converted from one"):
        export_checkpoint(save_own(), tmp_path / "back")


def test_an_architecture_of_timm_has_to_be_named_for_what_was_not_converted(save_own, tmp_path):
    with pytest.raises(ValueError, match="Expected the architecture of a model of timm to write, got none"):
        export_checkpoint(save_own(), tmp_path / "back", layout="timm")


def test_an_unknown_layout_is_refused(save_own, tmp_path):
    with pytest.raises(ValueError, match=r"Expected a layout of dinov2_with_registers, .*, got 'keras'"):
        export_checkpoint(save_own(), tmp_path / "back", layout="keras")


def test_models_with_another_head_are_refused(save_own, tmp_path):
    with pytest.raises(ValueError, match="Expected a backbone or an image classifier"):
        export_checkpoint(save_own(ViTRegForSemanticSegmentation), tmp_path / "back", layout="dinov2_with_registers")


def test_a_checkpoint_of_another_family_is_refused(tmp_path):
    hf.Dinov2Model(hf.Dinov2Config(**SMALL)).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="Expected a checkpoint of ViTReg"):
        export_checkpoint(tmp_path / "source", tmp_path / "back", layout="transformers_dinov2")


def test_weights_that_the_config_does_not_describe_are_refused(save_own, tmp_path):
    source = save_own()
    weights = load_file(source / "model.safetensors")
    weights["embeddings.register_tokens"] = torch.zeros(1, 5, 32)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"embeddings\.register_tokens"):
        export_checkpoint(source, tmp_path / "back", layout="dinov2_with_registers")


def test_an_architecture_is_told_to_timm_alone(filled, tmp_path, through):
    filled(TRANSFORMERS["dinov2"]()).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"Expected no architecture to be told for .*, which does not read it"):
        through(tmp_path / "source", architecture="vit_small_patch14_dinov2")


def test_a_folder_that_is_there_is_not_touched_unless_told(filled, tmp_path, through):
    filled(TRANSFORMERS["dinov2"]()).save_pretrained(tmp_path / "source")
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "diary.txt").write_text("dear")
    with pytest.raises(ValueError, match="Expected a new folder"):
        through(tmp_path / "source")
    with pytest.raises(ValueError, match=r"a folder with a checkpoint to be replaced, got .*back, which holds none"):
        export_checkpoint(tmp_path / "own", tmp_path / "back", overwrite=True)
    assert (tmp_path / "back" / "diary.txt").read_text() == "dear"
    (tmp_path / "back" / "old.pth").write_text("")
    with pytest.raises(ValueError, match=r"a checkpoint and nothing else to be replaced, got .*diary\.txt beside it"):
        export_checkpoint(tmp_path / "own", tmp_path / "back", overwrite=True)
    assert (tmp_path / "back" / "diary.txt").read_text() == "dear"
    (tmp_path / "back" / "diary.txt").unlink()
    export_checkpoint(tmp_path / "own", tmp_path / "back", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == [
        *("config.json", "model.safetensors", "preprocessor_config.json")
    ]
