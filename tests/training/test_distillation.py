# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What learns when features are distilled into registers, from which loss, and which settings make no sense."""

import pytest
import torch

from vitreg_hf.model.configuration_vitreg import ViTRegConfig
from vitreg_hf.model.modeling_vitreg import ViTRegModel
from vitreg_hf.training.distillation import feature_distances, unfreeze
from vitreg_hf.training.distillation_settings import DistillationSettings


def small_model(**changes) -> ViTRegModel:
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    return ViTRegModel(ViTRegConfig(**{**shape, "num_register_tokens": 2, "initializer_range": 0.2, **changes}))


def test_distances_are_those_of_every_patch_written_out():
    features, targets = torch.randn(2, 5, 2, 3), torch.randn(2, 5, 2, 3)
    expected = []
    for image in range(2):
        pairs = [(features[image, :, i, j], targets[image, :, i, j]) for i in range(2) for j in range(3)]
        cosine = sum(1 - a @ b / (a.norm() * b.norm()) for a, b in pairs) / 6
        squared = sum(((a - b) ** 2).sum() for a, b in pairs) / 30
        expected.append(torch.stack([cosine, squared]))
    torch.testing.assert_close(feature_distances(features, targets), torch.stack(expected))
    torch.testing.assert_close(feature_distances(features, features), torch.zeros(2, 2))


def test_registers_positions_projection_and_the_last_blocks_learn():
    student = small_model()
    unfreeze(student, 1)
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    names = ("register_tokens", "position_embeddings", "patch_embeddings.projection.weight")
    assert {f"embeddings.{name}" for name in (*names, "patch_embeddings.projection.bias")} < trained
    assert {name.split(".")[1] for name in trained if name.startswith("layers.")} == {"2"}
    assert "embeddings.cls_token" not in trained
    assert not any(name.startswith("layernorm") for name in trained)


@pytest.mark.parametrize("shape", [{}, {"position_embedding_type": "rotary"}, {"num_register_tokens": 0}])
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_all_that_learns_has_a_gradient_of_patches_alone(layers, shape):
    """DDP waits for the gradient of every parameter that wants one."""
    student, targets = small_model(**shape), torch.randn(2, 16, 4, 4)
    unfreeze(student, layers)
    feature_distances(student(torch.randn(2, 3, 32, 32)).patch_map, targets).sum().backward()
    learning = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in student.named_parameters() if parameter.grad is not None} == learning


def test_blocks_that_are_not_there_do_not_learn():
    with pytest.raises(ValueError, match="num_tuned_layers of 0 to 3, the blocks of the model, got 4"):
        unfreeze(small_model(), 4)


def test_what_is_left_out_follows_from_the_data():
    digits, photos = DistillationSettings(model="outputs/m/"), DistillationSettings(model="m", train_dir="photos")
    assert (digits.output_dir, digits.mirror_views, digits.crop_scale) == ("outputs/m-distilled", False, None)
    assert (photos.mirror_views, photos.crop_scale) == (True, (0.3, 1.0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": None}, "a model, got none"),
        ({"num_registers": -1}, "num_registers of 0 or more, got -1"),
        ({"num_views": 0}, "num_views of 1 or more, got 0"),
        ({"max_shift": 1.0}, r"max_shift in \[0, 1\), got 1.0"),
        ({"random_resized_crop_scale": [0.5, 0.2]}, "low <= high <= 1"),
        ({"eval_crop_ratio": 0.0}, r"eval_crop_ratio in \(0, 1\]"),
        ({"auto_find_batch_size": True}, "a chosen batch size"),
        ({"replay": "folder"}, "a training of classification to replay"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        DistillationSettings(**{"model": "m", **given})
