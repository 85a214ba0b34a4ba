# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from vitreg_hf.analysis.dense_probe import fit_dense_probe

GRID, SIZE = (4, 6), (8, 12)


def planted(count, seed):
    """Tokens `(n, 24, 16)` that hold the class of their patch in one direction each, and labels of 2 x 2 pixels."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(3, (count, *GRID), generator=generator)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(9)))[0][:3]
    noise = 0.05 * torch.randn(count, 24, 16, generator=generator)
    tokens = 100 + directions[classes.flatten(1)] + noise  # an offset that a probe has to see through
    return tokens, classes.repeat_interleave(2, 1).repeat_interleave(2, 2)


def test_planted_classes_are_read():
    tokens, labels = planted(20, 0)
    probe = fit_dense_probe(tokens, labels, GRID, 3)
    test, truth = planted(10, 1)
    # Upsampling mixes neighbours, so that pixels are asked at the resolution of the patches.
    predicted = probe.predict(test, GRID, GRID)
    assert (predicted == truth[:, ::2, ::2]).float().mean() > 0.99
    assert probe.predict(test, GRID, SIZE).shape == (10, *SIZE)


def test_tokens_without_classes_are_no_better_than_chance():
    tokens, labels = planted(20, 0)
    probe = fit_dense_probe(torch.randn(tokens.shape), labels, GRID, 3)
    test, truth = planted(40, 1)
    predicted = probe.predict(torch.randn(test.shape), GRID, GRID)
    assert (predicted == truth[:, ::2, ::2]).float().mean() < 0.45


def test_pixels_of_no_class_do_not_count():
    tokens, labels = planted(20, 0)
    partly = labels.clone()
    partly[10:] = 255
    whole = fit_dense_probe(tokens[:10], labels[:10], GRID, 3)
    left_out = fit_dense_probe(tokens, partly, GRID, 3)
    assert torch.allclose(whole.weight, left_out.weight, atol=1e-4)


def test_a_patch_of_two_classes_counts_for_both():
    tokens = torch.tensor([[[0.0], [1.0]]]).repeat(4, 1, 1)
    labels = torch.tensor([[[0, 0, 0, 1]]]).repeat(4, 1, 1)  # the second of two patches is half and half
    probe = fit_dense_probe(tokens, labels, (1, 2), 2)
    chances = ((tokens[:1] - probe.mean) / probe.std @ probe.weight.T + probe.bias).softmax(-1)
    assert chances[0, 1].tolist() == pytest.approx([0.5, 0.5], abs=0.05)


def test_nothing_is_drawn_and_inference_mode_is_no_obstacle():
    tokens, labels = planted(8, 0)
    with torch.inference_mode():
        first = fit_dense_probe(tokens.clone(), labels, GRID, 3)
    assert torch.equal(first.weight, fit_dense_probe(tokens, labels, GRID, 3).weight)


def test_what_does_not_fit_is_refused():
    tokens, labels = planted(4, 0)
    with pytest.raises(ValueError, match="tokens \\(n, 24, D\\) of 3 images"):
        fit_dense_probe(tokens, labels[:3], GRID, 3)
    with pytest.raises(ValueError, match="a grid of 4 x 6 divides"):
        fit_dense_probe(tokens, labels[:, :7], GRID, 3)
    with pytest.raises(ValueError, match="pixels with a class, got none"):
        fit_dense_probe(tokens, torch.full_like(labels, 255), GRID, 3)
