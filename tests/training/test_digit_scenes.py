# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Scenes of digits."""

import numpy as np
import pytest
import torch

from vitreg_hf.training.data import load_digits
from vitreg_hf.training.digit_scenes import SCENE_CLASSES, digit_scenes
from vitreg_hf.training.segmentation_data import LabelledScenes


def scenes(count: int = 12, **settings: int) -> LabelledScenes:
    return LabelledScenes(digit_scenes(load_digits().evaluation, count, **settings), SCENE_CLASSES)


def test_scenes_are_the_same_in_every_run_and_others_with_another_seed() -> None:
    first, again, other = scenes(), scenes(), scenes(seed=1)
    for index in range(12):
        assert torch.equal(first[index][0], again[index][0])
        assert torch.equal(first[index][1], again[index][1])
        assert not torch.equal(first[index][0], other[index][0])
    more = scenes(13)
    assert torch.equal(first[11][0], more[11][0])


def test_a_scene_has_two_to_four_digits_on_a_background_that_is_not_flat() -> None:
    seen = set()
    found = scenes(40, size=80)
    for index in range(40):
        image, mask = found[index]
        assert image.shape == (3, 80, 80)
        assert mask.shape == (80, 80)
        labels = set(mask.unique().tolist()) - {0}
        assert 1 <= len(labels) <= 4  # two of one class at times
        seen |= labels
        assert image[:, mask == 0].float().std(dim=1).min() > 6
    assert seen == set(range(1, 11))


def test_pixels_of_a_digit_stand_out_brighter_or_darker() -> None:
    found, signs = scenes(40), []
    for index in range(40):
        image, mask = found[index]
        for label in set(mask.unique().tolist()) - {0}:
            difference = image[:, mask == label].float().mean() - image[:, mask == 0].float().mean()
            signs.append(float(torch.sign(difference)))
    assert 0.2 < np.mean(np.array(signs) > 0) < 0.8


def test_a_scene_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected scenes of 32 pixels or more, got 31"):
        scenes(size=31)
