"""Everything that the audit says of one attack on several models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import beta

from raytrust.metrics.roc import Array, Mask, auc, checked
from raytrust.metrics.statistics import Figure, mean_figure

LOW_FPR = (0.01, 0.001)
_RESAMPLES = 1000


@dataclass(frozen=True)
class AuditReport:
    """An attack's figures. tpr: by false positive rate. slices: AUC by the name of a part of the points. epsilon: the
    mean of the models' bounds."""

    auc: Figure
    tpr: dict[float, Figure]
    slices: dict[str, Figure]
    epsilon: Figure | None


def pooled_audit(
    scores: ArrayLike, member: ArrayLike, slices: Mapping[str, ArrayLike] | None = None, guesses: int | None = None
) -> AuditReport:
    """Report on k models with the model as the unit. scores, member: (k, n); slices: masks (n,) or (k, n), by name.
    guesses: of the epsilon bound, fixed beforehand; none is given without it.

    AUCs and epsilons are means over models with Student-t intervals: points of one model share its training, so that
    pooled points would make the interval too narrow. TPR at a low FPR pools the scores, which one model's non-members
    seldom resolve, and resamples whole models. Models that were trained on parts of one pool are not quite independent
    either; the intervals neglect this.
    """
    s, m = np.asarray(scores, dtype=np.float64), np.asarray(member)
    if s.ndim != 2 or m.shape != s.shape:
        raise ValueError(f"Expected scores and member of one shape (models, points), got {s.shape} and {m.shape}.")
    checked(s.ravel(), m.ravel())

    def area(part: ArrayLike) -> Figure:
        mask = np.broadcast_to(np.asarray(part, dtype=bool), s.shape)
        rows = [(x[w], y[w]) for x, y, w in zip(s, m, mask, strict=True)]
        return mean_figure([auc(x, y) for x, y in rows if y.any() and not y.all()])

    bounds = [] if guesses is None else [one_run_epsilon(x, y, guesses) for x, y in zip(s, m, strict=True)]
    return AuditReport(
        auc=area(True),
        tpr={fpr: _pooled_tpr(s, m, fpr) for fpr in LOW_FPR},
        slices={name: area(part) for name, part in (slices or {}).items()},
        epsilon=mean_figure(bounds) if bounds else None,
    )


def _pooled_tpr(s: Array, m: Mask, fpr: float) -> Figure:
    """The greatest TPR at an FPR of at most `fpr`, without interpolation; none of fewer than 10 / fpr non-members, of
    whom fewer than ten would decide it. The threshold is drawn anew in each resample, being chosen on the sample."""
    # With a slack for rounding: 10 / 0.001 is 10,000.
    if (~m).sum() * fpr < 10 * (1 - 1e-12):
        return Figure(None, n=len(s))
    # How often each distinct score of the pool occurs in each model, so that resampling models is one product.
    values, place = np.unique(-s, return_inverse=True)
    rows = [zip(place.reshape(s.shape), who, strict=True) for who in (m, ~m)]
    counts = [np.stack([np.bincount(p[w], minlength=len(values)) for p, w in of]).astype(np.float64) for of in rows]
    ones = np.ones((1, len(s)))
    value = float(_tpr(ones @ counts[0], ones @ counts[1], fpr)[0])
    if len(s) == 1:
        return Figure(value, n=1)
    generator = np.random.default_rng(0)
    rates = []
    # Fifty at a time: a table of all resamples by all distinct scores would be gigabytes.
    for _ in range(_RESAMPLES // 50):
        weights = generator.multinomial(len(s), np.full(len(s), 1 / len(s)), size=50).astype(np.float64)
        rates.append(_tpr(weights @ counts[0], weights @ counts[1], fpr))
    low, high = np.quantile(np.concatenate(rates), [0.025, 0.975])
    return Figure(value, float(low), float(high), len(s))


def _tpr(positive: Array, negative: Array, fpr: float) -> Array:
    """The greatest TPR at an FPR of at most `fpr`. positive, negative: (r, k) weights, highest score first; (r,)."""
    # The same slack: 0.01 of 1,000 others are ten of them.
    allowed = negative.cumsum(axis=1) <= fpr * negative.sum(axis=1, keepdims=True) * (1 + 1e-12)
    reached = np.where(allowed, positive.cumsum(axis=1), 0).max(axis=1)
    return np.asarray(reached / positive.sum(axis=1))


def one_run_epsilon(scores: ArrayLike, member: ArrayLike, guesses: int) -> float:
    """A lower bound on epsilon from one model, each point a member by its own fair coin (Steinke et al. 2023).

    The guesses // 2 highest scores are guessed to be members and as many lowest to be none; on the rest the attacker
    abstains. `guesses` has to be fixed beforehand: the best of several is above 0 on pure noise far too often. Scores
    must not depend on the coins except through the model. Equal scores are guessed in the order of their points.

    With a confidence of 95 %, the training isn't epsilon-differentially private for any epsilon below the bound; it is
    0 where the guesses don't refute epsilon = 0. Raises ValueError unless 2 <= guesses <= n.
    """
    s, m = checked(scores, member)
    if not 2 <= guesses <= s.size:
        raise ValueError(f"Expected guesses={guesses} in [2, {s.size}], the number of points.")
    half = guesses // 2
    # A stable order, as the guesses must not depend on the coins, not even through ties.
    order = np.argsort(-s, kind="stable")
    correct = int(m[order[:half]].sum() + (~m[order[len(order) - half :]]).sum())
    # Under epsilon-DP at least so many guesses are right with a probability of at most P[Binomial(guesses, e^epsilon /
    # (1 + e^epsilon)) >= correct] (their Theorem 5.2): the share at which that is 5 % is a quantile of a beta.
    share = float(beta.ppf(0.05, correct, 2 * half - correct + 1)) if correct else 0.0
    return math.log(share / (1 - share)) if share > 0.5 else 0.0
