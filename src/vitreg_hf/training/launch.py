# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Whether the processes of a launch train one model together.

Launched by torchrun on a machine without GPUs, every process believes that it is alone and trains a model of its own,
without a word; the checks here turn that into an error.
"""

import os

from accelerate import Accelerator, DistributedType

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def check_launch(accelerator: Accelerator) -> None:
    """Refuse a launch that the examples cannot train with.

    Raises:
        ValueError: if processes do not know of one another, or each would hold only a part of the model.
    """
    launched, together = int(os.environ.get("WORLD_SIZE", "1")), accelerator.num_processes
    if launched != together:
        raise ValueError(
            f"Expected {launched} processes that train one model (WORLD_SIZE={launched}), got {together}: each would "
            "train a model of its own. Without GPUs, set ACCELERATE_USE_CPU=1"
        )
    if accelerator.distributed_type in _SHARDED or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise ValueError("Expected whole models in every process (data parallel), got a launch that shards them")
