# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Test-time registers (Jiang et al., arXiv 2506.08010): activations of a few neurons move onto tokens of their own.

Some neurons of the MLP write the outliers of a model that was trained without registers. Moved onto a token that holds
nothing else, they write there, and patches stay clean. Nothing is trained, and nothing but the config says so: the
tokens are no parameters.

Shapes: B images, N tokens, T test-time registers, F neurons of an MLP, k of them register neurons, D channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .configuration_vitreg import ViTRegConfig
from .token_layout import TokenLayout, packed, unpacked


class MovedNeurons:
    """Moves the activations of the register neurons of one block (the paper's Algorithm 2).

    On every token but the test-time registers a register neuron becomes 0, on CLS too unless the config keeps it. On
    its test-time register (they take turns) it becomes the maximum over all other tokens of that image, on others 0.
    Without test-time registers it becomes 0 everywhere. The reduction `"layer"` is that of the authors' code: one
    value for all register neurons of the block, from all of them on all tokens, test-time registers among them.

    Args:
        config: with `register_neurons`.
        layer: number of the block, from 0.
    """

    def __init__(self, config: ViTRegConfig, layer: int) -> None:
        self.layout = TokenLayout.from_config(config)
        self.keeps_cls = config.test_time_register_cls == "keep"
        self.reduction = config.register_neuron_reduction
        self.neurons, self.registers = neurons_of(config, layer)
        self._kept: dict[tuple, tuple[Tensor, Tensor]] = {}

    def __call__(
        self, activations: Tensor, group_sizes: Sequence[tuple[int, int]] = (), token_mask: Tensor | None = None
    ) -> Tensor:
        """Move them.

        Args:
            activations: `(B, N, F)`, after the activation function (of SwiGLU the product with the gate), or those of
                several groups of images behind one another, `(sum of B_i * N_i, F)`.
            group_sizes: `(B_i, N_i)` of each group; empty for a batch of images of one size.
            token_mask: `(B, N)`, True for tokens that take part; of padding no maximum is taken.

        Returns:
            The same, with those of register neurons moved.
        """
        if group_sizes:
            return packed([self._moved(group, None) for group in unpacked(activations, group_sizes)])
        return self._moved(activations, token_mask)

    def _moved(self, activations: Tensor, token_mask: Tensor | None) -> Tensor:
        neurons, owners = self._places(activations)
        own = activations.index_select(-1, neurons)  # (B, N, k)
        others = self.layout.without_test_time(own)  # (B, N - T, k)
        left = self.layout.cls_alone(others) if self.keeps_cls else torch.zeros_like(others)
        if self.layout.num_test_time_registers:
            left = self.layout.with_test_time(left, self._largest(own, token_mask) * owners)
        return activations.index_copy(-1, neurons, left)

    def _largest(self, own: Tensor, mask: Tensor | None) -> Tensor:
        """What each neuron has on its register, `(B, 1, k)`, from what it has on all tokens, `(B, N, k)`."""
        if self.reduction == "layer":  # of all neurons of the block on all tokens, these registers too
            values, sizes = own.flatten(1), _sizes(own, mask).flatten(1)
            return values.gather(1, sizes.argmax(1, keepdim=True))[..., None].expand(-1, -1, own.shape[-1])
        others = self.layout.without_test_time(own)
        mask = None if mask is None else self.layout.without_test_time(mask)
        if self.reduction == "max":
            return (others if mask is None else others.masked_fill(~mask[..., None], -torch.inf)).amax(1, keepdim=True)
        return others.gather(1, _sizes(others, mask).argmax(1, keepdim=True))

    def _places(self, activations: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of the neurons, `(k,)`, and which register each is moved to, `(T, k)` of ones and zeros."""
        # Not where a pass is traced or a tensor only pretends: what is kept must be good for every other pass.
        if torch.compiler.is_compiling() or type(activations) is not Tensor:
            return self._tensors(activations)
        key = (activations.device, activations.dtype, torch.is_inference_mode_enabled())
        if key not in self._kept:
            self._kept[key] = self._tensors(activations)
        return self._kept[key]

    def _tensors(self, activations: Tensor) -> tuple[Tensor, Tensor]:
        neurons = torch.tensor(self.neurons, device=activations.device)
        registers = torch.arange(self.layout.num_test_time_registers, device=activations.device)
        owners = (registers[:, None] == torch.tensor(self.registers, device=activations.device)).to(activations.dtype)
        return neurons, owners


def _sizes(values: Tensor, mask: Tensor | None) -> Tensor:
    """Magnitudes of `(B, N, k)`, below any other where `mask` `(B, N)` is False."""
    return values.abs() if mask is None else values.abs().masked_fill(~mask[..., None], -1.0)


def neurons_of(config: ViTRegConfig, layer: int) -> tuple[list[int], list[int]]:
    """The register neurons of a block, and the test-time register of each: over all blocks they take turns."""
    count = max(config.num_test_time_registers, 1)
    own = [(neuron, i % count) for i, (place, neuron) in enumerate(config.register_neurons or ()) if place == layer]
    return [neuron for neuron, _ in own], [register for _, register in own]


def initial_tokens(config: ViTRegConfig, patches: Tensor, patch_mask: Tensor | None) -> Tensor:
    """What test-time registers hold before the first block, `(1 or B, T, D)`.

    Args:
        config: with `test_time_register_init`: zero, the mean of the image's patches, or fixed pseudo-random numbers
            with their root mean square. The authors find no difference.
        patches: `(B, P, D)`, as the first block gets them.
        patch_mask: `(B, P)`, True for patches with real pixels, or None.
    """
    count, width = config.num_test_time_registers, config.hidden_size
    if config.test_time_register_init == "zero":
        return patches.new_zeros(1, count, width)
    real = patches.to(torch.promote_types(patches.dtype, torch.float32))  # sums overflow half precision
    number: int | Tensor = patches.shape[1]
    if patch_mask is not None:
        weights = patch_mask[..., None].to(real.dtype)
        real, number = real * weights, weights.sum(1, keepdim=True)
    if config.test_time_register_init == "mean":
        return (real.sum(1, keepdim=True) / number).to(patches.dtype).expand(-1, count, -1)
    size = (real.square().sum((1, 2), keepdim=True) / (number * width)).sqrt()
    return (_scattered(count, width, patches.device) * size).to(patches.dtype)


def _scattered(count: int, width: int, device: torch.device) -> Tensor:
    """Numbers of mean 0 and variance 1, `(1, T, D)`, to the last bit the same on every device and in every export.

    A generator is in no export, and of sines the last bits differ; these come of whole numbers.
    """
    prime = 2**31 - 1
    numbers = torch.arange(count * width, device=device).view(1, count, width)
    for _ in range(3):
        numbers = (numbers * numbers + 48271 * numbers + 1) % prime  # below 2**63
    return (numbers.to(torch.float32) / prime - 0.5) * 12**0.5
