# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The block of the network and its parts: MLP or SwiGLU, LayerScale, stochastic depth.

Shapes: B images, N tokens, D channels of the residual stream.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN, GELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import ViTRegAttention
from .configuration_vitreg import ViTRegConfig
from .inference import may_overwrite
from .moved_neurons import MovedNeurons, neurons_of
from .packing import Packing
from .position_embedding import Rotation
from .recording import RecordedModule

# Of tokens, and of the samples that they were reduced to.
Branch = Callable[[Tensor, Tensor | None], Tensor]
PackedBranch = Callable[[Tensor, Packing], Tensor]

# MLP


class ViTRegFeedForward(nn.Module):
    """Neurons and a projection from them; register neurons, if the config names any of this block, are moved."""

    down_proj: nn.Linear

    def __init__(self, config: ViTRegConfig, layer: int) -> None:
        super().__init__()
        self.register_neurons = MovedNeurons(config, layer) if neurons_of(config, layer)[0] else None

    def forward(
        self, hidden_states: Tensor, group_sizes: Sequence[tuple[int, int]] = (), token_mask: Tensor | None = None
    ) -> Tensor:
        activations = self.neurons(hidden_states)
        if self.register_neurons is not None:
            activations = self.register_neurons(activations, group_sizes, token_mask)
        return self.down_proj(activations)

    def neurons(self, hidden_states: Tensor) -> Tensor:
        """Activations `(..., F)` of tokens `(..., D)`."""
        raise NotImplementedError


def _is_gelu(activation: nn.Module) -> bool:
    """Whether it is the exact GELU, which PyTorch computes in place too."""
    return type(activation) is GELUActivation and activation.act is F.gelu


class ViTRegMLP(ViTRegFeedForward):
    """Two projections with an activation between them."""

    def __init__(self, config: ViTRegConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        inner = cast(int, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=config.mlp_bias)

    def neurons(self, hidden_states: Tensor) -> Tensor:
        projected = self.up_proj(hidden_states)
        if may_overwrite(projected, self.up_proj, self.act_fn) and _is_gelu(self.act_fn):
            return torch.ops.aten.gelu_(projected)
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

    def by_image(self, branch: Tensor, packing: Packing) -> Tensor:
        """The same for tokens `(T, D)` of images of several sizes: all tokens of an image are dropped together."""
        if not self.training or self.rate == 0.0:
            return branch
        keep = 1.0 - self.rate
        factors = branch.new_empty(len(packing.lengths), 1).bernoulli_(keep).div_(keep)
        return branch * factors.index_select(0, packing.image_of_token)

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
        self, hidden_states: Tensor, attention_mask: Any = None, packing: Packing | None = None, **kwargs: Any
    ) -> Tensor:
        """One block.

        Args:
            hidden_states: `(B, N, D)`, or with `packing` `(T, D)`.
            attention_mask: padding in the form of the backend, or None.
            packing: which tokens are of which image, for images of several sizes; they attend apart and share all the
                rest, have no mask, and no attention is recorded.
            kwargs: those of `ViTRegAttention.forward`.

        Returns:
            What came, transformed; the first `num_queries` tokens of each image, if that is given. Without register
            neurons only, which read all.
        """
        if packing is not None:
            return self._packed(hidden_states, packing, **kwargs)
        subsets = self.drop_path.takes_subsets() and _can_choose(attention_mask, kwargs)

        def attend(tokens: Tensor, chosen: Tensor | None) -> Tensor:
            mask, token_mask = _chosen(attention_mask, chosen), _chosen(kwargs.get("token_mask"), chosen)
            rotations = [  # empty without rotary positions, else one
                Rotation(*(_chosen(part, chosen) for part in rotation)) for rotation in kwargs.get("rotations", ())
            ]
            arguments = {**kwargs, "token_mask": token_mask, "rotations": rotations}
            attended, *_ = self.attention(self.norm1(tokens), mask, **arguments)
            return self.layer_scale1(self.dropout(attended))

        def transform(tokens: Tensor, chosen: Tensor | None) -> Tensor:
            token_mask = _chosen(kwargs.get("token_mask"), chosen)
            return self.layer_scale2(self.dropout(self.mlp(self.norm2(tokens), token_mask=token_mask)))

        for branch in (attend, transform):
            hidden_states = self._residual(hidden_states, branch, subsets, kwargs.get("num_queries"))
        return hidden_states

    def _residual(self, tokens: Tensor, branch: Branch, subsets: bool, num_queries: int | None) -> Tensor:
        """Add a branch, of some samples alone if they are chosen before it is computed."""
        chosen = self.drop_path.subset(tokens) if subsets else None
        added = branch(_chosen(tokens, chosen), chosen)
        wanted = self.attention.layout.first(tokens, num_queries)
        if chosen is None:
            return wanted + (added if subsets else self.drop_path(added))
        factor = tokens.shape[0] / added.shape[0]  # not 1 / (1 - rate): the number of samples was rounded
        return wanted.index_add(0, chosen, added.to(tokens.dtype), alpha=factor)

    def _packed(self, tokens: Tensor, packing: Packing, num_queries: int | None = None, **kwargs: Any) -> Tensor:
        """The same block on tokens `(T, D)` of images of several sizes."""

        def attend(taken: Tensor, own: Packing) -> Tensor:
            attended, *_ = self.attention(self.norm1(taken), packing=own, num_queries=num_queries, **kwargs)
            return self.layer_scale1(self.dropout(attended))

        def transform(taken: Tensor, own: Packing) -> Tensor:
            return self.layer_scale2(self.dropout(self.mlp(self.norm2(taken), own.sizes)))

        if num_queries is None and self.drop_path.takes_subsets():
            for branch in (attend, transform):
                tokens = self._packed_subset(tokens, packing, branch)
            return tokens
        wanted = packing.first(num_queries)
        attended = self.drop_path.by_image(attend(tokens, packing), wanted)
        tokens = packing.first_rows(tokens, num_queries) + attended
        return tokens + self.drop_path.by_image(transform(tokens, wanted), wanted)

    def _packed_subset(self, tokens: Tensor, packing: Packing, branch: PackedBranch) -> Tensor:
        """Add a branch of some images alone."""
        subset = packing.subset(self.drop_path.rate)
        if subset is None:
            return tokens + branch(tokens, packing)
        added = branch(tokens.index_select(0, subset.rows), subset.packing) * subset.factors
        return tokens.index_add(0, subset.rows, added.to(tokens.dtype))


def _can_choose(attention_mask: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a part of the batch can attend alone: with a mask by samples, and with no attention to be recorded."""
    recorded = kwargs.get("output_attentions") or kwargs.get("output_prefix_attentions")
    return not recorded and (attention_mask is None or isinstance(attention_mask, Tensor))


def _chosen(samples: Any, chosen: Tensor | None) -> Any:
    """The chosen samples of `(B, ...)`; a mask of one sample holds for all."""
    return samples if samples is None or chosen is None or samples.shape[0] == 1 else samples.index_select(0, chosen)
