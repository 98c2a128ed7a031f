"""The differential privacy that one training run refutes (Steinke, Nasr & Jagielski 2023)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import beta

from raytrust.metrics.roc import checked


def one_run_epsilon(scores: ArrayLike, member: ArrayLike, guesses: int) -> float:
    """A lower bound on epsilon from one model, whose points were each a member by its own fair coin.

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
