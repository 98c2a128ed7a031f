"""Everything that the audit says of one attack, on one model or on several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from raytrust.metrics.epsilon import EpsilonBound, one_run_epsilon
from raytrust.metrics.roc import (
    RESAMPLES,
    Array,
    Mask,
    auc,
    auc_interval,
    checked,
    percentiles,
    resolvable,
    tied_groups,
    tpr_at_fpr,
    tpr_of_groups,
)
from raytrust.metrics.statistics import Figure, mean_figure, mean_interval

LOW_FPR = (0.01, 0.001)


@dataclass(frozen=True)
class AuditReport:
    """An attack's figures. tpr: by false positive rate. slices: AUC by the name of a part of the points.

    epsilon: one run's bound, or for several models the mean of their bounds with its interval.
    unit: what the intervals take for independent and the figures' n counts, "point" or "model".
    """

    auc: Figure
    tpr: dict[float, Figure]
    slices: dict[str, Figure]
    epsilon: EpsilonBound | Figure | None
    unit: str


def audit(
    scores: ArrayLike,
    member: ArrayLike,
    slices: Mapping[str, ArrayLike] | None = None,
    guesses: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> AuditReport:
    """Report on one model. scores, member: (n,). slices: masks (n,) by name. guesses: of the epsilon bound, fixed
    beforehand; none is given without it. Intervals are bootstraps over points."""
    s, m = checked(scores, member)

    def area(part: Mask) -> Figure:
        if not m[part].any() or m[part].all():
            return Figure(None, n=int(part.sum()))
        return Figure(auc(s[part], m[part]), *auc_interval(s[part], m[part], confidence, seed=seed), int(part.sum()))

    return AuditReport(
        auc=area(np.ones(s.shape, dtype=bool)),
        tpr={fpr: tpr_at_fpr(s, m, fpr, confidence, seed=seed) for fpr in LOW_FPR},
        slices={name: area(np.asarray(part, dtype=bool)) for name, part in (slices or {}).items()},
        epsilon=None if guesses is None else one_run_epsilon(s, m, guesses, confidence=confidence),
        unit="point",
    )


def pooled_audit(
    scores: ArrayLike,
    member: ArrayLike,
    slices: Mapping[str, ArrayLike] | None = None,
    guesses: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> AuditReport:
    """Report on k models with the model as the unit. scores, member: (k, n); slices: masks (n,) or (k, n).

    AUCs and epsilons are means over models with Student-t intervals: points of one model share its training, so that
    pooled points would make the interval too narrow. TPR at a low FPR pools the scores, which one model's non-members
    seldom resolve, and resamples whole models. Models that were trained on parts of one pool are not quite independent
    either; the intervals neglect this.
    """
    s, m = np.asarray(scores, dtype=np.float64), np.asarray(member)
    if s.ndim != 2 or m.shape != s.shape:
        raise ValueError(f"Expected scores and member of one shape (models, points), got {s.shape} and {m.shape}.")
    checked(s.ravel(), m.ravel())

    def mean(values: Sequence[float]) -> Figure:
        return mean_figure(values, lambda x: mean_interval(x, confidence))

    def area(part: ArrayLike) -> Figure:
        mask = np.broadcast_to(np.asarray(part, dtype=bool), s.shape)
        rows = [(x[w], y[w]) for x, y, w in zip(s, m, mask, strict=True)]
        return mean([auc(x, y) for x, y in rows if y.any() and not y.all()])

    bounds = [] if guesses is None else [one_run_epsilon(x, y, guesses).epsilon for x, y in zip(s, m, strict=True)]
    return AuditReport(
        auc=area(True),
        tpr={fpr: _pooled_tpr(s, m, fpr, confidence, seed) for fpr in LOW_FPR},
        slices={name: area(part) for name, part in (slices or {}).items()},
        epsilon=mean(bounds) if bounds else None,
        unit="model",
    )


def _pooled_tpr(s: Array, m: Mask, fpr: float, confidence: float, seed: int) -> Figure:
    if not resolvable(int((~m).sum()), fpr):
        return Figure(None, n=len(s))
    # How often each distinct score of the pool occurs in each model, so that resampling models is one product.
    values, _, _ = tied_groups(s.ravel(), m.ravel())
    place = np.searchsorted(-values, -s)
    counts = [
        np.stack([np.bincount(p[w], minlength=len(values)) for p, w in zip(place, who, strict=True)]).astype(np.float64)
        for who in (m, ~m)
    ]
    ones = np.ones((1, len(s)))
    value = float(tpr_of_groups(ones @ counts[0], ones @ counts[1], fpr)[0])
    if len(s) == 1:
        return Figure(value, n=1)
    generator = np.random.default_rng(seed)
    rates = []
    # Fifty at a time: a table of all resamples by all distinct scores would be gigabytes.
    for _ in range(RESAMPLES // 50):
        weights = generator.multinomial(len(s), np.full(len(s), 1 / len(s)), size=50).astype(np.float64)
        rates.append(tpr_of_groups(weights @ counts[0], weights @ counts[1], fpr))
    return Figure(value, *percentiles(rates, confidence), len(s))
