# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The stream of samples: every pass has every image, and batches follow from positions alone."""

import pytest

from vitreg_hf.training.sampling import BatchStream, SampleKey, SampleStream


def keys(stream: SampleStream, start: int, stop: int) -> list[SampleKey]:
    return [stream.key(position) for position in range(start, stop)]


def test_every_pass_has_every_image_in_an_order_of_its_own() -> None:
    stream = SampleStream(10, seed=3)
    orders = [[key.index for key in keys(stream, 10 * epoch, 10 * epoch + 10)] for epoch in range(4)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert [key.epoch for key in keys(stream, 0, 40)] == [epoch for epoch in range(4) for _ in range(10)]
    assert keys(SampleStream(10, seed=3), 25, 35) == keys(stream, 25, 35)  # nothing before it was asked for
    assert keys(SampleStream(10, seed=4), 0, 10) != keys(stream, 0, 10)


def test_copies_of_an_image_follow_one_another_and_a_pass_is_no_longer_for_them() -> None:
    stream = SampleStream(10, seed=0, repeats=3)
    found = keys(stream, 0, 10)
    assert [key.repeat for key in found] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert len({key.index for key in found}) == 4
    assert len({key.seed(0) for key in found}) == 10
    assert stream.key(10).epoch == 1


@pytest.mark.parametrize(("num_processes", "batch_size", "accumulated"), [(1, 12, 1), (2, 3, 2), (3, 4, 1), (4, 1, 3)])
def test_processes_and_accumulation_do_not_change_a_step(
    num_processes: int, batch_size: int, accumulated: int
) -> None:
    """Twelve samples a step, whoever has them, across the ends of passes of seven images."""
    stream, steps = SampleStream(7, seed=1), 5
    shares = [
        list(BatchStream(stream, batch_size, steps * accumulated, 5, process, num_processes))
        for process in range(num_processes)
    ]
    for step in range(steps):
        batches = range(step * accumulated, (step + 1) * accumulated)
        together = [key for batch in batches for share in shares for key in share[batch]]
        assert sorted(together) == sorted(keys(stream, 5 + 12 * step, 17 + 12 * step))
    assert all(len(batch) == batch_size for share in shares for batch in share)


def test_starting_at_a_position_is_skipping() -> None:
    stream = SampleStream(7, seed=1)
    whole = BatchStream(stream, 3, 10, 0, 1, 2)
    assert len(whole) == 10
    assert list(whole)[4:] == list(BatchStream(SampleStream(7, seed=1), 3, 6, 4 * 6, 1, 2))


def test_seeds_of_samples_differ_by_pass_copy_image_and_training() -> None:
    key = SampleKey(3, 2, 1)
    others = [SampleKey(4, 2, 1), SampleKey(3, 3, 1), SampleKey(3, 2, 0), SampleKey(2, 3, 1)]
    assert len({one.seed(0) for one in (key, *others)} | {key.seed(1)}) == 6
    assert key.seed(5) == SampleKey(3, 2, 1).seed(5)


@pytest.mark.parametrize(("num_images", "repeats"), [(0, 1), (5, 0)])
def test_nothing_to_draw_from_is_refused(num_images: int, repeats: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1 image and 1 copy of each, got {num_images} and {repeats}"):
        SampleStream(num_images, 0, repeats)
