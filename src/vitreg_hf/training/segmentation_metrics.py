# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Mean intersection over union, counted without keeping any map.

K classes; every count is that of pixels.
"""

from typing import Any

import torch
from torch import Tensor


class MeanIoU:
    """Intersection over union of predicted and true pixels of each class, averaged over classes.

    Used as a metric of `evaluate`: `add_batch(predictions=..., references=...)`, then `compute()`, which starts anew.
    In distributed training add up `confusion` over the processes before.

    A class that is neither in a prediction nor in a reference has no IoU and is left out of the mean.

    Args:
        num_classes: K.
        ignore_index: label of the pixels that do not count.

    Attributes:
        confusion: pixels of true class (row) and predicted class (column), int64 `(K, K)`.

    Raises:
        ValueError: if there is no class, or the ignored label is one.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        if num_classes < 1 or 0 <= ignore_index < num_classes:
            raise ValueError(
                f"Expected at least one class and an ignored label that is none, got {num_classes}, {ignore_index}"
            )
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def add_batch(self, predictions: Tensor, references: Tensor) -> None:
        """Count class indices of the same shape, on any device.

        Raises:
            ValueError: if shapes differ, or a label is none of the classes.
        """
        if predictions.shape != references.shape:
            raise ValueError(
                f"Expected predictions of shape {tuple(references.shape)}, got {tuple(predictions.shape)}"
            )
        counted = references != self.ignore_index
        predicted, true = predictions[counted].long(), references[counted].long()
        self._check("predictions", predicted)
        self._check("references", true)
        pairs = torch.bincount(true * self.num_classes + predicted, minlength=self.num_classes**2)
        self.confusion += pairs.view(self.num_classes, self.num_classes).cpu()

    def _check(self, name: str, labels: Tensor) -> None:
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            got = f"{int(labels.min())}..{int(labels.max())}"
            raise ValueError(f"Expected {name} in 0..{self.num_classes - 1}, got {got}")

    def compute(self) -> dict[str, Any]:
        """The numbers of all that was added, and an empty count for what comes.

        Returns:
            `mean_iou`, `pixel_accuracy` (both 0..1), `iou` (a list by class; None where a class is absent) and
            `absent_classes`, how many these are.

        Raises:
            ValueError: if no pixel was counted.
        """
        confusion, self.confusion = self.confusion, torch.zeros_like(self.confusion)
        if not confusion.any():
            raise ValueError("Expected pixels with a label, got none")
        right, union = confusion.diagonal(), confusion.sum(dim=0) + confusion.sum(dim=1) - confusion.diagonal()
        present = union > 0
        iou = right.double() / union
        return {
            "mean_iou": iou[present].mean().item(),
            "pixel_accuracy": (right.sum().double() / confusion.sum()).item(),
            "iou": [value if there else None for value, there in zip(iou.tolist(), present.tolist(), strict=True)],
            "absent_classes": int((~present).sum()),
        }
