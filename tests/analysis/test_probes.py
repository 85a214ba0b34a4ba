# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Local and global probes on tokens that hold what the tests planted.

Shapes: 25 images of 4 x 6 patches, 16 channels, unless a test says otherwise.
"""

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import chi2
from sklearn.linear_model import LogisticRegression

from vitreg_hf.analysis import probes
from vitreg_hf.analysis.paper_datasets import PAPER_DATASETS
from vitreg_hf.analysis.probes import (
    accuracy_over_draws,
    choose_one,
    position_probe,
    reconstruction_probe,
    split_images,
    token_classification,
)

GRID = (4, 6)
PATCHES = GRID[0] * GRID[1]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def within_binomial_error(share, chance, count, deviations=4):
    return abs(share - chance) <= deviations * math.sqrt(chance * (1 - chance) / count)


def tokens_of(num_images):
    """Image, (row, column) and index of the position of each token."""
    place = torch.arange(PATCHES).repeat(num_images)
    image = torch.arange(num_images).repeat_interleave(PATCHES)
    return image, torch.stack((place // GRID[1], place % GRID[1]), dim=1), place


@pytest.fixture
def planted():
    """Normal tokens hold a code of their position; one token in five is an outlier, long and of no position."""
    image, positions, place = tokens_of(100)
    outlier = torch.rand(len(image)) < 0.2
    features = torch.randn(PATCHES, 16)[place] + 0.1 * torch.randn(len(image), 16)
    features[outlier] = 5 * torch.randn(int(outlier.sum()), 16)
    return features, positions, image, outlier


class TestSplit:
    @pytest.mark.parametrize(("num_images", "num_test"), [(2, 1), (7, 1), (25, 5)])
    def test_no_image_has_tokens_on_both_sides_and_no_token_is_lost(self, num_images, num_test):
        image = (torch.arange(num_images).repeat(5) * 1000 - 3)[torch.randperm(5 * num_images)]
        train, test = split_images(image, generator=seeded())
        assert not set(image[train].tolist()) & set(image[test].tolist())
        assert len(image[test].unique()) == num_test
        assert torch.equal(torch.cat((train, test)).sort().values, torch.arange(len(image)))

    def test_every_image_has_its_turn(self):
        image = torch.arange(10)
        generator = seeded()
        counts = sum(torch.bincount(split_images(image, generator=generator)[1], minlength=10) for _ in range(1000))
        assert (counts - 200).abs().max() < 4 * math.sqrt(1000 * 0.2 * 0.8)


class TestPosition:
    def test_tokens_with_a_code_are_placed_and_outliers_are_not(self, planted):
        features, positions, image, outlier = planted
        scores = position_probe(features, positions, GRID, image, generator=seeded(), steps=400)
        lost = outlier[scores.test_tokens]
        assert scores.correct[~lost].double().mean() > 0.98
        assert scores.distance[~lost].mean() < 0.05
        assert within_binomial_error(scores.correct[lost].double().mean(), 1 / PATCHES, int(lost.sum()))
        assert scores.distance[lost].mean() > 2

    def test_distance_is_euclidean_in_patches(self):
        """Tokens of test images carry the code of the patch one row down and two columns to the right."""
        image, positions, place = tokens_of(25)
        codes = torch.randn(PATCHES, 16)
        features = codes[place]
        _, test = split_images(image, generator=seeded())
        test = test[(positions[test] < torch.tensor([3, 4])).all(1)]
        features[test] = codes[place[test] + GRID[1] + 2]
        scores = position_probe(features, positions, GRID, image, generator=seeded(), steps=400)
        moved = torch.isin(scores.test_tokens, test)
        assert moved.sum() == 5 * 3 * 4
        torch.testing.assert_close(scores.distance, math.sqrt(5) * moved.double())
        assert torch.equal(scores.correct, ~moved)

    def test_targets_of_scored_images_are_not_learned(self):
        image, positions, place = tokens_of(25)
        features, turned = torch.randn(PATCHES, 16)[place], positions.clone()
        _, test = split_images(image, generator=seeded())
        turned[test] = torch.tensor(GRID) - 1 - positions[test]
        scores = position_probe(features, turned, GRID, image, generator=seeded(), steps=400)
        expected = (turned - positions)[test].double().norm(dim=1)
        torch.testing.assert_close(scores.distance, expected)

    def test_it_does_as_well_as_a_full_logistic_regression(self):
        image, positions, place = tokens_of(100)
        features = torch.randn(PATCHES, 16)[place] + 1.5 * torch.randn(len(image), 16)
        train, test = split_images(image, generator=seeded())
        reference = LogisticRegression(C=100.0, max_iter=1000).fit(features[train].numpy(), place[train].numpy())
        expected = reference.predict(features[test].numpy())
        scores = position_probe(features, positions, GRID, image, generator=seeded())
        assert 0.3 < np.mean(expected == place[test].numpy()) < 0.9  # neither hopeless nor easy
        assert abs(scores.correct.double().mean() - np.mean(expected == place[test].numpy())) < 0.03

    def test_nothing_is_found_in_noise(self):
        image, positions, _ = tokens_of(100)
        scores = position_probe(torch.randn(len(image), 16), positions, GRID, image, generator=seeded(), steps=200)
        assert within_binomial_error(scores.correct.double().mean(), 1 / PATCHES, len(scores.correct))

    def test_scale_and_offset_of_a_channel_do_not_matter(self, planted):
        features, positions, image, _ = planted
        rescaled = features.double() * torch.logspace(-3, 3, 16) + torch.linspace(-50, 50, 16)
        rescaled = torch.cat((rescaled, torch.full((len(image), 1), 0.1)), dim=1)  # and a channel that says nothing
        plain, other = (
            position_probe(tokens, positions, GRID, image, generator=seeded(), steps=200)
            for tokens in (features, rescaled)
        )
        assert (plain.correct == other.correct).double().mean() > 0.99

    def test_it_trains_on_tokens_from_inference_mode_and_inside_it(self, planted):
        features, positions, image, _ = planted
        expected = position_probe(features, positions, GRID, image, generator=seeded(), steps=20)
        with torch.inference_mode():
            scores = position_probe(features + 0, positions + 0, GRID, image + 0, generator=seeded(), steps=20)
        torch.testing.assert_close(scores.distance, expected.distance)

    def test_half_precision_and_autograd_make_no_difference(self, planted):
        features, positions, image, _ = planted
        half = features.bfloat16()
        expected = position_probe(half.float(), positions, GRID, image, generator=seeded(), steps=20)
        scores = position_probe(half.requires_grad_(), positions, GRID, image, generator=seeded(), steps=20)
        assert torch.equal(scores.distance, expected.distance)
        assert not scores.distance.requires_grad


class TestReconstruction:
    @pytest.fixture
    def pixels(self, planted):
        """What each token would show if it were normal: 12 values linear in the clean channels."""
        features, _, _, outlier = planted
        pixels = features @ torch.randn(16, 12) + 3
        pixels[outlier] = 2 * torch.randn(int(outlier.sum()), 12)
        return pixels

    def test_planted_pixels_come_back(self, planted):
        features, _, image, _ = planted
        pixels = features @ torch.randn(16, 12) + 3
        scores = reconstruction_probe(features, pixels, image, generator=seeded())
        assert scores.error.max() < 1e-3

    def test_outliers_without_pixels_fail_where_normal_tokens_do_not(self, planted):
        """Outliers hold a flag of their own and none of their pixels: a linear map can be exact for all others."""
        features, _, image, outlier = planted
        pixels = features @ torch.randn(16, 12) + 3
        pixels[outlier] = 2 * torch.randn(int(outlier.sum()), 12)
        flagged = torch.cat((features * ~outlier[:, None], 100.0 * outlier[:, None]), dim=1)
        scores = reconstruction_probe(flagged, pixels, image, generator=seeded())
        lost = outlier[scores.test_tokens]
        assert scores.error[~lost].max() < 1e-3
        assert scores.error[lost].mean() > math.sqrt(12)  # half of what their pixels spread

    def test_it_equals_least_squares(self, planted, pixels, monkeypatch):
        features, _, image, _ = planted
        train, test = split_images(image, generator=seeded())
        monkeypatch.setattr(probes, "_CHUNK", 100)  # many chunks and a shorter last one
        scores = reconstruction_probe(features, pixels, image, generator=seeded())
        inputs = torch.cat((features, torch.ones(len(features), 1)), dim=1).double()
        weight = torch.linalg.lstsq(inputs[train], pixels[train].double()).solution
        expected = [math.sqrt(sum((inputs[i] @ weight - pixels[i]).square().tolist())) for i in test]
        torch.testing.assert_close(scores.error, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=0)
        assert torch.equal(scores.test_tokens, test)

    def test_pixels_of_scored_images_are_not_fitted(self, planted):
        features, _, image, _ = planted
        pixels = features @ torch.randn(16, 1)
        _, test = split_images(image, generator=seeded())
        far = pixels.clone()
        far[test] += 1000
        scores = reconstruction_probe(features, far, image, generator=seeded())
        torch.testing.assert_close(scores.error, torch.full_like(scores.error, 1000), rtol=1e-5, atol=0)

    def test_both_probes_score_the_same_images(self, planted, pixels):
        features, positions, image, _ = planted
        where = position_probe(features, positions, GRID, image, generator=seeded(3), steps=1)
        what = reconstruction_probe(features, pixels, image, generator=seeded(3))
        assert torch.equal(where.test_tokens, what.test_tokens)

    def test_copied_and_constant_channels_are_no_trouble(self, planted, pixels):
        features, _, image, _ = planted
        expected = reconstruction_probe(features, pixels, image, generator=seeded())
        wider = torch.cat((features, features, torch.full((len(image), 1), 0.1)), dim=1)
        scores = reconstruction_probe(wider, pixels, image, generator=seeded())
        torch.testing.assert_close(scores.error, expected.error, rtol=1e-4, atol=0)

    def test_a_channel_of_rounding_noise_is_not_blown_up(self, planted, pixels):
        """In training it strays by less than float32 resolves, in the images to score a thousand times as far."""
        features, _, image, _ = planted
        expected = reconstruction_probe(features, pixels, image, generator=seeded())
        noise = 1 + 1e-9 * torch.randn(len(image), 1, dtype=torch.float64)
        noise[split_images(image, generator=seeded())[1]] += 1e-6
        scores = reconstruction_probe(torch.cat((features, noise), dim=1), pixels, image, generator=seeded())
        torch.testing.assert_close(scores.error, expected.error, rtol=1e-3, atol=0)

    def test_noise_is_no_better_than_the_mean_patch(self, planted, pixels):
        _, _, image, _ = planted
        scores = reconstruction_probe(torch.randn(len(image), 16), pixels, image, generator=seeded())
        train, test = split_images(image, generator=seeded())
        mean_patch = (pixels[test] - pixels[train].mean(0)).norm(dim=1)
        assert scores.error.mean() > 0.98 * mean_patch.mean()


class TestChooseOne:
    mask = torch.tensor([[False, True, True, False, True], [False] * 5, [False, False, False, True, False]])

    def test_every_marked_patch_has_the_same_chance(self):
        draws = 6000
        mask = self.mask[:1].expand(draws, -1)
        counts = torch.bincount(choose_one(mask, seeded()), minlength=5).double()
        assert counts[~self.mask[0]].sum() == 0
        statistic = ((counts[self.mask[0]] - draws / 3) ** 2 / (draws / 3)).sum()
        assert statistic < chi2.ppf(0.9999, df=2)

    def test_an_image_without_a_marked_patch_is_left_out(self):
        generator = seeded()
        for _ in range(20):
            chosen = choose_one(self.mask, generator)
            assert chosen.dtype == torch.int64
            assert chosen[1] == -1
            assert chosen[2] == 3

    def test_images_draw_on_their_own(self):
        chosen = choose_one(torch.ones(2000, 2, dtype=torch.bool), seeded()).double()
        assert within_binomial_error((chosen[:-1] == chosen[1:]).double().mean(), 0.5, 1999)


class TestGlobal:
    classes = 4

    @pytest.fixture
    def draws(self):
        """Outlier tokens hold a code of the class of their image, normal tokens are noise; two draws of each."""
        codes = 2 * torch.randn(self.classes, 16)
        labels = {"train": torch.arange(200) % self.classes, "test": torch.arange(400) % self.classes}
        noise = {(kind, part): torch.randn(2, len(labels[part]), 16) for kind in "on" for part in labels}
        outlier = {part: codes[labels[part]] + noise["o", part] for part in labels}
        return labels, outlier, {part: noise["n", part] for part in labels}

    def test_the_class_is_read_off_outliers_and_not_off_normal_tokens(self, draws):
        labels, outlier, normal = draws
        found, not_found = (
            token_classification(t["train"][0], labels["train"], t["test"][0], labels["test"], generator=seeded())
            for t in (outlier, normal)
        )
        assert found > 0.95
        assert within_binomial_error(not_found, 1 / self.classes, 400)

    def test_it_equals_a_penalised_likelihood_written_out(self, draws, monkeypatch):
        labels, outlier, _ = draws
        train, test = outlier["train"][0] * 0.3 + torch.randn(200, 16), outlier["test"][0] * 0.3 + torch.randn(400, 16)
        monkeypatch.setattr(probes, "_INVERSE_PENALTIES", (0.01,))
        accuracy = token_classification(train, labels["train"], test, labels["test"], generator=seeded())
        mean, std = train.double().mean(0), train.double().std(0, correction=0)
        inputs, scored = (torch.cat(((x.double() - mean) / std, torch.ones(len(x), 1)), 1) for x in (train, test))

        def loss(flat):
            weight = torch.tensor(flat).reshape(17, self.classes).requires_grad_()
            data = torch.nn.functional.cross_entropy(inputs @ weight, labels["train"], reduction="sum")
            value = 0.01 * data + 0.5 * weight[:-1].square().sum()
            return value.item(), torch.autograd.grad(value, weight)[0].flatten().numpy()

        solution = minimize(loss, np.zeros(17 * self.classes), jac=True, tol=1e-10)
        best = torch.tensor(solution.x).reshape(17, self.classes)
        expected = ((scored @ best).argmax(1) == labels["test"]).double().mean()
        assert 0.4 < accuracy < 0.9
        assert accuracy == pytest.approx(expected.item(), abs=1 / 400)

    def test_the_penalty_is_chosen_on_held_out_images_and_all_are_fitted_in_the_end(self, monkeypatch):
        """Each image is numbered in its feature, and the accuracy of each C is made up."""
        fits = []

        def made_up(train, labels, test, right, c):
            fits.append((c, set(train[:, 0]), set(test[:, 0])))
            return {1e-4: 0.1, 1e-3: 0.7, 1e-2: 0.9, 1e-1: 0.9, 1.0: 0.2}[c]

        monkeypatch.setattr(probes, "_accuracy", made_up)
        labels, numbers = torch.arange(40) % 2, torch.arange(80.0)[:, None]
        token_classification(numbers[:40], labels, numbers[40:], labels, generator=seeded())
        *choice, (c, fitted, scored) = fits
        assert [c for c, _, _ in choice] == [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
        for _, of_choice, held_out in choice:
            assert len(held_out) == 8
            assert not of_choice & held_out
            assert of_choice | held_out == set(range(40))
        assert (c, fitted, scored) == (1e-2, set(range(40)), set(range(40, 80)))  # the stronger of two equals

    def test_held_out_images_are_a_fifth_of_each_class_and_never_all_of_it(self):
        labels = np.repeat([3, 5, 8, 9], [1, 2, 10, 4])
        held_out = probes._held_out(labels, seeded())
        assert [int(held_out[labels == label].sum()) for label in (3, 5, 8, 9)] == [0, 1, 2, 1]

    def test_classes_need_not_be_numbered_from_zero(self, draws):
        labels, outlier, _ = draws
        plain, renamed = (
            token_classification(
                outlier["train"][0], f(labels["train"]), outlier["test"][0], f(labels["test"]), generator=seeded()
            )
            for f in (lambda x: x, lambda x: 100 + 7 * x)
        )
        assert plain == renamed

    def test_each_draw_counts_and_the_spread_is_the_samples(self, draws):
        labels, outlier, _ = draws
        train, test = outlier["train"], outlier["test"] * torch.tensor([1.0, 0.1]).reshape(2, 1, 1)
        result = accuracy_over_draws(train, labels["train"], test, labels["test"], generator=seeded())
        each = tuple(
            token_classification(train[i], labels["train"], test[i], labels["test"], generator=seeded())
            for i in range(2)
        )
        assert result.accuracies == each
        assert each[0] != each[1]
        assert result.mean == pytest.approx(sum(each) / 2)
        assert result.std == pytest.approx(abs(each[0] - each[1]) / math.sqrt(2))
        assert (result.n_train, result.n_test) == (200, 400)

    def test_all_draws_hold_out_the_same_images(self, monkeypatch):
        held_out = set()
        monkeypatch.setattr(
            probes, "_accuracy", lambda _a, _b, test, _d, _c: held_out.add(frozenset(test[:, 0])) or 0.5
        )
        labels, numbers = torch.arange(40) % 2, torch.arange(80.0)[:, None].expand(3, -1, -1)
        accuracy_over_draws(numbers[:, :40], labels, numbers[:, 40:], labels, generator=seeded())
        assert sorted(map(len, held_out)) == [8, 40]  # to choose C, and the test images

    def test_equal_draws_have_no_spread_and_one_draw_has_none_to_show(self, draws):
        labels, outlier, normal = draws
        train, test = normal["train"][:1], outlier["test"][:1]
        same = accuracy_over_draws(
            train.repeat(3, 1, 1), labels["train"], test.repeat(3, 1, 1), labels["test"], generator=seeded()
        )
        assert same.std == pytest.approx(0, abs=1e-12)
        single = accuracy_over_draws(train, labels["train"], test, labels["test"], generator=seeded())
        assert math.isnan(single.std)
        assert single.mean == pytest.approx(same.mean)


def test_a_seed_gives_one_answer_and_global_randomness_is_left_alone(planted):
    features, positions, image, outlier = planted
    labels = torch.arange(40) % 2

    def everything(seed):
        where = position_probe(features, positions, GRID, image, generator=seeded(seed), steps=20)
        what = reconstruction_probe(features, features[:, :3], image, generator=seeded(seed))
        chosen = choose_one(outlier.reshape(-1, PATCHES), seeded(seed))
        accuracy = token_classification(features[:40], labels, features[40:80], labels, generator=seeded(seed))
        return where.distance, where.test_tokens, what.error, chosen, torch.tensor(accuracy)

    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = everything(0)
    torch.rand(1, generator=seeded())  # another generator: no effect
    again, other = everything(0), everything(1)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])
    assert not torch.equal(first[3], other[3])


class TestMistakes:
    features, image = torch.randn(48, 4), torch.arange(2).repeat_interleave(24)
    positions, labels = torch.zeros(48, 2, dtype=torch.int64), torch.arange(48) % 2

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"features": features[:, 0]}, r"features of floats, a row each, got torch.float32 \(48,\)"),
            ({"features": features.long()}, "floats, a row each, got torch.int64"),
            ({"features": features / 0}, "finite features, got NaN"),
            ({"positions": positions[:5]}, r"positions \(48, ...\).*got \(5, 2\)"),
            ({"image_index": image[:5]}, r"image_index \(48,\).*got .* and \(5,\)"),
            ({"positions": positions[:, :1]}, r"integer positions \(n, 2\), got torch.int64 \(48, 1\)"),
            ({"positions": positions.float()}, "integer positions .* got torch.float32"),
            ({"positions": positions + torch.tensor([0, 6])}, r"grid of 4 x 6, got \[0, 6\] to \[0, 6\]"),
            ({"positions": positions - 1}, r"grid of 4 x 6, got \[-1, -1\]"),
            ({"steps": 0}, "at least 1 step, got 0"),
            ({"image_index": image * 0}, "at least 2 images, one to train on and one to score, got 1"),
            ({name: value[:0] for name, value in (("features", features), ("positions", positions))}, "got"),
        ],
    )
    def test_of_the_position_probe(self, change, message):
        given = {"features": self.features, "positions": self.positions, "grid": GRID, "image_index": self.image}
        with pytest.raises(ValueError, match=message):
            position_probe(**{**given, **change}, generator=seeded())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"features": features[0]}, "features of floats, a row each"),
            ({"pixels": features[:5]}, r"pixels \(48, ...\).*got \(5, 4\)"),
            ({"pixels": features[:, 0]}, r"pixels \(48, ...\).*got \(48,\)"),
            ({"pixels": features.long()}, "pixels of floats"),
            ({"pixels": features * float("nan")}, "finite pixels, got NaN"),
            ({"ridge": 0.0}, "positive ridge, got 0.0"),
            ({"image_index": image * 0 + 7}, "at least 2 images"),
        ],
    )
    def test_of_the_reconstruction_probe(self, change, message):
        given = {"features": self.features, "pixels": self.features, "image_index": self.image}
        with pytest.raises(ValueError, match=message):
            reconstruction_probe(**{**given, **change}, generator=seeded())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"train_features": features[0]}, "train_features of floats"),
            ({"test_features": features * float("inf")}, "finite test_features"),
            ({"train_labels": labels[:5]}, r"integer train_labels \(48,\), got torch.int64 \(5,\)"),
            ({"test_labels": labels.float()}, r"integer test_labels \(48,\), got torch.float32"),
            ({"test_features": features[:, :3]}, r"test_features \(1 or more, 4\), got \(48, 3\)"),
            ({"test_features": features[:0], "test_labels": labels[:0]}, r"1 or more, 4\), got \(0, 4\)"),
            ({"train_labels": labels * 0}, "at least 2 classes in training, got 1"),
            ({"train_features": features[:0], "train_labels": labels[:0]}, "at least 2 classes in training, got 0"),
            ({"train_labels": torch.arange(48)}, "2 training images or more.* got 1 image of each class"),
            ({"test_labels": labels + 1}, r"every class of the test images in training, got none of \[2\]"),
        ],
    )
    def test_of_the_global_probe_over_one_draw_or_several(self, change, message):
        given = {"train_features": self.features, "train_labels": self.labels}
        given = {**given, "test_features": self.features, "test_labels": self.labels, **change}
        with pytest.raises(ValueError, match=message):
            token_classification(**given, generator=seeded())
        stacked = {name: value[None] if name.endswith("features") else value for name, value in given.items()}
        if given["train_features"].ndim == given["test_features"].ndim == 2:
            with pytest.raises(ValueError, match=message):
                accuracy_over_draws(**stacked, generator=seeded())

    @pytest.mark.parametrize(("train", "test"), [((48, 4), (1, 48, 4)), ((2, 48, 4), (1, 48, 4)), ((0, 48, 4),) * 2])
    def test_of_draws_that_do_not_match(self, train, test):
        with pytest.raises(ValueError, match=r"of as many draws, got \(.*\) and \(.*\)"):
            accuracy_over_draws(torch.randn(train), self.labels, torch.randn(test), self.labels, generator=seeded())

    @pytest.mark.parametrize("mask", [torch.ones(2, 3), torch.ones(3, dtype=torch.bool), torch.ones(2, 0) > 0])
    def test_of_the_mask(self, mask):
        with pytest.raises(ValueError, match=r"bool mask \(images, patches\), got"):
            choose_one(mask, seeded())

    def test_of_the_split(self):
        with pytest.raises(ValueError, match=r"at least 2 images.* got 0"):
            split_images(torch.zeros(0, dtype=torch.int64), generator=seeded())


class TestPaperDatasets:
    def test_they_are_those_of_table_1_in_its_order(self):
        names = "IN1k P205 Airc CF10 CF100 CUB Cal101 Cars DTD Flow Food Pets SUN VOC"
        assert [row.short_name for row in PAPER_DATASETS] == names.split()

    @pytest.mark.parametrize(
        ("token", "percent"),
        [
            ("cls", "86.0 66.4 87.3 99.4 94.5 91.3 96.9 91.5 85.2 99.7 94.7 96.9 78.6 89.1"),
            ("normal", "65.8 53.1 17.1 97.1 81.3 18.6 73.2 10.8 63.1 59.5 74.2 47.8 37.7 70.8"),
            ("outlier", "69.0 55.1 79.1 99.3 93.7 84.9 97.6 85.2 84.9 99.6 93.5 94.1 78.5 89.7"),
        ],
    )
    def test_reported_accuracies_are_its_rows(self, token, percent):
        assert " ".join(str(getattr(row.reported, token)) for row in PAPER_DATASETS) == percent

    def test_a_row_can_be_loaded_or_says_that_it_cannot(self):
        for row in PAPER_DATASETS:
            needed = (row.train_split, row.test_split, row.image_column, row.label_column)
            assert all(needed) if row.hub_id else needed == (None,) * 4 and row.config is None
            assert row.hub_id is None or row.hub_id.count("/") == 1
            assert row.train_split is None or row.train_split != row.test_split
        assert {row.short_name for row in PAPER_DATASETS if row.hub_id is None} == {"P205", "VOC"}

    def test_none_claims_to_have_been_loaded(self):
        assert not any(row.checked for row in PAPER_DATASETS)

    def test_rows_do_not_change(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            PAPER_DATASETS[0].checked = True


def test_scikit_learn_warns_of_nothing():
    """Its releases rename arguments: what is passed here must be current in the one installed."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        labels = torch.arange(60) % 3
        token_classification(torch.randn(60, 8), labels, torch.randn(60, 8), labels, generator=seeded())
    assert caught == []
