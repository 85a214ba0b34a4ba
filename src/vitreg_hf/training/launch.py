# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Whether a launch does what it was asked to do, and the accelerator of one that does.

Several launches do something else without a word: started by torchrun on a machine without GPUs, every process
believes that it is alone and trains a model of its own; `accelerate launch --cpu --num_processes 2` starts one;
FSDP asked for without GPUs becomes data parallel training. The checks here turn that into errors.
"""

import os
import sys
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator, DistributedType
from accelerate.commands.config.config_args import default_config_file
from accelerate.utils import GradientAccumulationPlugin, str_to_bool


def create_accelerator(
    mixed_precision: str | None,
    gradient_accumulation_steps: int,
    per_device_train_batch_size: int,
    log_with: list[str] | None = None,
    project_dir: Path | None = None,
    max_grad_norm: float = 1.0,
) -> Accelerator:
    """The accelerator of this launch, whose processes train one model.

    Args:
        mixed_precision: `no`, `fp16`, `bf16`, or None for what Accelerate is set up for.
        gradient_accumulation_steps: batches per update of the weights.
        per_device_train_batch_size: images per batch and process, which DeepSpeed wants to be told.
        log_with: trackers by Accelerate's names.
        project_dir: where they write.
        max_grad_norm: norm that gradients are clipped to (0: not), which DeepSpeed does by itself.

    Raises:
        ValueError: as `check_launch`.
    """
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        # Loaders are not prepared, so the end of one must not end a window of accumulation.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with=log_with or None,  # warns of an empty list
        project_dir=project_dir,
    )
    check_launch(accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": per_device_train_batch_size,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "gradient_clipping": max_grad_norm,
        }
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        # Accelerate shards input embeddings by themselves and then fails on the module around them, which the model
        # names too, as a whole that must not be split over devices.
        plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or ["ViTRegLayer"]
    return accelerator


def describe_launch(accelerator: Accelerator) -> dict[str, Any]:
    """What a training that continues another one exactly has in common with it of the launch."""
    return {
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "sharded": accelerator.distributed_type == DistributedType.FSDP,
    }


def check_launch(accelerator: Accelerator) -> None:
    """Refuse a launch that would silently do something else than it was asked to.

    Raises:
        ValueError: if processes do not know of one another, fewer were started than asked for, or a model that was to
            be sharded would not be, or would be by the first FSDP.
    """
    launched, together = int(os.environ.get("WORLD_SIZE", "1")), accelerator.num_processes
    if launched != together:
        raise ValueError(
            f"Expected {launched} processes that train one model (WORLD_SIZE={launched}), got {together}: each would "
            "train a model of its own. Without GPUs, set ACCELERATE_USE_CPU=1"
        )
    asked = _processes_asked_for()
    if together == 1 and asked > 1:
        raise ValueError(
            f"Expected {asked} processes, as accelerate launch was asked for, got 1: it starts several processes on "
            "CPUs only with ACCELERATE_USE_CPU=1 and --multi_gpu in place of --cpu (docs/distributed.md)"
        )
    sharded = str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false"))
    if sharded and accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError(
            f"Expected a model sharded by FSDP, got {accelerator.distributed_type.value}: Accelerate shards on GPUs "
            "alone, and trains whole models elsewhere"
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("Expected fsdp_version 2, got 1 (examples/accelerate_configs/fsdp2.yaml)")


def _processes_asked_for() -> int:
    """What the `accelerate launch` that started this process was told, on Linux; 1 if that cannot be known."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().split("\0")
    except (OSError, UnicodeDecodeError):
        return 1
    return _processes_in(words[: words.index(sys.argv[0])] if sys.argv[0] in words else words)


def _processes_in(words: list[str]) -> int:
    """Number of processes in the command line of a launcher without the script: its option or its file says it."""
    names = {Path(word).name for word in words}
    by_subcommand = "launch" in names and {"accelerate", "accelerate.commands.accelerate_cli"} & names
    if not by_subcommand and not {"accelerate-launch", "accelerate.commands.launch"} & names:
        return 1
    given = _value_of(words, "--num_processes")
    if given is not None:
        return int(given) if given.isdecimal() else 1
    file = Path(_value_of(words, "--config_file") or default_config_file)
    try:
        return int((yaml.safe_load(file.read_text()) or {}).get("num_processes", 1))
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
        return 1


def _value_of(words: list[str], option: str) -> str | None:
    """What follows an option that Accelerate knows with underscores and with hyphens."""
    for word, following in zip(words, [*words[1:], None], strict=True):
        name, equals, value = word.partition("=")
        if name.replace("-", "_") == option.replace("-", "_"):
            return value if equals else following
    return None
