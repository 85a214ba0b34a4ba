# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Attention over all tokens, its dispatch to backends, and its probabilities, which every backend gives.

Shapes: B images, N tokens, D channels of the residual stream, h heads of d channels.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_vitreg import ViTRegConfig
from .fusing import PARTS, FusedProjections, is_fused, join_state, split_state
from .packing import Packing
from .pooled_attention import logits_of, taken_by
from .position_embedding import Rotation, rotated
from .prepacking import is_plain
from .recording import RecordedModule
from .token_layout import TokenLayout, packed

# Backends that compute softmax attention, which a few queries may then have in another way; a name that a user
# registered may mean anything.
_ATTENTION_OF_TRANSFORMERS = {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"}


def attention_probabilities(query: Tensor, key: Tensor, scaling: float, token_mask: Tensor | None = None) -> Tensor:
    """Softmax attention probabilities, before dropout, whatever kernel computes the attention itself.

    Args:
        query: `(B, h, Q, d)`, all tokens or some of them.
        key: `(B, h, N, d)`.
        scaling: factor on the logits.
        token_mask: `(B, N)`, True for tokens that may be attended to.

    Returns:
        `(B, h, Q, N)` in the dtype of `query`; softmax runs in float32.
    """
    return _softmax(torch.matmul(query, key.transpose(2, 3)) * scaling, token_mask)


def _softmax(logits: Tensor, token_mask: Tensor | None) -> Tensor:
    """Probabilities of logits `(B, h, Q, N)`, in float32 or better until the end; 0 for what `(B, N)` leaves out."""
    if token_mask is not None:
        logits = logits.masked_fill(~token_mask[:, None, None, :], torch.finfo(logits.dtype).min)
    return F.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(logits.dtype)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The reference of every other backend; returns the output `(B, N, h, d)` and the probabilities before dropout."""
    logits = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        logits = logits + attention_mask
    probabilities = F.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
    dropped = F.dropout(probabilities, p=dropout, training=module.training)
    return torch.matmul(dropped, value).transpose(1, 2).contiguous(), probabilities


def _placed(
    query: Tensor, key: Tensor, value: Tensor, rotation: Rotation | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Views by head, `(B, h, N, d)` of `(B, N, h, d)`; queries and keys turned if positions are rotary.

    Queries may be those of the first tokens alone.
    """
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return *_turned(query, key, rotation), value


def _turned(query: Tensor, key: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
    """Queries of the first tokens or of all, and keys, `(B, h, N, d)`, at the angles of their tokens."""
    if rotation is None:
        return query, key
    of_queries = Rotation(*(TokenLayout.first_by_head(part, query.shape[2]) for part in rotation))
    return rotated(query, of_queries), rotated(key, rotation)


def _with_one_more(tokens: Tensor, bias: Tensor) -> Tensor:
    """Keys or values `(B, h, N + 1, d)` with one more, the same for all images, from `(B, h, N, d)` and `(h, d)`.

    Reference: Sun et al., Massive Activations (arXiv 2402.17762), section 4.3.
    """
    return torch.cat([tokens, bias[None, :, None].to(tokens).expand(tokens.shape[0], -1, -1, -1)], dim=2)


def _mask_of_one_more(attention_mask: Any, backend: str | None) -> Any:
    """The mask of a backend for one more key, which is never masked; raises ValueError for masks of another kind."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 4:
        raise ValueError(
            f"Expected eager or sdpa attention for padded images with attention_bias_kv=True, got {backend!r}"
        )
    return F.pad(attention_mask, (0, 1), value=attention_mask.dtype == torch.bool)


class ViTRegAttention(RecordedModule):
    """Multi-head self-attention over all tokens, through the backend that the config names."""

    def __init__(self, config: ViTRegConfig) -> None:
        super().__init__()
        self.config = config
        self.layout = TokenLayout.from_config(config)
        self.head_dim = config.attention_head_dim
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        width, inner = config.hidden_size, cast(int, config.num_attention_heads) * self.head_dim

        def has_bias(own: bool | None) -> bool:
            return config.qkv_bias if own is None else own

        self.q_proj = nn.Linear(width, inner, bias=has_bias(config.query_bias))
        self.k_proj = nn.Linear(width, inner, bias=has_bias(config.key_bias))
        self.v_proj = nn.Linear(width, inner, bias=has_bias(config.value_bias))
        self.qkv_proj: FusedProjections | None = None  # in the place of these three, if that is asked for
        self.register_state_dict_post_hook(split_state)
        self.register_load_state_dict_pre_hook(join_state)
        self.o_proj = nn.Linear(inner, width, bias=config.proj_bias)
        biased, shape = config.attention_bias_kv, (config.num_attention_heads, self.head_dim)
        self.bias_k = nn.Parameter(torch.zeros(shape)) if biased else None  # type: ignore[arg-type]
        self.bias_v = nn.Parameter(torch.zeros(shape)) if biased else None  # type: ignore[arg-type]
        self.qk_norm, eps = config.qk_norm, config.layer_norm_eps
        self.q_norm = nn.LayerNorm(self.head_dim, eps=eps) if self.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim, eps=eps) if self.qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        token_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_prefix_attentions: bool = False,
        rotations: Sequence[Rotation] = (),
        num_queries: int | None = None,
        packing: Packing | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Attend.

        Args:
            hidden_states: `(B, N, D)`, or `(T, D)` with `packing`.
            attention_mask: padding in the form of the backend, or None.
            token_mask: the same padding as `(B, N)`, for the probabilities.
            output_attentions: return the probabilities of all tokens.
            output_prefix_attentions: return those of CLS and registers.
            rotations: of all tokens, one; none without rotary positions.
            num_queries: how many tokens of each image attend, which are the first; None for all. Only with a mask
                that is a tensor, and without probabilities.
            packing: which tokens are of which image. Each attends to those of its own image; there are neither masks
                nor probabilities, and rotations are those of the packing.

        Returns:
            Output of the shape of `hidden_states`, or of the first `num_queries` tokens; probabilities `(B, h, N, N)`
            or None, those of the prefix `(B, h, prefix, N)` or None.
        """
        if packing is not None:
            return self._packed(hidden_states, packing, num_queries, **kwargs), None, None
        queries = self.layout.first(hidden_states, num_queries)
        if num_queries is not None and self._can_take_by_weights():
            taken = self._taken_by_first(queries, hidden_states, token_mask, *rotations)
            return self.o_proj(taken), None, None
        projected = self._projected(queries, hidden_states)
        query, key, value = _placed(*projected, *rotations)
        if num_queries is not None and attention_mask is not None:
            attention_mask = self.layout.first_by_head(attention_mask, num_queries)
        attended, weights = self._attend(query, key, value, attention_mask, **kwargs)
        output = self.o_proj(attended.reshape(*queries.shape[:-1], -1))

        probabilities = prefix = None
        if output_attentions:
            own = self.config._attn_implementation == "eager"
            probabilities = self._onto_tokens(weights) if own else self._probabilities(query, key, token_mask)
        if output_prefix_attentions:
            prefix = self._probabilities(self.layout.prefix_queries(query), key, token_mask)
        return output, probabilities, prefix

    def _packed(self, hidden_states: Tensor, packing: Packing, num_queries: int | None, **kwargs: Any) -> Tensor:
        """Attention within each image of a sequence `(T, D)`: in one call if the backend can, else once per size."""
        queries, of_queries = packing.first_rows(hidden_states, num_queries), packing.first(num_queries)
        if num_queries is not None and packing.rotation is None and self._can_take_by_weights():
            by_size = zip(of_queries.by_group(queries), packing.by_group(hidden_states), strict=True)
            return self.o_proj(packed([self._taken_by_first(few, tokens, None) for few, tokens in by_size]))
        query, key, value = self._projected(queries, hidden_states)
        if packing.rotation is not None:
            turned = Rotation(*(packing.first_rows(part, num_queries) for part in packing.rotation))
            query, key = rotated(query, turned), rotated(key, packing.rotation)
        one_call = None
        if self.bias_k is None:  # its key would have to stand behind every image
            one_call = packing.kernel_arguments(self.config._attn_implementation, of_queries)
        if one_call is not None:
            mask, arguments = one_call
            query, key, value = _placed(query[None], key[None], value[None])
            attended, _ = self._attend(query, key, value, mask, **arguments, **kwargs)
            return self.o_proj(attended.flatten(0, 1).flatten(1))
        parts = zip(of_queries.by_group(query), packing.by_group(key), packing.by_group(value), strict=True)
        outputs = [self._attend(*_placed(*own), None, **kwargs)[0] for own in parts]
        return self.o_proj(packed([output.flatten(2) for output in outputs]))

    def _can_take_by_weights(self) -> bool:
        """Whether few queries can do without keys and values of all tokens: with the weights of the projections at
        hand, and with nothing between them and the softmax that somebody else has put there."""
        dropout = self.training and self.attention_dropout > 0
        known = self.config._attn_implementation in _ATTENTION_OF_TRANSFORMERS
        plain = is_fused(self) if self.qkv_proj is not None else is_plain(self.k_proj, self.v_proj)
        return plain and known and self.bias_k is None and not dropout

    def _taken_by_first(
        self, queries: Tensor, tokens: Tensor, token_mask: Tensor | None, rotation: Rotation | None = None
    ) -> Tensor:
        """What the first tokens `(B, Q, D)` take from all `(B, N, D)`, `(B, Q, h * d)`, before the last projection.

        Values of all tokens are not made, nor are keys unless each is normed or turned by itself.
        """
        query = self.q_norm(self._by_head(self._part(0, queries))).transpose(1, 2)
        if rotation is None and not self.qk_norm:
            logits = logits_of(query * self.scaling, tokens, *self._weights(1))
        else:
            key = self.k_norm(self._by_head(self._part(1, tokens))).transpose(1, 2)
            query, key = _turned(query, key, rotation)
            logits = (query * self.scaling) @ key.transpose(2, 3)
        return taken_by(_softmax(logits, token_mask), tokens, *self._weights(2))

    def _weights(self, part: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the projection to queries (0), keys (1) or values (2)."""
        if self.qkv_proj is not None:
            return self.qkv_proj.part(part)
        projection = getattr(self, PARTS[part])
        return projection.weight, projection.bias

    def _part(self, part: int, tokens: Tensor) -> Tensor:
        """Queries (0) or keys (1) alone, `(..., h * d)`."""
        if self.qkv_proj is not None:
            return F.linear(tokens, *self.qkv_proj.part(part))
        return getattr(self, PARTS[part])(tokens)

    def _probabilities(self, query: Tensor, key: Tensor, token_mask: Tensor | None) -> Tensor:
        """Attention of some queries `(B, h, Q, d)` onto all tokens, `(B, h, Q, N)`."""
        if self.bias_k is not None:
            key = _with_one_more(key, self.bias_k)
            token_mask = None if token_mask is None else F.pad(token_mask, (0, 1), value=True)
        return cast(Tensor, self._onto_tokens(attention_probabilities(query, key, self.scaling, token_mask)))

    def _onto_tokens(self, probabilities: Tensor | None) -> Tensor | None:
        """Probabilities without those of the bias; what they lack to a sum of 1 goes to it."""
        return probabilities if probabilities is None or self.bias_k is None else probabilities[..., :-1]

    def _projected(self, queries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `(..., h, d)` of tokens `(..., D)`, the first two normed if the config says so."""
        if self.qkv_proj is not None:
            parts = list(self.qkv_proj(tokens).chunk(3, dim=-1))
            if queries is not tokens:
                parts[0] = self.qkv_proj(queries).chunk(3, dim=-1)[0]
        else:
            parts = [self.q_proj(queries), self.k_proj(tokens), self.v_proj(tokens)]
        query, key, value = map(self._by_head, parts)
        # Under autocast a norm gives float32, and some backends take one type alone.
        return self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype), value

    def _by_head(self, projected: Tensor) -> Tensor:
        """View `(..., h, d)` of `(..., h * d)`; of some of the heads in a rank of tensor parallelism."""
        return projected.unflatten(-1, (-1, self.head_dim))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Output `(B, N, h, d)` of the backend, and the probabilities if it has them."""
        backend = self.config._attn_implementation
        self._check_backend(backend, query)
        if self.bias_k is not None:
            key, value = _with_one_more(key, self.bias_k), _with_one_more(value, cast(Tensor, self.bias_v))
            attention_mask = _mask_of_one_more(attention_mask, backend)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        return attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)

    def _check_backend(self, backend: str | None, query: Tensor) -> None:
        if backend == "flex_attention" and query.device.type == "cpu" and query.requires_grad:
            raise ValueError(
                "Expected a GPU or no gradient for attn_implementation='flex_attention', got a CPU tensor that needs "
                "a gradient: PyTorch has no backward pass of flex attention on CPU; train with 'sdpa' there"
            )
