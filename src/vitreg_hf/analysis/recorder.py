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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitreg_hf.analysis.foreign import Anatomy

Block = tuple[slice, slice, slice]  # of images, heads and queries
_ALL = slice(None)
# Probabilities at a time: what a core's own cache holds, which is faster than all at once; a GPU wants many.
_AT_ONCE_ON_CPU, _AT_ONCE = 2**18, 2**26


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one layer's attention.

    Attributes:
        query: `(B, h, N, d)`.
        key, value: `(B, h, N, d)`, or fewer heads that are shared by groups of queries.
        scaling: factor on the logits.
        mask: boolean (True: may be attended to) or added to the logits, broadcast to `(B, h, N, N)`; None for none.
        causal: whether a token sees only itself and those before it.
        bias_key, bias_value: `(B, h, more, d)`, further keys that are no tokens and that all may attend to, and their
            values; None for none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    mask: Tensor | None = None
    causal: bool = False
    bias_key: Tensor | None = None
    bias_value: Tensor | None = None

    def of_input(self, index: int) -> "AttentionCall":
        """The call for one input of the batch alone."""
        one = slice(index, index + 1)
        mask = self.mask[one] if self.mask is not None and len(self.mask) > 1 else self.mask
        tensors = (self.query, self.key, self.value, self.bias_key, self.bias_value)
        query, key, value, *bias = (None if tensor is None else tensor[one] for tensor in tensors)
        return AttentionCall(query, key, value, self.scaling, mask, self.causal, *bias)  # type: ignore[arg-type]

    def keys(self) -> Tensor:
        """Key vectors `(B, h, N, d)`, repeated for all heads that share them."""
        return self._for_each_head(self.key)

    def values(self) -> Tensor:
        """Value vectors `(B, h, N, d)`, repeated for all heads that share them."""
        return self._for_each_head(self.value)

    def _for_each_head(self, shared: Tensor) -> Tensor:
        groups = self.query.shape[1] // shared.shape[1]
        return shared.repeat_interleave(groups, dim=1) if groups > 1 else shared

    def logits(self, num_queries: int | None = None) -> Tensor:
        """Logits `(B, h, Q, N)` of the first `num_queries` queries, or of all; -inf where a mask forbids."""
        return self._logits((_ALL, _ALL, slice(num_queries)), self.keys())

    def _logits(self, block: Block, keys: Tensor) -> Tensor:
        logits = (self.query[block] @ keys[block[:2]].transpose(2, 3)).float().mul_(self.scaling)
        tokens = self.query.shape[2]
        if self.causal:
            future = torch.ones(tokens, keys.shape[2], dtype=torch.bool, device=keys.device).triu(1)
            logits = logits.masked_fill(future[block[2]], -torch.inf)
        if self.mask is None:
            return logits
        mask = self.mask.expand(*self.query.shape[:2], tokens, -1)[block]
        return logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask

    def probabilities(self, num_queries: int | None = None) -> Tensor:
        """Softmax probabilities `(B, h, Q, N)`, float32, before dropout; 0 for a query that may attend to nothing.

        What goes to keys that are no tokens is missing to a sum of 1.
        """
        return self._onto_all((_ALL, _ALL, slice(num_queries)), self.keys())[..., : self.key.shape[2]]

    def _onto_all(self, block: Block, keys: Tensor) -> Tensor:
        """Probabilities of a block, onto the keys that are no tokens, too, which come last."""
        logits = self._logits(block, keys)
        if self.bias_key is not None:
            more = (self.query[block] @ self.bias_key[block[:2]].transpose(2, 3)).float() * self.scaling
            logits = torch.cat([logits, more], dim=-1)
        probabilities = logits.softmax(dim=-1)
        return probabilities if self.mask is None else probabilities.nan_to_num(0.0)

    def attended(self) -> tuple[Tensor, Tensor]:
        """Attention itself, and how much of it each token gets, from probabilities that are computed once.

        They are computed block by block and never held: what is added to PyTorch's fused attention is little more
        than their sum over queries.

        Returns:
            What PyTorch's attention returns without dropout, `(B, h, N, d)`, up to rounding; and the mean over queries
            of the probabilities, float32 `(B, h, N)`, as `sinks.received_attention` has it without padding.
        """
        keys, values, tokens = self.keys(), self.values(), self.key.shape[2]
        if self.bias_value is not None:
            values = torch.cat([values, self.bias_value], dim=2)
        # The layout that models bring it to next.
        output = values.new_empty(self.query.transpose(1, 2).shape[:3] + values.shape[3:]).transpose(1, 2)
        received = torch.zeros(keys.shape[:3], device=keys.device)
        for block in self._blocks():
            probabilities = self._onto_all(block, keys)
            output[block] = probabilities.to(values.dtype) @ values[block[:2]]
            received[block[:2]] += probabilities[..., :tokens].sum(dim=-2)
        return output, received / self.query.shape[2]

    def _blocks(self) -> Iterator[Block]:
        """All images, heads and queries, in blocks of about as many probabilities as are fast at a time."""
        images, heads, tokens = self.query.shape[:3]
        at_once = _AT_ONCE_ON_CPU if self.query.device.type == "cpu" else _AT_ONCE
        for some_images in _slices(images, at_once // (heads * tokens**2)):
            for some_heads in _slices(heads, at_once // tokens**2):
                for queries in _slices(tokens, at_once // tokens):
                    yield some_images, some_heads, queries


def _slices(count: int, at_once: int) -> Iterator[slice]:
    step = max(at_once, 1)
    return (slice(start, start + step) for start in range(0, count, step))


class Attended(NamedTuple):
    """What a reader of attention returns that computed attention itself: the block goes on with `output`, in place of
    PyTorch's, `(B, h, N, d)`."""

    kept: Any
    output: Tensor


@dataclass(frozen=True)
class Readers:
    """What to keep of each layer; a reader that is None costs nothing. Layers count from 0.

    Attributes:
        hidden: gets the residual stream `(B, N, D)`, never normed: before the first block as layer 0, after block
            `i` as layer `i + 1`.
        attention: gets an `AttentionCall` per block; one that returns `Attended` takes the place of PyTorch's.
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
            kept = self.reader(self.tracker.block, _attention_call(*args, **kwargs))
            self.kept.append(kept.kept if isinstance(kept, Attended) else kept)
            if isinstance(kept, Attended):
                return kept.output
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
    more = key.shape[2] > tokens  # attention_bias_kv of this family
    mask = attn_mask[..., :tokens] if attn_mask is not None and more else attn_mask
    bias = (key[:, :, tokens:], value[:, :, tokens:]) if more else (None, None)
    return AttentionCall(query, key[:, :, :tokens], value[:, :, :tokens], scaling, mask, is_causal, *bias)


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
