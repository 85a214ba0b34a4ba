# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The head: cosines to prototypes, equal to torch's weight normalisation."""

import torch
from torch import nn

from vitreg_hf.training.self_supervision.head import DinoHead, Prototypes


def test_scores_are_cosines():
    torch.manual_seed(0)
    head = DinoHead(6, num_prototypes=5, hidden_features=8, bottleneck_features=3)
    nn.init.normal_(head.last_layer.weight, std=4)
    tokens = torch.randn(2, 7, 6)
    bottleneck = head.mlp(tokens)
    expected = nn.functional.cosine_similarity(bottleneck[..., None, :], head.last_layer.weight, dim=-1)
    torch.testing.assert_close(head(tokens), expected)


def test_prototypes_are_a_weight_normed_layer_with_gain_one():
    torch.manual_seed(0)
    prototypes = Prototypes(3, 5)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 5, bias=False))
    normed.parametrizations.weight.original0.data.fill_(1)
    normed.parametrizations.weight.original1.data.copy_(prototypes.weight.data)
    vectors = torch.randn(4, 3)
    torch.testing.assert_close(prototypes(vectors), normed(vectors))
    (ours,) = torch.autograd.grad(prototypes(vectors).square().sum(), prototypes.weight)
    (theirs,) = torch.autograd.grad(normed(vectors).square().sum(), normed.parametrizations.weight.original1)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_the_size_is_that_of_the_paper():
    head = DinoHead(1024, num_prototypes=65536)
    shapes = [tuple(p.shape) for p in head.parameters() if p.ndim == 2]
    assert shapes == [(2048, 1024), (2048, 2048), (256, 2048), (65536, 256)]
