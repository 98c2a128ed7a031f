"""The differential privacy that one training run refutes (Steinke, Nasr & Jagielski 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binom

from raytrust.metrics.roc import checked


@dataclass(frozen=True)
class EpsilonBound:
    """With `confidence`, the training isn't (epsilon, delta)-differentially private for any epsilon below `epsilon`.

    guesses, correct: on what it rests; the number of guesses was fixed before the scores were seen.
    """

    epsilon: float
    delta: float
    confidence: float
    guesses: int
    correct: int


def one_run_epsilon(
    scores: ArrayLike, member: ArrayLike, guesses: int, delta: float = 0.0, confidence: float = 0.95
) -> EpsilonBound:
    """A lower bound on epsilon from one model, whose points were each a member by its own fair coin.

    The guesses // 2 highest scores are guessed to be members and as many lowest to be none; on the rest the attacker
    abstains. `guesses` has to be fixed beforehand: the best of several is above 0 on pure noise far too often. Scores
    must not depend on the coins except through the model. Equal scores are guessed in the order of their points.

    Returns a bound of 0 where the guesses don't refute epsilon = 0; a score that knows nothing gets 0 in at least
    `confidence` of runs. Raises ValueError unless 2 <= guesses <= n.
    """
    s, m = checked(scores, member)
    if not 2 <= guesses <= s.size:
        raise ValueError(f"Expected guesses={guesses} in [2, {s.size}], the number of points.")
    if not 0 <= delta < 1:
        raise ValueError(f"Expected delta={delta} in [0, 1).")
    half = guesses // 2
    # A stable order, as the guesses must not depend on the coins, not even through ties.
    order = np.argsort(-s, kind="stable")
    correct = int(m[order[:half]].sum() + (~m[order[len(order) - half :]]).sum())

    def refuted(epsilon: float) -> bool:
        return p_value(s.size, 2 * half, correct, epsilon, delta) < 1 - confidence

    # What is refuted is refuted for every smaller epsilon: double until it isn't, then bisect.
    low, high = 0.0, 1.0
    if refuted(0.0):
        while refuted(high) and high < 64:
            low, high = high, 2 * high
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if refuted(middle) else (low, middle)
    return EpsilonBound(low, delta, confidence, 2 * half, correct)


def p_value(points: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The greatest probability, under (epsilon, delta)-DP, of at least `correct` right guesses (their Theorem 5.2).

    P[Binomial(guesses, e^epsilon / (1 + e^epsilon)) >= correct], and for delta > 0 the term
    2 points delta max_i P[correct > Binomial >= correct - i] / i. In [0, 1], rising with epsilon and delta.
    """
    share = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, share))
    if delta == 0 or correct == 0:
        return tail
    steps = np.arange(1, correct + 1)
    within = binom.pmf(correct - steps, guesses, share).cumsum()
    return min(1.0, tail + 2 * points * delta * float((within / steps).max()))
