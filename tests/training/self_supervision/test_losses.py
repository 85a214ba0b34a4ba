# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Losses of self-supervision, against sums over pairs written out."""

import math

import pytest
import torch

from vitreg_hf.training.self_supervision.losses import dino_loss, gram_loss, ibot_loss, koleo_loss
from vitreg_hf.training.self_supervision.patch_masks import PatchMasks


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def cross_entropy(scores, target, temperature):
    """Of one token, in Python's own numbers."""
    exponentials = [math.exp(score / temperature) for score in scores.tolist()]
    total = sum(exponentials)
    return -sum(t * math.log(e / total) for t, e in zip(target.tolist(), exponentials, strict=True))


@pytest.mark.parametrize("num_local", [0, 1, 8])
def test_dino_compares_every_crop_with_every_other_global_crop(num_local):
    scores, targets = torch.rand(2 + num_local, 3, 5), torch.rand(2, 3, 5).softmax(dim=-1)
    terms = [
        cross_entropy(scores[student, image], targets[teacher, image], 0.1)
        for image in range(3)
        for student in range(2 + num_local)
        for teacher in range(2)
        if student != teacher
    ]
    assert len(terms) == 3 * (2 + 2 * num_local)
    assert dino_loss(scores, targets, 0.1).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_dino_is_smallest_where_the_student_says_what_the_teacher_says():
    scores = torch.rand(1, 3, 5).expand(2, -1, -1)
    targets = (scores / 0.1).softmax(dim=-1)
    assert dino_loss(scores, targets) < dino_loss(scores + 0.1 * torch.rand(2, 3, 5), targets)


def test_dino_refuses_crops_that_do_not_fit():
    with pytest.raises(ValueError, match=r"Expected scores \(S, B, K\) .* got \(1, 3, 5\) and \(2, 3, 5\)"):
        dino_loss(torch.rand(1, 3, 5), torch.rand(2, 3, 5))


def test_ibot_is_a_mean_over_crops_of_means_over_their_masked_patches():
    masked = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    masks = PatchMasks.of(masked)
    scores, targets = torch.rand(4, 5), torch.rand(4, 5).softmax(dim=-1)
    of_patch = [cross_entropy(scores[patch], targets[patch], 0.2) for patch in range(4)]
    expected = (sum(of_patch[:3]) / 3 + 0 + of_patch[3]) / 3
    assert ibot_loss(scores, targets, masks.weights, 3, 0.2).item() == pytest.approx(expected, rel=1e-5)


def test_koleo_is_minus_the_logarithm_of_the_distance_to_the_nearest():
    features = torch.randn(6, 4)
    unit = [row / row.norm() for row in features]
    nearest = [min(float((one - other).norm()) for other in unit if other is not one) for one in unit]
    expected = -sum(math.log(distance) for distance in nearest) / 6
    assert koleo_loss(features).item() == pytest.approx(expected, rel=1e-5)


def test_koleo_moves_neighbours_apart():
    features = torch.randn(6, 4, requires_grad=True)
    before = koleo_loss(features)
    (step,) = torch.autograd.grad(before, features)
    assert koleo_loss(features - 0.01 * step) < before


def test_koleo_of_equal_images_is_finite_and_so_are_its_gradients():
    features = torch.ones(3, 4, requires_grad=True)
    loss = koleo_loss(features)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(features.grad).all()


def test_koleo_needs_another_image():
    with pytest.raises(ValueError, match="Expected at least 2 images to be apart, got 1"):
        koleo_loss(torch.ones(1, 4))


def test_gram_compares_cosines_of_all_pairs_of_patches_of_an_image():
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 6)

    def cosine(one, other):
        return float(one @ other / (one.norm() * other.norm()))

    differences = [
        cosine(student[image, i], student[image, j]) - cosine(teacher[image, i], teacher[image, j])
        for image in range(2)
        for i in range(3)
        for j in range(3)
    ]
    expected = sum(difference**2 for difference in differences) / len(differences)
    assert gram_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_gram_does_not_mind_lengths_and_rotations():
    student = torch.randn(2, 3, 4)
    rotation = torch.linalg.qr(torch.randn(4, 4)).Q
    assert gram_loss(student, 3 * student @ rotation).item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("loss", [koleo_loss, lambda x: gram_loss(x[None], x.flip(0)[None])])
def test_half_precision_around_them_changes_nothing(loss):
    features = torch.randn(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(features)
    torch.testing.assert_close(inside, loss(features), rtol=0, atol=0)
