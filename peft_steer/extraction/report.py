"""How well a block's vector tells held-out positive from negative texts, and how large it is there."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats


CONFIDENCE, RESAMPLES = 0.95, 999


@dataclass(frozen=True)
class BlockReport:
    """One block.

    Attributes:
        block: Its index.
        norm: Of the vector, as it acts at strength 1.
        states_norm: The mean norm of the states there.
        auc: The probability that a held-out positive text projects higher than a negative one; None without any.
        auc_low, auc_high: Its 95 % interval, by a bootstrap of pairs (percentiles).
        right, pairs: In how many of the held-out pairs the positive text projects higher.
        right_low, right_high: The 95 % interval of that share (Clopper and Pearson's). Where all are right, the
            bootstrap has no width, and this one says what the number of pairs allows.
    """

    block: int
    norm: float
    states_norm: float
    auc: float | None = None
    auc_low: float | None = None
    auc_high: float | None = None
    right: int | None = None
    pairs: int = 0
    right_low: float | None = None
    right_high: float | None = None


def report(
    block: int,
    v: torch.Tensor,
    positive: torch.Tensor,
    negative: torch.Tensor,
    held_out: tuple[torch.Tensor, torch.Tensor],
    seed: int = 0,
) -> BlockReport:
    """Describes the vector `v`, `(d,)`, made from `positive` and `negative`, `(pairs, d)`, on `held_out` pairs."""
    states_norm = torch.cat([positive, negative]).norm(dim=-1).mean().item()
    sizes = BlockReport(block, v.norm().item(), states_norm)
    unit = (v / v.norm()).double()
    p, n = ((states.double() @ unit).numpy() for states in held_out)
    if not len(p):
        return sizes
    interval = stats.bootstrap(
        (p, n),
        auc,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    right = int((p > n).sum())
    share = stats.binomtest(right, len(p)).proportion_ci(CONFIDENCE, method="exact")
    return BlockReport(
        block,
        sizes.norm,
        states_norm,
        float(auc(p, n)),
        float(interval.low),
        float(interval.high),
        right,
        len(p),
        float(share.low),
        float(share.high),
    )


def auc(positive: np.ndarray, negative: np.ndarray, axis: int = -1) -> np.ndarray:
    """The area under the ROC curve: Mann and Whitney's U of all pairs of a positive and a negative value; ties count
    half."""
    u = stats.mannwhitneyu(positive, negative, axis=axis, method="asymptotic").statistic
    return u / (positive.shape[axis] * negative.shape[axis])
