"""Vision towers in OpenCLIP's own layout, compared with what timm's own converter makes of the same files."""

import json

import pytest
import timm
import torch
from PIL import Image
from timm.models.vision_transformer import checkpoint_filter_fn

from vitreg_hf.conversion.convert import convert_checkpoint

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


def reference(weights, quick):
    """timm's model, with weights that timm's own converter names."""
    model = timm.create_model(
        f"vit_base_patch16_clip{'_quickgelu' if quick else ''}_224",
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=1,
        img_size=GRID * PATCH,
        num_classes=0,
        dynamic_img_size=True,
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
