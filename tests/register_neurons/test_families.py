"""Every family that converts without registers: with planted neurons in a source of it, these are found and moved."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from vitreg_hf import ViTRegModel, add_test_time_registers, convert_checkpoint, find_register_neurons
from vitreg_hf.conversion.back import export_checkpoint
from vitreg_hf.register_neurons.planted import BLUE, FREE, planted_network, planted_neurons, processor_for

WIDE = {"hidden_size": 384, "intermediate_size": 1536}  # 64 channels per head where no config tells their number
SCALED = {"layerscale_value": 1.0, "position_interpolation_antialias": False, "intermediate_size": 384}
CLIP = {"embedding_norm": True, "patch_bias": False, "layer_norm_eps": 1e-5}
LAYOUTS = {
    "DINOv2 of Transformers": ("transformers_dinov2", SCALED),
    "DINOv2 of Transformers, SwiGLU": ("transformers_dinov2", {**SCALED, "swiglu": True}),
    "DINOv2's own file": ("dinov2", {**SCALED, **WIDE, "position_interpolation_offset": 0.1}),
    "ViT of Transformers": ("vit", {"layer_norm_eps": 1e-12, "position_interpolation_antialias": False}),
    "CLIP of Transformers": (
        "clip",
        {**CLIP, "pooled_norm": True, "hidden_act": "quick_gelu", "position_interpolation_antialias": False},
    ),
    "OpenCLIP's own file": ("open_clip", {**CLIP, **WIDE}),
}
OF_TIMM = {
    "vit_small_patch16_224": {},
    "deit3_small_patch16_224": {"layerscale_value": 1.0},
    "vit_base_patch16_clip_quickgelu_224": {**CLIP, "hidden_act": "quick_gelu"},
}


def check(converted, images):
    """The planted neurons are found in a converted model, and moving them leaves no outlier and the output."""
    model = converted.model
    assert model.config.num_register_tokens == 0
    found = find_register_neurons(model, images.pixels, progress=False)
    assert set(found) == set(planted_neurons(model.config))
    mended = add_test_time_registers(model, found)
    with torch.no_grad():
        before, after = (one(images.pixels, output_hidden_states=True) for one in (model, mended))
    largest = [one.hidden_states[-1][:, -36:].norm(dim=-1).max() for one in (before, after)]
    assert largest[0] > 3 * found.threshold
    assert largest[1] < found.threshold
    assert torch.cosine_similarity(before.pooler_output, after.pooler_output, dim=-1)[:-1].min() > 0.98
    assert torch.cosine_similarity(before.patch_tokens[~images.blue], after.patch_tokens[~images.blue]).min() > 0.95
    return found


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_source_of_another_family_is_mended_as_ours_is(family, images, tmp_path):
    layout, fields = LAYOUTS[family]
    model = planted_network(**fields)
    model.save_pretrained(tmp_path / "own")
    processor_for(model).save_pretrained(tmp_path / "own")
    file = export_checkpoint(tmp_path / "own", tmp_path / "source", layout=layout)
    converted = convert_checkpoint(file if file.suffix == ".pth" else file.parent)
    assert converted.report.layout == layout
    found = check(converted, images)
    assert list(found) == list(find_register_neurons(model, images.pixels, top_k=5, progress=False))
    if layout.endswith("clip"):  # which norms tokens before the first block
        assert converted.model.config.embedding_norm


@pytest.mark.parametrize("architecture", OF_TIMM)
def test_a_source_of_timm_is_mended_as_ours_is(architecture, images, tmp_path):
    """Through a small model of the architecture, whose settings its conversion keeps."""
    arguments = {"embed_dim": 96, "depth": 6, "num_heads": 6, "img_size": 48, "patch_size": 8, "num_classes": 0}
    empty = timm.create_model(architecture, **arguments)
    (tmp_path / "empty").mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in empty.state_dict().items()},
        tmp_path / "empty" / "model.safetensors",
    )
    config = {"architecture": architecture, "num_classes": 0, "model_args": arguments, "pretrained_cfg": {}}
    (tmp_path / "empty" / "config.json").write_text(json.dumps(config))
    convert_checkpoint(tmp_path / "empty", tmp_path / "own")
    own = ViTRegModel.from_pretrained(tmp_path / "own")
    planted = planted_network(
        intermediate_size=384, cls_position_embedding=own.config.cls_position_embedding, **OF_TIMM[architecture]
    )
    own.load_state_dict(planted.state_dict())
    own.save_pretrained(tmp_path / "own")
    export_checkpoint(tmp_path / "own", tmp_path / "source")
    converted = convert_checkpoint(tmp_path / "source")
    assert converted.report.layout == "timm"
    check(converted, images)
    theirs = timm.create_model(architecture, **arguments)
    theirs.load_state_dict(load_file(tmp_path / "source" / "model.safetensors"), strict=True)
    writes = theirs.blocks[4].mlp.fc2.weight[:, 0]
    assert writes.abs().argsort(descending=True)[:3].sort().values.tolist() == FREE
    assert theirs.blocks[4].mlp.fc1.weight[0].abs().argmax() == BLUE
