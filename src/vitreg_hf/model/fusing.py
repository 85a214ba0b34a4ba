# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Joining what a model keeps apart, on request: one product for queries, keys and values; LayerScale in projections.

Files do not know of the former: a fused model is saved, and loads a state dict, with three projections. The latter is
another model with the same outputs, and is saved as that.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .inference import is_watched
from .prepacking import Prepacked, PrepackingMixin, check_plain

PARTS = ("q_proj", "k_proj", "v_proj")


class FusedProjections(nn.Module):
    """Queries, keys and values of tokens `(..., D)` by one product, `(..., 3 * h * d)`.

    Args:
        parts: the three projections; a part without a bias has none here either.
    """

    def __init__(self, parts: Iterable[nn.Linear]) -> None:
        super().__init__()
        query, key, value = parts
        trained = query.weight.requires_grad
        self.biased = tuple(part.bias is not None for part in (query, key, value))
        joined = torch.cat([part.weight.detach() for part in (query, key, value)])
        self.weight = nn.Parameter(joined, requires_grad=trained)
        biases = [part.bias.detach() for part in (query, key, value) if part.bias is not None]
        self.bias = nn.Parameter(torch.cat(biases), requires_grad=trained) if biases else None
        self.prepacked: Prepacked | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """Project tokens."""
        product = F.linear if self.prepacked is None else self.prepacked.product
        return product(tokens, self.weight, self._whole_bias())

    def part(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Weight `(h * d, D)` and bias `(h * d,)` of queries (0), keys (1) or values (2); views."""
        return self.weight.chunk(3)[index], self._biases()[index]

    def _biases(self) -> list[Tensor | None]:
        """The bias of each part, or None."""
        left = iter(() if self.bias is None else self.bias.chunk(sum(self.biased)))
        return [next(left) if biased else None for biased in self.biased]

    def _whole_bias(self) -> Tensor | None:
        """One bias for all, of zeros where a part has none."""
        if self.bias is None or all(self.biased):
            return self.bias
        zeros = torch.zeros_like(self.weight.chunk(3)[0][:, 0])
        return torch.cat([zeros if bias is None else bias for bias in self._biases()])

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


def is_fused(attention: Any) -> bool:
    """Whether an attention has one projection, which nobody has put anything into the place of, or watches."""
    fused = attention.qkv_proj
    exact = type(fused) is FusedProjections and type(fused.weight) is nn.Parameter
    return exact and not is_watched(fused)


def check_trained_alike(attention: Any) -> None:
    """Raise ValueError where a part is trained and another is not: they will be one parameter."""
    trained = {name: p.requires_grad for part in PARTS for name, p in getattr(attention, part).named_parameters(part)}
    if len(set(trained.values())) > 1:
        raise ValueError(f"Expected projections that are all trained or all frozen to fuse, got {trained}")


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
    """Hook of a state dict: one projection under the names of three, where these would stand."""
    fused = attention.qkv_proj
    if fused is None:
        return
    _check_own(fused)
    own = {name: state_dict.pop(name) for name in [key for key in state_dict if key.startswith(prefix)]}
    joined = {kind: own.pop(f"{prefix}qkv_proj.{kind}", None) for kind in ("weight", "bias")}
    children = {name: value for name, value in own.items() if "." in name.removeprefix(prefix)}
    state_dict.update({name: value for name, value in own.items() if name not in children})
    weights = joined["weight"].chunk(3)
    biases = iter(() if joined["bias"] is None else joined["bias"].chunk(sum(fused.biased)))
    for name, weight, biased in zip(PARTS, weights, fused.biased, strict=True):
        state_dict[f"{prefix}{name}.weight"] = weight.clone()  # a file holds no part of another tensor
        if biased:
            state_dict[f"{prefix}{name}.bias"] = next(biases).clone()
    state_dict.update(children)


def join_state(attention: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook of loading a state dict: the reverse. What lacks a part is left as it is, and reported as missing."""
    fused = attention.qkv_proj
    if fused is None:
        return
    _check_own(fused)
    biased = [name for name, own in zip(PARTS, fused.biased, strict=True) if own]
    for kind, parts in (("weight", list(PARTS)), ("bias", biased)):
        names = [f"{prefix}{name}.{kind}" for name in parts]
        if names and all(name in state_dict for name in names):
            state_dict[f"{prefix}qkv_proj.{kind}"] = torch.cat([state_dict.pop(name) for name in names])


def _check_own(fused: Any) -> None:
    """Raise ValueError for what an adapter or another wrapper has put in the place of the fused projection."""
    if not isinstance(fused, FusedProjections):
        raise ValueError(
            f"Expected the projections of fuse_qkv_projections, got {type(fused).__name__}: adapt a model after "
            "unfuse_qkv_projections"
        )


@torch.no_grad()
def fold(factors: Tensor, projection: nn.Linear) -> None:
    """Multiply the factors of a LayerScale, `(D,)`, into the projection before it."""
    projection.weight.mul_(factors[:, None])
    if projection.bias is not None:
        projection.bias.mul_(factors)


class FusingMixin(PrepackingMixin):
    """For the same models, with two LayerScales in each block; what is fused can be prepacked, too."""

    def fuse_qkv_projections(self) -> None:
        """Compute queries, keys and values by one product: fewer kernels to start, the same outputs.

        Parameters are others then, `qkv_proj` in each block, so an optimizer has to be made afterwards. A saved model,
        and a state dict, hold three projections as ever. Made for inference: adapters, and checkpoints of sharded
        trainings, look for parameters by their names, and need `unfuse_qkv_projections` first.

        Raises:
            ValueError: if a projection is adapted (LoRA), quantised, sharded or watched by a hook, or trained where
                another is frozen.
        """
        separate = [layer.attention for layer in self._blocks() if layer.attention.qkv_proj is None]
        check_plain("fuse", [getattr(attention, name) for attention in separate for name in PARTS])
        for attention in separate:
            check_trained_alike(attention)
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
