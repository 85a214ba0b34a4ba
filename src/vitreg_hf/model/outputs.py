# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What forward passes return: Transformers' usual fields first, then the tokens by name.

Fields are tensors, tuples of tensors or None, so that `return_dict=False`, `torch.export` and DataParallel work.
Shapes: B images, P patches on a grid of rows x columns, R registers, N tokens, D channels, h heads.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
    SemanticSegmenterOutput,
)


@dataclass
class ViTRegTokens:
    """The tokens of the last layer by name, all views of one tensor, after the final norm.

    With `output_tokens=False` those that were not computed are None, and no item of a tuple (`return_dict=False`).

    Attributes:
        cls_token: `(B, D)`; None without CLS.
        register_tokens: `(B, R, D)`; None without registers.
        patch_tokens: `(B, P, D)`, row-major; those that patch dropout kept.
        patch_map: `(B, D, rows, columns)`; None where patch dropout left patches out.
        prefix_attentions: one entry per layer, `(B, h, prefix tokens, N)`, or None for a layer that was not asked for:
            softmax probabilities before dropout of what CLS and registers attend to.
        patch_mask: `(B, P)`, True for patches that hold real pixels; None when nothing was padded.
    """

    cls_token: Tensor | None = None
    register_tokens: Tensor | None = None
    patch_tokens: Tensor | None = None
    patch_map: Tensor | None = None
    prefix_attentions: tuple[Tensor | None, ...] | None = None
    patch_mask: Tensor | None = None


@dataclass
class ViTRegModelOutput(ViTRegTokens, BaseModelOutputWithPooling):
    """`last_hidden_state` `(B, N, D)` after the final norm, `hidden_states` before it, `pooler_output` `(B, D)`."""


@dataclass
class ViTRegImageClassifierOutput(ViTRegTokens, ImageClassifierOutput):
    """`logits` `(B, labels)`, `loss` when labels are given, and the tokens."""


@dataclass
class ViTRegMaskedImageModelingOutput(ViTRegTokens, MaskedImageModelingOutput):
    """`reconstruction` `(B, C, H, W)`, `loss` when patches are masked, and the tokens."""


@dataclass
class ViTRegSemanticSegmenterOutput(ViTRegTokens, SemanticSegmenterOutput):
    """`logits` `(B, labels, rows, columns)`, `loss` when labels are given, and the tokens."""


@dataclass
class ViTRegBackboneOutput(ViTRegTokens, BackboneOutput):
    """`feature_maps`, one per stage asked for, and the tokens."""


_PASSED_ON = ("hidden_states", "attentions", *ViTRegTokens.__dataclass_fields__)


def passed_on(outputs: ViTRegModelOutput) -> dict[str, Any]:
    """What a head returns of the model below it: hidden states, attentions and the named tokens."""
    return {name: getattr(outputs, name) for name in _PASSED_ON}
