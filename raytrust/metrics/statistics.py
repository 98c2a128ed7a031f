"""Figures with their intervals, and paired comparisons: pure functions on arrays, without torch.

All errors are ``ValueError``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raytrust.metrics.distributions import normal_cdf, student_quantile

Interval: TypeAlias = tuple[float, float]

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Figure:
    """A measured number with its two-sided interval, of 95 % unless said otherwise.

    value: None where the sample can't tell. low, high: None where there is no interval. n: how many images, points or
    models the interval takes for independent, where that is known.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @classmethod
    def of(cls, value: float | None, interval: Sequence[float] | None, n: int | None = None) -> Figure:
        """With both ends of an interval, or without."""
        low, high = interval or (None, None)
        return cls(value, low, high, n)

    def below(self, other: Figure) -> bool:
        """Whether its interval ends before that of another begins; never without intervals."""
        return self.high is not None and other.low is not None and self.high < other.low

    def __format__(self, spec: str) -> str:
        """As text: 0.53 [0.44, 0.61]; without ends where there is no interval, "-" where there is no value.

        spec: that of each number, ".2f" by default; ".1%" is in per cent, without the sign, which stands in a column's
        head. A final "n" adds the sample: 0.53 [0.44, 0.61] (n = 8).
        """
        digits = spec.removesuffix("n") or ".2f"
        if self.value is None:
            return "-"
        ends = (
            "" if self.low is None or self.high is None else f" [{_text(self.low, digits)}, {_text(self.high, digits)}]"
        )
        return f"{_text(self.value, digits)}{ends}" + (f" (n = {self.n})" if spec.endswith("n") else "")

    def __str__(self) -> str:
        return format(self, "")


def _text(number: float, spec: str) -> str:
    text = format(number, spec).removesuffix("%")
    # What rounds to 0 has no sign, unless signs are asked for: there -0.00 says on which side of 0 it lies.
    return text.removeprefix("-") if "+" not in spec and float(text) == 0 else text


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Interval | None:
    """Two-sided Student-t interval for the mean of (n,) values, centred on their mean; None if n == 1.

    Exact for independent normal values; of width 0 if all are equal. It isn't clipped: the interval of a bounded metric
    may pass its bound. Raises ValueError if the values are none, not finite or not 1-dimensional, or if the confidence
    is outside (0, 1).
    """
    x = _finite_values(values)
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"Expected confidence={confidence} in (0, 1).")
    n = x.size
    if n == 1:
        return None
    mean = float(x.mean())
    # SciPy's `t.interval` is NaN where all values are equal, and takes 20 times as long: an audit of a hundred classes
    # asks for tens of thousands of intervals.
    half = float(student_quantile(n - 1, 0.5 + confidence / 2) * x.std(ddof=1) / math.sqrt(n))
    return mean - half, mean + half


def bootstrap_interval(values: ArrayLike) -> Interval | None:
    """95 % bootstrap interval for the mean of (n,) values: the expanded percentile interval (Hesterberg, 2015,
    "What Teachers Should Know About the Bootstrap", sec. 3.3), from 10,000 resamples by a fixed seed; None if n == 1.

    It lies within the range of the values, so with very few of them (up to 4) it is about this range; of width 0 if all
    are equal. Raises ValueError as `mean_interval`.
    """
    x = _finite_values(values)
    if x.size == 1:
        return None
    # No library has the expansion. SciPy's percentile and BCa intervals are too short for the few images that we have:
    # of eight skewed values the plain one covers the mean in 88 % of samples (see the tests). The expansion takes the
    # quantiles that would give a normal sample its Student-t interval.
    alpha = normal_cdf(-math.sqrt(x.size / (x.size - 1)) * student_quantile(x.size - 1, 0.975))
    means = x[np.random.default_rng(0).integers(0, x.size, (_RESAMPLES, x.size))].mean(axis=1)
    low, high = np.quantile(means, [alpha, 1 - alpha])
    return float(low), float(high)


def mean_figure(values: ArrayLike, interval: Callable[[ArrayLike], Interval | None] = mean_interval) -> Figure:
    """The mean of (n,) values with its interval; no value if there are none."""
    x = np.asarray(values, dtype=np.float64)
    return Figure.of(float(x.mean()), interval(x), x.size) if x.size else Figure(None, n=0)


@dataclass(frozen=True)
class Paired:
    """A comparison in pairs. difference: the mean of a - b. interval: of this mean, by :func:`bootstrap_interval`.

    p_value: two-sided, of the hypothesis that the sign of each difference is chance (sign-flip test).
    """

    difference: float
    interval: Interval | None
    p_value: float


def paired_difference(a: ArrayLike, b: ArrayLike) -> Paired:
    """The mean of ``a - b`` over pairs (n,), in the same order, with its interval and its p-value.

    The p-value is the share of sign patterns whose mean is at least as far from 0 as what was measured (Fisher's
    randomisation test): over all 2^n patterns up to n = 14, else over 10,000 drawn by a fixed seed and the one that was
    measured. With n pairs it can't fall below 2^(1 - n). Raises ValueError for two lengths, and as `mean_interval`.
    """
    x, y = _finite_values(a), _finite_values(b)
    if x.size != y.size:
        raise ValueError(f"Expected pairs, got {x.size} and {y.size} values.")
    d = x - y
    n = d.size
    # SciPy's `permutation_test` refuses a single pair, and agrees where all patterns are tried (see the tests). Where
    # they are drawn it doubles the smaller tail, which would change p-values that have been reported.
    if n <= 14:
        bits = np.arange(2**n)[:, None] >> np.arange(n) & 1
        means = np.abs((1 - 2 * bits) @ d)
    else:
        flips = 1 - 2 * np.random.default_rng(0).integers(0, 2, (_RESAMPLES, n))
        means = np.abs(np.concatenate([flips @ d, [d.sum()]]))
    # A pattern that ties with the measured one must count in spite of rounding.
    extreme = means >= abs(d.sum()) * (1 - 1e-9)
    return Paired(float(d.mean()), bootstrap_interval(d), float(extreme.mean()))


def proportion_interval(successes: int, n: int) -> Interval:
    """95 % Wilson score interval (Wilson, 1927, without continuity correction) for a proportion.

    0 <= low <= successes / n <= high <= 1, and of positive width, even at 0 and n successes. Raises ValueError unless
    0 <= successes <= n and n >= 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"Expected successes={successes} in [0, n={n}] and n >= 1.")
    from scipy.stats import binomtest

    low, high = binomtest(successes, n).proportion_ci(method="wilson")
    return float(low), float(high)


def _finite_values(values: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0 or not np.isfinite(x).all():
        raise ValueError(f"Expected at least one finite value in one dimension, got values={x}.")
    return x
