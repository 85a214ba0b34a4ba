# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Joining what a model keeps apart, on request: one product for queries, keys and values; LayerScale in projections.

Files do not know of the former: a fused model is saved, and loads a state dict, with three projections. The latter is
another model with the same outputs, and is saved as that.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .inference import is_plain

PARTS = ("q_proj", "k_proj", "v_proj")


class FusedProjections(nn.Linear):
    """Queries, keys and values of tokens `(..., D)` by one product, `(..., 3 * h * d)`.

    Args:
        parts: the three projections. Those without a bias get one of zeros if another has one.
    """

    def __init__(self, parts: Iterable[nn.Linear]) -> None:
        query, key, value = parts
        self.biased = tuple(part.bias is not None for part in (query, key, value))
        super().__init__(query.in_features, 3 * query.out_features, bias=any(self.biased), device="meta")
        trained = query.weight.requires_grad
        joined = torch.cat([part.weight.detach() for part in (query, key, value)])
        self.weight = nn.Parameter(joined, requires_grad=trained)
        if any(self.biased):
            zeros = torch.zeros_like(query.weight[:, 0])
            biases = [zeros if part.bias is None else part.bias.detach() for part in (query, key, value)]
            self.bias = nn.Parameter(torch.cat(biases), requires_grad=trained)

    def part(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Weight `(h * d, D)` and bias `(h * d,)` of queries (0), keys (1) or values (2); views."""
        bias = self.bias.chunk(3)[index] if self.biased[index] else None
        return self.weight.chunk(3)[index], bias

    def apart(self) -> dict[str, nn.Linear]:
        """Three projections of their own again, by name."""
        made = {}
        for index, name in enumerate(PARTS):
            weight, bias = self.part(index)
            one = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
            one.weight = nn.Parameter(weight.detach().clone(), requires_grad=self.weight.requires_grad)
            if bias is not None:
                one.bias = nn.Parameter(bias.detach().clone(), requires_grad=self.weight.requires_grad)
            made[name] = one.train(self.training)
        return made


def check_plain(purpose: str, projections: Iterable[nn.Module]) -> None:
    """Raise ValueError for a projection that is more than its weights: adapted, quantised, sharded or watched."""
    for one in projections:
        if not is_plain(one):
            raise ValueError(f"Expected nn.Linear without adapters or hooks to {purpose}, got {type(one).__name__}")


def fuse(attention: Any) -> None:
    """Put one projection in the place of three."""
    attention.qkv_proj = FusedProjections(getattr(attention, name) for name in PARTS)
    for name in PARTS:
        setattr(attention, name, None)


def unfuse(attention: Any) -> None:
    """Three projections in the place of one again; nothing if there is none."""
    if attention.qkv_proj is not None:
        for name, part in attention.qkv_proj.apart().items():
            setattr(attention, name, part)
        attention.qkv_proj = None


def split_state(attention: Any, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Hook of a state dict: one projection under the names of three."""
    fused = attention.qkv_proj
    if fused is None:
        return
    for kind in ("weight", "bias"):
        joined = state_dict.pop(f"{prefix}qkv_proj.{kind}", None)
        if joined is None:
            continue
        for name, values, biased in zip(PARTS, joined.chunk(3), fused.biased, strict=True):
            if kind == "weight" or biased:
                state_dict[f"{prefix}{name}.{kind}"] = values.clone()  # a file holds no part of another tensor


def join_state(attention: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook of loading a state dict: the reverse. What lacks a part is left as it is, and reported as missing."""
    fused = attention.qkv_proj
    if fused is None:
        return
    for kind in ("weight", "bias"):
        names = [f"{prefix}{name}.{kind}" for name in PARTS]
        wanted = [kind == "weight" or biased for biased in fused.biased]
        if not any(wanted) or not all(name in state_dict for name, own in zip(names, wanted, strict=True) if own):
            continue
        like = next(state_dict[name] for name, own in zip(names, wanted, strict=True) if own)
        parts = [state_dict.pop(n) if own else torch.zeros_like(like) for n, own in zip(names, wanted, strict=True)]
        state_dict[f"{prefix}qkv_proj.{kind}"] = torch.cat(parts)


@torch.no_grad()
def fold(factors: Tensor, projection: nn.Linear) -> None:
    """Multiply the factors of a LayerScale, `(D,)`, into the projection before it."""
    projection.weight.mul_(factors[:, None])
    if projection.bias is not None:
        projection.bias.mul_(factors)


class FusingMixin:
    """For models of blocks with `attention`, `mlp` and two LayerScales, in `base_model.layers`."""

    def fuse_qkv_projections(self) -> None:
        """Compute queries, keys and values by one product: fewer kernels to start, the same outputs.

        Parameters are others then, `qkv_proj` in each block, so an optimizer has to be made afterwards. A saved model,
        and a state dict, hold three projections as ever.

        Raises:
            ValueError: if a projection is adapted (LoRA), quantised, sharded or watched by a hook.
        """
        separate = [layer.attention for layer in self._blocks() if layer.attention.qkv_proj is None]
        check_plain("fuse", [getattr(attention, name) for attention in separate for name in PARTS])
        for attention in separate:
            fuse(attention)

    def unfuse_qkv_projections(self) -> None:
        """Undo `fuse_qkv_projections`."""
        for layer in self._blocks():
            unfuse(layer.attention)

    def fold_layer_scale(self) -> None:
        """Multiply LayerScale into the projections before it: outputs equal but for rounding, `layerscale_value` of
        the config None. What is saved afterwards is that model. Nothing for a model without LayerScale.

        Raises:
            ValueError: if a projection is adapted (LoRA), quantised, sharded or watched by a hook.
        """
        config = self.config  # type: ignore[attr-defined]
        if config.layerscale_value is None:
            return
        scaled = [(layer, "layer_scale1", layer.attention.o_proj) for layer in self._blocks()]
        scaled += [(layer, "layer_scale2", layer.mlp.down_proj) for layer in self._blocks()]
        check_plain("fold LayerScale into", [projection for _, _, projection in scaled])
        for layer, name, projection in scaled:
            fold(getattr(layer, name).lambda1, projection)
            setattr(layer, name, nn.Identity())
        config.layerscale_value = None

    def _blocks(self) -> Iterable[Any]:
        return self.base_model.layers  # type: ignore[attr-defined]
