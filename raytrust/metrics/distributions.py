"""The distributions that verdicts and intervals of an audit need: SciPy's, or as exact without it.

A slim training image has torch and NumPy alone, and an audit there must judge as anywhere else. All else that needs
SciPy imports it where it is used.
"""

from __future__ import annotations

import math
from statistics import NormalDist

try:
    from scipy.special import ndtr, stdtrit
    from scipy.stats import binom
except ModuleNotFoundError:
    binom = None


def binomial_tail(successes: int, n: int, p: float) -> float:
    """The probability of at least so many successes among n, each with probability p."""
    if binom is not None:
        return float(binom.sf(successes - 1, n, p))
    return binomial_tail_without_scipy(successes, n, p)


def normal_cdf(x: float) -> float:
    """The probability of a standard normal below x."""
    return float(ndtr(x)) if binom is not None else NormalDist().cdf(x)


def student_quantile(degrees: int, p: float) -> float:
    """The value below which a Student-t variable of so many degrees of freedom lies with probability p in (0, 1)."""
    return float(stdtrit(degrees, p)) if binom is not None else student_quantile_without_scipy(degrees, p)


def binomial_tail_without_scipy(successes: int, n: int, p: float) -> float:
    return math.fsum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(max(successes, 0), n + 1))


def student_quantile_without_scipy(degrees: int, p: float) -> float:
    """By bisection of the distribution function, a finite sum (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4)."""
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t / sqrt(degrees)
    target = abs(2 * p - 1)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(degrees, middle) < target else (low, middle)
    return math.copysign(math.sqrt(degrees) * math.tan(low), p - 0.5)


def _within(degrees: int, angle: float) -> float:
    """The probability between -t and t, where t = sqrt(degrees) tan(angle)."""
    term, total = (math.cos(angle), 0.0) if degrees % 2 else (1.0, 0.0)
    for k in range(1 + degrees % 2, degrees, 2):
        total += term
        term *= math.cos(angle) ** 2 * k / (k + 1)
    if degrees % 2 == 0:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + math.sin(angle) * total)
