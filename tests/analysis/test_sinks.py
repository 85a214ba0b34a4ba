# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Attention sinks: planted ones are measured exactly, uniform maps show none, padding never counts."""

import math

import pytest
import torch

from vitreg_hf.analysis.sinks import (
    MeanLogits,
    RunningMean,
    attention_entropy,
    entropy_over_uniform,
    head_norms,
    real_attention,
    received_attention,
    share_by_kind,
    sink_heads,
    sink_score,
    times_uniform,
)


def random_attention(batch, heads, tokens, causal=False, mask=None):
    logits = 2 * torch.randn(batch, heads, tokens, tokens)
    if causal:
        logits = logits.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None, :], -torch.inf)
    return logits.softmax(-1)  # rows of padding that see nothing are NaN, as they are in models


def planted_sink(batch, heads, tokens, sink_heads, key=0):
    """Half of the attention on one token in the first heads, the other half and the other heads even."""
    attention = torch.full((batch, heads, tokens, tokens), 1 / tokens)
    attention[:, :sink_heads] = 0.5 / (tokens - 1)
    attention[:, :sink_heads, :, key] = 0.5
    return attention


LEFT = torch.tensor([[False, False, True, True, True], [True, True, True, True, True]])
RIGHT, BOTH = LEFT.flip(1), torch.tensor([[False, True, True, True, False], [True, True, True, True, False]])
MASKS = pytest.mark.parametrize("mask", [LEFT, RIGHT, BOTH], ids=["left", "right", "both"])
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])


class TestReceivedAttention:
    @CAUSAL
    @MASKS
    def test_it_equals_a_literal_double_loop(self, causal, mask):
        attention = random_attention(2, 3, 5, causal, mask)
        received = received_attention(attention, mask, causal)
        ratio = times_uniform(received, mask, causal)
        for b in range(2):
            places = [n for n in range(5) if mask[b, n]]
            for k, key in enumerate(places):
                queries = range(k, len(places)) if causal else range(len(places))
                even = sum(1 / ((i + 1) if causal else len(places)) for i in queries) / len(queries)
                for head in range(3):
                    alpha = sum(attention[b, head, places[i], key].item() for i in queries) / len(queries)
                    assert received[b, head, key].item() == pytest.approx(alpha, rel=1e-5)
                    assert ratio[b, head, key].item() == pytest.approx(alpha / even, rel=1e-5)
        assert torch.equal(received.isnan(), ~mask[:, None].expand(2, 3, 5))
        assert torch.equal(ratio.isnan(), received.isnan())

    @CAUSAL
    def test_padding_gives_what_the_bare_sequence_gives(self, causal):
        bare = random_attention(1, 2, 4, causal)
        padded = torch.full((1, 2, 7, 7), torch.nan)
        padded[..., 2:6, :] = 0
        padded[..., 2:6, 2:6] = bare
        mask = torch.tensor([[False, False, True, True, True, True, False]])
        received = received_attention(padded, mask, causal)
        torch.testing.assert_close(received[..., 2:6], received_attention(bare, causal=causal))
        ratio = times_uniform(received, mask, causal)[..., 2:6]
        torch.testing.assert_close(ratio, times_uniform(received_attention(bare, causal=causal), causal=causal))

    def test_half_precision_is_summed_in_float32(self):
        attention = torch.full((1, 1, 300, 300), 1 / 300).to(torch.bfloat16)
        received = received_attention(attention)
        assert received.dtype == torch.float32
        torch.testing.assert_close(received, attention[:, :, 0].float())


class TestSinkScore:
    @pytest.mark.parametrize("heads_with_sink", [0, 1, 3, 4])
    def test_a_planted_sink_is_scored_exactly(self, heads_with_sink):
        received = received_attention(planted_sink(2, 4, 10, heads_with_sink))
        assert sink_score(received, 0).tolist() == [heads_with_sink / 4] * 2
        assert sink_score(received, 1).tolist() == [0, 0]
        assert sink_heads(received, 0)[0].tolist() == [head < heads_with_sink for head in range(4)]
        ratio = times_uniform(received)
        torch.testing.assert_close(ratio[:, :heads_with_sink, 0], torch.full((2, heads_with_sink), 5.0))
        torch.testing.assert_close(ratio[:, heads_with_sink:], torch.ones(2, 4 - heads_with_sink, 10))

    def test_a_planted_sink_of_a_causal_model(self):
        allowed = torch.ones(64, 64).tril()
        attention = 0.5 * allowed / allowed.sum(1, keepdim=True) * torch.ones(1, 2, 1, 1)
        attention[:, 0, :, 0] += 0.5
        attention[:, 1] *= 2
        received = received_attention(attention, causal=True)
        harmonic = sum(1 / i for i in range(1, 65)) / 64
        assert received[0, 0, 0].item() == pytest.approx(0.5 + 0.5 * harmonic, rel=1e-5)
        assert sink_score(received, 0).tolist() == [0.5]
        ratio = times_uniform(received, causal=True)
        assert ratio[0, 0, 0].item() == pytest.approx(0.5 / harmonic + 0.5, rel=1e-5)
        torch.testing.assert_close(ratio[:, 1], torch.ones(1, 64))

    @CAUSAL
    @MASKS
    def test_a_uniform_map_has_no_sink_and_gives_each_key_its_even_share(self, causal, mask):
        visible = (mask[:, None, :, None] & mask[:, None, None, :]).float().expand(2, 3, 5, 5)
        visible = visible.tril() if causal else visible
        even = visible / visible.sum(-1, keepdim=True)
        ratio = times_uniform(received_attention(even, mask, causal), mask, causal)
        torch.testing.assert_close(ratio[~ratio.isnan()], torch.ones(3 * int(mask.sum())))
        assert sink_score(received_attention(torch.full((2, 3, 8, 8), 1 / 8)), 0).tolist() == [0, 0]

    def test_each_input_may_have_its_own_position(self):
        attention = torch.cat([planted_sink(1, 4, 6, 2, key=3), planted_sink(1, 4, 6, 1, key=5)])
        received = received_attention(attention)
        assert sink_score(received, torch.tensor([3, 5])).tolist() == [0.5, 0.25]
        assert sink_score(received, torch.tensor([5, 3])).tolist() == [0, 0]

    def test_epsilon_is_a_bound_to_exceed(self):
        received = torch.tensor([[[0.25, 0.75]]])
        assert sink_score(received, 0, epsilon=0.25).tolist() == [0]
        assert sink_score(received, 0, epsilon=0.24).tolist() == [1]

    def test_the_mean_over_inputs_and_layers_is_the_papers_score(self):
        layers = [random_attention(6, 4, 8, causal=True) for _ in range(3)]
        per_layer = []
        for attention in layers:
            mean = RunningMean(())
            for batch in attention.split(4):
                mean.update(sink_score(received_attention(batch, causal=True), 0))
            per_layer.append(mean.result())
        alpha = torch.stack([a[..., 0].mean(-1) for a in layers])  # every query sees the first key
        expected = (alpha > 0.3).double().mean()
        assert 0 < expected < 1
        torch.testing.assert_close(torch.stack(per_layer).mean(), expected)


class TestShareByKind:
    def test_planted_shares_are_recovered(self):
        attention = torch.tensor([0.5, 0.25, 0.125, 0.125]).expand(1, 2, 4, 4)
        share = share_by_kind(attention, torch.tensor([[2, 0, 0, 3]]), num_kinds=5)
        assert share.tolist() == [[[0.375, 0, 0.5, 0.125, 0]] * 2]

    @CAUSAL
    @MASKS
    def test_it_equals_a_literal_loop_and_sums_to_one(self, causal, mask):
        attention, kinds = random_attention(2, 3, 5, causal, mask), torch.randint(0, 4, (2, 5))
        share = share_by_kind(attention, kinds.masked_fill(~mask, 99), 4, mask)
        for b in range(2):
            for kind in range(4):
                keys = [k for k in range(5) if mask[b, k] and kinds[b, k] == kind]
                expected = attention[b][:, mask[b]][..., keys].sum(-1).mean(-1)
                torch.testing.assert_close(share[b, :, kind], expected)
        torch.testing.assert_close(share.sum(-1), torch.ones(2, 3))


class TestEntropy:
    @CAUSAL
    @MASKS
    def test_even_attention_has_the_entropy_of_its_keys(self, causal, mask):
        visible = (mask[:, None, :, None] & mask[:, None, None, :]).float().expand(2, 3, 5, 5)
        visible = visible.tril() if causal else visible
        entropy = attention_entropy(visible / visible.sum(-1, keepdim=True), mask)
        relative = entropy_over_uniform(entropy, mask, causal)
        for b in range(2):
            for rank, place in enumerate(mask[b].nonzero().flatten().tolist()):
                keys = rank + 1 if causal else int(mask[b].sum())
                assert entropy[b, 0, place].item() == pytest.approx(math.log(keys), abs=1e-6)
                value = relative[b, 0, place].item()
                assert math.isnan(value) if keys == 1 else value == pytest.approx(1)
        assert torch.equal(entropy.isnan(), ~mask[:, None].expand(2, 3, 5))

    def test_attention_to_one_key_has_none(self):
        assert attention_entropy(torch.eye(4).expand(1, 2, 4, 4)).abs().max() == 0

    def test_random_attention_against_scipy(self):
        from scipy.stats import entropy

        attention = random_attention(2, 2, 6)
        expected = torch.from_numpy(entropy(attention.numpy(), axis=-1))
        torch.testing.assert_close(attention_entropy(attention), expected)


def test_what_rounding_leaves_on_padding_is_dropped():
    attention = torch.full((1, 1, 3, 3), 0.5)
    attention[..., 2] = 1e-4
    real, _ = real_attention(attention, torch.tensor([[True, True, False]]))
    assert real[0, 0].tolist() == [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 0]]


def test_of_a_single_key_there_is_no_relative_entropy():
    relative = entropy_over_uniform(torch.full((1, 1, 2), 1e-7), causal=True)
    assert relative.isnan().tolist() == [[[True, False]]]


class TestHeadNorms:
    @MASKS
    def test_they_equal_a_literal_computation(self, mask):
        attention, values = random_attention(2, 3, 5, mask=mask), torch.randn(2, 3, 5, 7)
        norms = head_norms(attention, values.masked_fill(~mask[:, None, :, None], torch.nan), mask)
        for b, n in mask.nonzero().tolist():
            torch.testing.assert_close(norms.value[b, :, n], values[b, :, n].square().sum(-1).sqrt())
            places = mask[b].nonzero().flatten().tolist()
            output = sum(attention[b, :, n, k, None] * values[b, :, k] for k in places)
            torch.testing.assert_close(norms.output[b, :, n], output.square().sum(-1).sqrt())
        assert torch.equal(norms.value.isnan(), ~mask[:, None].expand(2, 3, 5))
        assert torch.equal(norms.output.isnan(), ~mask[:, None].expand(2, 3, 5))


class TestRunningMean:
    def test_it_equals_the_mean_of_all_and_survives_a_restart(self):
        values, counted = torch.randn(10, 3, 4), torch.rand(10, 3, 4) > 0.4
        mean = RunningMean((3, 4))
        mean.update(values[:6].masked_fill(~counted[:6], torch.nan), counted[:6])
        saved = mean.state_dict()
        mean.update(values[6:], counted[6:])
        resumed = RunningMean((3, 4))
        resumed.load_state_dict(saved)
        resumed.update(values[6:], counted[6:])
        expected = values.double().masked_fill(~counted, torch.nan).nanmean(0)
        torch.testing.assert_close(mean.result(), expected)
        assert torch.equal(resumed.result(), mean.result())
        assert torch.equal(saved["count"], counted[:6].sum(0))  # the saved state did not move on

    def test_what_was_never_counted_is_nan(self):
        mean = RunningMean((2,))
        assert mean.result().isnan().all()
        mean.update(torch.ones(3, 2), torch.tensor([True, False]))
        assert mean.result()[0] == 1
        assert mean.result()[1].isnan()

    def test_many_small_numbers_after_a_large_one_are_not_lost(self):
        mean = RunningMean(())
        mean.update(torch.tensor([2.0**25]))
        for _ in range(100):
            mean.update(torch.ones(1))
        assert mean.total == 2**25 + 100


class TestMeanLogits:
    def test_it_equals_the_mean_of_all_and_survives_a_restart(self):
        logits = torch.randn(9, 2, 16, 16)
        forbidden = torch.ones(16, 16).triu(1).bool()
        masked = logits.masked_fill(forbidden, -torch.inf)
        mean, resumed = MeanLogits(2, 16), MeanLogits(2, 16)
        mean.update(masked[:5])
        resumed.load_state_dict(mean.state_dict())
        for gathered in (mean, resumed):
            gathered.update(masked[5:])
            result = gathered.result()
            assert torch.equal(result.isnan(), forbidden.expand(2, 16, 16))
            torch.testing.assert_close(result[:, ~forbidden], logits.double().mean(0)[:, ~forbidden])

    @pytest.mark.parametrize("shape", [(1, 2, 15, 15), (1, 2, 17, 17), (1, 3, 16, 16), (2, 16, 16), (1, 2, 16, 15)])
    def test_other_lengths_are_refused(self, shape):
        with pytest.raises(ValueError, match=r"Expected logits \(B, 2, 16, 16\)"):
            MeanLogits(2, 16).update(torch.zeros(shape))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_a_finite_mask_is_refused(self, dtype):
        logits = torch.zeros(1, 1, 2, 2, dtype=dtype)
        logits[..., 0, 1] = torch.finfo(dtype).min
        with pytest.raises(ValueError, match="Expected -inf"):
            MeanLogits(1, 2).update(logits)

    @pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
    def test_what_is_no_number_is_refused(self, wrong):
        with pytest.raises(ValueError, match="finite values"):
            MeanLogits(1, 2).update(torch.full((1, 1, 2, 2), wrong))

    def test_a_state_of_another_length_is_refused(self):
        with pytest.raises(ValueError, match=r"shape \(1, 2, 2\), got \(1, 3, 3\)"):
            MeanLogits(1, 2).load_state_dict(MeanLogits(1, 3).state_dict())


class TestMistakes:
    def test_maps_that_are_none(self):
        for wrong in (torch.zeros(2, 3, 3), torch.zeros(1, 2, 3, 4)):
            with pytest.raises(ValueError, match=r"probabilities \(B, h, N, N\)"):
                real_attention(wrong)
        with pytest.raises(ValueError, match="at least one input"):
            real_attention(torch.zeros(0, 2, 3, 3))
        for value in (-0.5, 1.5, torch.nan):
            with pytest.raises(ValueError, match="probabilities from 0 to 1"):
                received_attention(torch.full((1, 1, 2, 2), value))

    def test_masks_that_are_none(self):
        attention = torch.full((2, 1, 3, 3), 1 / 3)
        for wrong in (torch.ones(2, 3), torch.ones(2, 4).bool(), torch.ones(3).bool()):
            with pytest.raises(ValueError, match=r"boolean token_mask \(2, 3\)"):
                attention_entropy(attention, wrong)
        with pytest.raises(ValueError, match="input of padding alone"):
            received_attention(attention, torch.tensor([[True, True, True], [False, False, False]]))

    def test_attention_to_padding_or_to_the_future(self):
        attention = torch.full((1, 1, 4, 4), 0.25)
        with pytest.raises(ValueError, match=r"attention to padding, got 0\.5"):
            received_attention(attention, torch.tensor([[True, True, False, False]]))
        with pytest.raises(ValueError, match=r"later tokens of a causal model, got 0\.75"):
            received_attention(attention, causal=True)

    def test_arguments_of_the_sink_score(self):
        received = torch.tensor([[[0.5, torch.nan]], [[0.5, 0.5]]])
        with pytest.raises(ValueError, match=r"received attention \(B, h, N\)"):
            sink_score(received[0], 0)
        for epsilon in (0, 1):
            with pytest.raises(ValueError, match="epsilon between 0 and 1"):
                sink_score(received, 0, epsilon)
        for key in (torch.tensor([0]), torch.tensor([[0, 0]]), torch.tensor([0.0, 0.0])):
            with pytest.raises(ValueError, match=r"integer position or \(2,\)"):
                sink_score(received, key)
        for key in (-1, 2, torch.tensor([0, 2])):
            with pytest.raises(ValueError, match="positions from 0 to 1"):
                sink_score(received, key)
        for key in (1, torch.tensor([1, 1])):
            with pytest.raises(ValueError, match="got padding"):
                sink_score(received, key)

    def test_shapes_of_the_other_functions(self):
        with pytest.raises(ValueError, match=r"received attention \(B, h, N\)"):
            times_uniform(torch.zeros(2, 3))
        with pytest.raises(ValueError, match=r"entropy \(B, h, N\)"):
            entropy_over_uniform(torch.zeros(2, 3))
        attention = torch.full((1, 2, 3, 3), 1 / 3)
        for kinds in (torch.zeros(1, 4).long(), torch.zeros(1, 3)):
            with pytest.raises(ValueError, match=r"integer kinds \(1, 3\)"):
                share_by_kind(attention, kinds, 2)
        for kind in (-1, 2):
            with pytest.raises(ValueError, match="kinds from 0 to 1"):
                share_by_kind(attention, torch.full((1, 3), kind), 2)
        for shape in ((1, 2, 4, 5), (1, 1, 3, 5), (1, 2, 3)):
            with pytest.raises(ValueError, match=r"Expected values \(1, 2, 3, 'd'\)"):
                head_norms(attention, torch.zeros(shape))

    def test_values_that_a_mean_does_not_take(self):
        for shape in ((2, 4), (3,), ()):
            with pytest.raises(ValueError, match=r"values \(B, \*\(3,\)\)"):
                RunningMean((3,)).update(torch.zeros(shape))
        with pytest.raises(ValueError, match="values"):
            RunningMean(()).update(torch.tensor(1.0))
        with pytest.raises(ValueError, match=r"saved mean of shape \(3,\), got \(2,\)"):
            RunningMean((3,)).load_state_dict(RunningMean((2,)).state_dict())
