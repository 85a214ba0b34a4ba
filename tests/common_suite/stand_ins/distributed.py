"""Stands in for `tests/distributed_testing_utils.py`: ranks as processes on the CPU, talking over gloo."""

import functools
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    torch.set_num_threads(1)


def _start_rank_processes(function: Callable[..., None], args: tuple[Any, ...], nprocs: int) -> None:
    """Run `function(rank, *args)` in `nprocs` new processes and wait; an error in one of them is raised here."""
    multiprocessing.spawn(_rank, args=(function, args), nprocs=nprocs, join=True)


def _rank(rank: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    import tests.parallel  # noqa: F401 - aims the FSDP mixin at images in this process too

    torch.set_num_threads(1)
    function(rank, *args)


def run_distributed(world_size: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: call `function(rank, *args)` on every rank of a process group."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any) -> None:
            arguments = (world_size, _free_port(), function, args)
            _start_rank_processes(_in_process_group, arguments, nprocs=world_size)

        return run

    return decorate


def _in_process_group(rank: int, world_size: int, port: int, function: Callable[..., None], args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        function(rank, *args)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
