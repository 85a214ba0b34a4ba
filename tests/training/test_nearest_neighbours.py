# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Nearest neighbours, against a loop over pairs."""

import math

import pytest
import torch

from vitreg_hf.training import nearest_neighbours
from vitreg_hf.training.nearest_neighbours import knn_accuracy, knn_predict


def slow_votes(train, labels, test, k, num_classes, temperature):
    """One image and one neighbour at a time, in Python's own numbers."""
    rows = []
    for image in test.double():
        similarity = [float(image @ other / (image.norm() * other.norm())) for other in train.double()]
        nearest = sorted(range(len(train)), key=lambda index: -similarity[index])[:k]
        weights = [math.exp(similarity[index] / temperature) for index in nearest]
        votes = [0.0] * num_classes
        for index, weight in zip(nearest, weights, strict=True):
            votes[int(labels[index])] += weight / sum(weights)
        rows.append(votes)
    return torch.tensor(rows)


@pytest.fixture
def features():
    """Training features and labels, test features and labels: 40 and 9 images of 3 classes."""
    draw = torch.Generator().manual_seed(0)
    train, test = torch.randn(40, 6, generator=draw), torch.randn(9, 6, generator=draw)
    labels = torch.randint(3, (49,), generator=draw)
    return train, labels[:40], test, labels[40:]


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, 0.07), (40, 0.5)])
def test_votes_are_those_of_a_loop_over_pairs(features, k, temperature):
    train, labels, test, _ = features
    votes = knn_predict(train, labels, test, k, num_classes=4, temperature=temperature)
    torch.testing.assert_close(votes, slow_votes(train, labels, test, k, 4, temperature), atol=1e-5, rtol=1e-5)


def test_lengths_of_features_do_not_matter(features):
    train, labels, test, _ = features
    scaled = knn_predict(train * torch.rand(40, 1).add(0.5), labels, test * 100, 7, 3)
    torch.testing.assert_close(scaled, knn_predict(train, labels, test, 7, 3))


def test_chunks_change_nothing(features, monkeypatch):
    train, labels, test, truth = features
    votes, accuracy = knn_predict(train, labels, test, 5, 3), knn_accuracy(train, labels, test, truth, 3, ks=(1, 5))
    monkeypatch.setattr(nearest_neighbours, "_SIMILARITIES", 80)  # two test images at a time
    torch.testing.assert_close(knn_predict(train, labels, test, 5, 3), votes)
    assert knn_accuracy(train, labels, test, truth, 3, ks=(1, 5)) == accuracy


def test_accuracy_is_that_of_the_largest_vote_and_too_many_neighbours_are_left_out(features):
    train, labels, test, truth = features
    accuracy = knn_accuracy(train, labels, test, truth, 3, ks=(1, 7, 40, 41))
    assert list(accuracy) == [1, 7, 40]
    for k, found in accuracy.items():
        right = slow_votes(train, labels, test, k, 3, 0.07).argmax(dim=1) == truth
        assert found == pytest.approx(right.float().mean().item())


def test_an_image_is_its_own_nearest_neighbour(features):
    train, labels, _, _ = features
    assert knn_accuracy(train, labels, train, labels, 3, ks=(1,)) == {1: 1.0}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"k": 41}, "Expected k of 1 to 40 labelled images, got 41"),
        ({"k": 0}, "got 0"),
        ({"num_classes": 2}, "Expected labels from 0 to 1, got 0 to 2"),
        ({"temperature": 0.0}, "Expected a positive temperature, got 0.0"),
        ({"test_features": torch.zeros(2, 5)}, r"Expected features \(n, D\) and \(B, D\), got \(40, 6\) and \(2, 5\)"),
        ({"train_labels": torch.zeros(3)}, r"Expected one label for each of 40 images, got \(3,\)"),
    ],
)
def test_what_does_not_fit_is_refused(features, changes, sentence):
    train, labels, test, _ = features
    given = {"train_features": train, "train_labels": labels, "test_features": test, "k": 5, "num_classes": 3}
    with pytest.raises(ValueError, match=sentence):
        knn_predict(**(given | changes))


def test_an_accuracy_of_nothing_is_refused(features):
    train, labels, test, truth = features
    with pytest.raises(ValueError, match="Expected a k of 1 to 40 labelled images, got"):
        knn_accuracy(train, labels, test, truth, 3, ks=(100, 200))
    with pytest.raises(ValueError, match="at least 1 test image, got 0"):
        knn_accuracy(train, labels, test[:0], truth[:0], 3)
