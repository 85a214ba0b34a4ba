# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The block of the network and its parts: MLP or SwiGLU, LayerScale, stochastic depth.

Shapes: B images, N tokens, D channels of the residual stream.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import ViTRegAttention
from .configuration_vitreg import ViTRegConfig
from .recording import RecordedModule

# MLP


class ViTRegMLP(nn.Module):
    """Two projections with an activation between them."""

    def __init__(self, config: ViTRegConfig) -> None:
        super().__init__()
        inner = cast(int, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class ViTRegSwiGLU(nn.Module):
    """MLP whose inner activation is a second projection, gated by SiLU of the first."""

    def __init__(self, config: ViTRegConfig) -> None:
        super().__init__()
        inner = cast(int, config.intermediate_size)
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


# Layer


class ViTRegLayerScale(nn.Module):
    """A learned factor per channel on the output of a branch."""

    def __init__(self, config: ViTRegConfig) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.full((config.hidden_size,), float(cast(float, config.layerscale_value))))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.lambda1


class ViTRegDropPath(nn.Module):
    """Stochastic depth (Huang et al., arXiv 1603.09382): drop a branch for whole samples, scale up the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return hidden_states
        keep = 1.0 - self.rate
        shape = (hidden_states.shape[0],) + (1,) * (hidden_states.ndim - 1)
        return hidden_states * hidden_states.new_empty(shape).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class ViTRegLayer(RecordedModule, GradientCheckpointingLayer):
    """One pre-norm block: attention, then MLP, each on a residual branch."""

    def __init__(self, config: ViTRegConfig, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ViTRegAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ViTRegSwiGLU(config) if config.use_swiglu_ffn else ViTRegMLP(config)
        scaled = config.layerscale_value is not None
        self.layer_scale1 = ViTRegLayerScale(config) if scaled else nn.Identity()
        self.layer_scale2 = ViTRegLayerScale(config) if scaled else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = ViTRegDropPath(drop_path_rate)

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        """One block, `(B, N, D)` to `(B, N, D)`; `kwargs` are those of `ViTRegAttention.forward`."""
        attended, *_ = self.attention(self.norm1(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + self.drop_path(self.layer_scale1(self.dropout(attended)))
        transformed = self.mlp(self.norm2(hidden_states))
        return hidden_states + self.drop_path(self.layer_scale2(self.dropout(transformed)))
