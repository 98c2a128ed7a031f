"""An attack model, trained on the outputs of shadow models, whose members are known."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from raytrust.attacks.membership.signals import Array, log_probabilities


class AttackModel:
    """Tells members by the three highest posteriors, without the label (Shokri et al. 2017; Salem et al. 2019).

    We deviate in the model: a logistic regression on the log posteriors, their squares and products, instead of a
    network, so that a fit has no seed and one optimum. One model serves all classes.
    """

    def __init__(self, top: int = 3):
        self._top = top
        self._model: Pipeline = make_pipeline(
            StandardScaler(), PolynomialFeatures(2, include_bias=False), LogisticRegression(C=1.0, max_iter=500)
        )

    def fit(self, logits: ArrayLike, member: ArrayLike) -> AttackModel:
        """logits: (n, classes) of shadow models; member: (n,) booleans."""
        self._model.fit(self._features(logits), np.asarray(member))
        return self

    def score(self, logits: ArrayLike) -> Array:
        """(n, classes) -> (n,): the log odds of membership."""
        return np.asarray(self._model.decision_function(self._features(logits)))

    def _features(self, logits: ArrayLike) -> Array:
        log_p = log_probabilities(logits)
        highest = -np.sort(-log_p, axis=-1)[..., : self._top]
        # The float32 logits of a saturated network resolve nothing below this.
        return np.clip(highest, -30, 0)
