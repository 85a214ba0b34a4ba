# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Numbers that tell how a step went: gradients, registers and other tokens, memory.

They are computed from what a step has at hand, without another pass, and stay tensors without dimensions on the device
until a log reads them: reading a number off a GPU makes it wait. Of sharded parameters every process must ask.

Shapes: B images, R registers, P patches, N tokens, D channels.
"""

from collections.abc import Iterable
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from vitreg_hf.model.modeling_vitreg import ViTRegPreTrainedModel
from vitreg_hf.model.token_layout import TokenLayout


def gradient_norms(model: ViTRegPreTrainedModel) -> dict[str, Tensor]:
    """L2 norms of the gradients of tokens and positions, other embeddings, each block, and what comes after.

    To be called between the backward pass and the update. After clipping, they are the norms of what was clipped.

    Args:
        model: not wrapped for several processes; may be sharded.

    Returns:
        `gradient_norm_tokens`, `gradient_norm_embeddings`, `gradient_norm_block_1`, ..., `gradient_norm_head`; those
        without a gradient are missing.
    """
    layers, tokens = model.parameter_layers(), model.token_parameters()
    last = model.config.num_hidden_layers + 1
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            layer = layers[name]
            kind = "embeddings" if layer == 0 else "head" if layer == last else f"block_{layer}"
            groups.setdefault("tokens" if name in tokens else kind, []).append(parameter.grad)
    return {f"gradient_norm_{kind}": norm_of(gradients) for kind, gradients in sorted(groups.items(), key=_by_kind)}


def _by_kind(group: tuple[str, Any]) -> tuple[int, int]:
    kind, _, number = group[0].partition("_")
    return ["tokens", "embeddings", "block", "head"].index(kind), int(number or 0)


def norm_of(tensors: Iterable[Tensor]) -> Tensor:
    """L2 norm of all numbers in tensors, whole or sharded; no tensor has norm 0."""
    return whole(get_total_norm(list(tensors)))


def whole(value: Tensor) -> Tensor:
    """A tensor that may be sharded, with all that other processes have of it; to be called by all of them."""
    return value.full_tensor() if isinstance(value, DTensor) else value


# Registers and other tokens


@torch.no_grad()
def register_statistics(model: ViTRegPreTrainedModel) -> dict[str, Tensor]:
    """Norms of the learned registers, and how much they resemble one another.

    Returns:
        `register_norm`, mean over registers, and with two or more of them `register_cosine`, mean over pairs: 1 where
        all have become one. Nothing of a model without registers.
    """
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] == "register_tokens":
            registers = whole(parameter).float()[0]
            found = {"register_norm": registers.norm(dim=-1).mean()}
            return found | _cosine("register_cosine", registers[None])
    return {}


@torch.no_grad()
def token_statistics(outputs: Any, layout: TokenLayout | None = None) -> dict[str, Tensor]:
    """Norms of the tokens of a batch by kind, and how much registers of an image resemble one another.

    Args:
        outputs: of a ViTReg with its named tokens, which are those after the final norm.
        layout: with it, tokens are taken from the last of `outputs.hidden_states`, before the final norm: the place
            where artifacts have large norms, which the norm then hides. The forward pass must have been asked for
            hidden states.

    Returns:
        `output_norm_cls`, `output_norm_registers`, `output_norm_patches` (means over tokens),
        `output_norm_patches_highest` (the highest of each image, mean over images) and `output_cosine_registers`; of
        hidden states the same with `residual` in place of `output`. What a model does not have is missing.
    """
    if layout is None:
        place, cls, registers, patches = "output", outputs.cls_token, outputs.register_tokens, outputs.patch_tokens
    else:
        tokens = outputs.hidden_states[-1]
        place, cls, registers = "residual", layout.cls_token(tokens), layout.register_tokens(tokens)
        patches = layout.patch_tokens(tokens)
    norms = patches.float().norm(dim=-1)
    found = {} if cls is None else {f"{place}_norm_cls": cls.float().norm(dim=-1).mean()}
    if registers is not None:
        found[f"{place}_norm_registers"] = registers.float().norm(dim=-1).mean()
        found |= _cosine(f"{place}_cosine_registers", registers.float())
    return found | {
        f"{place}_norm_patches": norms.mean(),
        f"{place}_norm_patches_highest": norms.max(dim=-1).values.mean(),
    }


def _cosine(name: str, tokens: Tensor) -> dict[str, Tensor]:
    """Mean cosine of all pairs of `(B, R, D)` within an image, under a name; nothing for a single register."""
    count = tokens.shape[1]
    if count < 2:
        return {}
    unit = F.normalize(tokens, dim=-1)
    together = unit.sum(dim=1).square().sum(dim=-1)  # all pairs of R unit vectors, each with itself too
    return {name: ((together - unit.square().sum(dim=(1, 2))) / (count * (count - 1))).mean()}


# Memory


def memory_megabytes(device: torch.device) -> float:
    """Most memory that tensors of this process have had on a GPU, or what the process has in the machine's, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return psutil.Process().memory_info().rss / 1e6
