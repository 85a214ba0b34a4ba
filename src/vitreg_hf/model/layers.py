# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The block of the network and its parts: MLP or SwiGLU, LayerScale, stochastic depth.

Shapes: B images, N tokens, D channels of the residual stream.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import ViTRegAttention
from .configuration_vitreg import ViTRegConfig
from .inference import may_overwrite
from .moved_neurons import MovedNeurons, neurons_of
from .position_embedding import Rotation
from .recording import RecordedModule
from .token_layout import packed, unpacked

GroupSizes = list[tuple[int, int]]  # images and tokens of each
# Of the tokens of all groups, their sizes, and the samples that each group was reduced to.
Branch = Callable[[Tensor, GroupSizes, list[Tensor | None]], Tensor]

# MLP

# Activations that PyTorch computes in place, by their approximation.
_GELU = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}


class ViTRegFeedForward(nn.Module):
    """Neurons and a projection from them; register neurons, if the config names any of this block, are moved."""

    down_proj: nn.Linear

    def __init__(self, config: ViTRegConfig, layer: int) -> None:
        super().__init__()
        self.register_neurons = MovedNeurons(config, layer) if neurons_of(config, layer)[0] else None

    def forward(
        self, hidden_states: Tensor, group_sizes: GroupSizes | None = None, token_mask: Tensor | None = None
    ) -> Tensor:
        activations = self.neurons(hidden_states)
        if self.register_neurons is not None:
            activations = self.register_neurons(activations, group_sizes or (), token_mask)
        return self.down_proj(activations)

    def neurons(self, hidden_states: Tensor) -> Tensor:
        """Activations `(..., F)` of tokens `(..., D)`."""
        raise NotImplementedError


class ViTRegMLP(ViTRegFeedForward):
    """Two projections with an activation between them."""

    def __init__(self, config: ViTRegConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        inner = cast(int, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.gelu = _GELU.get(config.hidden_act)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=config.mlp_bias)

    def neurons(self, hidden_states: Tensor) -> Tensor:
        projected = self.up_proj(hidden_states)
        if self.gelu is not None and may_overwrite(projected, self.up_proj, self.act_fn):
            return torch.ops.aten.gelu_(projected, approximate=self.gelu)
        return self.act_fn(projected)


class ViTRegSwiGLU(ViTRegFeedForward):
    """MLP whose inner activation is a second projection, gated by SiLU of the first."""

    def __init__(self, config: ViTRegConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        inner = cast(int, config.intermediate_size)
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=config.mlp_bias)

    def neurons(self, hidden_states: Tensor) -> Tensor:
        gate, projected = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        if may_overwrite(gate, self.gate_proj):
            return F.silu(gate, inplace=True).mul_(projected)
        return F.silu(gate) * projected


# Layer


class ViTRegLayerScale(nn.Module):
    """A learned factor per channel on the output of a branch."""

    def __init__(self, config: ViTRegConfig) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.full((config.hidden_size,), float(cast(float, config.layerscale_value))))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.lambda1


class ViTRegDropPath(nn.Module):
    """Stochastic depth (Huang et al., arXiv 1603.09382): drop a branch for whole samples, scale up the others.

    Args:
        rate: share of the samples to drop, in [0, 1).
        kind: `"mask"` computes the branch of every sample and drops each by itself, so that their number varies.
            `"subset"` (Oquab et al., arXiv 2304.07193, section 5) computes it for `max(int(B * (1 - rate)), 1)` random
            samples alone. Both are the identity plus the branch in expectation.
    """

    def __init__(self, rate: float, kind: str = "mask") -> None:
        super().__init__()
        self.rate = rate
        self.kind = kind

    def forward(self, branch: Tensor) -> Tensor:
        """Drop samples of a branch that was computed for all, `(B, ...)`, and scale up the others."""
        if not self.training or self.rate == 0.0:
            return branch
        keep = 1.0 - self.rate
        shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
        return branch * branch.new_empty(shape).bernoulli_(keep).div_(keep)

    def takes_subsets(self) -> bool:
        """Whether samples are chosen before the branch is computed."""
        return self.training and self.rate > 0.0 and self.kind == "subset"

    def subset(self, hidden_states: Tensor) -> Tensor | None:
        """Indices of the samples of `(B, ...)` that go through the branch; None for all, as for a batch of one."""
        batch_size = hidden_states.shape[0]
        keep = max(int(batch_size * (1.0 - self.rate)), 1)
        return None if keep >= batch_size else torch.randperm(batch_size, device=hidden_states.device)[:keep]

    def extra_repr(self) -> str:
        return f"rate={self.rate}, kind={self.kind!r}"


class ViTRegLayer(RecordedModule, GradientCheckpointingLayer):
    """One pre-norm block: attention, then MLP, each on a residual branch."""

    def __init__(self, config: ViTRegConfig, drop_path_rate: float = 0.0, layer: int = 0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ViTRegAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ViTRegSwiGLU(config, layer) if config.use_swiglu_ffn else ViTRegMLP(config, layer)
        scaled = config.layerscale_value is not None
        self.layer_scale1 = ViTRegLayerScale(config) if scaled else nn.Identity()
        self.layer_scale2 = ViTRegLayerScale(config) if scaled else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = ViTRegDropPath(drop_path_rate, config.drop_path_kind)

    def forward(
        self, hidden_states: Tensor | tuple[Tensor, ...], attention_mask: Any = None, **kwargs: Any
    ) -> Tensor | tuple[Tensor, ...]:
        """One block.

        Args:
            hidden_states: `(B, N, D)`, or a tuple of groups `(B_i, N_i, D)`, which attend apart and share all the
                rest; several groups have no mask, and no attention is recorded.
            attention_mask: padding in the form of the backend, or None.
            kwargs: those of `ViTRegAttention.forward`.

        Returns:
            What came, transformed; of one group the first `num_queries` tokens, if that is given. Without register
            neurons only, which read all.
        """
        groups = hidden_states if isinstance(hidden_states, tuple) else (hidden_states,)
        subsets = self.drop_path.takes_subsets() and _can_choose(attention_mask, kwargs)

        def attend(tokens: Tensor, sizes: GroupSizes, chosen: list[Tensor | None]) -> Tensor:
            mask, token_mask = _chosen(attention_mask, chosen[0]), _chosen(kwargs.get("token_mask"), chosen[0])
            rotations = [  # empty without rotary positions, else one per group
                Rotation(_chosen(rotation.cos, own), _chosen(rotation.sin, own))
                for rotation, own in zip(kwargs.get("rotations", ()), chosen, strict=False)
            ]
            arguments = {**kwargs, "token_mask": token_mask, "group_sizes": sizes, "rotations": rotations}
            attended, *_ = self.attention(self.norm1(tokens), mask, **arguments)
            return self.layer_scale1(self.dropout(attended))

        def transform(tokens: Tensor, sizes: GroupSizes, chosen: list[Tensor | None]) -> Tensor:
            token_mask = _chosen(kwargs.get("token_mask"), chosen[0])
            return self.layer_scale2(self.dropout(self.mlp(self.norm2(tokens), sizes, token_mask)))

        for branch in (attend, transform):
            groups = self._residual(groups, branch, subsets, kwargs.get("num_queries"))
        return groups if isinstance(hidden_states, tuple) else groups[0]

    def _residual(
        self, groups: tuple[Tensor, ...], branch: Branch, subsets: bool, num_queries: int | None
    ) -> tuple[Tensor, ...]:
        """Add a branch to every group; it runs once, on the tokens of all groups."""
        chosen = [self.drop_path.subset(group) if subsets else None for group in groups]
        taken = [_chosen(group, indices) for group, indices in zip(groups, chosen, strict=True)]
        sizes = [(group.shape[0], group.shape[1]) for group in taken]
        branches = unpacked(branch(packed(taken), sizes, chosen), sizes)
        wanted = [self.attention.layout.first(group, num_queries) for group in groups]
        added = zip(wanted, branches, chosen, strict=True)
        return tuple(self._added(group, own, indices, subsets) for group, own, indices in added)

    def _added(self, group: Tensor, branch: Tensor, chosen: Tensor | None, subsets: bool) -> Tensor:
        if chosen is None:
            return group + (branch if subsets else self.drop_path(branch))
        factor = group.shape[0] / branch.shape[0]  # not 1 / (1 - rate): the number of samples was rounded
        return group.index_add(0, chosen, branch.to(group.dtype), alpha=factor)


def _can_choose(attention_mask: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a part of the batch can attend alone: with a mask by samples, and with no attention to be recorded."""
    recorded = kwargs.get("output_attentions") or kwargs.get("output_prefix_attentions")
    return not recorded and (attention_mask is None or isinstance(attention_mask, Tensor))


def _chosen(samples: Any, chosen: Tensor | None) -> Any:
    """The chosen samples of `(B, ...)`; a mask of one sample holds for all."""
    return samples if samples is None or chosen is None or samples.shape[0] == 1 else samples.index_select(0, chosen)
