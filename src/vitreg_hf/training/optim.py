# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What the optimizer decays, how the learning rate runs, and the moving average of weights."""

import math

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import get_cosine_schedule_with_warmup

from vitreg_hf.model.modeling_vitreg import ViTRegPreTrainedModel


def parameter_groups(model: ViTRegPreTrainedModel, weight_decay: float) -> list[dict[str, object]]:
    """Two groups for an optimizer: weights that decay, and tokens, positions, biases and norms that do not.

    Which is which, the model says (`no_weight_decay`). Frozen parameters are in neither group.
    """
    exempt = model.no_weight_decay()
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [p for name, p in trained if name not in exempt], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name in exempt], "weight_decay": 0.0},
    ]


def create_optimizer(model: ViTRegPreTrainedModel, learning_rate: float, weight_decay: float) -> AdamW:
    """AdamW over `parameter_groups`, all of them updated in one kernel."""
    return AdamW(parameter_groups(model, weight_decay), lr=learning_rate, fused=True)


def optimizer_steps(num_batches: int, accumulation: int, num_epochs: int) -> int:
    """Updates of the weights in a training: a window of accumulation ends with its epoch at the latest."""
    return math.ceil(num_batches / accumulation) * num_epochs


def create_schedule(optimizer: torch.optim.Optimizer, num_steps: int, warmup_ratio: float) -> LambdaLR:
    """Linear warm-up from 0 over a share of the steps, then half a cosine down to 0.

    Raises:
        ValueError: if the share is not in [0, 1).
    """
    if not 0 <= warmup_ratio < 1:
        raise ValueError(f"Expected warmup_ratio in [0, 1), got {warmup_ratio}")
    return get_cosine_schedule_with_warmup(optimizer, round(warmup_ratio * num_steps), num_steps)


def create_ema(model: torch.nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of the weights: `average = decay * average + (1 - decay) * weights` per update.

    The first update copies the weights. Choose `1 / (1 - decay)` well below the number of steps.

    Raises:
        ValueError: if the decay is not in (0, 1).
    """
    if not 0 < decay < 1:
        raise ValueError(f"Expected ema_decay in (0, 1), got {decay}")
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
