# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""When images are checked, and how many of them may be left out.

Up to a size of the data every image is decoded once before a training starts: whatever is broken is known within
minutes, and what is left out is the same for everybody. Larger data would wait too long, and a stream cannot be
checked at all: there a broken image is met while training, and what happens follows from its place in the order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

# Images that are decoded before a training unless it is said otherwise: some minutes of a few cores.
CHECKED_UP_FRONT = 50_000
# Images that are left out before their share counts: the first ones say little about a share.
_SKIPPED_ANYWAY = 10


def check_up_front(num_images: int, asked: bool | None) -> bool:
    """Whether the training images are decoded before a training: as asked, or as long as there are not too many."""
    return num_images <= CHECKED_UP_FRONT if asked is None else asked


@dataclass
class SkipLimit:
    """Counts what one loading process leaves out.

    Args:
        most: share of images that may be left out.

    Raises:
        ValueError: if the share is not within 0..1.
    """

    most: float = 0.01
    _seen: int = field(default=0, init=False)
    _skipped: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.most <= 1:
            raise ValueError(f"Expected a share of images in 0..1 that may be left out, got {self.most}")

    def count(self, seen: int, skipped: Sequence[str]) -> None:
        """Add images that were seen and the names of those of them that were left out.

        Raises:
            ValueError: if too many have been left out, naming the last.
        """
        self._seen, self._skipped = self._seen + seen, self._skipped + len(skipped)
        if skipped and self._skipped > max(_SKIPPED_ANYWAY, self.most * self._seen):
            raise ValueError(
                f"Expected at most {self.most:.1%} unreadable images, "
                f"got {self._skipped} among the first {self._seen}, the last of them {skipped[-1]}"
            )
