# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Records what happens inside a model during one forward pass, of any project's model, and leaves no trace in it.

Tensors go to functions while they exist, and only what these return is kept: a reader of attention sees one layer at
a time, so maps of all layers are never held. Queries and keys are taken where PyTorch computes attention, at
`scaled_dot_product_attention`, so rotary positions, query norms and grouped heads are already in them.

Shapes: B inputs, N tokens, D channels of the residual stream, h heads of d channels.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitreg_hf.analysis.foreign import Anatomy


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one layer's attention.

    Attributes:
        query: `(B, h, N, d)`.
        key, value: `(B, h, N, d)`, or fewer heads that are shared by groups of queries.
        scaling: factor on the logits.
        mask: boolean (True: may be attended to) or added to the logits, broadcast to `(B, h, N, N)`; None for none.
        causal: whether a token sees only itself and those before it.
        bias_key: `(B, h, more, d)`, further keys that are no tokens and that all may attend to; None for none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    mask: Tensor | None = None
    causal: bool = False
    bias_key: Tensor | None = None

    def of_input(self, index: int) -> "AttentionCall":
        """The call for one input of the batch alone."""
        one = slice(index, index + 1)
        mask = self.mask[one] if self.mask is not None and len(self.mask) > 1 else self.mask
        bias = None if self.bias_key is None else self.bias_key[one]
        return AttentionCall(self.query[one], self.key[one], self.value[one], self.scaling, mask, self.causal, bias)

    def values(self) -> Tensor:
        """Value vectors `(B, h, N, d)`, repeated for all heads that share them."""
        return self.value.repeat_interleave(self.query.shape[1] // self.value.shape[1], dim=1)

    def logits(self, num_queries: int | None = None) -> Tensor:
        """Logits `(B, h, Q, N)` of the first `num_queries` queries, or of all; -inf where a mask forbids."""
        query = self.query[:, :, :num_queries]
        groups = query.shape[1] // self.key.shape[1]
        key = self.key.repeat_interleave(groups, dim=1) if groups > 1 else self.key
        logits = (query @ key.transpose(2, 3)).float() * self.scaling
        if self.causal:
            future = torch.ones(self.query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).triu(1)
            logits = logits.masked_fill(future[:num_queries], -torch.inf)
        if self.mask is None:
            return logits
        mask = self.mask[:, :, :num_queries]
        return logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask

    def probabilities(self, num_queries: int | None = None) -> Tensor:
        """Softmax probabilities `(B, h, Q, N)`, float32, before dropout; 0 for a query that may attend to nothing.

        What goes to keys that are no tokens is missing to a sum of 1.
        """
        logits = self.logits(num_queries)
        if self.bias_key is not None:
            more = (self.query[:, :, :num_queries] @ self.bias_key.transpose(2, 3)).float() * self.scaling
            logits = torch.cat([logits, more], dim=-1)
        return logits.softmax(dim=-1).nan_to_num(0.0)[..., : self.key.shape[2]]


@dataclass(frozen=True)
class Readers:
    """What to keep of each layer; a reader that is None costs nothing. Layers count from 0.

    Attributes:
        hidden: gets the residual stream `(B, N, D)`, never normed: before the first block as layer 0, after block
            `i` as layer `i + 1`.
        attention: gets an `AttentionCall` per block.
        attention_update, ffn_update: get what the branch of a block adds to the residual stream, `(B, N, D)`.
        edit: gets the input of every block and returns what the block gets instead.
        neurons: gets the activations of the neurons of a block's FFN, `(B, N, F)`, as they are projected back.
    """

    hidden: Callable[[int, Tensor], Any] | None = None
    attention: Callable[[int, AttentionCall], Any] | None = None
    attention_update: Callable[[int, Tensor], Any] | None = None
    ffn_update: Callable[[int, Tensor], Any] | None = None
    edit: Callable[[int, Tensor], Tensor] | None = None
    neurons: Callable[[int, Tensor], Any] | None = None


@dataclass
class Recording:
    """What the readers returned, in the order of layers; `embedded` is the output of the patch embedding as it is."""

    hidden: list[Any] = field(default_factory=list)
    attention: list[Any] = field(default_factory=list)
    attention_updates: list[Any] = field(default_factory=list)
    ffn_updates: list[Any] = field(default_factory=list)
    neurons: list[Any] = field(default_factory=list)
    embedded: Tensor | None = None


@contextmanager
def recording(anatomy: Anatomy, readers: Readers) -> Iterator[Recording]:
    """Record one forward pass that runs inside this context.

    Raises:
        ValueError: if neurons were wanted of a family whose neurons are not read; at the end, if attention was wanted
            and a block did not call PyTorch's attention exactly once.
    """
    if readers.neurons is not None and not anatomy.neuron_projections:
        raise ValueError(f"Expected a model whose neurons can be read, got one of the family {anatomy.family!r}")
    recorded, tracker = Recording(), _Tracker()
    with ExitStack() as stack:
        for index, block in enumerate(anatomy.blocks):
            _hook(stack, block.register_forward_pre_hook(_before_block(index, tracker, readers, recorded)))
            _hook(stack, block.register_forward_hook(_after_block(index, tracker, readers, recorded)))
        _hook_branches(stack, anatomy.attention_branches, readers.attention_update, recorded.attention_updates)
        _hook_branches(stack, anatomy.ffn_branches, readers.ffn_update, recorded.ffn_updates)
        if readers.neurons is not None:
            for index, module in enumerate(anatomy.neuron_projections):
                _hook(stack, module.register_forward_pre_hook(_before_projection(index, readers.neurons, recorded)))
        if anatomy.patch_embedding is not None:
            _hook(stack, anatomy.patch_embedding.register_forward_hook(_keep_embedded(recorded)))
        if readers.attention is not None:
            stack.enter_context(_AttentionCalls(tracker, readers.attention, recorded.attention))
        yield recorded
    if readers.attention is not None and len(recorded.attention) != len(anatomy.blocks):
        raise ValueError(
            f"Expected each of {len(anatomy.blocks)} blocks to call scaled_dot_product_attention once, got "
            f"{len(recorded.attention)} calls: is the model compiled, or its attention implementation not 'sdpa'?"
        )


class _Tracker:
    """Whether a block is running, and which: attention outside blocks, as in a pooling head, is not recorded."""

    block: int | None = None


class _AttentionCalls(TorchFunctionMode):
    """Hands the arguments of PyTorch's attention to a reader while a block runs."""

    def __init__(self, tracker: _Tracker, reader: Callable[[int, AttentionCall], Any], kept: list[Any]) -> None:
        super().__init__()
        self.tracker, self.reader, self.kept = tracker, reader, kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.tracker.block is not None:
            self.kept.append(self.reader(self.tracker.block, _attention_call(*args, **kwargs)))
        return func(*args, **kwargs)


def _attention_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    """PyTorch's own arguments; the number of heads tells whether they are grouped, and dropout comes later."""
    scaling = query.shape[-1] ** -0.5 if scale is None else scale
    tokens = query.shape[2]
    bias = key[:, :, tokens:] if key.shape[2] > tokens else None  # attention_bias_kv of this family
    mask = attn_mask if attn_mask is None or bias is None else attn_mask[..., :tokens]
    return AttentionCall(query, key[:, :, :tokens], value[:, :, :tokens], scaling, mask, is_causal, bias)


def _hook(stack: ExitStack, handle: Any) -> None:
    stack.callback(handle.remove)


def _before_block(index: int, tracker: _Tracker, readers: Readers, recorded: Recording) -> Callable:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        tracker.block = index
        tokens = args[0] if readers.edit is None else readers.edit(index, args[0])
        if readers.hidden is not None and index == 0:
            recorded.hidden.append(readers.hidden(0, tokens))
        return None if readers.edit is None else (tokens, *args[1:])

    return hook


def _after_block(index: int, tracker: _Tracker, readers: Readers, recorded: Recording) -> Callable:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tracker.block = None
        if readers.hidden is not None:
            recorded.hidden.append(readers.hidden(index + 1, _first(output)))

    return hook


def _hook_branches(
    stack: ExitStack, modules: Any, reader: Callable[[int, Tensor], Any] | None, kept: list[Any]
) -> None:
    if reader is None:
        return
    for index, module in enumerate(modules):

        def hook(_: nn.Module, args: Any, output: Any, index: int = index) -> None:
            kept.append(reader(index, _first(output)))

        _hook(stack, module.register_forward_hook(hook))


def _before_projection(index: int, reader: Callable[[int, Tensor], Any], recorded: Recording) -> Callable:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        recorded.neurons.append(reader(index, args[0]))

    return hook


def _keep_embedded(recorded: Recording) -> Callable:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        recorded.embedded = _first(output)

    return hook


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
