# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Registers in a trained model: at test time, as a bias of attention, or as new parameters to be tuned.

The models that come out are ordinary ones of the family, and share their weights with the one that came in.
"""

import operator
from collections.abc import Iterable
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from vitreg_hf.model.configuration_vitreg import ViTRegConfig
from vitreg_hf.model.modeling_vitreg import ViTRegModel, ViTRegPreTrainedModel
from vitreg_hf.register_neurons.ranking import RegisterNeurons

Model = TypeVar("Model", bound=ViTRegPreTrainedModel)


def add_test_time_registers(
    model: Model,
    neurons: RegisterNeurons | Iterable[tuple[int, int]],
    num_registers: int = 1,
    *,
    cls: Literal["zero", "keep"] = "zero",
    init: Literal["zero", "mean", "random"] = "zero",
    reduction: Literal["max", "largest", "layer"] | None = None,
) -> Model:
    """A model whose register neurons write to test-time registers rather than to patches (arXiv 2506.08010).

    Nothing is trained, and no weight changes: the config says which neurons, and the MLPs move their activations.

    Args:
        model: of this family, with or without a head, and with or without trained registers.
        neurons: pairs of layer and neuron, as `find_register_neurons` finds them; they replace those that the model
            has already.
        num_registers: how many test-time registers; the neurons take turns. One is enough (the authors' finding).
        cls: whether register neurons become 0 on CLS too (the paper), or CLS keeps them (the authors' code).
        init: what the tokens hold at first; makes no difference (the authors' finding).
        reduction: what a register gets of each neuron; left out, what the neurons were found with, else `max`.

    Returns:
        A new model of the same class that shares its weights with the given one.

    Raises:
        ValueError: if there are no neurons, they are none of this model, or it has an attention bias for others.
    """
    config = model.config
    if config.register_neurons and config.attention_bias_kv:
        raise ValueError("Expected a model as it was trained, got one with an attention bias for its register neurons")
    pairs = [[operator.index(layer), operator.index(neuron)] for layer, neuron in neurons]
    if not pairs:
        raise ValueError("Expected at least one register neuron, got none")
    if num_registers < 1:
        raise ValueError(f"Expected one test-time register or more, got {num_registers}")
    found = neurons.reduction if isinstance(neurons, RegisterNeurons) else "max"
    return with_config(
        model,
        register_neurons=pairs,
        num_test_time_registers=num_registers,
        test_time_register_cls=cls,
        test_time_register_init=init,
        register_neuron_reduction=reduction or found,
    )


def add_attention_bias(model: Model, keys: Tensor, values: Tensor) -> Model:
    """A model whose test-time registers became one more key and value per head, the same for all images.

    Register neurons are 0 on every token then, and there is no token left to compute.

    Args:
        model: with one test-time register.
        keys, values: mean key and value of the register in every block, `(L, h, d)` for L blocks with h heads of d
            channels: `mean_register`.

    Returns:
        A new model of the same class that shares its other weights with the given one.

    Raises:
        ValueError: if the model has none or several, has such biases already, or shapes do not fit.
    """
    config = model.config
    if config.num_test_time_registers != 1 or config.attention_bias_kv:
        got = f"{config.num_test_time_registers} and attention_bias_kv={config.attention_bias_kv}"
        raise ValueError(f"Expected a model with one test-time register and no attention bias of its own, got {got}")
    shape = (config.num_hidden_layers, config.num_attention_heads, config.attention_head_dim)
    if keys.shape != shape or values.shape != shape:
        raise ValueError(f"Expected keys and values of shape {shape}, got {tuple(keys.shape)}, {tuple(values.shape)}")
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    like = cast(ViTRegModel, model.base_model).embeddings.patch_embeddings.projection.weight
    biases = {
        f"{prefix}layers.{layer}.attention.{name}": tensor[layer].to(like, copy=True)
        for name, tensor in (("bias_k", keys), ("bias_v", values))
        for layer in range(config.num_hidden_layers)
    }
    return with_config(model, biases, num_test_time_registers=0, attention_bias_kv=True)


@torch.no_grad()
def add_registers(model: Model, num_registers: int, initial: Tensor | None = None, seed: int = 0) -> Model:
    """A model with new learned registers, to be tuned (`examples/distill_registers.py`, `--tuning registers`).

    Every register starts as a slightly different average patch, so that attention sees one more average patch and
    outputs hardly change; registers that started equal would stay copies of one another.

    Args:
        model: of this family, with or without registers already.
        num_registers: how many to add, behind those that are there.
        initial: average patch, `(D,)`, of `mean_patch`. None: small random vectors, which
            change outputs a little more.
        seed: of the differences.

    Returns:
        A new model of the same class that shares its other weights with the given one.

    Raises:
        ValueError: if none is added, the average patch has another width, or registers have positions.
    """
    config = model.config
    if num_registers < 1:
        raise ValueError(f"Expected one register or more, got {num_registers}")
    if config.register_position_embeddings:
        raise ValueError("Expected registers without positions, got register_position_embeddings=True")
    width = config.hidden_size
    if initial is not None and initial.shape != (width,):
        raise ValueError(f"Expected an average patch of shape ({width},), got {tuple(initial.shape)}")
    base = cast(ViTRegModel, model.base_model)
    like = base.embeddings.patch_embeddings.projection.weight
    noise = torch.randn(1, num_registers, width, generator=torch.Generator().manual_seed(seed)).to(like)
    if initial is None:
        added = noise * float(config.token_initializer_range)
    else:
        added = initial.to(like) + noise * (0.1 * initial.std().to(like))
    old = base.embeddings.register_tokens
    name = "embeddings.register_tokens" if base is model else f"{model.base_model_prefix}.embeddings.register_tokens"
    tokens = added if old is None else torch.cat([old, added], dim=1)
    return with_config(model, {name: tokens}, num_register_tokens=config.num_register_tokens + num_registers)


def with_config(model: Model, weights: dict[str, Tensor] | None = None, **changes: Any) -> Model:
    """A model of the same class with other fields of its config, which shares its weights.

    What is frozen stays so, and every part is in the mode that it was in; new parameters are to be trained.

    Args:
        model: any model of the family.
        weights: parameters that are new or changed, by name.
        changes: fields of the config.

    Raises:
        ValueError: if the config cannot be built.
    """
    if isinstance(model, ViTRegModel) and model.embeddings.mask_token is not None:
        changes["use_mask_token"] = True  # a model may have one that its config does not tell of
    config = ViTRegConfig.from_dict(model.config.to_dict(), **changes)
    config._attn_implementation = model.config._attn_implementation
    config.name_or_path = model.config.name_or_path
    with torch.device("meta"):
        changed = type(model)(config)
    weights = weights or {}
    changed.load_state_dict({**model.state_dict(), **weights}, strict=True, assign=True)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, parameter in changed.named_parameters():
        parameter.requires_grad_(name in weights or name not in frozen)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in changed.named_modules():
        module.training = modes.get(name, model.training)
    return changed
