# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Student and teacher: what they see, what moves them, and that registers take part without a loss."""

import pytest
import torch

from vitreg_hf.model.configuration_vitreg import ViTRegConfig
from vitreg_hf.model.modeling_vitreg import ViTRegModel
from vitreg_hf.training.self_supervision.losses import dino_loss, gram_loss, ibot_loss, koleo_loss
from vitreg_hf.training.self_supervision.patch_masks import draw_masks
from vitreg_hf.training.self_supervision.student_teacher import (
    DinoNetwork,
    create_teacher,
    parameter_groups,
    update_teacher,
)


@pytest.fixture
def config():
    return ViTRegConfig(
        image_size=16,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_register_tokens=3,
        initializer_range=0.2,
    )


@pytest.fixture
def student(config):
    torch.manual_seed(0)
    return DinoNetwork(config, num_prototypes=7, head_hidden_size=8, head_bottleneck_size=5)


@pytest.fixture
def crops():
    """Global crops of 3 images, 4 local crops of each."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 16, 16, generator=draw), torch.randn(12, 3, 8, 8, generator=draw)


@pytest.fixture
def masks():
    torch.manual_seed(0)
    return draw_masks(6, (4, 4))


def total_loss(output, targets, masks):
    """All losses at once, as the example adds them up."""
    cls_targets, patch_targets, gram_patches = targets
    return (
        dino_loss(output.cls_scores, cls_targets)
        + ibot_loss(output.patch_scores, patch_targets, masks.weights, 6)
        + 0.1 * sum(koleo_loss(features) for features in output.cls_tokens)
        + 2 * gram_loss(output.patch_tokens, gram_patches)
    )


def targets_of(teacher, crops, masks):
    with torch.no_grad():
        seen = teacher(crops[0], None, masks, hide=False)
    return seen.cls_scores.softmax(dim=-1), seen.patch_scores.softmax(dim=-1), seen.patch_tokens


def test_every_output_is_that_of_one_crop_alone(student, crops, masks):
    student.eval()
    output = student(*crops, masks, hide=True)
    assert output.cls_scores.shape == (6, 3, 7)
    for image in range(3):
        for number in range(2):
            place = 3 * number + image
            alone = student.backbone(crops[0][[place]], masks.masked[[place]], return_dict=True)
            torch.testing.assert_close(output.cls_tokens[number, image], alone.cls_token[0])
            torch.testing.assert_close(output.patch_tokens[place], alone.patch_tokens[0])
            torch.testing.assert_close(output.cls_scores[number, image], student.head(alone.cls_token)[0])
        for number in range(4):
            alone = student.backbone(crops[1][[3 * number + image]], return_dict=True)
            torch.testing.assert_close(output.cls_scores[2 + number, image], student.head(alone.cls_token)[0])


def test_patch_scores_are_those_of_masked_patches_in_order(student, crops, masks):
    output = student(*crops, masks, hide=True)
    expected = [student.head(output.patch_tokens[crop, patch]) for crop, patch in masks.masked.nonzero().tolist()]
    torch.testing.assert_close(output.patch_scores, torch.stack(expected))


def test_the_teacher_sees_what_the_student_does_not(student, crops, masks):
    """Pixels of a masked patch do not reach the student, but reach the teacher."""
    student.eval()
    crop, patch = masks.masked.nonzero()[0].tolist()
    row, column = 4 * (patch // 4), 4 * (patch % 4)
    changed = crops[0].clone()
    changed[crop, :, row : row + 4, column : column + 4] += 1
    for hide in (True, False):
        before, after = (student(pixels, None, masks, hide).patch_tokens[crop] for pixels in (crops[0], changed))
        assert torch.equal(before, after) == hide


def test_registers_get_no_loss_but_gradients(student, crops, masks):
    """Nothing that losses read changes with the final norm of registers; their gradients come through attention."""
    teacher = create_teacher(student)
    targets = targets_of(teacher, crops, masks)
    total_loss(student(*crops, masks, hide=True), targets, masks).backward()
    gradients = student.backbone.embeddings.register_tokens.grad
    assert gradients.abs().amax(dim=-1).gt(0).all()

    outputs = []
    packed = student.backbone.forward_packed

    def with_gradients_of_tokens(*arguments):
        outputs.extend(packed(*arguments))
        for output in outputs:
            output.last_hidden_state.retain_grad()
        return tuple(outputs)

    student.backbone.forward_packed = with_gradients_of_tokens
    total_loss(student(*crops, masks, hide=True), targets, masks).backward()
    layout = student.backbone.layout
    assert len(outputs) == 2
    for output in outputs:
        gradients = output.last_hidden_state.grad
        assert layout.register_tokens(gradients).eq(0).all()
        assert layout.cls_token(gradients).ne(0).any()


def test_everything_that_is_trained_gets_a_gradient(config, crops, masks):
    """A parameter without one stops distributed training."""
    for patch_head in ("shared", "separate"):
        student = DinoNetwork(config, 7, 8, 5, patch_head)
        targets = targets_of(create_teacher(student), crops, masks)
        total_loss(student(*crops, masks, hide=True), targets, masks).backward()
        assert [name for name, p in student.named_parameters() if p.grad is None] == []
    student = DinoNetwork(config, 7, 8, 5, "none")
    output = student(*crops, None, hide=True)
    assert output.patch_scores is None
    dino_loss(output.cls_scores, output.cls_scores.detach()[:2].softmax(dim=-1)).backward()
    assert [name for name, p in student.named_parameters() if p.grad is None] == []


def test_the_teacher_is_the_moving_average_of_the_student(student):
    teacher = create_teacher(student)
    expected = [p.detach().clone() for p in student.parameters()]
    for momentum in (0.9, 0.5, 1.0):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter))
        update_teacher(teacher, student, momentum)
        expected = [momentum * mine + (1 - momentum) * p for mine, p in zip(expected, student.parameters())]
    for mine, wanted in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(mine, wanted.detach())
        assert not mine.requires_grad
    assert not any(module.training for module in teacher.modules())


def test_a_teacher_is_restored_exactly(student):
    teacher, other = create_teacher(student), create_teacher(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    update_teacher(teacher, student, 0.9)
    other.load_state_dict(teacher.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), other.parameters(), strict=True))


def test_what_is_saved_is_a_plain_backbone(student, crops, tmp_path):
    student.trained_backbone().save_pretrained(tmp_path)
    loaded, info = ViTRegModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    student.eval()
    expected = student.backbone(crops[0], return_dict=True).last_hidden_state
    torch.testing.assert_close(loaded(crops[0], return_dict=True).last_hidden_state, expected)


def grouped_names(student, **options):
    """Names of parameters with the settings of their group."""
    names = {id(p): name for name, p in student.named_parameters()}
    groups = parameter_groups(student, weight_decay=0.04, **options)
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert len(found) == len(names) == sum(len(group["params"]) for group in groups)
    return found


def test_tokens_biases_norms_and_prototypes_do_not_decay(config):
    found = grouped_names(DinoNetwork(config, 7, 8, 5, "separate"))
    prototypes = {name for name, group in found.items() if group["last_layer"]}
    assert prototypes == {"head.last_layer.weight", "patch_head.last_layer.weight"}
    for name in ("register_tokens", "cls_token", "mask_token", "position_embeddings"):
        assert not found[f"backbone.embeddings.{name}"]["decays"]
    for name in ("head.mlp.0.bias", "backbone.layernorm.weight", *prototypes):
        assert found[name]["weight_decay"] == 0
    for name in ("backbone.layers.0.mlp.up_proj.weight", "head.mlp.0.weight"):
        assert found[name]["weight_decay"] == 0.04


def test_tokens_decay_where_they_are_to(config):
    found = grouped_names(DinoNetwork(config, 7, 8, 5), decay_tokens=True)
    assert found["backbone.embeddings.register_tokens"]["decays"]
    assert not found["backbone.layernorm.weight"]["decays"]


def test_learning_rates_fall_with_depth_and_heads_have_the_full_one(config):
    found = grouped_names(DinoNetwork(config, 7, 8, 5), layer_decay=0.5, patch_embedding_factor=0.2)
    factors = {
        "head.mlp.0.weight": 1.0,
        "head.last_layer.weight": 1.0,
        "backbone.layernorm.weight": 1.0,
        "backbone.layers.1.norm1.weight": 0.5,
        "backbone.layers.0.attention.q_proj.weight": 0.25,
        "backbone.embeddings.register_tokens": 0.125,
        "backbone.embeddings.patch_embeddings.projection.weight": 0.025,
    }
    assert {name: found[name]["lr_factor"] for name in factors} == pytest.approx(factors)


def test_a_model_without_cls_is_refused(config):
    config.use_cls_token, config.pooling = False, "mean"
    with pytest.raises(ValueError, match="Expected a model with a CLS token, got use_cls_token=False"):
        DinoNetwork(config, 7)
