"""What a model's outputs say of a point: one number a point, higher means member.

All take logits (..., n, classes) and labels (n,), and return (..., n) in float64. They are computed from log
probabilities, so that a confident network does not round them to a tie.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp

Array = NDArray[np.float64]

SIGNALS = ("max confidence", "confidence", "loss", "entropy", "modified entropy")


def signals(logits: ArrayLike, labels: ArrayLike) -> dict[str, Array]:
    """Every signal by its name in `SIGNALS`, besides "logit", the signal of LiRA.

    - max confidence: max_i p_i, in [0, 1]. It needs no label (Salem et al. 2019).
    - confidence: p_y, in [0, 1] (Shokri et al. 2017 and later).
    - loss: log p_y <= 0, the negative cross-entropy in nats (Yeom et al. 2018). The ranking of the confidence, but
      another mean, and so another threshold of Yeom's.
    - entropy: sum_i p_i log p_i, in [-log classes, 0]. It needs no label.
    - modified entropy: (1 - p_y) log p_y + sum_{i != y} p_i log(1 - p_i) <= 0 (Song & Mittal 2021, eq. 7, negated).
    - logit: log p_y - log(1 - p_y), near to normally distributed (Carlini et al. 2022, section IV-C).
    """
    log_p = log_probabilities(logits)
    p, log_rest = np.exp(log_p), _log_complement(log_p)
    index = np.broadcast_to(np.asarray(labels, dtype=np.int64), log_p.shape[:-1])[..., None]
    of_label = np.take_along_axis(log_p, index, -1)[..., 0]
    rest_of_label = np.take_along_axis(log_rest, index, -1)[..., 0]
    others = p * log_rest
    np.put_along_axis(others, index, 0.0, -1)
    # Each sign is chosen so that higher means member: a loss taken the wrong way round has an AUC of 0.27 instead of
    # 0.73.
    return {
        "max confidence": p.max(axis=-1),
        "confidence": np.exp(of_label),
        "loss": of_label,
        "entropy": (p * log_p).sum(axis=-1),
        "modified entropy": np.exp(rest_of_label) * of_label + others.sum(axis=-1),
        "logit": of_label - rest_of_label,
    }


def log_probabilities(logits: ArrayLike) -> Array:
    """Log softmax over the last axis, in float64; that of the likeliest class from the sum of the others."""
    z = np.asarray(logits, dtype=np.float64)
    top = z.argmax(axis=-1)[..., None]
    others = z - np.take_along_axis(z, top, -1)
    np.put_along_axis(others, top, -np.inf, -1)
    log_p = others - np.log1p(np.exp(others).sum(axis=-1, keepdims=True))
    # 1 plus something tiny rounds to 1: taken from the logits' sum, all confident points would tie at 0.
    np.put_along_axis(log_p, top, -np.log1p(np.exp(others).sum(axis=-1, keepdims=True)), -1)
    return np.asarray(log_p)


def _log_complement(log_p: Array) -> Array:
    """log(1 - p_i): of the likeliest class from the sum of the others, as 1 - p would cancel."""
    top = log_p.argmax(axis=-1)[..., None]
    others = log_p.copy()
    np.put_along_axis(others, top, -np.inf, -1)
    # None of the others exceeds 1/2, so that the subtraction from 1 loses no digits.
    log_rest = np.log1p(-np.exp(others))
    np.put_along_axis(log_rest, top, logsumexp(others, axis=-1)[..., None], -1)
    return log_rest
