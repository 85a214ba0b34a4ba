# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Outlier channels and massive activations: what is planted is found, at its place, and nothing else."""

import numpy as np
import pytest
import scipy.stats
import torch

from vitreg_hf.analysis.channels import (
    BranchContributions,
    ChannelMagnitudes,
    infinity_norm,
    kurtosis,
    largest_ffn_writer,
    massive_activations,
    no_op_share,
    sigma_outliers,
    written_by,
)
from vitreg_hf.analysis.sinks import RunningMean
from vitreg_hf.analysis.token_kinds import TextKind

MASK = torch.tensor([[False, True, True, True, False], [True, True, True, True, True]])


def padded_activations(channels=40):
    """Random activations whose padding holds what would change every statistic, and the mask."""
    return torch.randn(2, 5, channels).masked_fill(~MASK[..., None], torch.inf), MASK


class TestSigmaOutliers:
    def test_gaussian_noise_has_none(self):
        assert not sigma_outliers(torch.randn(4, 100, 200)).any()

    def test_planted_outliers_are_found_exactly_on_both_sides(self):
        x = torch.randn(3, 50, 64)
        planted = torch.zeros_like(x, dtype=torch.bool)
        for b, n, d in [(0, 7, 12), (0, 7, 40), (0, 20, 12), (2, 3, 12)]:
            planted[b, n, d] = True
        x[planted] = torch.tensor([30.0, -30.0, -25.0, 25.0])
        outliers = sigma_outliers(x)
        assert torch.equal(outliers, planted)
        assert outliers.sum((1, 2)).tolist() == [3, 0, 1]
        assert outliers.sum(1)[0].nonzero().flatten().tolist() == [12, 40]
        assert outliers.sum(1)[0, 12] == 2
        assert outliers.sum(2)[0, 7] == 2

    def test_it_equals_a_literal_loop_around_any_mean(self):
        x, mask = padded_activations()
        x = x * 3 + 50
        x[0, 2, 5], x[1, 0, 6] = 150, -60
        outliers = sigma_outliers(x, mask, num_sigmas=3)
        for b in range(2):
            values = x[b, mask[b]].double().numpy()
            expected = np.abs(values - values.mean()) > 3 * values.std()
            assert (outliers[b, mask[b]].numpy() == expected).all()
            assert expected.any()
            assert not outliers[b, ~mask[b]].any()

    def test_the_fewest_values_that_can_hold_one(self):
        """A lone spike among n values is the square root of n - 1 deviations away."""
        for n, found in [(36, 0), (38, 1)]:  # of 37, six exactly
            spike = torch.zeros(1, 1, n)
            spike[..., 0] = 1
            assert sigma_outliers(spike).sum() == found
        assert sigma_outliers(spike, num_sigmas=6.08).sum() == 1
        assert sigma_outliers(spike, num_sigmas=6.09).sum() == 0


class TestKurtosisAndInfinityNorm:
    def test_a_gaussian_has_three(self):
        assert kurtosis(torch.randn(2, 500, 200)).tolist() == pytest.approx([3, 3], abs=0.1)

    def test_a_spike_among_n_values_has_about_n(self):
        x = torch.zeros(1, 10, 50)
        x[0, 3, 4] = 100
        n = 500  # a lone spike: kurtosis is n - 2 + 1 / (n - 1)
        assert kurtosis(x).item() == pytest.approx(n - 2 + 1 / (n - 1), rel=1e-6)

    def test_both_equal_scipy_and_numpy_and_padding_does_not_count(self):
        x, mask = padded_activations()
        x[1, 2, 3] = -20
        for b in range(2):
            values = x[b, mask[b]].double().numpy().ravel()
            assert kurtosis(x, mask)[b].item() == pytest.approx(scipy.stats.kurtosis(values, fisher=False), rel=1e-9)
            assert infinity_norm(x, mask)[b].item() == pytest.approx(np.abs(values).max())

    def test_a_large_mean_does_not_drown_it(self):
        noise = torch.randn(1, 100, 100, dtype=torch.float64)
        torch.testing.assert_close(kurtosis(noise + 1e6), kurtosis(noise), rtol=1e-6, atol=0)

    def test_equal_values_have_none(self):
        assert kurtosis(torch.ones(1, 2, 3)).isnan().all()

    def test_the_mean_over_inputs_does_not_depend_on_batches(self):
        x, mean = torch.randn(7, 20, 30), RunningMean(())
        for batch in x.split(3):
            mean.update(kurtosis(batch))
        expected = np.mean([scipy.stats.kurtosis(v.double().numpy().ravel(), fisher=False) for v in x])
        assert mean.result().item() == pytest.approx(expected, rel=1e-9)


class TestChannelMagnitudes:
    def test_it_equals_the_one_shot_curve_and_survives_a_restart(self):
        x, mask = padded_activations()
        more = torch.randn(3, 4, 40)
        curve, resumed = ChannelMagnitudes(40), ChannelMagnitudes(40)
        curve.update(x, mask)
        resumed.load_state_dict(curve.state_dict())
        tokens = torch.cat([x[mask], more.flatten(0, 1)]).abs().double()
        for gathered in (curve, resumed):
            gathered.update(more)
            torch.testing.assert_close(gathered.mean(), tokens.mean(0))
            assert torch.equal(gathered.maximum(), tokens.amax(0))

    def test_a_planted_channel_stands_out(self):
        x = torch.randn(4, 50, 30)
        x[..., 17] += 20
        x[2, 9, 5] = -500
        curve = ChannelMagnitudes(30)
        curve.update(x)
        assert curve.maximum().argmax() == 5
        assert curve.maximum()[5] == 500
        assert curve.mean().argmax() == 17
        assert curve.mean()[17].item() == pytest.approx(20, abs=0.5)

    def test_nothing_is_known_before_an_update(self):
        assert ChannelMagnitudes(3).mean().isnan().all()
        assert ChannelMagnitudes(3).maximum().isnan().all()

    def test_other_channels_are_refused(self):
        with pytest.raises(ValueError, match=r"values \(B, \*\(3,\)\)"):
            ChannelMagnitudes(3).update(torch.zeros(1, 2, 4))
        with pytest.raises(ValueError, match=r"shape \(3,\), got \(4,\)"):
            ChannelMagnitudes(3).load_state_dict(ChannelMagnitudes(4).state_dict())


class TestMassiveActivations:
    def test_planted_ones_are_found_largest_first_with_value_and_ratio(self):
        x = torch.randn(3, 40, 64)
        planted = {(1, 0, 15): 2500.0, (0, 0, 15): -2000.0, (2, 11, 33): 900.0}
        for place, value in planted.items():
            x[place] = value
        found = massive_activations(x)
        assert found.total == 3
        assert [tuple(p) for p in found.positions.tolist()] == list(planted)
        assert found.values.tolist() == list(planted.values())
        for (b, _, _), value, ratio in zip(planted, found.values.tolist(), found.ratios.tolist()):
            middle = x[b].abs().flatten().sort().values[(40 * 64 - 1) // 2].item()
            assert ratio == pytest.approx(abs(value) / middle, rel=1e-5)
        assert np.median(x[0].abs().numpy()) == pytest.approx(2000 / found.ratios[1].item(), rel=1e-2)

    @pytest.mark.parametrize("absolute", [100.0, 0.0])
    def test_gaussian_noise_has_none_at_any_scale(self, absolute):
        for scale in (1, 1000):
            found = massive_activations(scale * torch.randn(2, 100, 100), absolute=absolute)
            assert found.total == len(found.positions) == len(found.values) == len(found.ratios) == 0
            assert found.positions.shape == (0, 3)

    def test_both_rules_must_hold_and_zero_leaves_the_relative_one(self):
        x = torch.full((1, 4, 8), 0.01)
        x[0, 1, 2] = 50  # 5000 medians, but small
        assert massive_activations(x).total == 0
        relative = massive_activations(x, absolute=0)
        assert relative.positions.tolist() == [[0, 1, 2]]
        assert relative.ratios.tolist() == pytest.approx([5000])
        x = torch.full((1, 4, 8), 1.0)
        x[0, 1, 2] = 999  # large, but less than 1000 medians
        assert massive_activations(x).total == 0
        x[0, 1, 2] = 1000
        assert massive_activations(x).total == 1
        assert massive_activations(x, absolute=1000).total == 0

    def test_the_median_is_that_of_each_input(self):
        x = torch.ones(2, 4, 8)
        x[1] *= 10
        x[:, 3, 3] = 2000
        assert massive_activations(x).positions.tolist() == [[0, 3, 3]]

    def test_the_list_is_cut_but_the_total_is_not(self):
        x = torch.full((1, 50, 10), 0.1)
        x[0, :20, 4] = torch.arange(1000, 1020).float()
        found = massive_activations(x, limit=3)
        assert found.total == 20
        assert found.values.tolist() == [1019, 1018, 1017]
        assert found.positions.tolist() == [[0, 19, 4], [0, 18, 4], [0, 17, 4]]
        assert len(massive_activations(x).values) == 20

    def test_padding_is_neither_found_nor_in_the_median(self):
        x = torch.full((1, 6, 4), 1e6)
        x[0, 3:] = 0.5
        x[0, 4, 1] = -800
        found = massive_activations(x, torch.tensor([[False, False, False, True, True, True]]))
        assert found.positions.tolist() == [[0, 4, 1]]
        assert found.values.tolist() == [-800]
        assert found.ratios.tolist() == [1600]


class TestWriters:
    def test_the_branch_that_wrote_each_place(self):
        before, attention, ffn = torch.randn(3, 2, 5, 8).unbind()
        ffn[0, 1, 2], attention[1, 3, 4], before[1, 0, 0] = -700, 300, 50
        ffn[1, 0, 0] = -20  # works against the value: it did not write it
        places = torch.tensor([[0, 1, 2], [1, 3, 4], [1, 0, 0]])
        parts = written_by(before, attention, ffn, places)
        assert parts.writers() == ["ffn", "attention", "before"]
        assert parts.ffn[0] == -700
        assert parts.attention[1] == 300
        assert parts.before[2] == 50
        after = before + attention + ffn
        torch.testing.assert_close(parts.after, torch.stack([after[tuple(p)] for p in places.tolist()]))

    def test_what_massive_activations_finds_is_traced_to_its_writer(self):
        stream, layers = torch.randn(2, 6, 16), []
        updates = torch.randn(5, 2, 2, 6, 16)  # layer, branch
        updates[2, 1, 0, 0, 7] = 3000
        updates[3, 1, 1, 4, 9] = -2500
        updates[2, 1, 1, 4, 9] = -50
        updates[4, 1, 0, 0, 7] = -3100  # the last layer takes it away
        states = [stream]
        for attention, ffn in updates:
            states.append(states[-1] + attention + ffn)
        found = massive_activations(states[4])
        assert found.positions.tolist() == [[0, 0, 7], [1, 4, 9]]
        for before, (attention, ffn) in zip(states, updates):
            layers.append(written_by(before, attention, ffn, found.positions))
        writers = largest_ffn_writer(layers)
        assert writers.layer.tolist() == [2, 3]
        assert writers.contribution.tolist() == [3000, -2500]
        assert writers.peak[0].item() == pytest.approx(3000, abs=20)
        assert writers.peak[1].item() == pytest.approx(-2550, abs=20)

    def test_half_precision_parts_are_added_in_float32(self):
        parts = [torch.full((1, 1, 1), value, dtype=torch.bfloat16) for value in (1024.0, 1.0, 1.0)]
        assert written_by(*parts, torch.zeros(1, 3).long()).after.tolist() == [1026]

    def test_mistakes_are_refused(self):
        x, places = torch.zeros(1, 2, 3), torch.tensor([[0, 1, 2]])
        for wrong in (torch.zeros(1, 2, 4), torch.zeros(2, 3)):
            with pytest.raises(ValueError, match=r"three tensors of one shape \(B, N, D\)"):
                written_by(x, x, wrong, places)
        with pytest.raises(ValueError, match="three tensors"):
            written_by(x[0], x[0], x[0], places)
        for wrong in (places[0], places[:, :2], places.float()):
            with pytest.raises(ValueError, match=r"integer positions \(M, 3\)"):
                written_by(x, x, x, wrong)
        for wrong in ([[1, 0, 0]], [[0, 2, 0]], [[0, 0, 3]], [[0, -1, 0]]):
            with pytest.raises(ValueError, match=r"positions inside \(1, 2, 3\)"):
                written_by(x, x, x, torch.tensor(wrong))
        two, one = (BranchContributions(v, v, v) for v in (torch.zeros(2), torch.zeros(1)))
        for layers in ([], [two, one]):
            with pytest.raises(ValueError, match="equally many places"):
                largest_ffn_writer(layers)


SEP, OTHER = int(TextKind.SEP), int(TextKind.OTHER)


def resting_head(short=0.1):
    """Two heads over six tokens, the last one SEP: head 0 rests there, head 1 is even; SEP's value is short."""
    attention = torch.full((1, 2, 6, 6), 1 / 6)
    attention[:, 0] = 0.05
    attention[:, 0, :, 5] = 0.75
    values = torch.ones(1, 2, 6, 4)
    values[:, :, 5] = short
    return attention, values, torch.tensor([[OTHER] * 5 + [SEP]])


class TestHeadsThatDoNothing:
    def test_the_resting_head_is_found(self):
        assert no_op_share(*resting_head(), [TextKind.SEP]).tolist() == [[1, 0]]

    def test_a_part_of_the_queries(self):
        attention, values, kinds = resting_head()
        attention[0, 0, :3] = 1 / 6
        assert no_op_share(attention, values, kinds, [SEP]).tolist() == [[0.5, 0]]

    @pytest.mark.parametrize(("short", "share"), [(0.49, 1), (0.5, 0), (1.0, 0), (3.0, 0)])
    def test_tokens_with_values_of_usual_length_are_no_resting_places(self, short, share):
        assert no_op_share(*resting_head(short), [SEP]).tolist() == [[share, 0]]

    def test_tokens_of_other_kinds_are_no_resting_places(self):
        assert no_op_share(*resting_head(), [TextKind.CLS, TextKind.PUNCTUATION]).tolist() == [[0, 0]]

    def test_resting_places_count_together(self):
        attention, values, kinds = resting_head()
        attention[:, 0, :, 4:] = torch.tensor([0.4, 0.4])
        values[:, :, 4] = 0.1
        kinds[0, 4] = TextKind.PUNCTUATION
        assert no_op_share(attention, values, kinds, [SEP, TextKind.PUNCTUATION]).tolist() == [[1, 0]]
        assert no_op_share(attention, values, kinds, [SEP]).tolist() == [[0, 0]]

    def test_the_thresholds_are_those_given(self):
        attention, values, kinds = resting_head(short=0.3)
        assert no_op_share(attention, values, kinds, [SEP], attention_above=0.76).tolist() == [[0, 0]]
        assert no_op_share(attention, values, kinds, [SEP], attention_above=0.1).tolist() == [[1, 1]]
        assert no_op_share(attention, values, kinds, [SEP], norm_below=0.2).tolist() == [[0, 0]]

    def test_padding_gives_what_the_bare_sequence_gives(self):
        attention, values, kinds = resting_head()
        attention[0, 0, :2] = 1 / 6
        mask = torch.tensor([[False, *[True] * 6, False, False]])
        padded = torch.full((1, 2, 9, 9), torch.nan)
        padded[:, :, 1:7] = 0
        padded[:, :, 1:7, 1:7] = attention
        wide, wide_kinds = torch.full((1, 2, 9, 4), torch.nan), torch.full((1, 9), SEP)
        wide[:, :, 1:7], wide_kinds[:, 1:7] = values, kinds
        share = no_op_share(padded, wide, wide_kinds, [SEP], mask)
        torch.testing.assert_close(share, torch.tensor([[4 / 6, 0]]))

    def test_mistakes_are_refused(self):
        attention, values, kinds = resting_head()
        with pytest.raises(ValueError, match="at least one kind"):
            no_op_share(attention, values, kinds, [])
        for thresholds in ((0, 0.5), (1, 0.5), (0.5, 0), (0.5, 1)):
            with pytest.raises(ValueError, match="thresholds between 0 and 1"):
                no_op_share(attention, values, kinds, [SEP], None, *thresholds)
        with pytest.raises(ValueError, match=r"Expected kinds \(1, 6\)"):
            no_op_share(attention, values, kinds[:, :5], [SEP])
        with pytest.raises(ValueError, match=r"Expected values \(1, 2, 6, 'd'\)"):
            no_op_share(attention, values[:, :1], kinds, [SEP])


@pytest.mark.parametrize("statistic", [sigma_outliers, kurtosis, infinity_norm, massive_activations])
def test_what_are_no_activations_is_refused(statistic):
    for wrong in (torch.zeros(2, 3), torch.zeros(1, 2, 3).long()):
        with pytest.raises(ValueError, match=r"floating-point activations \(B, N, D\)"):
            statistic(wrong)
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="finite activations"):
            statistic(torch.full((1, 2, 3), value))
    with pytest.raises(ValueError, match=r"boolean token_mask \(1, 2\)"):
        statistic(torch.ones(1, 2, 3), torch.ones(1, 3).bool())
    with pytest.raises(ValueError, match="padding alone"):
        statistic(torch.ones(1, 2, 3), torch.zeros(1, 2).bool())


def test_wrong_arguments_are_refused():
    x = torch.ones(1, 2, 3)
    for num_sigmas in (0, -1):
        with pytest.raises(ValueError, match="positive number of standard deviations"):
            sigma_outliers(x, num_sigmas=num_sigmas)
    for wrong in ({"absolute": -1}, {"ratio": 0}, {"limit": 0}):
        with pytest.raises(ValueError, match=r"absolute >= 0, ratio > 0 and limit >= 1"):
            massive_activations(x, **wrong)
    with pytest.raises(ValueError, match=r"median \|x\| above 0"):
        massive_activations(torch.zeros(1, 2, 3))
