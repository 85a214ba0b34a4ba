# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Weights of projections once more, in the order in which oneDNN multiplies by them, on request: for CPUs.

A kernel for matrix products copies a weight into blocks that fit the registers of the processor. PyTorch does so in
every pass; here it is done once. Files and parameters know nothing of it.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .inference import is_tracing, is_transformed, is_watched


class Prepacked:
    """A weight `(out, in)` in the order of oneDNN, made anew when the weight has changed.

    A change is seen by the memory and the version of the weight, and by some of its values: what is written through
    `weight.data`, as when adapters are merged, has no version. Copies and pickles leave the packed weight out.
    """

    def __init__(self) -> None:
        self._packed: Tensor | None = None
        self._source: tuple[Any, ...] = ()
        self._some = torch.empty(0)

    def __reduce__(self) -> tuple[Any, ...]:
        return Prepacked, ()

    def pack(self, weight: Tensor) -> Tensor:
        """The weight in that order."""
        source, some = (weight.data_ptr(), weight._version, weight.dtype), weight.detach().diagonal()[::8]
        if self._packed is None or source != self._source or not torch.equal(some, self._some):
            with torch.inference_mode(False):  # so that a pass outside of it may read it
                self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
                self._source, self._some = source, some.clone()
        return self._packed

    def product(self, tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As `F.linear`, which also takes over where the packed weight cannot be used: with gradients, under autocast,
        when compiled, and where operations are counted or transformed."""
        if not self._is_usable(tokens, weight):
            return F.linear(tokens, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(tokens, self.pack(weight), bias, "none", [], "")

    def _is_usable(self, tokens: Tensor, weight: Tensor) -> bool:
        return (
            not (is_tracing() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or is_transformed())
            and type(tokens) is Tensor
            and tokens.dtype == weight.dtype
            and tokens.device.type == weight.device.type == "cpu"
            and tokens.numel() > 0
            and not weight.is_inference()  # whose changes nobody counts
            and can_prepack(weight.dtype)
        )


class PrepackedLinear(nn.Linear):
    """A projection with its weight in both orders; parameters, names and files are those of `nn.Linear`."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self.prepacked = Prepacked()
        self.train(plain.training)

    def forward(self, tokens: Tensor) -> Tensor:
        """Project tokens `(..., in)` to `(..., out)`."""
        return self.prepacked.product(tokens, self.weight, self.bias)

    def plain(self) -> nn.Linear:
        """The same projection with one weight."""
        made = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        made.weight, made.bias = self.weight, self.bias
        return made.train(self.training)


def can_prepack(dtype: torch.dtype) -> bool:
    """Whether this PyTorch, on this processor, multiplies by packed weights of a type."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_plain(*projections: nn.Module) -> bool:
    """Whether projections are no more than their weights: not watched, quantised, sharded or adapted."""
    known = (nn.Linear, PrepackedLinear)
    exact = all(type(one) in known and type(one.weight) is nn.Parameter for one in projections)
    return exact and not is_watched(*projections)


def check_plain(purpose: str, projections: Sequence[nn.Module]) -> None:
    """Raise ValueError for a projection that is more than its weights: adapted, quantised, sharded or watched."""
    for one in projections:
        if not is_plain(one):
            raise ValueError(f"Expected nn.Linear without adapters or hooks to {purpose}, got {type(one).__name__}")


class PrepackingMixin:
    """For models of blocks with `attention` and `mlp`, in `base_model.layers`."""

    def prepack_projections(self) -> None:
        """Keep the weights of the blocks once more in the order in which oneDNN multiplies by them, so that passes
        without gradients on a CPU take less time: for inference, at the cost of as much memory again.

        Outputs are equal but for rounding; parameters, state dicts and files stay as they are. What cannot use the
        packed weights takes the others: training, autocast, `torch.compile`, GPUs. Changed weights are packed anew;
        only a change of few values of a matrix through `.data` may go unseen.

        Raises:
            ValueError: if weights are not float32 (or bfloat16, where the processor has it) on a CPU, were made in
                inference mode, or a projection is adapted (LoRA), quantised, sharded or watched by a hook.
        """
        owners = self._owners_of_projections()
        check_plain("prepack", [getattr(owner, name) for owner, name in owners])
        fused = self._fused_projections()
        for one in fused:
            if not hasattr(one, "prepacked"):  # an adapter has taken its place
                raise ValueError(
                    f"Expected the projections of fuse_qkv_projections to prepack, got {type(one).__name__}"
                )
        for weight in [getattr(owner, name).weight for owner, name in owners] + [one.weight for one in fused]:
            _check_weight(weight)
        for owner, name in owners:
            if type(one := getattr(owner, name)) is nn.Linear:
                setattr(owner, name, PrepackedLinear(one))
            getattr(owner, name).prepacked.pack(getattr(owner, name).weight)
        for one in fused:
            one.prepacked = one.prepacked or Prepacked()
            one.prepacked.pack(one.weight)

    def unpack_projections(self) -> None:
        """Undo `prepack_projections`."""
        for owner, name in self._owners_of_projections():
            if isinstance(one := getattr(owner, name), PrepackedLinear):
                setattr(owner, name, one.plain())
        for one in self._fused_projections():
            one.prepacked = None

    def _owners_of_projections(self) -> list[tuple[nn.Module, str]]:
        """Every projection of the blocks by its parent and its name, but for fused ones."""
        parts = [part for layer in self._blocks() for part in (layer.attention, layer.mlp)]
        return [
            (part, name)
            for part in parts
            for name, _ in part.named_children()
            if name.endswith("_proj") and name != "qkv_proj"
        ]

    def _fused_projections(self) -> list[Any]:
        attentions = (layer.attention for layer in self._blocks())
        return [attention.qkv_proj for attention in attentions if attention.qkv_proj is not None]

    def _blocks(self) -> Iterable[Any]:
        return self.base_model.layers  # type: ignore[attr-defined]


def _check_weight(weight: Tensor) -> None:
    if weight.device.type != "cpu" or not can_prepack(weight.dtype):
        raise ValueError(
            "Expected weights on a CPU, of a type that oneDNN multiplies there (float32, or bfloat16 with AVX-512), "
            f"got {weight.dtype} on {weight.device}"
        )
    if weight.is_inference():
        raise ValueError("Expected a model that was made outside of torch.inference_mode, got one made in it")
