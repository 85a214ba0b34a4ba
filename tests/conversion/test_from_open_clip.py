"""Vision towers in OpenCLIP's own layout, compared with what timm's own converter makes of the same files."""

import json
from functools import partial

import pytest
import timm
import torch
from PIL import Image
from skimage import data
from timm.models.vision_transformer import checkpoint_filter_fn

from vitreg_hf.conversion.convert import convert_checkpoint
from vitreg_hf.conversion.verify import verify_conversion

WIDTH, DEPTH, PATCH, GRID = 64, 3, 16, 4
SIZES = ((64, 64), (96, 48), (112, 80))
OTHERS = {  # of the text tower, and between the two
    "positional_embedding": (77, 16),
    "text_projection": (16, 8),
    "logit_scale": (),
    "visual.proj": (WIDTH, 8),
    "transformer.resblocks.0.ln_1.weight": (16,),
    "token_embedding.weight": (9, 16),
    "ln_final.weight": (16,),
}


@pytest.fixture
def weights():
    """A state dict as OpenCLIP writes it: towers of both kinds, large random values."""
    shapes = {
        "class_embedding": (WIDTH,),
        "positional_embedding": (1 + GRID * GRID, WIDTH),
        "conv1.weight": (WIDTH, 3, PATCH, PATCH),
        **{f"{norm}.{part}": (WIDTH,) for norm in ("ln_pre", "ln_post") for part in ("weight", "bias")},
    }
    for block in range(DEPTH):
        name = f"transformer.resblocks.{block}"
        shapes |= {f"{name}.ln_{i}.{part}": (WIDTH,) for i in (1, 2) for part in ("weight", "bias")}
        shapes |= {f"{name}.attn.in_proj_weight": (3 * WIDTH, WIDTH), f"{name}.attn.in_proj_bias": (3 * WIDTH,)}
        shapes |= {f"{name}.attn.out_proj.weight": (WIDTH, WIDTH), f"{name}.attn.out_proj.bias": (WIDTH,)}
        shapes |= {f"{name}.mlp.c_fc.weight": (4 * WIDTH, WIDTH), f"{name}.mlp.c_fc.bias": (4 * WIDTH,)}
        shapes |= {f"{name}.mlp.c_proj.weight": (WIDTH, 4 * WIDTH), f"{name}.mlp.c_proj.bias": (WIDTH,)}
    named = {f"visual.{name}": shape for name, shape in shapes.items()} | OTHERS
    return {
        name: torch.randn(shape) * 0.2 + float("ln_" in name and "weight" in name) for name, shape in named.items()
    }


def reference(weights, quick, **options):
    """timm's model, with weights that timm's own converter names."""
    model = timm.create_model(
        f"vit_base_patch16_clip{'_quickgelu' if quick else ''}_224",
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=1,
        num_classes=0,
        dynamic_img_size=True,
        **{"img_size": GRID * PATCH, **options},
    )
    renamed = checkpoint_filter_fn(dict(weights), model)
    model.load_state_dict({name: tensor for name, tensor in renamed.items() if not name.startswith("head.")})
    return model.eval()


def outputs_of(model):
    def run(pixels):
        tokens, taken = model.forward_intermediates(pixels, return_prefix_tokens=True, output_fmt="NLC")
        blocks = [torch.cat([prefix, patches], 1) for patches, prefix in taken]
        cls, patches = tokens[:, 0], tokens[:, 1:]
        return {"blocks": blocks, "last_hidden_state": tokens, "cls": cls, "patches": patches, "pooled": model(pixels)}

    return run


@pytest.fixture
def save(weights, save_source):
    def write(quick=None, preprocess=None, **vision):
        folder = save_source(weights, file="open_clip_model.safetensors")
        if quick is not None:
            model = {"embed_dim": 8, "quick_gelu": quick, "vision_cfg": {"width": WIDTH, **vision}}
            content = {"model_cfg": model, "preprocess_cfg": preprocess or {}}
            (folder / "open_clip_config.json").write_text(json.dumps(content))
        return folder

    return write


@pytest.mark.parametrize("quick", [True, False])
def test_every_output_is_that_of_timm_s_own_conversion(quick, weights, save, assert_same_outputs):
    converted = convert_checkpoint(save(quick))
    assert converted.report.layout == "open_clip"
    assert not converted.report.notes
    assert_same_outputs(outputs_of(reference(weights, quick)), converted.model, SIZES)


def test_the_two_activations_differ(weights):
    """Else the test above could not tell QuickGELU from GELU."""
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        one, other = (reference(weights, quick)(pixels) for quick in (True, False))
    assert (one - other).abs().max() > 0.01


def test_gradients_of_images_and_of_a_weight_are_those_of_the_reference(weights, save, assert_same_gradients):
    own, model = convert_checkpoint(save(False)).model, reference(weights, False)
    assert_same_gradients(
        model.forward_features,
        model.blocks[0].mlp.fc1.weight,
        lambda pixels: own(pixels).last_hidden_state,
        own.layers[0].mlp.up_proj.weight,
        (96, 48),
    )


def test_intermediate_layers_are_those_of_the_reference(weights, save):
    own, model = convert_checkpoint(save(False)).model, reference(weights, False)
    pixels = torch.randn(1, 3, 96, 48)
    with torch.no_grad():
        theirs = model.get_intermediate_layers(pixels, n=2, reshape=True, norm=True)
        found = own.get_intermediate_layers(pixels, n=2, reshape=True)
    for maps, patches in zip(theirs, found, strict=True):
        torch.testing.assert_close(patches, maps, atol=1e-4, rtol=0)


def test_without_a_config_gelu_is_taken_and_said(weights, save, assert_same_outputs):
    converted = convert_checkpoint(save())
    assert any("GELU is taken" in note for note in converted.report.notes)
    assert_same_outputs(outputs_of(reference(weights, False)), converted.model, SIZES)


@pytest.mark.parametrize("has_settings", [True, False])
def test_weights_of_open_clip_beside_a_config_of_transformers_are_known_by_their_names(
    has_settings, weights, save, assert_same_outputs
):
    folder = save(False if has_settings else None)
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": {"hidden_size": WIDTH}}))
    torch.save({"vision_model.pre_layrnorm.weight": torch.ones(WIDTH)}, folder / "pytorch_model.bin")
    converted = convert_checkpoint(folder)
    assert converted.report.layout == "open_clip"
    assert_same_outputs(outputs_of(reference(weights, False)), converted.model, SIZES)


def test_the_text_tower_is_left_out_with_a_reason(save):
    dropped = convert_checkpoint(save(False)).report.dropped
    assert set(dropped) == set(OTHERS)
    assert "text tower" in dropped["transformer.resblocks.0.ln_1.weight"]
    assert "space of texts" in dropped["visual.proj"]


def test_heads_are_those_of_the_config_before_one_per_64_channels(save):
    assert convert_checkpoint(save(False, head_width=16)).config.num_attention_heads == 4


def test_towers_that_are_computed_otherwise_are_refused_by_the_setting(save, tmp_path):
    source = save(False, attentional_pool=True)
    with pytest.raises(ValueError, match="Expected attentional_pool=False in a vision tower, got True"):
        convert_checkpoint(source, tmp_path / "own")
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize(
    ("setting", "options"),
    [
        ({"norm_kwargs": {"eps": 0.05}}, {"norm_layer": partial(torch.nn.LayerNorm, eps=0.05)}),
        ({"act_kwargs": {"approximate": "tanh"}}, {"act_layer": "gelu_tanh"}),
        ({"act_kwargs": {"approximate": "none"}, "norm_kwargs": {}}, {}),
    ],
)
def test_norms_and_activations_are_those_of_the_config(setting, options, weights, save, assert_same_outputs):
    converted = convert_checkpoint(save(False, **setting))
    assert converted.config.hidden_act == ("gelu_pytorch_tanh" if "act_layer" in options else "gelu")
    assert_same_outputs(outputs_of(reference(weights, False, **options)), converted.model, SIZES)
    assert verify_conversion(converted, [Image.fromarray(data.chelsea())]).is_equal


@pytest.mark.parametrize(
    ("quick", "setting", "message"),
    [
        (False, {"norm_kwargs": {"elementwise_affine": False}}, "Expected norms of another eps alone"),
        (False, {"act_kwargs": {"inplace": True}}, "Expected GELU, by tanh or not"),
        (False, {"act_kwargs": {"approximate": "sinh"}}, "Expected GELU, by tanh or not"),
        (True, {"act_kwargs": {"approximate": "tanh"}}, "Expected GELU, by tanh or not"),
        (False, {"qk_norm": True}, "Expected qk_norm=False in a vision tower, got True"),
        (False, {"block_type": "custom"}, "Expected block_type='default' in a vision tower, got 'custom'"),
        (False, {"rope": True}, "Expected a vision tower of settings that are known here, got rope=True"),
    ],
)
def test_settings_that_make_another_tower_are_refused(quick, setting, message, save):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(save(quick, **setting))


def test_another_epsilon_than_that_of_the_config_is_refused(save):
    source = save(False, norm_kwargs={"eps": 0.05})
    with pytest.raises(ValueError, match=r"Expected layer_norm_eps=0\.05, as norm_kwargs says, got 0\.1"):
        convert_checkpoint(source, layer_norm_eps=0.1)
    assert convert_checkpoint(source, layer_norm_eps=0.05).config.layer_norm_eps == 0.05


def test_settings_that_change_no_output_are_read_over(save):
    told = {"patch_dropout": 0.5, "mlp_ratio": 4.0, "ls_init_value": None, "output_tokens": True, "block_type": None}
    assert convert_checkpoint(save(False, layers=DEPTH, patch_size=[PATCH, PATCH], **told)).config.patch_size == PATCH


def test_patches_and_images_may_be_oblong(weights, save, assert_same_outputs):
    weights["visual.conv1.weight"] = weights["visual.conv1.weight"][..., : PATCH // 2].clone()
    weights["visual.positional_embedding"] = weights["visual.positional_embedding"][:9].clone()
    converted = convert_checkpoint(save(False, patch_size=[PATCH, PATCH // 2], image_size=[2 * PATCH, 2 * PATCH]))
    assert list(converted.config.patch_size) == [PATCH, PATCH // 2]
    assert converted.config.position_grid == (2, 4)
    oblong = {"patch_size": (PATCH, PATCH // 2), "img_size": 2 * PATCH}
    model = reference(weights, False, **oblong)
    assert_same_outputs(outputs_of(model), converted.model, ((32, 32), (64, 48)))
    assert verify_conversion(converted, [Image.fromarray(data.chelsea())]).is_equal


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_pixels_are_those_that_open_clip_shows(mode, save, photo, assert_same_pixels):
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    preprocess = {"mean": mean, "std": std, "resize_mode": mode, "interpolation": "bilinear", "size": 64}
    processor = convert_checkpoint(save(False, preprocess)).processor
    if mode == "squash":
        shown = photo.resize((64, 64), Image.Resampling.BILINEAR)
    else:
        left = round((96 - 64) / 2)  # 451 x 300 becomes 96 x 64
        shown = photo.resize((96, 64), Image.Resampling.BILINEAR).crop((left, 0, left + 64, 64))
    pixels = torch.frombuffer(bytearray(shown.tobytes()), dtype=torch.uint8).view(64, 64, 3).permute(2, 0, 1) / 255
    statistics = [torch.tensor(one)[:, None, None] for one in (mean, std)]
    assert_same_pixels(((pixels - statistics[0]) / statistics[1])[None], processor)
