"""Decisions and their balanced accuracy, the "success rate" of the literature, by the origin of the threshold.

A threshold has one of three origins, which stands beside every figure: "yeom", the mean over the training points, which
an attacker may know; "shadow", the best on models of the attacker's own; "in-sample", the best on the very points that
are judged, which no attacker has and which is above one half even for a useless score (`null_floor`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta

from raytrust.metrics.roc import Array, Mask, checked, roc
from raytrust.metrics.statistics import Figure, Interval

Origin: TypeAlias = Literal["yeom", "shadow", "in-sample"]
ORIGINS: tuple[Origin, ...] = ("yeom", "shadow", "in-sample")


@dataclass(frozen=True)
class BalancedAccuracy(Figure):
    """(TPR + TNR) / 2 of decisions. floor: what a useless score is expected to reach with a threshold of this origin,
    one half unless it was chosen in-sample."""

    origin: Origin = "in-sample"
    floor: float = 0.5


def yeom_thresholds(scores: ArrayLike, member: ArrayLike, groups: ArrayLike | None = None) -> Array:
    """One threshold a group: the members' mean score (Yeom et al. 2018, Adversary 1, for the negative loss).

    groups: (n,) in 0..k-1, such as class labels; all one group if not given. Returns (k,); a group without a member
    takes the overall mean.
    """
    s, m = checked(scores, member)
    g = _groups(groups, s)
    overall = float(s[m].mean())
    # A group without a member has no mean of its own.
    means = [float(s[m & (g == k)].mean()) if (m & (g == k)).any() else overall for k in range(int(g.max()) + 1)]
    return np.array(means)


def best_thresholds(scores: ArrayLike, member: ArrayLike, groups: ArrayLike | None = None) -> Array:
    """One threshold a group, each maximising TPR - FPR of "score >= threshold" in its group; ties: the highest.

    Maximising group by group is what Song & Mittal 2021 do by class. A group without members or without others takes
    the overall threshold. Returns (k,), where infinity means that nobody is called a member.
    """
    s, m = checked(scores, member)
    g = _groups(groups, s)
    overall = _best(s, m)
    thresholds = []
    for k in range(int(g.max()) + 1):
        inside = g == k
        mixed = m[inside].any() and not m[inside].all()
        thresholds.append(_best(s[inside], m[inside]) if mixed else overall)
    return np.array(thresholds)


def decide(scores: ArrayLike, thresholds: ArrayLike, groups: ArrayLike | None = None) -> Mask:
    """(n,): whether each score reaches the threshold of its group."""
    s = np.asarray(scores, dtype=np.float64)
    return np.asarray(s >= np.asarray(thresholds)[_groups(groups, s)])


def balanced_accuracy(
    decisions: ArrayLike, member: ArrayLike, origin: Origin, groups: int = 1, confidence: float = 0.95
) -> BalancedAccuracy:
    """Balanced accuracy of (n,) decisions. groups: how many thresholds were chosen, which sets the floor.

    Interval: Clopper-Pearson for TPR and for TNR, combined by MOVER (Zou & Donner 2008). It holds for a threshold that
    was fixed elsewhere; an in-sample one adds its optimism, which the floor tells.
    """
    d, m = checked(decisions, member)
    hits = d.astype(bool)
    n, others = int(m.sum()), int((~m).sum())
    right = [(int(hits[m].sum()), n), (int((~hits)[~m].sum()), others)]
    rates = [k / size for k, size in right]
    bounds = [clopper_pearson(k, size, confidence) for k, size in right]
    value = sum(rates) / 2
    down = math.hypot(*(r - low for r, (low, _) in zip(rates, bounds, strict=True))) / 2
    up = math.hypot(*(high - r for r, (_, high) in zip(rates, bounds, strict=True))) / 2
    floor = null_floor(n, others, groups) if origin == "in-sample" else 0.5
    return BalancedAccuracy(value, max(0.0, value - down), min(1.0, value + up), n + others, origin, floor)


def null_floor(n_members: int, n_others: int, thresholds: int = 1) -> float:
    """Expected balanced accuracy of a score that knows nothing, with thresholds chosen in-sample.

    1/2 + sqrt(pi / 32) sqrt(k (1/n + 1/m)) for k groups of equal size: half the expected maximum of the difference of
    two empirical distribution functions (Smirnov), each group being decided on a k-th of the points. A limit for large
    groups; a little above it for small ones. At most 1.
    """
    return min(1.0, 0.5 + math.sqrt(math.pi / 32) * math.sqrt(thresholds * (1 / n_members + 1 / n_others)))


def clopper_pearson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """The exact two-sided interval for a proportion (Clopper & Pearson 1934); covers at least `confidence`."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"Expected successes={successes} in [0, n={n}] and n >= 1.")
    # SciPy's `binomtest(...).proportion_ci("exact")` seeks these quantiles by bisection, which takes 10 ms.
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, n - successes + 1))
    high = 1.0 if successes == n else float(beta.ppf(1 - tail, successes + 1, n - successes))
    return low, high


def _best(s: Array, m: Mask) -> float:
    curve = roc(s, m)
    return float(curve.thresholds[np.argmax(curve.tpr - curve.fpr)])


def _groups(groups: ArrayLike | None, s: Array) -> NDArray[np.int64]:
    return np.zeros(s.shape, dtype=np.int64) if groups is None else np.asarray(groups, dtype=np.int64)
