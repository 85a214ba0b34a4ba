# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Steps and epochs: an epoch ends with the step that takes the last image of a pass."""

import pytest

from vitreg_hf.training.timetable import Timetable


def ends(timetable: Timetable) -> list[int]:
    return [timetable.end_of(epoch) for epoch in range(1, timetable.total_epochs + 1)]


def test_passes_that_steps_divide() -> None:
    timetable = Timetable(images_per_step=24, num_images=96, num_epochs=3)
    assert (timetable.total_steps, ends(timetable)) == (12, [4, 8, 12])


def test_a_step_may_take_some_of_the_next_pass() -> None:
    timetable = Timetable(images_per_step=10, num_images=25, num_epochs=4)
    assert (timetable.total_steps, ends(timetable)) == (10, [3, 5, 8, 10])


def test_fewer_images_than_a_step_takes() -> None:
    timetable = Timetable(images_per_step=100, num_images=30, num_epochs=7)
    assert timetable.total_steps == 7  # an epoch has one step at least
    assert ends(timetable) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("options", "steps", "expected"),
    [
        ({"max_steps": 5}, 5, [3, 5]),
        ({"steps_per_epoch": 4}, 8, [4, 8]),
        ({"steps_per_epoch": 4, "max_steps": 6}, 6, [4, 6]),
        ({"max_steps": 30}, 30, [3, 5, 8, 10, 13, 15, 18, 20, 23, 25, 28, 30]),
    ],
)
def test_steps_may_be_given(options: dict[str, int], steps: int, expected: list[int]) -> None:
    timetable = Timetable(images_per_step=10, num_images=25, num_epochs=2, **options)
    assert (timetable.total_steps, ends(timetable)) == (steps, expected)


def test_images_of_unknown_number_need_a_length() -> None:
    with pytest.raises(ValueError, match="Expected max_steps or steps_per_epoch"):
        Timetable(10, None, 3)
    assert ends(Timetable(10, None, 3, steps_per_epoch=5)) == [5, 10, 15]
    assert ends(Timetable(10, None, 3, max_steps=7)) == [7]
