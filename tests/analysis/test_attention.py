"""What maps of attention say, on maps whose answer is known."""

import math

import pytest
import torch

from vitreg_hf.analysis.attention import area, centre, entropy, mass_by_kind, on_patches_only, overlap, rollout_step
from vitreg_hf.model.token_layout import TokenLayout

LAYOUT = TokenLayout(1, 2, 1, (8, 8))  # CLS, 2 registers, 1 test-time register
TOKENS = 4 + 6


def one_patch(row, column, height=0.3):
    planted = torch.zeros(4, 6)
    planted[row, column] = height
    return planted


def left_half(height=0.01):
    planted = torch.zeros(4, 6)
    planted[:, :3] = height
    return planted


EVEN = torch.full((4, 6), 0.02)


@pytest.mark.parametrize(
    ("planted", "covered"), [(one_patch(1, 2), 1 / 24), (EVEN, 1.0), (left_half(), 0.5)], ids=["one", "even", "half"]
)
def test_entropy_and_area_of_planted_maps(planted, covered):
    torch.testing.assert_close(entropy(planted), torch.tensor(math.log(24 * covered)), atol=1e-6, rtol=0)
    torch.testing.assert_close(area(planted), torch.tensor(covered))


@pytest.mark.parametrize(
    ("planted", "where"),
    [
        (one_patch(0, 0), (0.125, 1 / 12)),
        (one_patch(3, 5), (0.875, 11 / 12)),
        (EVEN, (0.5, 0.5)),
        (left_half(), (0.5, 0.25)),
    ],
    ids=["corner", "other corner", "even", "half"],
)
def test_centre_of_planted_maps(planted, where):
    torch.testing.assert_close(centre(planted), torch.tensor(where))


def test_overlap_of_planted_maps():
    maps = torch.stack([left_half(), EVEN, left_half(0.9).flip(-1), one_patch(0, 0)])
    expected = torch.tensor(
        [[1, 0.5, 0, 1 / 12], [0.5, 1, 0.5, 1 / 24], [0, 0.5, 1, 0], [1 / 12, 1 / 24, 0, 1]]
    )  # however much of a token's attention is on patches at all
    torch.testing.assert_close(overlap(maps), expected)
    torch.testing.assert_close(overlap(maps.expand(2, 3, 4, 4, 6)), expected.expand(2, 3, 4, 4))


def test_maps_scaled_to_patches_sum_to_one_and_keep_their_form():
    maps = torch.rand(2, 3, 4, 6)
    shares = on_patches_only(maps)
    torch.testing.assert_close(shares.sum((-2, -1)), torch.ones(2, 3))
    torch.testing.assert_close(shares[0, 1] * maps[0, 1].sum(), maps[0, 1])


def test_maps_without_attention_count_as_even():
    nothing = torch.zeros(2, 4, 6)
    torch.testing.assert_close(entropy(nothing), torch.full((2,), math.log(24)))
    torch.testing.assert_close(centre(nothing), torch.full((2, 2), 0.5))
    torch.testing.assert_close(overlap(nothing), torch.ones(2, 2))
    torch.testing.assert_close(on_patches_only(torch.full((4, 6), 1e-30)), torch.full((4, 6), 1 / 24))


def test_mass_by_kind():
    attention = torch.tensor([0.1, 0.2, 0.05, 0.05, *[0.1] * 6])
    torch.testing.assert_close(mass_by_kind(attention, LAYOUT), torch.tensor([0.1, 0.3, 0.6]))
    random = torch.rand(2, 3, TOKENS).softmax(-1)
    torch.testing.assert_close(mass_by_kind(random, LAYOUT).sum(-1), torch.ones(2, 3))
    bare = mass_by_kind(random, TokenLayout(0, 0, 0, (8, 8)))
    torch.testing.assert_close(bare, torch.tensor([0.0, 0.0, 1.0]).expand(2, 3, 3))


# Rollout


def rolled_over(layers, registers):
    rolled = None
    for attention in layers:
        rolled = rollout_step(rolled, attention, LAYOUT, registers)
    return rolled


def literal_product(layers):
    """Element by element: later layers from the left."""
    product = torch.eye(TOKENS).expand(2, TOKENS, TOKENS)
    for attention in layers:
        mixed, result = 0.5 * attention + 0.5 * torch.eye(TOKENS), torch.zeros(2, TOKENS, TOKENS)
        for i in range(TOKENS):
            for j in range(TOKENS):
                result[:, i, j] = sum(mixed[:, i, k] * product[:, k, j] for k in range(TOKENS))
        product = result
    return product


def test_rollout_is_the_product_of_all_layers():
    layers = torch.randn(3, 2, TOKENS, TOKENS).softmax(-1)
    torch.testing.assert_close(rolled_over(layers, "follow"), literal_product(layers))


def test_rollout_without_registers_is_the_product_without_attention_to_them():
    layers = torch.randn(3, 2, TOKENS, TOKENS).softmax(-1)
    without = layers.clone()
    without[..., 1:4] = 0
    without = without / without.sum(-1, keepdim=True)
    rolled = rolled_over(layers, "cut")
    torch.testing.assert_close(rolled, literal_product(without))
    others = torch.tensor([0, *range(4, TOKENS)])
    assert rolled[:, others][:, :, 1:4].max() == 0


@pytest.mark.parametrize("registers", ["follow", "cut"])
def test_rows_of_rollout_sum_to_one(registers):
    rolled = rolled_over(torch.randn(4, 2, TOKENS, TOKENS).softmax(-1), registers)
    torch.testing.assert_close(rolled.sum(-1), torch.ones(2, TOKENS))


def test_registers_carry_what_they_gathered():
    """Registers read patch 0 in layer 1, CLS reads registers in layer 2: only `follow` shows patch 0 in CLS."""
    first, second = torch.eye(TOKENS)[None], torch.eye(TOKENS)[None]
    first[:, 1], second[:, 0] = 0, 0
    first[:, 1, 4], second[:, 0, 1] = 1, 1
    assert rolled_over([first, second], "follow")[0, 0, 4] == 0.25
    assert rolled_over([first, second], "cut")[0, 0, 4] == 0


def test_a_token_that_reads_only_registers_gives_no_nan_when_they_are_cut():
    attention = torch.zeros(1, TOKENS, TOKENS)
    attention[:, :, 1] = 1
    assert torch.isfinite(rollout_step(None, attention, LAYOUT, "cut")).all()


def test_another_word_for_registers_is_refused():
    with pytest.raises(ValueError, match="'follow' or 'cut', got 'keep'"):
        rollout_step(None, torch.eye(TOKENS)[None], LAYOUT, "keep")
