# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What CLS and registers attend to, as maps over the patch grid. The only caller of a model in this room.

Shapes: B images, h heads, T prefix tokens (CLS, then registers), rows x columns patches.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from vitreg_hf.model.modeling_vitreg import ViTRegModel, ViTRegPreTrainedModel
from vitreg_hf.model.token_layout import TokenLayout


@dataclass(frozen=True)
class PrefixAttention:
    """Attention of one layer from each prefix token to the patches.

    Attributes:
        layer: index of the layer, from 0.
        token_names: "CLS", "register 1", and so on, one per prefix token.
        maps: softmax probabilities `(B, h, T, rows, columns)`; what is missing to a sum of 1 goes to the prefix.
    """

    layer: int
    token_names: list[str]
    maps: Tensor

    def mean_over_heads(self) -> Tensor:
        """`(B, T, rows, columns)`."""
        return self.maps.mean(dim=1)

    def equal_share(self) -> float:
        """What each of all tokens would get if all got the same."""
        return 1 / (len(self.token_names) + self.maps[0, 0, 0].numel())

    def share_on_patches(self) -> Tensor:
        """Share of each token's attention that goes to patches, not to the prefix, mean over heads, `(B, T)`."""
        return self.mean_over_heads().sum(dim=(-2, -1))


@torch.inference_mode()
def prefix_attention(model: ViTRegPreTrainedModel, pixel_values: Tensor, layer: int = -1) -> PrefixAttention:
    """Run a model and keep what its CLS and registers attend to in one layer.

    The model returns the attention of these few tokens alone (`output_prefix_attentions`): no N x N map is made.

    Args:
        model: any model of the family, in evaluation mode.
        pixel_values: `(B, C, H, W)`, as the image processor makes them.
        layer: index of the layer; negative counts from the last.

    Raises:
        ValueError: if the model is in training mode, has no such layer, or has neither CLS nor registers.
    """
    if model.training:
        raise ValueError("Expected a model in evaluation mode, got one in training mode: call model.eval() first")
    backbone = cast(ViTRegModel, model.base_model)
    outputs = backbone(pixel_values.to(model.device), output_prefix_attentions=[layer])
    grid = (outputs.patch_map.shape[-2], outputs.patch_map.shape[-1])
    maps = backbone.layout.attention_to_patches(outputs.prefix_attentions[layer], grid)
    return PrefixAttention(layer % len(backbone.layers), token_names(backbone.layout), maps)


def token_names(layout: TokenLayout) -> list[str]:
    """Names of the prefix tokens in their order."""
    registers = [f"register {i}" for i in range(1, layout.num_registers + 1)]
    test_time = [f"test-time register {i}" for i in range(1, layout.num_test_time_registers + 1)]
    return ["CLS"] * layout.num_cls + registers + test_time
