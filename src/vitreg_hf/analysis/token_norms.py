# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Norms of patch tokens, cutoffs above which a token is an outlier, and whether norms fall into two groups at all.

The norm that the paper looks at is that of the residual stream: after the final LayerNorm artifacts cannot be seen.
Shapes: B images, N tokens, P patches on a grid of rows x columns, D channels, n norms in no order.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vitreg_hf.model.token_layout import TokenLayout

Norms = NDArray[np.float32]

# Rule -> its number where none is given. The paper picks 150 by hand for DINOv2-g and says that it differs by model;
# none of the others is the paper's. Twice the median marks nothing in models whose norms form one group.
CUTOFF_RULES: dict[str, float | None] = {
    "median": 2.0,  # times the median
    "sigma": 3.0,  # standard deviations above the mean, as in arXiv 2506.08010, appendix A.4
    "percentile": 98.0,  # marks 2 % of any model, artifacts or not
    "mixture": None,  # where the upper of two Gaussians over log norms becomes the likelier
    "fixed": None,  # the number itself, in units of the residual stream
}
# Beyond this many, patches are drawn at random: the dip test's table of probabilities ends soon after.
_TESTED_AT_MOST = 50_000
_DIP_SIGNIFICANCE = 0.01
_FAR_APART = 3.0


def patch_norms(hidden_state: Tensor, layout: TokenLayout) -> Tensor:
    """L2 norm of each patch token, `(B, P)`, of a residual stream `(B, N, D)`.

    Reference: Darcet et al., Vision Transformers Need Registers (arXiv 2309.16588), section 2.1.
    """
    return layout.patch_tokens(hidden_state).float().norm(dim=-1)


def cutoff(norms: Norms, rule: str = "median", value: float | None = None) -> float:
    """Norm above which a patch is an outlier, in units of the residual stream.

    Args:
        norms: norms of one layer over many images, `(n,)`.
        rule: one of `CUTOFF_RULES`.
        value: the number of the rule; left out, that of `CUTOFF_RULES`.

    Raises:
        ValueError: if there is no norm or no such rule, or the rule's number is missing, wrong or not wanted.
    """
    number = checked_rule(rule, value)
    if norms.size == 0:
        raise ValueError("Expected at least one norm, got none")
    if rule == "mixture":
        return _crossing(norms)
    if rule == "fixed":
        return number
    if rule == "percentile":
        return float(np.percentile(norms, number))
    if rule == "sigma":
        return float(norms.mean(dtype=np.float64) + number * norms.std(dtype=np.float64))
    return number * float(np.median(norms))


def checked_rule(rule: str, value: float | None) -> float:
    """The number that a rule of `cutoff` works with; raises its errors, for a check before work starts."""
    if rule not in CUTOFF_RULES:
        raise ValueError(f"Expected a cutoff rule of {', '.join(CUTOFF_RULES)}, got {rule!r}")
    if rule == "mixture":
        if value is not None:
            raise ValueError(f"Expected no number for the cutoff rule 'mixture', got {value}")
        return 0.0
    number = CUTOFF_RULES[rule] if value is None else value
    if number is None or number <= 0 or (rule == "percentile" and number >= 100):
        expected = "below 100" if rule == "percentile" else "above 0"
        raise ValueError(f"Expected a number {expected} for the cutoff rule {rule!r}, got {number}")
    return float(number)


def outlier_mask(norms: Tensor, threshold: float) -> Tensor:
    """Mark the patches that carry an artifact: those whose norm is above the threshold; any shape, boolean.

    Reference: Darcet et al. (arXiv 2309.16588), section 2.1.
    """
    return norms > threshold


@dataclass(frozen=True)
class Bimodality:
    """Whether norms fall into two groups.

    Attributes:
        dip: Hartigan's dip statistic of log norms, from 0; large where a valley separates groups.
        p_value: probability of such a dip or a larger one if there were one group. Patches of one image resemble one
            another, so with many patches a small value alone says little; with few patches a small group is missed
            however far away it is: simulated groups ten-fold apart of 2 % of patches are missed among 4,000 and found
            among 8,000, of 1 % missed among 16,000 and found among 50,000.
        bic_gain: what a mixture of two Gaussians over log norms gains over one, in BIC; positive favours two.
        low_mode, high_mode: medians of the two groups of that mixture, in units of the residual stream.
        high_share: share of norms in the upper group.
        n: norms that were tested.
    """

    dip: float
    p_value: float
    bic_gain: float
    low_mode: float
    high_mode: float
    high_share: float
    n: int

    @property
    def probably(self) -> bool:
        """Whether only the dip test is missing: with few patches it finds nothing (p = 0.3 for 12 images at 2 %)."""
        return not self.two_groups and self.bic_gain > 0 and self.high_mode >= _FAR_APART * self.low_mode

    @property
    def two_groups(self) -> bool:
        """All of: the dip is significant at 1 %, two Gaussians fit better, and the groups are three-fold apart."""
        apart = self.high_mode >= _FAR_APART * self.low_mode
        return self.p_value < _DIP_SIGNIFICANCE and self.bic_gain > 0 and apart


def bimodality(norms: Norms) -> Bimodality:
    """Test norms `(n,)` for two groups, as the paper finds them in DINOv2-g (section 2.1, Fig. 3).

    Raises:
        ValueError: if there are fewer than 8 norms.
    """
    import diptest

    if norms.size < 8:
        raise ValueError(f"Expected at least 8 norms for a test of two groups, got {norms.size}")
    logs = _log_sample(norms)
    dip, p_value = diptest.diptest(logs[:, 0])
    if _all_equal(logs):  # no second group to fit
        return Bimodality(float(dip), float(p_value), 0.0, _median(logs), _median(logs), 0.0, len(logs))
    one, two = _mixture(logs, 1), _mixture(logs, 2)
    upper = two.predict(logs) == int(np.argmax(two.means_))
    low, high = _median(logs[~upper]), _median(logs[upper])
    return Bimodality(
        float(dip), float(p_value), one.bic(logs) - two.bic(logs), low, high, float(upper.mean()), len(logs)
    )


def _log_sample(norms: Norms) -> NDArray[np.float64]:
    """Logarithms `(n, 1)`: norms spread by factors, and a Gaussian fits their logarithms far better than them."""
    if norms.size > _TESTED_AT_MOST:  # at random: an even stride would pick columns of the patch grid
        norms = np.random.default_rng(0).choice(norms, _TESTED_AT_MOST, replace=False)
    smallest = np.finfo(np.float32).tiny
    return np.log(np.maximum(norms, smallest).astype(np.float64))[:, None]


def _all_equal(logs: NDArray[np.float64]) -> bool:
    return bool(np.ptp(logs) == 0)


def _mixture(logs: NDArray[np.float64], groups: int) -> Any:
    from sklearn.mixture import GaussianMixture

    # The regulariser keeps a group of equal norms from becoming infinitely likely.
    start = np.quantile(logs, [0.5] if groups == 1 else [0.5, 1.0])[:, None]
    return GaussianMixture(groups, reg_covar=1e-4, means_init=start, max_iter=500, random_state=0).fit(logs)


def _median(logs: NDArray[np.float64]) -> float:
    return float(np.exp(np.median(logs))) if logs.size else float("nan")


def _crossing(norms: Norms) -> float:
    """The lowest norm between both means from which on the upper Gaussian is the likelier.

    Where there is none, as with equal norms or one Gaussian inside the other, the largest norm: nothing is above it.
    """
    logs = _log_sample(norms)
    if _all_equal(logs):
        return float(norms.max())
    two = _mixture(logs, 2)
    means = np.sort(two.means_[:, 0])
    between = np.linspace(means[0], means[1], 2_001)[:, None]
    upper = two.predict(between) == int(np.argmax(two.means_))
    if upper[0] or not upper.any():
        return float(norms.max())
    return float(np.exp(between[int(np.argmax(upper)), 0]))


def neighbour_similarity(patches: Tensor) -> Tensor:
    """Mean cosine similarity of each patch to its neighbours above, below, left and right (as many as there are).

    Args:
        patches: right after the patch embedding, before positions, `(B, rows, columns, D)`.

    Returns:
        `(B, rows, columns)`, from -1 to 1: high where a patch is redundant.

    Raises:
        ValueError: if a patch has no neighbour.

    Reference: Darcet et al. (arXiv 2309.16588), section 2.1 and Fig. 5a.
    """
    _, rows, columns, _ = patches.shape
    if rows * columns < 2:
        raise ValueError(f"Expected a grid of at least 2 patches, got {rows} x {columns}")
    unit = F.normalize(patches.float(), dim=-1)
    below, right = (unit[:, 1:] * unit[:, :-1]).sum(-1), (unit[:, :, 1:] * unit[:, :, :-1]).sum(-1)
    total = F.pad(below, (0, 0, 0, 1)) + F.pad(below, (0, 0, 1, 0)) + F.pad(right, (0, 1)) + F.pad(right, (1, 0))
    ones = torch.ones_like(unit[..., 0])
    vertical, horizontal = ones[:, 1:], ones[:, :, 1:]
    count = F.pad(vertical, (0, 0, 0, 1)) + F.pad(vertical, (0, 0, 1, 0))
    count = count + F.pad(horizontal, (0, 1)) + F.pad(horizontal, (1, 0))
    return total / count
