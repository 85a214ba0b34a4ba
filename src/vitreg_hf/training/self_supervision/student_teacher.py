# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The network that is a student once and a teacher once: a backbone, and heads on CLS and on masked patches.

Shapes: B images with V = 2 global and L local crops, S = V + L; P patches of a global crop, M masked patches of all
global crops together, D channels, K prototypes.
"""

import copy
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vitreg_hf.model.configuration_vitreg import ViTRegConfig
from vitreg_hf.model.modeling_vitreg import ViTRegModel
from vitreg_hf.training.self_supervision.head import DinoHead
from vitreg_hf.training.self_supervision.multi_crop import NUM_GLOBAL_CROPS
from vitreg_hf.training.self_supervision.patch_masks import PatchMasks


class NetworkOutput(NamedTuple):
    """What losses read; registers are not among it.

    Attributes:
        cls_scores: of CLS in each crop, global ones first, `(S, B, K)`.
        patch_scores: of masked patches, `(M, K)`; None without masks.
        cls_tokens: CLS of global crops after the final norm, `(V, B, D)`.
        patch_tokens: patches of global crops after the final norm, `(V * B, P, D)`.
    """

    cls_scores: Tensor
    patch_scores: Tensor | None
    cls_tokens: Tensor
    patch_tokens: Tensor


class DinoNetwork(nn.Module):
    """A backbone with the heads of self-supervision.

    Args:
        config: of the backbone, which needs a CLS token.
        num_prototypes: K.
        head_hidden_size: width of the heads' hidden layers.
        head_bottleneck_size: width of the vectors that heads compare with prototypes.
        patch_head: `shared` scores patches with the head of CLS, `separate` with one of their own, `none` not at all,
            so that there is no mask token, either: a parameter without a gradient stops distributed training.

    Raises:
        ValueError: if the config has no CLS token.
    """

    def __init__(
        self,
        config: ViTRegConfig,
        num_prototypes: int,
        head_hidden_size: int = 2048,
        head_bottleneck_size: int = 256,
        patch_head: str = "shared",
    ) -> None:
        super().__init__()
        if not config.use_cls_token:
            raise ValueError("Expected a model with a CLS token, got use_cls_token=False")

        def head() -> DinoHead:
            return DinoHead(config.hidden_size, num_prototypes, head_hidden_size, head_bottleneck_size)

        self.backbone = ViTRegModel(config, use_mask_token=patch_head != "none")
        self.head = head()
        self.patch_head = head() if patch_head == "separate" else None

    def forward(
        self, global_crops: Tensor, local_crops: Tensor | None, masks: PatchMasks | None, hide: bool
    ) -> NetworkOutput:
        """One pass over all crops.

        Args:
            global_crops: `(V * B, 3, h, w)`, crop by crop.
            local_crops: `(L * B, 3, l, l)`, crop by crop; None for none.
            masks: which patches of global crops are scored; None for none.
            hide: the student sees the mask token instead of those patches; the teacher sees the patches.
        """
        crops = [global_crops] if local_crops is None else [global_crops, local_crops]
        hidden = masks.masked if masks is not None and hide else None
        outputs = self.backbone.forward_packed(crops, [hidden] + [None] * (len(crops) - 1))
        patches = cast(Tensor, outputs[0].patch_tokens)
        cls_tokens = torch.cat([cast(Tensor, output.cls_token) for output in outputs])
        batch_size = len(global_crops) // NUM_GLOBAL_CROPS
        cls_scores, patch_scores = self.head(cls_tokens).unflatten(0, (-1, batch_size)), None
        if masks is not None:
            scored = patches.flatten(0, 1).index_select(0, masks.indices)
            patch_scores = (self.head if self.patch_head is None else self.patch_head)(scored)
        of_global_crops = cast(Tensor, outputs[0].cls_token).unflatten(0, (-1, batch_size))
        return NetworkOutput(cls_scores, patch_scores, of_global_crops, patches)

    def trained_backbone(self) -> ViTRegModel:
        """A copy of the backbone as every other task loads it: without the mask token."""
        plain = ViTRegModel(self.backbone.config)
        weights = self.backbone.state_dict()
        plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
        return plain.eval()


def create_teacher(student: nn.Module) -> nn.Module:
    """A copy that does not learn by gradients, without dropout and drop path."""
    return copy.deepcopy(student).requires_grad_(False).eval()


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher: `teacher = momentum * teacher + (1 - momentum) * student`; buffers are copied.

    Args:
        teacher, student: of one architecture.
        momentum: 0 to 1.
    """
    get_ema_multi_avg_fn(momentum)(list(teacher.parameters()), list(student.parameters()), None)
    for mine, theirs in zip(teacher.buffers(), student.buffers(), strict=True):
        mine.copy_(theirs)


def parameter_groups(
    student: DinoNetwork,
    weight_decay: float,
    layer_decay: float = 1.0,
    patch_embedding_factor: float = 1.0,
    decay_tokens: bool = False,
) -> list[dict[str, object]]:
    """Parameters with one learning rate and decay each: what schedules of the two are told apart by.

    Args:
        student: its backbone says how deep a parameter lies and what does not decay; biases do not, either. Nor do
            prototypes, whose length has no effect.
        weight_decay: of the others.
        layer_decay: learning rate of a layer as a share of that of the layer above it; heads have the full one.
        patch_embedding_factor: multiplies the learning rate of the projection of patches once more.
        decay_tokens: CLS, registers, mask token and positions decay, too, as DINOv2 has it.

    Returns:
        Groups for an optimizer with `params`, `weight_decay`, `lr_factor`, `decays` and `last_layer`: prototypes, that
        may rest in the first steps.
    """
    backbone = student.backbone
    layers = {f"backbone.{name}": layer for name, layer in backbone.parameter_layers().items()}
    exempt = {f"backbone.{name}" for name in (() if decay_tokens else backbone.token_parameters())}
    top = max(layers.values())
    grouped: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        last_layer = name.endswith("last_layer.weight")
        factor = layer_decay ** (top - layers.get(name, top))
        if name.startswith("backbone.embeddings.patch_embeddings."):
            factor *= patch_embedding_factor
        decays = parameter.ndim > 1 and name not in exempt and not last_layer
        grouped.setdefault((factor, decays, last_layer), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decays else 0.0,
            "lr_factor": factor,
            "decays": decays,
            "last_layer": last_layer,
        }
        for (factor, decays, last_layer), parameters in grouped.items()
    ]
