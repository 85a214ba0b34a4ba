# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What the optimizer decays, how fast each layer learns, how learning rates run, and the moving average of weights."""

from typing import Any

import torch
from accelerate import Accelerator
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vitreg_hf.model.modeling_vitreg import ViTRegPreTrainedModel
from vitreg_hf.training.schedules import warmup_cosine
from vitreg_hf.training.settings import TrainingSettings


def parameter_groups(model: ViTRegPreTrainedModel, settings: TrainingSettings) -> list[dict[str, Any]]:
    """Groups for an optimizer: those that decay and those that do not, of every learning rate, from the input up.

    How deep a parameter lies and what it is, the model says (`parameter_layers`, `no_weight_decay`,
    `token_parameters`). CLS, registers, positions and the projection of patches lie lowest. Biases, norms and
    LayerScale never decay; tokens and positions do with `decay_tokens`: in DINOv2 they do, in DeiT III and timm not.
    Frozen parameters are in no group. LoRA's matrices lie as deep as what they are added to.

    Args:
        model: not wrapped.
        settings: `learning_rate` of the layer next to the output, `layer_decay`, `weight_decay`, `decay_tokens`.
    """
    layers, exempt, tokens = model.parameter_layers(), model.no_weight_decay(), model.token_parameters()
    top = model.config.num_hidden_layers + 1
    groups: dict[tuple[int, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = settings.decay_tokens if name in tokens else name not in exempt
            groups.setdefault((layers[name], decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": settings.learning_rate * settings.layer_decay ** (top - layer),
            "weight_decay": settings.weight_decay if decays else 0.0,
        }
        for (layer, decays), parameters in _joined(groups, top, apart=settings.layer_decay != 1)
    ]


Groups = dict[tuple[int, bool], list[torch.nn.Parameter]]


def _joined(groups: Groups, top: int, apart: bool) -> list[tuple[tuple[int, bool], list[torch.nn.Parameter]]]:
    """Groups from the input up; if all layers have one learning rate, only those that decay and those that do not."""
    if apart:
        return sorted(groups.items(), key=lambda group: group[0])
    joined: Groups = {}
    for (_, decays), parameters in groups.items():
        joined.setdefault((top, decays), []).extend(parameters)
    return sorted(joined.items(), key=lambda group: not group[0][1])


def one_kernel(accelerator: Accelerator) -> bool | None:
    """Whether AdamW may update all parameters in one kernel (`fused`); None leaves the choice to PyTorch.

    With fp16 it may not: that kernel passes over steps whose gradients have overflowed by itself. Accelerate would see
    a step like any other, and schedule and averages would go on.
    """
    return None if accelerator.mixed_precision == "fp16" else True


def create_optimizer(model: ViTRegPreTrainedModel, settings: TrainingSettings, fused: bool | None = True) -> Optimizer:
    """AdamW, or LAMB (You et al., arXiv 1904.00962).

    Args:
        model: not wrapped.
        settings: learning rate, decay, moments.
        fused: of AdamW, as `one_kernel` says.

    Raises:
        ValueError: for LAMB without timm, whose implementation it is.
    """
    groups, betas = parameter_groups(model, settings), (settings.adam_beta1, settings.adam_beta2)
    if settings.optimizer == "adamw":
        return AdamW(groups, lr=settings.learning_rate, betas=betas, fused=fused)
    try:
        from timm.optim import Lamb
    except ImportError as error:
        raise ValueError(
            'Expected timm for the optimizer lamb, got no such package: pip install "vitreg_hf[convert]"'
        ) from error
    return Lamb(groups, lr=settings.learning_rate, betas=betas, max_grad_norm=None)  # the loop clips


def create_schedule(optimizer: Optimizer, num_steps: int, settings: TrainingSettings) -> LambdaLR:
    """Linear warm-up over some of the steps, then half a cosine down, in every group as shares of its learning rate.

    Args:
        optimizer: gives the highest learning rate of every group.
        num_steps: of the training.
        settings: `warmup_steps`, or `warmup_ratio` of all steps; `warmup_learning_rate`, `min_learning_rate`.

    Raises:
        ValueError: if the warm-up is longer than the training.
    """
    given = settings.warmup_steps
    warmup = round(settings.warmup_ratio * num_steps) if given is None else given
    if warmup > num_steps:
        raise ValueError(f"Expected warmup_steps of at most the {num_steps} steps of the training, got {warmup}")
    first, last = (
        rate / settings.learning_rate for rate in (settings.warmup_learning_rate, settings.min_learning_rate)
    )
    return LambdaLR(optimizer, lambda step: warmup_cosine(1.0, last, step, warmup, num_steps, first))


def create_ema(model: torch.nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of the weights: `average = decay * average + (1 - decay) * weights` per update.

    The first update copies the weights. Choose `1 / (1 - decay)` well below the number of steps.

    Raises:
        ValueError: if the decay is not in (0, 1).
    """
    if not 0 < decay < 1:
        raise ValueError(f"Expected ema_decay in (0, 1), got {decay}")
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
