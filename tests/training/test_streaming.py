# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Streams that continue exactly, in parts that share nothing."""

import pickle
import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import fsspec
import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader

from vitreg_hf.training.corrupt_images import SkipLimit
from vitreg_hf.training.shards import EncodedRow
from vitreg_hf.training.streaming import Decoder, Part, StreamedEvaluation, StreamedImages, shuffled

from .encoded import png

MORE_WORKERS_THAN_CORES = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


class Numbers:
    """Shards of numbered images, told apart by their first pixel; `known` says whether lengths are told."""

    def __init__(self, *sizes: int, known: bool = True, broken: tuple[int, ...] = ()) -> None:
        self.sizes, self.known, self.broken, self.rows_read = sizes, known, broken, 0

    @property
    def num_shards(self) -> int:
        return len(self.sizes)

    def count(self, shard: int) -> int | None:
        return self.sizes[shard] if self.known else None

    def read(self, shard: int, offset: int = 0, stride: int = 1) -> Iterator[EncodedRow]:
        for row in range(offset, self.sizes[shard], stride):
            number = sum(self.sizes[:shard]) + row
            self.rows_read += 1
            content = b"" if number in self.broken else png(PIL.Image.fromarray(np.full((4, 4, 3), number, np.uint8)))
            yield EncodedRow({"bytes": content, "path": None}, number % 10, f"shard {shard}: row {row}")


def noisy(image: torch.Tensor) -> torch.Tensor:
    """The image with random rows below its first, from all three generators."""
    noise = torch.rand(2) + random.random() + np.random.random()
    return torch.cat([image[0, 0, :1].float(), noise])


def collate(examples: list[Any]) -> dict[str, Any]:
    skipped = [name for example in examples for name in example.skipped]
    images = torch.stack([example.image for example in examples])
    return {"pixel_values": images, "labels": [example.label for example in examples], "skipped": skipped}


def stream(shards: Any, start: int = 0, batch_size: int = 3, **settings: Any) -> StreamedImages:
    return StreamedImages(shards, batch_size, noisy, collate, seed=5, start=start, **settings)


def batches(data: StreamedImages, number: int, workers: int = 0) -> list[dict[str, Any]]:
    return list(islice(iter(DataLoader(data, batch_size=None, num_workers=workers)), number))


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a["pixel_values"], b["pixel_values"]) and a["labels"] == b["labels"] for a, b in pairs)


@MORE_WORKERS_THAN_CORES
@pytest.mark.parametrize(("workers", "known"), [(0, True), (0, False), (2, False), (3, True)])
def test_a_stream_continues_bit_by_bit(workers: int, known: bool) -> None:
    """Four passes and more; stops inside passes, between them and at every worker's turn."""
    shards = Numbers(7, 5, 9, 6, known=known)
    whole = batches(stream(shards, buffer_size=4), 40, workers)
    for stop in (1, 9, 20) if workers else range(40):
        assert same(batches(stream(shards, stop, buffer_size=4), 40 - stop, workers), whole[stop:])


@pytest.mark.parametrize("known", [True, False])
def test_a_part_continues_at_any_of_its_rows(known: bool) -> None:
    for index, count, sizes in ((0, 1, (3, 8)), (1, 2, (5, 1, 4)), (3, 5, (6, 7))):
        part = Part(Numbers(*sizes, known=known), index, count, seed=1, buffer_size=3)
        whole = list(islice(part.samples(), 60))
        assert len({key for key, _ in whole}) == 60
        for position in range(50):
            assert list(islice(part.samples(position), 10)) == whole[position : position + 10]


def test_passes_of_known_length_are_not_read_again() -> None:
    shards, unknown = Numbers(10, 10), Numbers(10, 10, known=False)
    for source in (shards, unknown):
        next(Part(source, seed=0, buffer_size=2).samples(65))
    assert (shards.rows_read, unknown.rows_read) == (8, 68)  # 5 of the fourth pass, the sample, and the buffer


@pytest.mark.parametrize("sizes", [(9, 9, 9, 9, 9, 9, 9), (4, 11, 2), (20,), (1, 1, 0, 1, 5, 8, 3)])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_every_pass_has_every_image_once_over_all_parts(sizes: tuple[int, ...], count: int) -> None:
    parts = [Part(Numbers(*sizes), index, count, seed=2, buffer_size=5) for index in range(count)]
    for epoch in range(4):
        names = Counter(row.name for part in parts for row in part.rows(epoch))
        assert set(names.values()) == {1}
        assert len(names) == sum(sizes)
        assert [part.length(epoch) for part in parts] == [len(list(part.rows(epoch))) for part in parts]


def test_every_part_gets_to_see_every_image() -> None:
    for sizes in ((3, 2, 4, 3, 2), (7,), (4, 3)):
        parts = [Part(Numbers(*sizes), index, 3, seed=2, buffer_size=2) for index in range(3)]
        seen = [{row.name for epoch in range(40) for row in part.rows(epoch)} for part in parts]
        assert [len(one) for one in seen] == [sum(sizes)] * 3


def test_orders_differ_between_passes_seeds_and_parts() -> None:
    shards = Numbers(*(8,) * 6)
    orders = {
        tuple(row.name for row in Part(shards, index, 2, seed, 4).rows(epoch))
        for index in (0, 1)
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 8
    of_one_shard = {tuple(row.name for row in Part(Numbers(8), 0, 1, 0, 8).rows(epoch)) for epoch in range(5)}
    assert len(of_one_shard) == 5
    in_order = [row.name for row in Part(shards).rows(0)]
    assert in_order == [row.name for row in Part(shards).rows(1)] == sorted(in_order)


def test_a_shuffle_buffer_holds_as_many_rows_as_asked() -> None:
    for size in (0, 1):
        assert list(shuffled(iter(range(20)), size, np.random.default_rng(0))) == list(range(20))
    mixed = list(shuffled(iter(range(1000)), 100, np.random.default_rng(0)))
    assert sorted(mixed) == list(range(1000))
    assert all(number <= place + 100 for place, number in enumerate(mixed))
    first = [next(iter(shuffled(iter(range(8)), 8, np.random.default_rng(seed)))) for seed in range(800)]
    assert all(70 < times < 130 for times in Counter(first).values())


def test_augmentation_differs_between_passes_and_parts() -> None:
    noise = [
        tuple(row.tolist())
        for process in (0, 1)
        for batch in batches(stream(Numbers(4), process_index=process, num_processes=2), 8)
        for row in batch["pixel_values"][:, 1:]
    ]
    assert len(set(noise)) == len(noise) == 48


def test_loading_leaves_the_generators_as_they_are() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert len(list(islice(stream(Numbers(4)), 3))) == 3  # a loader draws a seed for its workers, a stream nothing
    assert torch.equal(torch.get_rng_state(), before)


@MORE_WORKERS_THAN_CORES
@pytest.mark.parametrize("workers", [0, 3])
def test_an_evaluation_has_every_image_once(workers: int) -> None:
    """Also where there are more processes and workers than images."""
    for sizes in ((4, 3, 6), (2,)):
        found: list[int] = []
        for process in (0, 1):
            data = StreamedEvaluation(Numbers(*sizes), 2, collate, process, 2)
            loader: Any = DataLoader(data, batch_size=None, num_workers=workers)
            found += [int(image[0, 0, 0]) for batch in loader for image in batch["pixel_values"]]
        assert sorted(found) == list(range(sum(sizes)))


def test_unreadable_images_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Expected a readable image, got shard 1: row 2"):
        batches(stream(Numbers(3, 4, broken=(5,))), 10)
    with pytest.raises(ValueError, match="Expected a readable image, got shard 1: row 2"):
        list(StreamedEvaluation(Numbers(3, 4, broken=(5,)), 2, collate))


def test_left_out_images_are_replaced_and_named_and_a_stream_continues_all_the_same() -> None:
    shards = Numbers(20, 10, broken=(4, 22))
    decoder = Decoder(skip_limit=SkipLimit())
    whole = batches(stream(shards, decoder=decoder, buffer_size=3), 30)
    assert all(len(batch["labels"]) == 3 for batch in whole)
    named = Counter(name for batch in whole for name in batch["skipped"])
    assert named == {"shard 0: row 4": 3, "shard 1: row 2": 3}  # in three passes
    values = torch.cat([batch["pixel_values"][:, 0] for batch in whole]).tolist()
    assert not {4, 22} & set(values)
    assert [value % 10 for value in values] == [label for batch in whole for label in batch["labels"]]
    for stop in (1, 2, 13):
        assert same(batches(stream(shards, stop, decoder=decoder, buffer_size=3), 30 - stop), whole[stop:])


@pytest.mark.parametrize("broken", [(0, 1, 3), (4, 5, 6), (6,), ()])
def test_evaluation_leaves_out_what_it_cannot_read_and_says_so(broken: tuple[int, ...]) -> None:
    data = StreamedEvaluation(Numbers(7, broken=broken), 2, collate, decoder=Decoder(skip_limit=SkipLimit()))
    for _ in range(2):
        found = list(data)
        assert [name for batch in found for name in batch["skipped"]] == [f"shard 0: row {row}" for row in broken]
        values = torch.cat([batch["pixel_values"][:, 0, 0, 0] for batch in found]).tolist()
        assert values == sorted(set(range(7)) - set(broken))
    with pytest.raises(ValueError, match="a readable image to evaluate on, got none: shard 0: row 0, shard 0: row 1"):
        list(StreamedEvaluation(Numbers(2, broken=(0, 1)), 2, collate, decoder=Decoder(skip_limit=SkipLimit())))


def test_too_many_unreadable_images_are_refused() -> None:
    every_fifth = Numbers(200, broken=tuple(range(0, 200, 5)))
    decoder = Decoder(skip_limit=SkipLimit(0.1))
    with pytest.raises(ValueError, match=r"at most 10.0% unreadable images, got 11 among the first 5\d, the last"):
        batches(stream(every_fifth, decoder=decoder, buffer_size=0), 60)
    decoder = Decoder(skip_limit=SkipLimit(0.3))
    assert len(batches(stream(every_fifth, decoder=decoder, buffer_size=0), 60)) == 60
    with pytest.raises(ValueError, match="a readable image in every batch, got one of 3 without"):
        batches(stream(Numbers(3, broken=(0, 1, 2)), decoder=decoder), 1)


def test_a_stream_without_images_ends_with_a_sentence() -> None:
    with pytest.raises(ValueError, match="images for each of 1 loading processes, got none for some"):
        batches(stream(Numbers(0, 0)), 1)
    one_image = stream(Numbers(1), process_index=3, num_processes=4)
    assert len(batches(one_image, 2)) == 2  # its turn comes


def test_sizes_out_of_range_are_refused() -> None:
    for wrong in ({"batch_size": 0}, {"start": -1}, {"buffer_size": -1}):
        with pytest.raises(ValueError, match="Expected batch_size of 1 or more, start and buffer_size of 0 or more"):
            stream(Numbers(3), **wrong)
    with pytest.raises(ValueError, match="Expected batch_size of 1 or more, got 0"):
        StreamedEvaluation(Numbers(3), 0, collate)


def test_a_stream_travels_to_a_process_that_is_started_anew() -> None:
    data = stream(Numbers(3, 4))
    assert same(batches(pickle.loads(pickle.dumps(data)), 5), batches(data, 5))


def test_images_that_lie_elsewhere_are_fetched() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/far/a.png", png(PIL.Image.new("RGB", (3, 2))))
    near, far = ({"bytes": None, "path": f"memory://far/{name}.png"} for name in ("a", "b"))
    image = Decoder().decode(EncodedRow(near, 0, "near"))
    assert image is not None
    assert image.shape == (3, 2, 3)
    with pytest.raises(ValueError, match="Expected a readable image, got far"):
        Decoder().decode(EncodedRow(far, 0, "far"))
