# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What turns a token into scores of prototypes: the projection head of DINO (arXiv 2104.14294, appendix C).

Shapes: D channels of a token, K prototypes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_INITIAL_STD = 0.02


class DinoHead(nn.Module):
    """Three layers to a narrow vector of length 1, whose cosine to each of K prototypes is its score.

    Args:
        in_features: D.
        num_prototypes: K.
        hidden_features: width of the two hidden layers.
        bottleneck_features: width of what is compared with prototypes.
    """

    def __init__(
        self, in_features: int, num_prototypes: int, hidden_features: int = 2048, bottleneck_features: int = 256
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_features, hidden_features),
            nn.GELU(),
            nn.Linear(hidden_features, hidden_features),
            nn.GELU(),
            nn.Linear(hidden_features, bottleneck_features),
        )
        self.last_layer = Prototypes(bottleneck_features, num_prototypes)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=_INITIAL_STD)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores `(..., K)` between -1 and 1 of tokens `(..., D)`."""
        bottleneck = self.mlp(tokens)
        eps = 1e-6 if bottleneck.dtype == torch.float16 else 1e-12
        return self.last_layer(F.normalize(bottleneck, dim=-1, eps=eps))


class Prototypes(nn.Module):
    """A linear layer without bias whose rows have length 1: weight normalisation with its gain frozen to 1."""

    def __init__(self, in_features: int, num_prototypes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_prototypes, in_features))
        nn.init.trunc_normal_(self.weight, std=_INITIAL_STD)

    def forward(self, vectors: Tensor) -> Tensor:
        """`(..., in_features)` to `(..., K)`."""
        return F.linear(vectors, F.normalize(self.weight, dim=-1))
