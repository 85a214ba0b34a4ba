# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Parts of a distillation of dense features into a model with new registers: what learns, and from which loss.

Reference: Yan & Chen, Vision Transformers with Self-Distilled Registers (arXiv 2505.21501).

Shapes: B images, a grid of rows x columns patches, D channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitreg_hf.model.modeling_vitreg import ViTRegModel

_COLUMNS = {
    "cosine_distance": "1 - cosine to the teacher",
    "squared_error": "squared error",
    "largest_over_median": "largest norm / median",
    "outlier_share": "outliers",
    "knn_accuracy": "k-NN",
}


def feature_distances(features: Tensor, targets: Tensor) -> Tensor:
    """How far features are from targets in every image, `(B, 2)`: their sum is what is minimised.

    Args:
        features, targets: of patches, `(B, D, rows, columns)`.

    Returns:
        1 - cosine, mean over patches; squared error, mean over patches and channels.
    """
    features, targets = features.float(), targets.float()
    cosine = F.cosine_similarity(features, targets, dim=1).mean(dim=(1, 2))
    return torch.stack([1 - cosine, (features - targets).square().mean(dim=(1, 2, 3))], dim=1)


def unfreeze(student: ViTRegModel, num_tuned_layers: int) -> None:
    """Leave gradients to registers, the position table, the projection of patches, and the last blocks, as the paper.

    Args:
        student: not wrapped.
        num_tuned_layers: how many of the last blocks learn.

    Raises:
        ValueError: if the model has fewer blocks.
    """
    embeddings, count = student.embeddings, len(student.layers)
    if not 0 <= num_tuned_layers <= count:
        raise ValueError(f"Expected num_tuned_layers of 0 to {count}, the blocks of the model, got {num_tuned_layers}")
    student.requires_grad_(False)
    for table in (embeddings.register_tokens, embeddings.position_embeddings):
        if table is not None:
            table.requires_grad_(True)
    for part in (embeddings.patch_embeddings, *list(student.layers)[count - num_tuned_layers :]):
        part.requires_grad_(True)


def as_table(results: dict[str, Any]) -> str:
    """What was gained and what was lost, as Markdown.

    Args:
        results: content of a `results.json` of `examples/distill_registers.py`.
    """
    metrics, added = results["metrics"], results["hyperparameters"]["num_registers"]
    rows = {"original": "original", "untrained": f"{added} registers added", "distilled": "distilled"}
    lines = [f"| | {' | '.join(_COLUMNS.values())} |", f"|---|{'---|' * len(_COLUMNS)}"]
    for name, label in rows.items():
        cosine, squared, largest, outliers, accuracy = (metrics[name][column] for column in _COLUMNS)
        shares = f"{100 * outliers:.2f} % | {100 * accuracy:.2f} %"
        lines.append(f"| {label} | {cosine:.4f} | {squared:.4f} | {largest:.2f} | {shares} |")
    return "\n".join(lines)
