# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""LoRA (Hu et al., arXiv 2106.09685): small matrices beside frozen projections, which vanish in them at the end.

The matrices are those of `peft`. They are put into the model itself, which stays what it was to a training loop; once
merged, it is a plain checkpoint that `from_pretrained` loads without peft.
"""

from typing import Any, TypeVar

import torch

from vitreg_hf.model.modeling_vitreg import ViTRegForImageClassification

# Names of the family's modules, the same in every checkpoint of it.
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("up_proj", "down_proj", "gate_proj")

Model = TypeVar("Model", bound=torch.nn.Module)


def add_lora(
    model: ViTRegForImageClassification,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    mlp: bool = False,
    registers: bool = False,
) -> None:
    """Freeze a model but for its head, and put a pair of trained matrices beside every projection of attention.

    The model computes what it did before, until it is trained: one matrix of each pair starts at zero. To be called
    before the model is prepared for several processes.

    Args:
        model: not wrapped; changed in place.
        rank: of the product of the two matrices.
        alpha: the product is scaled by `alpha / rank`.
        dropout: of what goes into the matrices, in training.
        mlp: also beside the projections of the MLP.
        registers: train the registers, too.

    Raises:
        ValueError: without peft, if the model has matrices already or is fused, for registers of a model without, or
            a rank or dropout out of range.
    """
    if rank < 1 or not 0 <= dropout < 1 or alpha <= 0:
        raise ValueError(f"Expected rank >= 1, alpha > 0 and dropout in [0, 1), got {rank}, {alpha} and {dropout}")
    tokens = model.vitreg.embeddings.register_tokens
    if registers and tokens is None:
        raise ValueError("Expected a model with registers to train them, got one without")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError('Expected peft for LoRA, got no such package: pip install "vitreg_hf[train]"') from error
    if _adapted(model):
        raise ValueError("Expected a model without LoRA, got one with it: merge it first")
    if any(name.endswith(".qkv_proj") for name, _ in model.vitreg.named_modules()):
        raise ValueError("Expected a model with three projections for LoRA, got a fused one: unfuse_qkv_projections()")
    wanted = {*ATTENTION_PROJECTIONS, *(MLP_PROJECTIONS if mlp else ())}
    present = {name.rpartition(".")[2] for name, _ in model.vitreg.layers.named_modules()}
    scale: Any = alpha  # declared a whole number by peft, which only divides it
    config = LoraConfig(r=rank, lora_alpha=scale, lora_dropout=dropout, target_modules=sorted(wanted & present))
    inject_adapter_in_model(config, model)
    model.classifier.requires_grad_(True)
    if registers and tokens is not None:
        tokens.requires_grad_(True)


def merge_lora(model: Model) -> Model:
    """Add the trained matrices to the projections, in place, and take them out; returns the model, a plain one.

    Raises:
        ValueError: if there are none, or a weight would not be finite.
    """
    adapted = _adapted(model)
    if not adapted:
        raise ValueError("Expected a model with LoRA, got one without")
    for name in adapted:
        layer = model.get_submodule(name)
        layer.merge(safe_merge=True)  # type: ignore[operator]  # raises what is said above
        model.set_submodule(name, layer.get_base_layer())  # type: ignore[operator]
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model.requires_grad_(True)


def _adapted(model: torch.nn.Module) -> list[str]:
    """Names of projections with LoRA."""
    return [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
