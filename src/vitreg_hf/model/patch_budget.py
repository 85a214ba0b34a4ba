# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The native aspect ratio up to a budget of patches: what `max_num_patches` of the image processors does.

An image of h x w pixels is resized so that patches of p x p pixels cover it, at most `max_num_patches` of them. Larger
images shrink. Smaller ones are not enlarged beyond the patch that a side ends in (Siglip2 of Transformers enlarges all
of them to the budget): enlarged pixels hold nothing new, and every patch costs time.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import SizeDict


@dataclass(eq=False)
class PatchBudget(SizeDict):
    """A size that depends on the image; it stands where a processor's other sizes do."""

    max_num_patches: int = 1
    patch_size: int = 1

    __hash__ = SizeDict.__hash__

    def of(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing, multiples of the patch size."""
        rows, columns = grid_within(height, width, self.patch_size, self.max_num_patches)
        return rows * self.patch_size, columns * self.patch_size


def grid_within(height: int, width: int, patch_size: int, max_num_patches: int) -> tuple[int, int]:
    """Rows and columns of patches for an image, at most `max_num_patches`.

    Of the grids around the image's own, or around the largest that the budget allows, the one that changes aspect
    ratio and area the least: by squared logarithms, of which that of the ratio counts four times.
    """
    shrink = min(1.0, math.sqrt(max_num_patches / height / width) * patch_size)
    exact = height * shrink / patch_size, width * shrink / patch_size
    most = [min(max(math.ceil(side), 1), max_num_patches) for side in exact]

    def along(side: float, ratio: float, limits: list[int]) -> set[tuple[int, int]]:
        """Grids by their number of patches along one side, from what that number can be."""
        pairs = set()
        for count in {min(max(math.floor(side), 1), limits[0]), limits[0]}:
            for other in (math.floor(count * ratio), math.ceil(count * ratio)):
                pairs.add((count, min(max(other, 1), limits[1], max_num_patches // count)))
        return pairs

    grids = along(exact[0], width / height, most)
    grids |= {(rows, columns) for columns, rows in along(exact[1], height / width, most[::-1])}

    def change(grid: tuple[int, int]) -> tuple[float, tuple[int, int]]:
        rows, columns = (math.log(own / side) for own, side in zip(grid, exact, strict=True))
        return round(4 * (rows - columns) ** 2 + (rows + columns) ** 2, 9), grid  # the grid for ties, as of squares

    return min(grids, key=change)


def batch_of_sizes(data: dict[str, Any], tensor_type: Any) -> BatchFeature:
    """Images, masks and label maps as tensors: stacked where all have one size, else lists of single ones."""
    if tensor_type is None or len({image.shape for image in data["pixel_values"]}) == 1:
        return BatchFeature(data, tensor_type=tensor_type)
    return BatchFeature(
        {name: [BatchFeature({name: one}, tensor_type=tensor_type)[name] for one in own] for name, own in data.items()}
    )


def with_budget(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a processor or a call, in which a budget takes the place of a size and of a crop.

    Raises:
        ValueError: for a size, a crop, or no resizing beside `max_num_patches`.
    """
    if options.get("max_num_patches") is None:
        return dict(options)
    against = {"size": None, "do_center_crop": False, "do_resize": True}
    for name, expected in against.items():
        if options.get(name) not in (None, expected):
            raise ValueError(f"expected {name}={expected} with max_num_patches, got {options[name]!r}")
    return {**options, **against}
