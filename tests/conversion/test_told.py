"""What a user tells of a source that says it already, or that is not read: refused in a sentence."""

import json

import pytest
import timm
import torch
from transformers import AutoModel, Dinov2WithRegistersConfig, ViTConfig

from vitreg_hf.conversion.convert import convert_checkpoint

from .reference_files import dinov2_file, dinov2_source

TOLD = {
    "heads": (
        "transformers",
        {"num_attention_heads": 4},
        "Expected no num_attention_heads to be told for .*has 2, got 4",
    ),
    "epsilon": (
        "transformers",
        {"layer_norm_eps": 0.1},
        "Expected no layer_norm_eps to be told for .*has 1e-06, got 0.1",
    ),
    "mask token": ("vit", {"use_mask_token": True}, "Expected a mask token that can be kept, got ViT of Transformers"),
    "heads of timm": ("timm", {"num_attention_heads": 4}, "Expected num_attention_heads=2, as the config says, got 4"),
    "mask token of timm": ("timm", {"use_mask_token": True}, "Expected a mask token that can be kept, got timm"),
    "architecture": (
        "dinov2",
        {"architecture": "vit_small_patch16_224", "layout": "dinov2"},
        "which does not read it",
    ),
    "heads of OpenCLIP": (
        "open_clip",
        {"num_attention_heads": 4},
        "Expected 2 attention heads, as head_width says, got 4",
    ),
}


@pytest.fixture
def telling(tmp_path, save_source):
    """A small source of a kind that says how many heads it has: two."""

    def make(kind):
        small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
        if kind == "timm":
            arguments = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 32}
            model = timm.create_model("vit_small_patch16_224", num_classes=0, **arguments)
            return save_source(
                model, {"architecture": "vit_small_patch16_224", "num_classes": 0, "model_args": arguments}
            )
        if kind == "dinov2":
            return save_source(dinov2_file(dinov2_source(num_hidden_layers=1)), file="weights.pth")
        if kind == "open_clip":
            return open_clip_folder(save_source)
        config = {"vit": ViTConfig, "transformers": Dinov2WithRegistersConfig}[kind](**small, patch_size=14)
        AutoModel.from_config(config).save_pretrained(tmp_path / "source")
        return tmp_path / "source"

    return make


def open_clip_folder(save_source):
    zeros = {"class_embedding": (32,), "positional_embedding": (5, 32), "conv1.weight": (32, 3, 16, 16)}
    zeros |= {"transformer.resblocks.0.mlp.c_fc.weight": (64, 32)}
    folder = save_source({f"visual.{name}": torch.zeros(shape) for name, shape in zeros.items()})
    settings = {"model_cfg": {"vision_cfg": {"head_width": 16}}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("case", TOLD)
def test_what_is_told_and_not_read_is_refused(case, telling, tmp_path):
    kind, told, message = TOLD[case]
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(telling(kind), tmp_path / "converted", **told)
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("kind", ["transformers", "timm"])
def test_what_the_source_says_too_may_be_told(kind, telling):
    assert convert_checkpoint(telling(kind), num_attention_heads=2).config.num_attention_heads == 2
