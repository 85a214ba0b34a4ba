# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Processes with different numbers of batches; threads stand for them."""

import threading
from typing import Any

import torch

from vitreg_hf.training.labelled_images import Collate
from vitreg_hf.training.lockstep import NOT_COUNTED, in_step

COLLATE = Collate(lambda images: torch.stack([image.float() for image in images]))


def batches(*sizes: int) -> list[dict[str, Any]]:
    return [
        {"pixel_values": torch.rand(size, 3, 32, 32), "labels": torch.arange(size), "skipped": ["a"]} for size in sizes
    ]


def run(*sizes: tuple[int, ...]) -> list[list[dict[str, Any]]]:
    barrier, flags = threading.Barrier(len(sizes), timeout=30), [False] * len(sizes)
    found: list[list[dict[str, Any]]] = [[] for _ in sizes]

    def process(index: int) -> None:
        def any_left(mine: bool) -> bool:
            flags[index] = mine
            barrier.wait()
            answer = any(flags)
            barrier.wait()
            return answer

        found[index] = list(in_step(batches(*sizes[index]), COLLATE, 4, any_left))

    threads = [threading.Thread(target=process, args=(index,)) for index in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_all_processes_have_as_many_batches_of_one_size() -> None:
    found = run((4, 4, 2), (1,), ())
    assert [len(one) for one in found] == [3, 3, 3]
    assert {batch["pixel_values"].shape for one in found for batch in one} == {(4, 3, 32, 32)}
    counted = [sum(int((batch["labels"] != NOT_COUNTED).sum()) for batch in one) for one in found]
    assert counted == [10, 1, 0]


def test_one_process_keeps_what_it_has() -> None:
    given = batches(4, 3)
    first, last = in_step(given, COLLATE, 4)
    assert torch.equal(first["pixel_values"], given[0]["pixel_values"])
    assert last["labels"].tolist() == [0, 1, 2, NOT_COUNTED]
    assert torch.equal(last["pixel_values"][:3], given[1]["pixel_values"])
    assert last["skipped"] == ["a"]
    assert list(in_step([], COLLATE, 4)) == []
