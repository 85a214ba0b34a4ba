# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from vitreg_hf.training.mosaics import mosaics


class Plain:
    """Images of one grey level each, which is their class."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return torch.full((3, 4, 6), index, dtype=torch.uint8), int(index)


def stacked(images):
    return torch.stack(list(images)).float()


def test_every_pixel_has_the_class_of_its_quarter():
    pixels, labels = next(mosaics(Plain(8), stacked, 2, 2))
    assert pixels.shape == (2, 3, 8, 12)
    assert labels.shape == (2, 8, 12)
    assert torch.equal(pixels[:, 0].long(), labels)
    for row, column in ((0, 0), (0, 6), (4, 0), (4, 6)):
        assert len(labels[0, row : row + 4, column : column + 6].unique()) == 1
    assert sorted(labels[:, ::4, ::6].flatten().tolist()) == list(range(8))  # each image once


def test_images_come_again_only_when_all_were_drawn():
    batches = list(mosaics(Plain(6), stacked, 3, 2))
    assert [len(pixels) for pixels, _ in batches] == [2, 1]
    drawn = torch.cat([labels for _, labels in batches])[:, ::4, ::6].flatten().tolist()
    assert sorted(drawn) == [index for index in range(6) for _ in range(2)]


def test_the_draw_follows_from_the_seed():
    first, again, other = (next(mosaics(Plain(20), stacked, 2, 2, seed))[1] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="got 0, 2 and 2"):
        next(mosaics(Plain(0), stacked, 2, 2))
