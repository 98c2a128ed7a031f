"""What DP-SGD guarantees: epsilon, by the Renyi divergences of the sampled Gaussian mechanism."""

from __future__ import annotations

import math

import numpy as np

ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(11, 65), *range(72, 513, 8))
DELTA = 1e-5


def epsilon(noise: float, rate: float, releases: int, delta: float = DELTA) -> float:
    """An epsilon for which all releases together are (epsilon, delta)-differentially private, for neighbours that
    differ in one image more or less. Not the least there is, as it goes by Renyi divergences.

    noise: the standard deviation of the Gaussian noise on a sum, in units of what one image may add to it. rate: the
    probability with which each image is in a release, by itself, in (0, 1]. releases: how many are made; of several
    workers, of all.

    Mironov, Talwar & Zhang 2019 (theorem 4 and sec. 3.1) for the divergence, Canonne, Kamath & Steinke 2020 (prop. 12)
    for what follows from it. Raises ValueError for values out of range.
    """
    for name, value, valid, words in (
        ("noise", noise, 0 < noise < math.inf, "to be positive and finite"),
        ("rate", rate, 0 < rate <= 1, "in (0, 1]"),
        ("releases", releases, releases >= 0, "to be at least 0"),
        ("delta", delta, 0 < delta < 1, "in (0, 1)"),
    ):
        if not valid:
            raise ValueError(f"Expected {name}={value} {words}.")
    bounds = [
        releases * _divergence(noise, rate, a) + math.log1p(-1 / a) - (math.log(delta) + math.log(a)) / (a - 1)
        for a in ORDERS
    ]
    return max(0.0, min(bounds)) if releases else 0.0


def _divergence(noise: float, rate: float, order: float) -> float:
    """The Renyi divergence of one release: log E[((1 - rate) + rate exp((2 z - 1) / (2 noise^2)))^order] / (order - 1)
    for z of N(0, noise^2)."""
    if noise < 0.1:
        # That of a release of all images, which is no smaller: the integral would take millions of points.
        return order / 2 / noise / noise
    # Beyond, nothing is left but what `delta` costs, and squares overflow. More noise is never worse.
    noise = min(noise, 1e6)
    # By the trapezoidal rule, whose error for such smooth and short-tailed integrands is that of rounding; the sum that
    # whole orders have leaves out the orders below 2, which little noise needs.
    step = noise / 50
    z = np.arange(-12 * noise, order + 12 * noise, step)
    ratio = np.logaddexp(math.log1p(-rate) if rate < 1 else -np.inf, math.log(rate) + (2 * z - 1) / (2 * noise**2))
    density = -(z**2) / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi))
    return float(np.logaddexp.reduce(density + order * ratio) + math.log(step)) / (order - 1)
