"""Receiver operating characteristics of membership scores, with tied scores taken as one step of the curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from raytrust.metrics.statistics import Figure, Interval

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

RESAMPLES = 1000
# Entries of a table of resampled weights that are held at once: all would be half a gigabyte for 20,000 points.
_CHUNK = 2**22


@dataclass(frozen=True)
class Roc:
    """The curve of "score >= threshold means member", one point a distinct score, from (0, 0) to (1, 1).

    fpr, tpr: (k + 1,), in [0, 1], non-decreasing. thresholds: (k + 1,), decreasing, first of all infinity.
    """

    fpr: Array
    tpr: Array
    thresholds: Array


def checked(scores: ArrayLike, member: ArrayLike) -> tuple[Array, Mask]:
    """(n,) float64 scores and booleans. Raises ValueError unless both classes occur and no score is NaN."""
    s, m = np.asarray(scores, dtype=np.float64), np.asarray(member)
    if s.ndim != 1 or m.shape != s.shape or m.dtype != np.bool_:
        raise ValueError(f"Expected scores (n,) and member (n,) of booleans, got {s.shape} and {m.dtype} {m.shape}.")
    if np.isnan(s).any():
        raise ValueError(f"Expected scores without NaN, got {int(np.isnan(s).sum())} of {s.size}.")
    if not m.any() or m.all():
        raise ValueError(f"Expected members and non-members, got members={int(m.sum())} of {m.size}.")
    return s, m


def roc(scores: ArrayLike, member: ArrayLike) -> Roc:
    """The whole curve, every distinct score a point (scikit-learn's `roc_curve` with drop_intermediate=False)."""
    s, m = checked(scores, member)
    # scikit-learn's takes ten times as long, and thresholds are sought on a curve for every class, model and signal.
    values, positive, negative = tied_groups(s, m)
    fpr = np.concatenate([[0.0], negative.cumsum() / negative.sum()])
    tpr = np.concatenate([[0.0], positive.cumsum() / positive.sum()])
    return Roc(fpr, tpr, np.concatenate([[np.inf], values]))


def auc(scores: ArrayLike, member: ArrayLike) -> float:
    """Area under the curve: P(member's score > other's) + P(equal) / 2, in [0, 1]; 0.5 for a constant score."""
    s, m = checked(scores, member)
    n = int(m.sum())
    # Mann and Whitney's count. scikit-learn's `roc_auc_score` is the same (see the tests), and takes 4 ms of checks: an
    # audit asks for tens of thousands of areas, one a message.
    return float((rankdata(s)[m].sum() - n * (n + 1) / 2) / (n * (m.size - n)))


def auc_interval(
    scores: ArrayLike, member: ArrayLike, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Percentile bootstrap for the AUC: members and others are each drawn anew with replacement.

    The points are the unit, so it speaks of this model on other points, not of other models.
    """
    s, m = checked(scores, member)
    areas = []
    for positive, negative in _resampled(s, m, resamples, seed):
        # Groups go from high scores to low, and a tie counts half.
        below = negative[:, ::-1].cumsum(axis=1)[:, ::-1] - negative / 2
        areas.append((positive * below).sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1)))
    return percentiles(areas, confidence)


def tpr_at_fpr(
    scores: ArrayLike,
    member: ArrayLike,
    fpr: float,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Figure:
    """The greatest TPR whose FPR is at most `fpr`, without interpolation, and its percentile bootstrap interval.

    Its value is None, "not resolvable", where there are fewer than 10 / fpr non-members: then fewer than ten false
    positives decide it. The threshold is drawn anew in each resample, as it is chosen on this very sample.
    """
    if not 0 < fpr < 1:
        raise ValueError(f"Expected fpr={fpr} in (0, 1).")
    s, m = checked(scores, member)
    if not resolvable(int((~m).sum()), fpr):
        return Figure(None, n=s.size)
    _, positive, negative = tied_groups(s, m)
    value = float(tpr_of_groups(positive[None], negative[None], fpr)[0])
    rates = [tpr_of_groups(p, q, fpr) for p, q in _resampled(s, m, resamples, seed)]
    return Figure(value, *percentiles(rates, confidence), s.size)


def percentiles(resampled: Sequence[Array], confidence: float) -> Interval:
    """The interval that leaves out as much of the resampled figures on either side."""
    low, high = np.quantile(np.concatenate(resampled), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def resolvable(others: int, fpr: float) -> bool:
    """Whether `others` non-members are at least 10 / fpr."""
    # With a slack for rounding: 10 / 0.001 is 10,000.
    return others * fpr >= 10 * (1 - 1e-12)


def tpr_of_groups(positive: Array, negative: Array, fpr: float) -> Array:
    """The greatest TPR at an FPR of at most `fpr`. positive, negative: (r, k) weights, highest score first; (r,)."""
    # The same slack: 0.01 of 1,000 others are ten of them.
    allowed = negative.cumsum(axis=1) <= fpr * negative.sum(axis=1, keepdims=True) * (1 + 1e-12)
    reached = np.where(allowed, positive.cumsum(axis=1), 0).max(axis=1)
    return np.asarray(reached / positive.sum(axis=1))


def tied_groups(s: Array, m: Mask) -> tuple[Array, Array, Array]:
    """Distinct scores, highest first, with how many members and others have each: (k,), (k,), (k,)."""
    values, index = np.unique(-s, return_inverse=True)
    weights = [np.bincount(index[who], minlength=len(values)).astype(np.float64) for who in (m, ~m)]
    return -values, weights[0], weights[1]


def _resampled(s: Array, m: Mask, resamples: int, seed: int) -> list[tuple[Array, Array]]:
    """Bootstrap weights of the groups of tied scores, highest first: chunks of (r, k) for members and for others."""
    # Drawing how often each group occurs says the same as drawing points, and needs no sorting in each resample, as
    # SciPy's `bootstrap` would.
    generator = np.random.default_rng(seed)
    _, positive, negative = tied_groups(s, m)
    chunks = []
    step = max(1, _CHUNK // len(positive))
    for first in range(0, resamples, step):
        size = min(step, resamples - first)
        drawn = [
            generator.multinomial(int(w.sum()), w / w.sum(), size=size).astype(np.float64) for w in (positive, negative)
        ]
        chunks.append((drawn[0], drawn[1]))
    return chunks
