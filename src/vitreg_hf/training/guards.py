# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""A training whose loss breaks stops at once, and the batch that did it is kept.

A loss that is not finite never becomes finite again, and weights after a spike are rarely worth the hours that follow.
"""

import math
from collections import deque
from statistics import median
from typing import Any

_ENOUGH = 5  # losses that a median wants; those before them are only asked to be finite


class TrainingDiverged(RuntimeError):
    """A training was stopped because its loss or its gradients broke.

    Attributes:
        step: updates of the weights when the loss was computed, this one included.
        loss: mean over all processes.
        reason: what is wrong with it, in words.
        folder: where the batch was kept for replay; None until it is.
    """

    def __init__(self, step: int, loss: float, reason: str) -> None:
        super().__init__(f"Expected a loss to go on with, got {loss:.6g} in step {step}: {reason}")
        self.step, self.loss, self.reason = step, loss, reason
        self.folder: str | None = None


class LossGuard:
    """Tells a loss that breaks from one that is merely large.

    A spike is a loss of more than `spike_factor` times the running median and more than the largest of the first
    losses. The second condition is for trainings that go well: late losses are so small that a single hard batch may
    be ten times their median, and yet no worse than where the training began.

    All processes must ask about the same numbers, or some would stop while the others wait for them.

    Args:
        spike_factor: how many times the median a loss may be; 0: every finite loss is fine.
        window: how many of the last losses make the median, and how many are the first.

    Raises:
        ValueError: if the factor is neither 0 nor above 1, or the window holds too few losses for a median.
    """

    def __init__(self, spike_factor: float = 10.0, window: int = 50) -> None:
        if spike_factor != 0 and not spike_factor > 1:
            raise ValueError(f"Expected a spike_factor of 0 or above 1, got {spike_factor}")
        if window < _ENOUGH:
            raise ValueError(f"Expected a window of {_ENOUGH} losses or more, got {window}")
        self.spike_factor, self.window = spike_factor, window
        self._recent: deque[float] = deque(maxlen=window)
        self._seen, self._highest = 0, -math.inf

    def check(self, step: int, loss: float, gradient_norm: float | None = None) -> None:
        """Refuse the numbers of a step, or remember its loss.

        Args:
            step: updates of the weights so far, this one included.
            loss: mean over all processes.
            gradient_norm: of the whole gradient; None where it is unknown, or where the update was left out because
                fp16 had overflowed, which is no harm.

        Raises:
            TrainingDiverged: if the loss is a spike, or one of them is not finite.
        """
        if not math.isfinite(loss):
            raise TrainingDiverged(step, loss, "it is not finite")
        if gradient_norm is not None and not math.isfinite(gradient_norm):
            raise TrainingDiverged(step, loss, f"the norm of its gradient is {gradient_norm}")
        if self.spike_factor and len(self._recent) >= _ENOUGH:
            usual = median(map(abs, self._recent))  # a loss may be below 0, as that of KoLeo is
            if loss > self.spike_factor * usual and loss > self._highest:
                raise TrainingDiverged(
                    step,
                    loss,
                    f"it is {loss / max(usual, 1e-12):.3g} times the median of the last {len(self._recent)} losses "
                    f"({usual:.3g}) and above the largest of the first ones ({self._highest:.3g})",
                )
        self._recent.append(loss)
        if self._seen < self.window:
            self._highest = max(self._highest, loss)
        self._seen += 1

    def state(self) -> dict[str, Any]:
        """What `load_state` restores exactly, in numbers that JSON keeps."""
        highest = self._highest if self._seen else None
        return {"recent": list(self._recent), "seen": self._seen, "highest": highest}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where another guard was."""
        self._recent = deque(state["recent"], maxlen=self.window)
        self._seen = state["seen"]
        self._highest = -math.inf if state["highest"] is None else state["highest"]
