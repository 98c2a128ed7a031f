"""LiRA and RMIA as settings of one likelihood ratio over shadow models.

For a point x with signal s under the attacked model, both compare how likely s is if x was a member (f_1) with how
likely it is if it wasn't (f_0), where f_1 is an exponential tilt of f_0:

    log f_1(s) / f_0(s) = eta s - K(eta),    K(eta) = log E_{f_0}[exp(eta s)].

LiRA (Carlini et al. 2022) takes f_0 to be normal, s the logit, and fits eta = (mu_in - mu_out) / sigma^2 to each point;
variances of their own for f_1 and f_0 add a term in s^2. RMIA (Zarifzadeh, Liu & Shokri 2024) takes f_0 to be the
shadows' empirical distribution, s = log p_y and eta = 1, so that K is the log of the mean p_y over shadows, and then
ranks the ratio among those of population points. Online attackers have shadows that were trained on x, offline ones
have none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Rule:
    """One setting of the likelihood ratio.

    family: "normal" (LiRA) or "empirical" (RMIA). online: whether shadows trained on the point are used.
    separate: a variance for each hypothesis, as online LiRA has it; else one for both.
    shrinkage: how many observations the pooled variance of all points, and for the mean of f_1 the pooled shift, count
        for beside a point's own shadows: 0 is LiRA with variances of each point, infinity LiRA with a fixed variance.
    gamma: a population point counts as surpassed if it has at most 1 / gamma of the point's ratio (RMIA, eq. 4).
    offline_slope: RMIA's a, from the mean p_y of models without x to that of all: ((1 + a) p + 1 - a) / 2.
    """

    name: str
    family: Literal["normal", "empirical"]
    online: bool
    separate: bool = False
    shrinkage: float = 4.0
    gamma: float = 1.0
    offline_slope: float = 0.3

    def __post_init__(self) -> None:
        if not self.shrinkage >= 0:
            raise ValueError(f"Expected shrinkage={self.shrinkage} to be at least 0.")
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"Expected gamma={self.gamma} to be positive and finite.")

    @property
    def signal(self) -> str:
        """The name of the signal that it takes: see `signals`."""
        return "logit" if self.family == "normal" else "loss"


LIRA_ONLINE = Rule("LiRA online", "normal", online=True)
LIRA_OFFLINE = Rule("LiRA offline", "normal", online=False)
RMIA_ONLINE = Rule("RMIA online", "empirical", online=True)
RMIA_OFFLINE = Rule("RMIA offline", "empirical", online=False)
RULES = (LIRA_ONLINE, LIRA_OFFLINE, RMIA_ONLINE, RMIA_OFFLINE)


def log_ratio(target: Array, shadows: Array, keep: Mask, rule: Rule) -> Array:
    """log f_1 / f_0 of each point, (n,); higher means member.

    target: (n,), the signal under the attacked model. shadows: (m, n), under m other models. keep: (m, n), which of
    these were trained on which point. Raises ValueError if a point has no shadow that the rule can use.

    An offline attacker has no f_1 to fit; shifted by one standard deviation it ranks points like the one-sided tail
    Phi((s - mu_out) / sigma) of offline LiRA: a signal below that of the shadows never counts for membership.
    """
    _check(target, shadows, keep, rule)
    out = ~keep
    if rule.family == "empirical":
        return np.asarray(target - _log_mean(shadows, keep, rule))
    mean_out, squares_out = _moments(shadows, out)
    if not rule.online:
        sigma = np.sqrt(_shrunk_variance(squares_out, out.sum(axis=0) - 1, rule.shrinkage))
        # The log ratio of two normals that lie one standard deviation apart is z - 1/2. It rises with z throughout: a
        # two-sided one would count points of unusually low confidence as members.
        return np.asarray((target - mean_out) / sigma - 0.5)
    _, squares_in = _moments(shadows, keep)
    mean_in = _shrunk_mean_in(shadows, keep, mean_out, rule.shrinkage)
    free = keep.sum(axis=0) - 1, out.sum(axis=0) - 1
    if rule.separate:
        variance_in, variance_out = (
            _shrunk_variance(squares, n, rule.shrinkage)
            for squares, n in zip((squares_in, squares_out), free, strict=True)
        )
    else:
        variance_in = variance_out = _shrunk_variance(squares_in + squares_out, free[0] + free[1], rule.shrinkage)
    return np.asarray(_log_normal(target, mean_in, variance_in) - _log_normal(target, mean_out, variance_out))


def rank_in_population(ratio: Array, population: Array, gamma: float = 1.0) -> Array:
    """The share of population points whose log ratio is at most ratio - log gamma: (n,) in [0, 1] (RMIA, eq. 4).

    ratio: (n,), population: (z,), under one model. It makes the scores of different models comparable.
    """
    # A search in sorted values takes n log z comparisons, where a table of all pairs would take n z.
    ordered = np.sort(population)
    return np.asarray(np.searchsorted(ordered, ratio - math.log(gamma), side="right") / len(ordered))


def leave_one_out(signal: Array, keep: Mask, rule: Rule, population: Array | None = None) -> Array:
    """The scores of each of m models, with the m - 1 others as its shadows: (m, n).

    signal, keep: (m, n). population: (m, z), the signal of points that no model was trained on, which only the
    empirical family needs. A point that the rule can't use, since the other models were all trained on it or none was,
    gets the median score: no evidence. Coins of different models must be independent; of a balanced design the shadows'
    coins alone give the members away.
    """
    if rule.family == "empirical" and population is None:
        raise ValueError(f"Expected population points for {rule.name}, got none.")
    scores = np.empty_like(signal, dtype=np.float64)
    for i in range(len(signal)):
        others = np.arange(len(signal)) != i
        count = keep[others].sum(axis=0)
        usable = (count < len(signal) - 1) & ((count > 0) | (not rule.online))
        scores[i, usable] = log_ratio(signal[i, usable], signal[others][:, usable], keep[others][:, usable], rule)
        scores[i, ~usable] = np.median(scores[i, usable])
        if rule.family == "empirical" and population is not None:
            never = np.zeros(population[others].shape, dtype=bool)
            # No shadow was trained on a population point. An online attacker estimates nothing: for it the slope is 1.
            # Where probabilities are small, a reference that is built in another way than the points' own puts every
            # point at the same rank, an AUC of 0.50 (docs/findings.md).
            slope = 1.0 if rule.online else rule.offline_slope
            out = Rule(rule.name, "empirical", online=False, offline_slope=slope)
            reference = log_ratio(population[i], population[others], never, out)
            scores[i] = rank_in_population(scores[i], reference, rule.gamma)
    return scores


def vulnerability(signal: Array, keep: Mask, shrinkage: float = LIRA_ONLINE.shrinkage) -> Array:
    """How far apart each point's signals with and without it lie, in standard deviations, by the other models: (m, n).

    Row i leaves model i out, so that choosing points by it does not look at the model that is attacked. 0 where the
    other models were all trained on the point or none was.
    """
    found = np.empty_like(signal, dtype=np.float64)
    for i in range(len(signal)):
        others = np.arange(len(signal)) != i
        s, k = signal[others], keep[others]
        mean_out, squares_out = _moments(s, ~k)
        mean_in, squares_in = _moments(s, k)
        # Two means were fitted, with and without the point, which takes two degrees of freedom.
        variance = _shrunk_variance(squares_in + squares_out, np.full(s.shape[1], len(s) - 2), shrinkage)
        known = k.any(axis=0) & ~k.all(axis=0)
        found[i] = np.where(known, (mean_in - mean_out) / np.sqrt(variance), 0.0)
    return found


def _check(target: Array, shadows: Array, keep: Mask, rule: Rule) -> None:
    if shadows.shape != keep.shape or shadows.ndim != 2 or target.shape != shadows.shape[1:] or keep.dtype != np.bool_:
        raise ValueError(
            f"Expected target (n,), shadows (m, n) and keep (m, n), got {target.shape}, {shadows.shape}, {keep.shape}."
        )
    least_in, least_out = int(keep.sum(axis=0).min()), int((~keep).sum(axis=0).min())
    if least_out < 1 or (rule.online and least_in < 1):
        raise ValueError(
            f"Expected shadows with and without every point for {rule.name}, got at least {least_in} and {least_out}."
        )


def _log_mean(log_p: Array, keep: Mask, rule: Rule) -> Array:
    """Log of the mean p_y over models, half of which were trained on the point: (n,)."""
    out = logsumexp(np.where(keep, -np.inf, log_p), axis=0) - np.log((~keep).sum(axis=0))
    if rule.online:
        with_it = logsumexp(np.where(keep, log_p, -np.inf), axis=0) - np.log(keep.sum(axis=0))
        return np.asarray(np.logaddexp(out, with_it) - math.log(2))
    a = rule.offline_slope
    return np.asarray(np.log(((1 + a) * np.exp(out) + 1 - a) / 2))


def _moments(s: Array, part: Mask) -> tuple[Array, Array]:
    """Mean and sum of squared deviations over the part of the models, for each point: (n,), (n,)."""
    # The callers leave out points that no such model saw, so that only the division by zero has to be avoided.
    mean = np.where(part, s, 0).sum(axis=0) / np.maximum(part.sum(axis=0), 1)
    return mean, np.where(part, (s - mean) ** 2, 0).sum(axis=0)


def _shrunk_variance(squares: Array, free: NDArray[np.int64], shrinkage: float) -> Array:
    """(shrinkage * pooled + squares) / (shrinkage + free), at least a millionth of the pooled variance: (n,)."""
    pooled = float(squares.sum() / max(1, int(free.sum())))
    if math.isinf(shrinkage):
        return np.full(squares.shape, max(pooled, np.finfo(float).tiny))
    # Of a handful of shadows a point's own variance is mostly chance, and where it comes out small the ratio explodes.
    variance = (shrinkage * pooled + squares) / np.maximum(shrinkage + free, np.finfo(float).tiny)
    return np.maximum(variance, max(1e-6 * pooled, np.finfo(float).tiny))


def _shrunk_mean_in(s: Array, keep: Mask, mean_out: Array, shrinkage: float) -> Array:
    """The mean of f_1: that of the point's own models, drawn towards its mean without it plus the mean shift."""
    count = keep.sum(axis=0)
    mean, _ = _moments(s, keep)
    shifted = mean_out + (mean - mean_out).mean()
    if math.isinf(shrinkage):
        return np.asarray(shifted)
    return np.asarray((count * mean + shrinkage * shifted) / (count + shrinkage))


def _log_normal(s: Array, mean: Array, variance: Array) -> Array:
    return np.asarray(-((s - mean) ** 2) / (2 * variance) - np.log(2 * np.pi * variance) / 2)
