"""Principal components against scikit-learn's, and alignment of features whose answer is known."""

import math

import pytest
import torch
from sklearn.decomposition import PCA

from vitreg_hf.analysis.features import linear_cka, principal_components


def test_components_equal_those_of_scikit_learn():
    features = torch.randn(80, 12) @ torch.diag(torch.linspace(3, 0.2, 12)) + 5
    coordinates, explained = principal_components(features, 4)
    reference = PCA(4, whiten=True, svd_solver="full").fit(features.double().numpy())
    expected = torch.tensor(reference.transform(features.double().numpy()), dtype=torch.float32)
    expected = expected / expected.std(dim=0, correction=0)
    sign = (coordinates * expected).sum(0).sign()
    torch.testing.assert_close(coordinates, expected * sign, atol=1e-4, rtol=0)
    torch.testing.assert_close(explained, torch.tensor(reference.explained_variance_ratio_, dtype=torch.float32))


def test_components_are_standardised_and_point_to_the_rarer_side():
    features = torch.randn(500, 8) * 0.1
    features[:20, 3] += 10  # 4 % of samples
    coordinates, explained = principal_components(features, 2)
    torch.testing.assert_close(coordinates.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(coordinates.std(0, correction=0), torch.ones(2))
    assert coordinates[:20, 0].min() > 3
    assert coordinates[20:, 0].max() < 0.5
    assert explained[0] > 0.9
    torch.testing.assert_close(principal_components(-features, 1)[0], coordinates[:, :1], atol=1e-4, rtol=0)


def test_constant_features_explain_nothing():
    coordinates, explained = principal_components(torch.ones(10, 4), 2)
    assert torch.isfinite(coordinates).all()
    assert explained.tolist() == [0, 0]


@pytest.mark.parametrize(("shape", "count"), [((3, 8), 3), ((8, 2), 3), ((8, 8), 0)])
def test_too_few_samples_or_features_are_refused(shape, count):
    with pytest.raises(ValueError, match=f"more than {count} samples.*got {shape[0]} of {shape[1]}"):
        principal_components(torch.randn(shape), count)


# Alignment


def gram_cka(first, second):
    """The definition by Gram matrices of the samples."""
    centring = torch.eye(len(first)) - 1 / len(first)
    grams = [(centring @ (x @ x.T) @ centring).double() for x in (first, second)]
    own = [(gram * gram).sum().sqrt() for gram in grams]
    return float((grams[0] * grams[1]).sum() / (own[0] * own[1]))


def test_alignment_is_one_for_rotations_and_scalings():
    features = torch.randn(50, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6))[0]
    assert linear_cka(features, -4 * features @ rotation + 7) == pytest.approx(1, abs=1e-5)


def test_alignment_equals_the_gram_formula():
    first = torch.randn(40, 5)
    second = torch.cat([first[:, :2], torch.randn(40, 7)], dim=1)
    assert linear_cka(first, second) == pytest.approx(gram_cka(first, second), abs=1e-5)
    assert linear_cka(first, second) == pytest.approx(linear_cka(second, first))
    assert 0.1 < linear_cka(first, second) < 0.9


def test_independent_features_are_not_aligned_with_many_samples_and_seem_so_with_few():
    assert linear_cka(torch.randn(5_000, 8), torch.randn(5_000, 8)) < 0.01
    assert linear_cka(torch.randn(8, 500), torch.randn(8, 500)) > 0.5


def test_constant_features_have_no_alignment():
    assert math.isnan(linear_cka(torch.ones(5, 3), torch.randn(5, 3)))


@pytest.mark.parametrize(("first", "second"), [(4, 5), (1, 1)])
def test_other_numbers_of_samples_are_refused(first, second):
    with pytest.raises(ValueError, match=f"same 2 or more samples, got {first} and {second}"):
        linear_cka(torch.randn(first, 3), torch.randn(second, 3))
