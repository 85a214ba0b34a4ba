"""Comparing a conversion with its source: what is compared, in whose implementation, and whether it tells."""

import json

import PIL.Image
import pytest
import timm
import torch
from skimage import data
from transformers import (
    AutoModel,
    BitImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ViTConfig,
    ViTForImageClassification,
)

from vitreg_hf import convert_checkpoint, export_checkpoint
from vitreg_hf.cli import main
from vitreg_hf.conversion.convert import CONVERSION
from vitreg_hf.conversion.verify import TOLERANCE, images_of, sample_photos, verify_conversion

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "image_size": 56, "patch_size": 14}


@pytest.fixture
def photos():
    return [PIL.Image.fromarray(data.chelsea()), PIL.Image.fromarray(data.coffee())]


@pytest.fixture
def classifier(filled, tmp_path):
    """Folder of a DINOv2 classifier of Transformers, with its image processor."""
    model = filled(Dinov2WithRegistersForImageClassification(Dinov2WithRegistersConfig(num_labels=5, **SMALL)))
    model.save_pretrained(tmp_path / "source")
    BitImageProcessor(size={"shortest_edge": 64}, crop_size=56).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def names(found):
    return list(dict.fromkeys(one.what for one in found.differences))


def test_every_layer_token_kind_logit_and_pixel_is_compared_at_three_sizes(classifier, photos):
    found = verify_conversion(convert_checkpoint(classifier), photos)
    assert found.is_equal
    assert found.images == 2
    assert names(found) == ["layer 0", "layer 1", "CLS", "registers", "patches", "logits", "pixels"]
    sizes = {one.size for one in found.differences}
    assert sizes == {(56, 56), (84, 84), (28, 56)}
    assert "Dinov2WithRegistersForImageClassification" in found.source
    table = str(found)
    assert "56 x 56" in table
    assert table.endswith(f"equal within {TOLERANCE}, or that share of an output's largest value if above 1")


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (DINOv3ViTModel, (DINOv3ViTConfig, {"num_register_tokens": 4, "intermediate_size": 96})),
        (ViTForImageClassification, (ViTConfig, {"intermediate_size": 96, "num_labels": 3})),
        (CLIPVisionModel, (CLIPVisionConfig, {"intermediate_size": 96})),
    ],
)
def test_models_of_transformers_are_compared_with_themselves(filled, tmp_path, photos, model, options):
    config, more = options
    filled(model(config(**SMALL, **more))).save_pretrained(tmp_path / "source")
    found = verify_conversion(convert_checkpoint(tmp_path / "source"), photos)
    assert found.is_equal
    assert model.__name__ in found.source


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_medium_patch16_rope_reg1_gap_256"])
def test_models_of_timm_are_compared_with_themselves(filled, save_source, photos, name):
    small = {"embed_dim": 64, "depth": 2, "num_heads": 4}
    source = filled(timm.create_model(name, num_classes=3, **small))
    folder = save_source(source, {"architecture": name, "num_classes": 3, "model_args": small})
    found = verify_conversion(convert_checkpoint(folder), photos[:1])
    assert found.is_equal
    assert "logits" in names(found)
    assert "timm" in found.source


def own_files(filled, tmp_path, layout):
    """A `.pth` in the layout of DINOv2 with a head, of DINOv2 without registers, of DINOv3."""
    if layout == "dinov2":
        config = Dinov2WithRegistersConfig(num_labels=5, use_swiglu_ffn=True, **SMALL)
        source = Dinov2WithRegistersForImageClassification(config)
    elif layout == "dinov2 without registers":
        source = Dinov2Model(Dinov2Config(**SMALL))
    else:
        gated = {"use_gated_mlp": True, "hidden_act": "silu", "intermediate_size": 96, "num_register_tokens": 4}
        source = DINOv3ViTModel(DINOv3ViTConfig(**SMALL, **gated))
    filled(source).save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "own")
    if layout == "dinov2 without registers":  # the rule of Transformers is another one
        config = json.loads((tmp_path / "own" / "config.json").read_text())
        (tmp_path / "own" / "config.json").write_text(json.dumps({**config, "position_interpolation_offset": 0.1}))
    return export_checkpoint(tmp_path / "own", tmp_path / "file", layout=layout.split()[0])


@pytest.mark.parametrize("layout", ["dinov2", "dinov2 without registers", "dinov3"])
def test_files_without_code_of_their_own_are_compared_with_timm(filled, tmp_path, photos, layout):
    file = own_files(filled, tmp_path, layout)
    head = file.with_name("linear_head.pth")
    conversion = convert_checkpoint(file, head=head if head.exists() else None)
    found = verify_conversion(conversion, photos[:1])
    assert found.is_equal
    assert "timm" in found.source
    assert ("logits" in names(found)) is head.exists()
    sizes = {one.size for one in found.differences}
    if layout == "dinov2 without registers":
        assert len(sizes) == 1, "timm has another rule for other sizes"
        assert "another rule" in found.notes[0]
    else:
        assert len(sizes) == 3


def test_a_difference_is_found(classifier, photos):
    conversion = convert_checkpoint(classifier)
    with torch.no_grad():
        conversion.model.vitreg.layers[1].mlp.down_proj.bias += 0.1
    found = verify_conversion(conversion, photos)
    assert not found.is_equal
    assert "NOT equal" in str(found)
    large = {one.what for one in found.differences if one.largest > one.allowed}
    assert "layer 1" in large
    assert "layer 0" not in large


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_before_rounding(classifier, photos, dtype):
    conversion = convert_checkpoint(classifier, dtype=dtype)
    found = verify_conversion(conversion, photos)
    assert found.is_equal
    assert found.notes == (f"compared before rounding: the weights are written in {str(dtype)[6:]}",)
    assert conversion.model.dtype == dtype
    assert not verify_conversion(convert_checkpoint(classifier), photos).notes


def test_a_source_in_half_precision_is_not_rounded(filled, tmp_path, photos):
    model = filled(Dinov2Model(Dinov2Config(**SMALL))).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    conversion = convert_checkpoint(tmp_path / "source")
    assert conversion.config.dtype == torch.bfloat16
    found = verify_conversion(conversion, photos[:1])
    assert found.is_equal
    assert not found.notes


def test_half_precision_can_be_verified_and_saved(classifier, tmp_path):
    out = tmp_path / "out"
    assert main(["convert", str(classifier), str(out), "--dtype", "bfloat16", "--verify"]) == 0
    assert "written in bfloat16" in json.loads((out / CONVERSION).read_text())["verified"]["notes"][0]
    assert AutoModel.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("has_processor", [False, True])
def test_models_of_one_channel_are_shown_grey_images(filled, tmp_path, photos, has_processor):
    config = Dinov2WithRegistersConfig(num_channels=1, num_labels=5, **SMALL)
    filled(Dinov2WithRegistersForImageClassification(config)).save_pretrained(tmp_path / "source")
    if has_processor:
        options = {"size": {"shortest_edge": 64}, "crop_size": 56, "image_mean": [0.5], "image_std": [0.25]}
        BitImageProcessor(**options, do_convert_rgb=False).save_pretrained(tmp_path / "source")
    found = verify_conversion(convert_checkpoint(tmp_path / "source"), photos)
    assert found.is_equal
    assert ("pixels" in names(found)) is has_processor


def test_two_real_photos_stand_ready():
    photos = sample_photos()
    assert [photo.size for photo in photos] == [(640, 427), (640, 427)]


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="Expected a folder with images"):
        images_of(tmp_path)
    with pytest.raises(ValueError, match="Expected a folder with images"):
        images_of(tmp_path / "missing")


def test_a_folder_per_class_has_images(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        sample_photos()[0].resize((8, 8)).save(tmp_path / name / "1.png")
    assert [image.size for image in images_of(tmp_path)] == [(8, 8), (8, 8)]


# The command


def test_the_command_reports_compares_and_saves(classifier, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(classifier), str(out), "--verify"]) == 0
    told = capsys.readouterr().out
    assert "as it is" in told
    assert "none unknown or missing" in told
    assert "compared with transformers" in told
    assert str(out) in told
    saved = json.loads((out / CONVERSION).read_text())
    assert saved["layout"] == "dinov2_with_registers"
    assert saved["verified"]["equal"] is True
    assert len(saved["used"]) == len(json.loads(json.dumps(saved["used"])))
    assert any("mask_token" in name for name in saved["dropped"])


def test_the_command_saves_nothing_that_is_not_equal(classifier, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vitreg_hf.conversion.verify.TOLERANCE", -1.0)
    assert main(["convert", str(classifier), str(tmp_path / "out"), "--verify"]) == 2
    assert "nothing was saved" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_takes_images_of_a_folder(classifier, tmp_path, photos):
    (tmp_path / "photos").mkdir()
    photos[0].save(tmp_path / "photos" / "cat.png")
    command = ["convert", str(classifier), str(tmp_path / "out"), "--verify", str(tmp_path / "photos")]
    assert main(command) == 0
    assert json.loads((tmp_path / "out" / CONVERSION).read_text())["verified"]["images"] == 1


def test_the_command_takes_images_of_the_current_folder(classifier, tmp_path, photos, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path / "photos")
    command = ["convert", str(classifier), str(tmp_path / "out"), "--verify", "."]
    assert main(command) == 2
    assert "Expected a folder with images" in capsys.readouterr().err
    photos[0].save("cat.png")
    assert main(command) == 0
    assert json.loads((tmp_path / "out" / CONVERSION).read_text())["verified"]["images"] == 1


def test_overwrite_of_convert_says_what_it_replaces(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "replace OUT as a whole, if it holds a checkpoint and nothing else" in told
    assert "records and reports" not in told


def test_the_command_goes_back(classifier, tmp_path, capsys):
    assert main(["convert", str(classifier), str(tmp_path / "own"), "--dtype", "float32"]) == 0
    assert main(["convert", str(tmp_path / "own"), str(tmp_path / "back"), "--to", "dinov2_with_registers"]) == 0
    again = Dinov2WithRegistersForImageClassification.from_pretrained(tmp_path / "back")
    source = Dinov2WithRegistersForImageClassification.from_pretrained(classifier)
    assert torch.equal(again.classifier.weight, source.classifier.weight)
    refused = ["convert", str(tmp_path / "own"), str(tmp_path / "again"), "--to", "dinov2", "--verify"]
    assert main(refused) == 2
    assert "--verify" in capsys.readouterr().err


def test_mistakes_end_in_one_sentence(classifier, tmp_path, capsys):
    assert main(["convert", str(classifier), str(classifier)]) == 2
    assert capsys.readouterr().err.startswith("vitreg convert: Expected a new folder")
    assert main(["convert", str(tmp_path / "none.pth"), str(tmp_path / "out")]) == 2
    assert "Expected a file, a folder or the id of a repository" in capsys.readouterr().err
