# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Masks of patches: exact numbers, blocks, and nothing that is not drawn from torch's generator."""

import pytest
import torch

from vitreg_hf.training.self_supervision.patch_masks import PatchMasks, draw_blocks, draw_masks

GRIDS = [(16, 16), (4, 4), (3, 7), (1, 5)]


@pytest.mark.parametrize("grid", GRIDS)
def test_blocks_have_exactly_as_many_patches_as_asked_for(grid):
    torch.manual_seed(0)
    patches = grid[0] * grid[1]
    for count in range(patches + 1):
        masked = draw_blocks(grid, count)
        assert masked.shape == (patches,)
        assert masked.sum() == count


def test_blocks_are_blocks():
    """Of neighbouring patches many more are masked together than of patches masked one by one."""
    torch.manual_seed(0)

    def together(masked):
        on_grid = masked.view(16, 16)
        return (on_grid[:, 1:] & on_grid[:, :-1]).sum().item()

    blocks = sum(together(draw_blocks((16, 16), 64)) for _ in range(50))
    singles = sum(together(torch.randperm(256) < 64) for _ in range(50))
    assert blocks > 2 * singles


def test_half_of_the_crops_are_masked_and_parts_spread_over_the_range():
    torch.manual_seed(0)
    masks = draw_masks(20, (16, 16), share=0.5, ratio=(0.1, 0.5))
    counts = sorted(count for count in masks.masked.sum(dim=1).tolist() if count)
    assert len(counts) == 10
    for step, count in enumerate(counts):  # one crop in each tenth of the range
        low, high = 256 * (0.1 + 0.04 * step), 256 * (0.1 + 0.04 * (step + 1))
        assert int(low) <= count <= high


def test_which_crops_are_masked_is_drawn():
    torch.manual_seed(0)
    chosen = torch.stack([draw_masks(6, (4, 4)).masked.any(dim=1) for _ in range(40)])
    assert chosen.sum(dim=1).eq(3).all()
    assert chosen.any(dim=0).all()
    assert not chosen.all(dim=0).any()


def test_every_batch_has_a_masked_patch():
    torch.manual_seed(0)
    assert len(draw_masks(1, (2, 2), share=0.5, ratio=(0.1, 0.2)).indices) == 1


def test_one_seed_gives_one_set_of_masks():
    torch.manual_seed(3)
    first = draw_masks(8, (8, 8)).masked
    second = draw_masks(8, (8, 8)).masked
    torch.manual_seed(3)
    assert torch.equal(draw_masks(8, (8, 8)).masked, first)
    assert not torch.equal(first, second)


def test_masked_patches_are_listed_with_the_weight_of_their_crop():
    masked = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    masks = PatchMasks.of(masked)
    assert masks.indices.tolist() == [1, 2, 8]
    assert masks.weights.tolist() == [0.5, 0.5, 1.0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((0, (4, 4)), "Expected at least 1 crop"),
        ((4, (4, 4), 0.0), r"share in \(0, 1\], got 4 and 0.0"),
        ((4, (4, 4), 0.5, (0.5, 0.1)), r"Expected a ratio with 0 < low <= high < 1, got \(0.5, 0.1\)"),
    ],
)
def test_masks_without_sense_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        draw_masks(*arguments)


def test_more_patches_than_there_are_cannot_be_masked():
    with pytest.raises(ValueError, match="Expected 0 to 16 patches to mask, got 17"):
        draw_blocks((4, 4), 17)
