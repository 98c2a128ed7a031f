"""Decisions and their balanced accuracy, the "success rate" of the literature, by the origin of the threshold.

A threshold has one of three origins, which stands beside every figure: "yeom", the mean over the training points, which
an attacker may know; "shadow", the best on models of the attacker's own; "in-sample", the best on the very points that
are judged, which no attacker has and which is above one half even for a useless score (`null_floor`).
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raytrust.metrics.roc import Array, Mask, checked, roc

Origin: TypeAlias = Literal["yeom", "shadow", "in-sample"]
ORIGINS: tuple[Origin, ...] = ("yeom", "shadow", "in-sample")


def yeom_thresholds(scores: ArrayLike, member: ArrayLike, groups: NDArray[np.int64]) -> Array:
    """One threshold a group: the members' mean score (Yeom et al. 2018, Adversary 1, for the negative loss).

    groups: (n,) in 0..k-1, such as class labels. Returns (k,); a group without a member
    takes the overall mean.
    """
    s, m = checked(scores, member)
    inside = [m & (groups == k) for k in range(int(groups.max()) + 1)]
    # A group without a member has no mean of its own.
    return np.array([s[mask if mask.any() else m].mean() for mask in inside])


def best_thresholds(scores: ArrayLike, member: ArrayLike, groups: NDArray[np.int64]) -> Array:
    """One threshold a group, each maximising TPR - FPR of "score >= threshold" in its group; ties: the highest.

    Maximising group by group is what Song & Mittal 2021 do by class. A group without members or without others takes
    the overall threshold. Returns (k,), where infinity means that nobody is called a member.
    """
    s, m = checked(scores, member)
    overall = _best(s, m)
    thresholds = []
    for k in range(int(groups.max()) + 1):
        inside = groups == k
        mixed = m[inside].any() and not m[inside].all()
        thresholds.append(_best(s[inside], m[inside]) if mixed else overall)
    return np.array(thresholds)


def decide(scores: ArrayLike, thresholds: ArrayLike, groups: NDArray[np.int64]) -> Mask:
    """(n,): whether each score reaches the threshold of its group."""
    return np.asarray(np.asarray(scores) >= np.asarray(thresholds)[groups])


def balanced_accuracy(decisions: ArrayLike, member: ArrayLike) -> float:
    """(TPR + TNR) / 2 of (n,) decisions: see `null_floor` for what a useless score reaches."""
    d, m = checked(decisions, member)
    return float(d[m].mean() + (d[~m] == 0).mean()) / 2


def null_floor(n_members: int, n_others: int, thresholds: int = 1) -> float:
    """Expected balanced accuracy of a score that knows nothing, with thresholds chosen in-sample.

    1/2 + sqrt(pi / 32) sqrt(k (1/n + 1/m)) for k groups of equal size: half the expected maximum of the difference of
    two empirical distribution functions (Smirnov), each group being decided on a k-th of the points. A limit for large
    groups; a little above it for small ones. At most 1.
    """
    return min(1.0, 0.5 + math.sqrt(math.pi / 32) * math.sqrt(thresholds * (1 / n_members + 1 / n_others)))


def _best(s: Array, m: Mask) -> float:
    curve = roc(s, m)
    return float(curve.thresholds[np.argmax(curve.tpr - curve.fpr)])
