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
    Without test-time registers it becomes 0 everywhere.

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
            group_sizes: `(B_i, N_i)` of each group.
            token_mask: `(B, N)`, True for tokens that take part; of padding no maximum is taken.

        Returns:
            The same, with those of register neurons moved.
        """
        if len(group_sizes) > 1:
            return packed([self._moved(group, None) for group in unpacked(activations, group_sizes)])
        return self._moved(activations, token_mask)

    def _moved(self, activations: Tensor, token_mask: Tensor | None) -> Tensor:
        neurons, owners = self._places(activations)
        others = self.layout.without_test_time(activations.index_select(-1, neurons))  # (B, N - T, k)
        left = self.layout.cls_alone(others) if self.keeps_cls else torch.zeros_like(others)
        if self.layout.num_test_time_registers:
            mask = None if token_mask is None else self.layout.without_test_time(token_mask)
            left = self.layout.with_test_time(left, self._largest(others, mask) * owners)
        return activations.index_copy(-1, neurons, left)

    def _largest(self, others: Tensor, mask: Tensor | None) -> Tensor:
        """What each neuron has on its register, `(B, 1, k)`."""
        if self.reduction == "max":
            return (others if mask is None else others.masked_fill(~mask[..., None], -torch.inf)).amax(1, keepdim=True)
        sizes = others.abs() if mask is None else others.abs() * mask[..., None]
        if self.reduction == "layer":  # of all neurons of the block, as the authors' code has it
            place = sizes.flatten(1).argmax(1)[:, None, None]
            return others.flatten(1)[..., None].gather(1, place).expand(-1, -1, others.shape[-1])
        return others.gather(1, sizes.argmax(1, keepdim=True))

    def _places(self, activations: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of the neurons, `(k,)`, and which register each is moved to, `(T, k)` of ones and zeros."""
        key = (activations.device, activations.dtype, torch.is_inference_mode_enabled())
        if key in self._kept and not torch.compiler.is_compiling():
            return self._kept[key]
        neurons = torch.tensor(self.neurons, device=activations.device)
        registers = torch.arange(self.layout.num_test_time_registers, device=activations.device)
        owners = (registers[:, None] == torch.tensor(self.registers, device=activations.device)).to(activations.dtype)
        if type(neurons) is Tensor and not torch.compiler.is_compiling():  # and not one that only pretends
            self._kept[key] = neurons, owners
        return neurons, owners


def neurons_of(config: ViTRegConfig, layer: int) -> tuple[list[int], list[int]]:
    """The register neurons of a block, and the test-time register of each: over all blocks they take turns."""
    count = max(config.num_test_time_registers, 1)
    own = [(neuron, i % count) for i, (place, neuron) in enumerate(config.register_neurons or ()) if place == layer]
    return [neuron for neuron, _ in own], [register for _, register in own]


def initial_tokens(config: ViTRegConfig, patches: Tensor, patch_mask: Tensor | None) -> Tensor:
    """What test-time registers hold before the first block, `(1 or B, T, D)`.

    Args:
        config: with `test_time_register_init`: zero, the mean of the image's patches, or a fixed pseudo-random vector
            of their standard deviation. The authors find no difference.
        patches: `(B, P, D)`, as the first block gets them.
        patch_mask: `(B, P)`, True for patches with real pixels, or None.
    """
    count, width = config.num_test_time_registers, config.hidden_size
    if config.test_time_register_init == "zero":
        return patches.new_zeros(1, count, width)
    weights = None if patch_mask is None else patch_mask[..., None].to(patches.dtype)
    real = patches if weights is None else patches * weights
    number = patches.shape[1] if weights is None else weights.sum(1, keepdim=True)
    if config.test_time_register_init == "mean":
        return (real.sum(1, keepdim=True) / number).expand(-1, count, -1)
    deviation = (real.square().sum((1, 2), keepdim=True) / (number * width)).sqrt()
    return _scattered(count, width, patches) * deviation


def _scattered(count: int, width: int, like: Tensor) -> Tensor:
    """Numbers of mean 0 and variance 1 that are the same everywhere, `(1, T, D)`: no generator, which exports lack."""
    numbers = torch.arange(count * width, device=like.device, dtype=torch.float32).view(1, count, width)
    uniform = (torch.sin(numbers * 12.9898) * 43758.5453).remainder(1.0)
    return ((uniform - 0.5) * 12**0.5).to(like.dtype)
