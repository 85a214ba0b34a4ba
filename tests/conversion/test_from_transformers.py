"""Models of Transformers: every output, gradient, label and pixel is that of the source."""

import json

import pytest
import torch
import transformers as hf

from vitreg_hf.conversion.convert import convert_checkpoint

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
WITH_MLP = {**SMALL, "intermediate_size": 48}
SIZES = ((56, 56), (70, 42), (84, 98))  # the table's own, one that is not square, a larger one
ANY_SIZE = {"interpolate_pos_encoding": True}  # ViT and CLIP of Transformers adapt positions when asked

# How to build each, by name.
FAMILIES = {
    "dinov2 with registers": lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**SMALL)),
    "dinov2 with seven registers": lambda: hf.Dinov2WithRegistersModel(
        hf.Dinov2WithRegistersConfig(num_register_tokens=7, layer_norm_eps=1e-3, mlp_ratio=2, **SMALL)
    ),
    "dinov2 with registers, no biases of qkv": lambda: hf.Dinov2WithRegistersModel(
        hf.Dinov2WithRegistersConfig(qkv_bias=False, **SMALL)
    ),
    "dinov2 with registers, SwiGLU": lambda: hf.Dinov2WithRegistersModel(
        hf.Dinov2WithRegistersConfig(use_swiglu_ffn=True, **SMALL)
    ),
    "dinov2 with registers, head": lambda: hf.Dinov2WithRegistersForImageClassification(
        hf.Dinov2WithRegistersConfig(num_labels=7, **SMALL)
    ),
    "dinov2 with registers, SwiGLU, head": lambda: hf.Dinov2WithRegistersForImageClassification(
        hf.Dinov2WithRegistersConfig(use_swiglu_ffn=True, num_labels=7, **SMALL)
    ),
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**SMALL)),
    "dinov2, SwiGLU, head": lambda: hf.Dinov2ForImageClassification(
        hf.Dinov2Config(use_swiglu_ffn=True, num_labels=7, **SMALL)
    ),
    "dinov3": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(num_register_tokens=4, **WITH_MLP)),
    "dinov3, no registers": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**WITH_MLP)),
    "dinov3, gated": lambda: hf.DINOv3ViTModel(
        hf.DINOv3ViTConfig(num_register_tokens=4, use_gated_mlp=True, hidden_act="silu", **WITH_MLP)
    ),
    "dinov3, all biases": lambda: hf.DINOv3ViTModel(
        hf.DINOv3ViTConfig(num_register_tokens=2, query_bias=True, key_bias=True, value_bias=True, **WITH_MLP)
    ),
    "dinov3, no biases": lambda: hf.DINOv3ViTModel(
        hf.DINOv3ViTConfig(
            num_register_tokens=2,
            query_bias=False,
            value_bias=False,
            proj_bias=False,
            mlp_bias=False,
            rope_theta=37.0,
            **WITH_MLP,
        )
    ),
    "dinov3, bias of values alone": lambda: hf.DINOv3ViTModel(
        hf.DINOv3ViTConfig(num_register_tokens=4, query_bias=False, **WITH_MLP)
    ),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**WITH_MLP), add_pooling_layer=False),
    "vit, head": lambda: hf.ViTForImageClassification(hf.ViTConfig(num_labels=7, **WITH_MLP)),
    "vit, no biases of qkv": lambda: hf.ViTModel(hf.ViTConfig(qkv_bias=False, **WITH_MLP), add_pooling_layer=False),
    "clip": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**WITH_MLP)),
    "clip, GELU": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(hidden_act="gelu", **WITH_MLP)),
}
OF_EACH = ("dinov2 with registers", "dinov2 with registers, head", "dinov2", "dinov3", "vit", "clip")


def arguments_of(model):
    return ANY_SIZE if model.config.model_type in ("vit", "clip_vision_model") else {}


def outputs_of(model):
    """What a model of Transformers says of images, by the names of the comparison."""
    registers = getattr(model.config, "num_register_tokens", 0)

    def run(pixels):
        out = model(pixels, output_hidden_states=True, **arguments_of(model))
        if "logits" in out:
            return {"hidden_states": out.hidden_states, "logits": out.logits}
        tokens = out.last_hidden_state
        return {
            "hidden_states": out.hidden_states,
            "last_hidden_state": tokens,
            "pooled": out.pooler_output,
            "cls": tokens[:, 0],
            "registers": tokens[:, 1 : 1 + registers] if registers else None,
            "patches": tokens[:, 1 + registers :],
        }

    return run


def config_of(model):
    content = json.loads(model.config.to_json_string(use_diff=False))
    return {**content, "architectures": [type(model).__name__]}


@pytest.fixture
def save(save_source, tmp_path):
    """A folder with a model: as `save_pretrained` writes it (names of the Hub), or as its class calls its weights."""

    def write(model, names="of the Hub"):
        if names == "of the Hub":
            model.save_pretrained(tmp_path / "source")
            return tmp_path / "source"
        return save_source(model, config_of(model))

    return write


@pytest.mark.parametrize("names", ["of the Hub", "of the class"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_output_is_that_of_the_source(family, names, filled, save, assert_same_outputs):
    model = filled(FAMILIES[family]())
    converted = convert_checkpoint(save(model, names))
    assert_same_outputs(outputs_of(model), converted.model, SIZES)


@pytest.mark.parametrize("family", OF_EACH)
def test_gradients_of_images_and_of_a_weight_are_those_of_the_source(family, filled, save, assert_same_gradients):
    model = filled(FAMILIES[family]())
    own = convert_checkpoint(save(model)).model
    what = "logits" if "head" in family else "last_hidden_state"
    weights = [
        next(w for name, w in one.named_parameters() if "0." in name and name.endswith("q_proj.weight"))
        for one in (model, own)
    ]
    assert_same_gradients(
        lambda pixels: model(pixels, **arguments_of(model))[what],
        weights[0],
        lambda pixels: own(pixels)[what],
        weights[1],
        (70, 42),
    )


def test_the_two_generations_of_names_differ(filled, save, save_source):
    """Else the tests above would read one generation twice."""
    model = filled(FAMILIES["dinov2 with registers, SwiGLU"]())
    old = convert_checkpoint(save(model)).report.to_dict()["used"]
    new = convert_checkpoint(save_source(model, config_of(model), name="new")).report.to_dict()["used"]
    assert "encoder.layer.0.mlp.weights_in.weight" in old
    assert old["encoder.layer.0.mlp.weights_in.weight"]["what"] == "split"
    assert "encoder.layer.0.mlp.gate_proj.weight" in new
    assert "encoder.layer.0.attention.attention.query.weight" in old
    assert "encoder.layer.0.attention.q_proj.weight" in new


@pytest.mark.parametrize("family", ["dinov2 with registers", "dinov2", "dinov3"])
def test_intermediate_layers_are_normed_hidden_states(family, filled, save):
    model = filled(FAMILIES[family]())
    own = convert_checkpoint(save(model)).model
    prefix = 1 + getattr(model.config, "num_register_tokens", 0)
    norm = model.norm if family == "dinov3" else model.layernorm
    pixels = torch.randn(2, 3, 70, 42)
    with torch.no_grad():
        states = model(pixels, output_hidden_states=True).hidden_states[1:]
        found = own.get_intermediate_layers(pixels, n=[0, 2], reshape=True, return_class_token=True)
        expected = [norm(states[layer]) for layer in (0, 2)]
    for tokens, (patches, cls) in zip(expected, found, strict=True):
        torch.testing.assert_close(cls, tokens[:, 0], atol=1e-4, rtol=0)
        maps = tokens[:, prefix:].transpose(1, 2).unflatten(-1, (5, 3))
        torch.testing.assert_close(patches, maps, atol=1e-4, rtol=0)


# DINOv2


def test_a_checkpoint_of_real_size_gives_the_outputs_of_the_source(filled, save, assert_same_outputs):
    """ViT-S/14 with four registers and a table for 518 pixels, run at 224."""
    shape = {
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "image_size": 518,
        "patch_size": 14,
    }
    model = filled(hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**shape)), std=0.04)
    converted = convert_checkpoint(save(model))
    assert converted.config.num_positions == 1 + 37 * 37
    assert_same_outputs(outputs_of(model), converted.model, [(224, 224)], images=1)


def test_images_of_one_channel(filled, save, assert_same_outputs):
    model = filled(hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(num_channels=1, **SMALL)))
    assert_same_outputs(outputs_of(model), convert_checkpoint(save(model)).model, SIZES, channels=1)


@pytest.mark.parametrize("family", ["dinov2 with registers, head", "dinov2, SwiGLU, head", "vit, head"])
def test_labels_are_carried_over(family, filled, save):
    model = filled(FAMILIES[family]())
    labels = {index: f"animal {index}" for index in range(7)}
    model.config.id2label, model.config.label2id = labels, {name: index for index, name in labels.items()}
    config = convert_checkpoint(save(model)).model.config
    assert config.id2label == labels
    assert config.label2id == model.config.label2id


def test_the_mask_token_is_left_out_with_a_reason_or_kept_when_asked(filled, save):
    model = filled(FAMILIES["dinov2 with registers"]())
    source = save(model)
    converted = convert_checkpoint(source)
    assert "training" in converted.report.dropped["embeddings.mask_token"]
    assert not converted.config.use_mask_token
    kept = convert_checkpoint(source, use_mask_token=True)
    assert not kept.report.dropped
    assert torch.equal(kept.model.embeddings.mask_token.flatten(), model.embeddings.mask_token.flatten())


HIBOU = {
    "model_type": "dinov2",
    "architectures": ["Dinov2ModelWithRegisters"],
    "auto_map": {"AutoModel": "modeling_dinov2.Dinov2ModelWithRegisters"},
}


@pytest.fixture
def hibou(filled, save):
    """A model like hibou, DINOv2 with registers and SwiGLU by names of Transformers 4, and its folder."""
    model = filled(FAMILIES["dinov2 with registers, SwiGLU"]())
    folder = save(model)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **HIBOU}))
    return model, folder


def test_hibou_is_dinov2_by_its_config_and_has_registers_by_its_weights(hibou, assert_same_outputs):
    model, folder = hibou
    converted = convert_checkpoint(folder)
    assert converted.report.layout == "transformers_dinov2"
    assert converted.config.num_register_tokens == 4
    assert any("hibou" in note for note in converted.report.notes)
    assert_same_outputs(outputs_of(model), converted.model, SIZES)


def test_hibou_is_interpolated_as_its_authors_build_it(hibou):
    """`build_model` of github.com/HistAI/hibou: `interpolate_offset=0, interpolate_antialias=True`."""
    config = convert_checkpoint(hibou[1]).config
    assert config.position_interpolation_antialias is True
    assert config.position_interpolation_offset == 0


# DINOv3


def test_converted_dinov3_is_deterministic_in_training_and_the_source_is_not(filled, save):
    model = filled(FAMILIES["dinov3"]())
    own = convert_checkpoint(save(model)).model
    pixels = torch.randn(1, 3, 56, 56)
    theirs, ours = ([one.train()(pixels).last_hidden_state for _ in range(2)] for one in (model, own))
    assert not torch.equal(*theirs)
    assert torch.equal(*ours)


def test_a_gated_mlp_without_silu_is_refused(filled, save):
    config = hf.DINOv3ViTConfig(use_gated_mlp=True, hidden_act="gelu", **WITH_MLP)
    with pytest.raises(ValueError, match=r"Expected SiLU in a gated MLP, got 'gelu'"):
        convert_checkpoint(save(filled(hf.DINOv3ViTModel(config))))


# ViT


@pytest.mark.parametrize("names", ["of the Hub", "of the class"])
def test_the_pooler_of_vit_is_left_out_with_a_reason(names, filled, save, assert_same_outputs):
    model = filled(hf.ViTModel(hf.ViTConfig(**WITH_MLP)))
    converted = convert_checkpoint(save(model, names))
    dropped = converted.report.dropped
    assert set(dropped) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert all("pooler_output is CLS" in reason for reason in dropped.values())
    theirs = outputs_of(model)
    assert_same_outputs(lambda pixels: {**theirs(pixels), "pooled": theirs(pixels)["cls"]}, converted.model, SIZES)


def test_the_decoder_of_masked_patches_is_left_out_with_a_reason(filled, save, assert_same_outputs):
    model = filled(hf.ViTForMaskedImageModeling(hf.ViTConfig(encoder_stride=14, **WITH_MLP)))
    converted = convert_checkpoint(save(model))
    dropped = converted.report.dropped
    assert {name for name in dropped if "decoder" in name} == {"decoder.0.weight", "decoder.0.bias"}
    assert "masked patches" in dropped["decoder.0.weight"]
    assert "training" in dropped["vit.embeddings.mask_token"]

    def theirs(pixels):
        out = model.vit(pixels, output_hidden_states=True, **ANY_SIZE)
        return {"hidden_states": out.hidden_states, "last_hidden_state": out.last_hidden_state}

    assert_same_outputs(theirs, converted.model, SIZES)


def test_the_mask_token_of_vit_is_kept_when_asked(filled, save):
    model = filled(hf.ViTForMaskedImageModeling(hf.ViTConfig(encoder_stride=14, **WITH_MLP)))
    own = convert_checkpoint(save(model), use_mask_token=True).model
    assert torch.equal(own.embeddings.mask_token.flatten(), model.vit.embeddings.mask_token.flatten())


# CLIP

TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 9,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def clip_config(**fields):
    return hf.CLIPConfig(text_config=TEXT, vision_config=WITH_MLP, projection_dim=8, **fields)


def test_names_of_a_clip_tower_as_transformers_4_writes_them(filled, save_source, assert_same_outputs):
    model = filled(hf.CLIPVisionModel(hf.CLIPVisionConfig(**WITH_MLP)))
    weights = {f"vision_model.{name}": tensor for name, tensor in model.state_dict().items()}
    weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    converted = convert_checkpoint(save_source(weights, config_of(model)))
    assert converted.report.dropped == {"vision_model.embeddings.position_ids": "counts positions"}
    assert_same_outputs(outputs_of(model), converted.model, SIZES)


def test_the_projection_of_a_clip_tower_is_left_out_with_a_reason(filled, save, assert_same_outputs):
    model = filled(hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(projection_dim=8, **WITH_MLP)))
    converted = convert_checkpoint(save(model))
    assert "space of texts" in converted.report.dropped["visual_projection.weight"]
    assert_same_outputs(outputs_of(model.vision_model), converted.model, SIZES)


def test_the_text_tower_of_clip_is_left_out_with_a_reason(filled, save, assert_same_outputs):
    model = filled(hf.CLIPModel(clip_config()))
    converted = convert_checkpoint(save(model))
    reasons = set(converted.report.dropped.values())
    assert "the text tower" in reasons
    assert {name.split(".")[0] for name in converted.report.dropped} == {
        *("text_model", "text_projection", "visual_projection", "logit_scale")
    }
    assert_same_outputs(outputs_of(model.vision_model), converted.model, SIZES)


def test_a_classifier_of_clip_is_refused(filled, save, tmp_path):
    """It reads the mean of patches without a norm."""
    model = filled(hf.CLIPForImageClassification(clip_config(num_labels=7)))
    with pytest.raises(ValueError, match="Expected no classifier for vision tower of Transformers' CLIP"):
        convert_checkpoint(save(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Processors

PUBLISHED = {  # options that differ from the defaults of the class, or that published checkpoints state
    "dinov2 with registers": hf.BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        resample=3,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ),
    "dinov2": hf.BitImageProcessor(
        size={"shortest_edge": 280}, crop_size={"height": 140, "width": 196}, resample=2, image_mean=[0.1, 0.2, 0.3]
    ),
    "dinov3": hf.DINOv3ViTImageProcessor(),
    "vit": hf.ViTImageProcessor(size={"height": 98, "width": 126}),
    "clip": hf.CLIPImageProcessor(),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_pixels_are_those_of_the_source(family, filled, save, photo, assert_same_pixels):
    folder = save(filled(FAMILIES[family]()))
    PUBLISHED[family].save_pretrained(folder)
    converted = convert_checkpoint(folder)
    assert not converted.report.notes, "every option is known"
    theirs = hf.AutoImageProcessor.from_pretrained(folder)(photo, return_tensors="pt")["pixel_values"]
    assert_same_pixels(theirs, converted.processor)


def test_pixels_of_a_saved_processor_are_those_of_the_source(filled, save, photo, assert_same_pixels, tmp_path):
    folder = save(filled(FAMILIES["dinov2"]()))
    PUBLISHED["dinov2"].save_pretrained(folder)
    convert_checkpoint(folder, tmp_path / "own")
    theirs = PUBLISHED["dinov2"](photo, return_tensors="pt")["pixel_values"]
    assert_same_pixels(theirs, hf.AutoImageProcessor.from_pretrained(tmp_path / "own"))


@pytest.mark.parametrize(
    ("family", "size", "crop", "mean"),
    [
        ("dinov2", {"shortest_edge": 256}, 224, 0.485),
        ("vit", {"height": 56, "width": 56}, None, 0.5),
        ("dinov3", {"height": 56, "width": 56}, None, 0.485),
        ("clip", {"shortest_edge": 56}, 56, 0.48145466),
    ],
)
def test_a_missing_processor_is_that_of_the_family_and_said(filled, save, family, size, crop, mean):
    converted = convert_checkpoint(save(filled(FAMILIES[family]())))
    assert dict(converted.processor.size) == size
    assert converted.processor.do_center_crop == (crop is not None)
    if crop is not None:
        assert dict(converted.processor.crop_size) == {"height": crop, "width": crop}
    assert converted.processor.image_mean[0] == mean
    (note,) = [note for note in converted.report.notes if "no image processor" in note]
    assert f"mean {mean:.3g}" in note
