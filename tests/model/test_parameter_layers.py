"""Depth of every parameter, and which ones are tokens, asked of a model."""

import pytest

from vitreg_hf import (
    ViTRegBackbone,
    ViTRegForImageClassification,
    ViTRegForMaskedImageModeling,
    ViTRegForSemanticSegmentation,
    ViTRegModel,
)

FAMILY = [
    ViTRegModel,
    ViTRegBackbone,
    ViTRegForImageClassification,
    ViTRegForMaskedImageModeling,
    ViTRegForSemanticSegmentation,
]


@pytest.mark.parametrize("model_class", FAMILY)
def test_every_parameter_has_the_depth_of_its_module(make_config, model_class):
    model = model_class(make_config(layerscale_value=0.1, use_mask_token=True, segmentation_batch_norm=True))
    depths = model.parameter_layers()
    assert depths.keys() == {name for name, _ in model.named_parameters()}
    for name, depth in depths.items():
        parts = name.removeprefix("vitreg.").split(".")
        assert depth == {"embeddings": 0, "layers": int(parts[1]) + 1 if parts[0] == "layers" else None}.get(
            parts[0], 4
        )
    assert set(depths.values()) == {0, 1, 2, 3, 4}


def test_heads_are_above_the_last_block(make_config):
    depths = ViTRegForImageClassification(make_config()).parameter_layers()
    assert {depths[name] for name in ("classifier.weight", "classifier.bias", "vitreg.layernorm.weight")} == {4}
    assert depths["vitreg.embeddings.register_tokens"] == depths["vitreg.embeddings.cls_token"] == 0


def test_frozen_parameters_have_a_depth_too(make_config):
    model = ViTRegModel(make_config())
    before = model.parameter_layers()
    model.embeddings.requires_grad_(False)
    assert model.parameter_layers() == before


@pytest.mark.parametrize("model_class", FAMILY)
def test_tokens_and_positions_are_named(make_config, model_class):
    prefix = "" if issubclass(model_class, ViTRegModel) else "vitreg."
    names = ["cls_token", "register_tokens", "mask_token", "position_embeddings"]
    model = model_class(make_config(use_mask_token=True))
    assert model.token_parameters() == {f"{prefix}embeddings.{name}" for name in names}
    assert model.token_parameters() <= model.no_weight_decay()


def test_tokens_that_do_not_exist_are_not_named(make_config):
    model = ViTRegModel(make_config(use_cls_token=False, num_register_tokens=0, pooling="mean"))
    assert model.token_parameters() == {"embeddings.position_embeddings"}
