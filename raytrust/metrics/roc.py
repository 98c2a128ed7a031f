"""Receiver operating characteristics of membership scores, with tied scores taken as one step of the curve."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


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
    values, index = np.unique(-s, return_inverse=True)
    fpr, tpr = (np.bincount(index[who], minlength=len(values)).cumsum() / who.sum() for who in (~m, m))
    return Roc(np.concatenate([[0.0], fpr]), np.concatenate([[0.0], tpr]), np.concatenate([[np.inf], -values]))


def auc(scores: ArrayLike, member: ArrayLike) -> float:
    """Area under the curve: P(member's score > other's) + P(equal) / 2, in [0, 1]; 0.5 for a constant score."""
    s, m = checked(scores, member)
    n = int(m.sum())
    # Mann and Whitney's count. scikit-learn's `roc_auc_score` is the same (see the tests), and takes 4 ms of checks: an
    # audit asks for tens of thousands of areas, one a message.
    return float((rankdata(s)[m].sum() - n * (n + 1) / 2) / (n * (m.size - n)))
