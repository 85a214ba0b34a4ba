# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What a classifier is trained on.

Shapes: B images, K classes.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def classification_loss(kind: Literal["cross_entropy", "bce"], label_smoothing: float = 0.0) -> Loss:
    """A function of logits `(B, K)` and targets, class indices `(B,)` or shares of classes `(B, K)`; mean over B.

    Args:
        kind: `cross_entropy`, or `bce`: every class on its own, its target 1 for every class that an image has a share
            of, as DeiT III trains with MixUp and CutMix (Touvron et al., arXiv 2204.07118, section 3).
        label_smoothing: share of the target that is spread over all classes; cross-entropy only.
    """
    return binary_loss if kind == "bce" else partial(F.cross_entropy, label_smoothing=label_smoothing)


def binary_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of every class on its own, mean over images and classes."""
    shares = F.one_hot(targets, logits.shape[-1]) if targets.ndim == 1 else targets
    return F.binary_cross_entropy_with_logits(logits, (shares > 0).to(logits.dtype))
