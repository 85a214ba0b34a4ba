# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Attention maps of CLS and registers."""

import pytest
import torch

from vitreg_hf import ViTRegBackbone, ViTRegForImageClassification, ViTRegModel
from vitreg_hf.analysis.extract import prefix_attention
from vitreg_hf.analysis.foreign import token_names
from vitreg_hf.model.token_layout import TokenLayout


@pytest.mark.parametrize("family_class", [ViTRegModel, ViTRegForImageClassification, ViTRegBackbone])
def test_maps_are_rows_of_the_full_attention(make_config, family_class):
    model = family_class(make_config()).eval()
    pixels = torch.randn(2, 3, 24, 40)
    attention = prefix_attention(model, pixels, layer=1)
    assert attention.token_names == ["CLS", "register 1", "register 2", "register 3", "register 4"]
    assert attention.maps.shape == (2, 4, 5, 3, 5)
    with torch.no_grad():
        full = model.base_model(pixels, output_attentions=True).attentions[1]
    torch.testing.assert_close(attention.maps, full[:, :, :5, 5:].reshape(2, 4, 5, 3, 5))
    torch.testing.assert_close(attention.share_on_patches(), full[:, :, :5, 5:].sum(-1).mean(1))
    torch.testing.assert_close(attention.mean_over_heads(), attention.maps.mean(1))


def test_layers_count_from_either_end(make_config):
    model, pixels = ViTRegModel(make_config()).eval(), torch.randn(1, 3, 32, 32)
    last, same = prefix_attention(model, pixels), prefix_attention(model, pixels, layer=2)
    assert last.layer == same.layer == 2
    torch.testing.assert_close(last.maps, same.maps)
    with pytest.raises(ValueError, match="layers from -3 to 2"):
        prefix_attention(model, pixels, layer=3)


def test_names_follow_the_layout():
    assert token_names(TokenLayout(0, 2, 1, (8, 8))) == ["register 1", "register 2", "test-time register 1"]
    assert token_names(TokenLayout(1, 0, 0, (8, 8))) == ["CLS"]


def test_a_model_in_training_or_without_prefix_is_refused(make_config):
    pixels = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match="evaluation mode"):
        prefix_attention(ViTRegModel(make_config()).train(), pixels)
    bare = ViTRegModel(make_config(num_register_tokens=0, use_cls_token=False, pooling="mean")).eval()
    with pytest.raises(ValueError, match="CLS or registers"):
        prefix_attention(bare, pixels)
