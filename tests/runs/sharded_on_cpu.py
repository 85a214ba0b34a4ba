# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The classification example with a model that FSDP2 shards on the CPU, which Accelerate does on GPUs alone.

Run by the warm trainer like an example, in processes that know of one another. For tests only: the state of Accelerate
is told that it shards.
"""

from typing import Any

from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin

import train_image_classification as example
from vitreg_hf.training import launch


class ShardingAccelerator(Accelerator):
    """Shards whatever it prepares."""

    def __init__(self, **options: Any) -> None:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            state_dict_type="SHARDED_STATE_DICT",
            cpu_ram_efficient_loading=False,
        )
        super().__init__(fsdp_plugin=plugin, **options)
        for state in (AcceleratorState._shared_state, PartialState._shared_state):
            state["distributed_type"] = DistributedType.FSDP
        self.state.fsdp_plugin = plugin


def main(argv: list[str]) -> None:
    """As the example's, with a sharded model."""
    launch.Accelerator = ShardingAccelerator
    example.main(argv)
