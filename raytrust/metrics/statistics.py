"""Intervals, paired comparisons and Pareto sets: pure functions on arrays, without torch.

All errors are ``ValueError``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, stdtrit

_RESAMPLES = 10_000


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float] | None:
    """Two-sided Student-t interval for the mean of ``values``, centred on their sample mean.

    Exact for independent normal values. It isn't clipped: the interval of a bounded metric may pass its bound.

    Args:
        values: (n,), finite, n >= 1.
        confidence: coverage in (0, 1).

    Returns:
        (low, high), of width 0 if all values are equal; None if n == 1, when no interval exists.

    Raises:
        ValueError: ``values`` is empty, not 1-dimensional or not finite, or ``confidence`` is outside (0, 1).
    """
    x = _finite_values(values)
    _check_confidence(confidence)
    n = x.size
    if n == 1:
        return None
    mean = float(x.mean())
    half = float(stdtrit(n - 1, 0.5 + confidence / 2) * x.std(ddof=1) / math.sqrt(n))
    return mean - half, mean + half


def bootstrap_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float] | None:
    """Two-sided bootstrap interval for the mean of ``values``: the expanded percentile interval (Hesterberg, 2015,
    "What Teachers Should Know About the Bootstrap", sec. 3.3), from 10,000 resamples by a fixed seed.

    The plain percentile interval is too short for few values. The expansion makes up for it: it takes the quantiles
    that would give a normal sample its Student-t interval. The interval lies within the range of the values, so with
    very few of them (up to 4) it is about this range.

    Args, raises:
        As in :func:`mean_interval`.

    Returns:
        (low, high), of width 0 if all values are equal; None if n == 1.
    """
    x = _finite_values(values)
    _check_confidence(confidence)
    if x.size == 1:
        return None
    alpha = float(ndtr(-math.sqrt(x.size / (x.size - 1)) * stdtrit(x.size - 1, 0.5 + confidence / 2)))
    low, high = np.quantile(_resampled_means(x), [alpha, 1 - alpha])
    return float(low), float(high)


@dataclass(frozen=True)
class Paired:
    """A comparison in pairs. difference: the mean of a - b. interval: of this mean, by :func:`bootstrap_interval`.

    p_value: two-sided, of the hypothesis that the sign of each difference is chance (sign-flip test).
    """

    difference: float
    interval: tuple[float, float] | None
    p_value: float


def paired_difference(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> Paired:
    """The mean of ``a - b`` over pairs, with its interval and its p-value.

    The p-value is the share of sign patterns whose mean is at least as far from 0 as what was found (Fisher's
    randomisation test): over all 2^n patterns up to n = 14, else over 10,000 drawn by a fixed seed and the one found.
    With n pairs it can't fall below 2^(1 - n).

    Args:
        a, b: (n,), finite, n >= 1, in the same order.

    Raises:
        ValueError: the lengths differ; as in :func:`mean_interval`.
    """
    x, y = _finite_values(a), _finite_values(b)
    if x.size != y.size:
        raise ValueError(f"Expected pairs, got {x.size} and {y.size} values.")
    d = x - y
    n = d.size
    if n <= 14:
        bits = np.arange(2**n)[:, None] >> np.arange(n) & 1
        means = np.abs((1 - 2 * bits) @ d)
    else:
        flips = 1 - 2 * np.random.default_rng(0).integers(0, 2, (_RESAMPLES, n))
        means = np.abs(np.concatenate([flips @ d, [d.sum()]]))
    extreme = means >= abs(d.sum()) * (1 - 1e-9)  # what was found is among them in spite of rounding
    return Paired(float(d.mean()), bootstrap_interval(d, confidence), float(extreme.mean()))


def proportion_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval (Wilson, 1927, without continuity correction) for a proportion.

    Returns:
        (low, high) with 0 <= low <= successes / n <= high <= 1; of positive width, even at 0 and n successes.

    Raises:
        ValueError: ``n`` < 1, ``successes`` outside [0, n], or ``confidence`` outside (0, 1).
    """
    if n < 1:
        raise ValueError(f"Expected n={n} >= 1.")
    if not 0 <= successes <= n:
        raise ValueError(f"Expected successes={successes} in [0, {n}].")
    _check_confidence(confidence)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # The bounds hold in exact arithmetic; min and max keep them under rounding.
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def pareto(points: ArrayLike, maximise: Sequence[bool]) -> NDArray[np.bool_]:
    """Mask of the non-dominated points.

    A point is dominated if another is at least as good in every coordinate and better in one. So every copy of a
    non-dominated point is kept, and the mask of a non-empty set has at least one True.

    Args:
        points: (n, d), without NaN; n may be 0.
        maximise: (d,), True where larger is better.

    Returns:
        (n,) booleans. Time and memory are O(n^2 d).

    Raises:
        ValueError: ``points`` is not (n, d) with d == len(maximise) >= 1, or holds a NaN.
    """
    x = np.asarray(points, dtype=np.float64)
    if x.ndim != 2 or len(maximise) == 0 or x.shape[1] != len(maximise):
        raise ValueError(f"Expected points of shape (n, {len(maximise)}) with at least one column, got {x.shape}.")
    if np.isnan(x).any():
        raise ValueError("Expected points without NaN.")
    gain = np.where(np.asarray(maximise, dtype=bool), x, -x)
    other, one = gain[:, None, :], gain[None, :, :]
    dominates = (other >= one).all(axis=2) & (other > one).any(axis=2)
    return np.logical_not(dominates.any(axis=0))


def _finite_values(values: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0 or not np.isfinite(x).all():
        raise ValueError(f"Expected at least one finite value in one dimension, got values={x}.")
    return x


def _resampled_means(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x[np.random.default_rng(0).integers(0, x.size, (_RESAMPLES, x.size))].mean(axis=1)


def _check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"Expected confidence={confidence} in (0, 1).")
