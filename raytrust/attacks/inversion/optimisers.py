"""Optimisers of many candidates at once: each candidate has a state of its own, and rows can be dropped.

Candidates are the rows of a matrix (n, d). `direction` returns the step of size 1, (n, d), which the caller scales.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from raytrust.config import InversionConfig


class Optimiser(Protocol):
    def direction(self, z: Tensor, gradient: Tensor) -> Tensor: ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        ...


class Adam:
    """Kingma & Ba 2015, Algorithm 1, with its default constants."""

    # Not torch.optim's: that one steps by itself, at one rate for all rows, and can't drop any.
    def __init__(self, like: Tensor):
        self._mean, self._square, self._steps = torch.zeros_like(like), torch.zeros_like(like), 0

    def direction(self, z: Tensor, gradient: Tensor) -> Tensor:
        self._steps += 1
        self._mean.lerp_(gradient, 1 - 0.9)
        self._square.mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
        scale = self._square.sqrt().div_(math.sqrt(1 - 0.999**self._steps)).add_(1e-8)
        return -(self._mean / (1 - 0.9**self._steps)) / scale

    def keep(self, rows: Tensor) -> None:
        self._mean, self._square = self._mean[rows], self._square[rows]


class LBFGS:
    """Limited-memory BFGS without line search, as `torch.optim.LBFGS` runs it, but a matrix of candidates at a time.

    The first step is at most 1 in L1 norm. A pair of differences enters the memory only where its curvature is
    positive. Differences are of the points as they come, so that a projection in between is accounted for.
    """

    def __init__(self, memory: int = 100):
        self._memory = memory
        self._pairs: list[tuple[Tensor, Tensor, Tensor]] = []  # s, y (n, d) and 1 / <s, y> (n, 1), 0 if left out
        self._scale: Tensor | None = None  # (n, 1), of the initial inverse Hessian
        self._last: tuple[Tensor, Tensor] | None = None

    def direction(self, z: Tensor, gradient: Tensor) -> Tensor:
        z, gradient = z.clone(), gradient.clone()
        if self._last is None or self._scale is None:
            self._last, self._scale = (z, gradient), torch.ones_like(z[:, :1])
            # Before any curvature is known, the gradient's size says nothing of how far to go.
            return -gradient / gradient.abs().sum(1, keepdim=True).clamp_min(1)
        s, y = z - self._last[0], gradient - self._last[1]
        self._last = z, gradient
        curvature = (s * y).sum(1, keepdim=True)
        # The threshold of torch's L-BFGS. Without positive curvature the next direction might lead uphill.
        sound = curvature > 1e-10
        self._scale = torch.where(sound, curvature / y.square().sum(1, keepdim=True), self._scale)
        # A row whose pair is left out keeps it with weight 0: so all rows have as many pairs, and are one matrix.
        self._pairs.append((s, y, torch.where(sound, 1 / curvature, torch.zeros_like(curvature))))
        del self._pairs[: -self._memory]
        q, weights = -gradient, []
        for s, y, inverse in reversed(self._pairs):
            weights.append(inverse * (s * q).sum(1, keepdim=True))
            q = q - weights[-1] * y
        q = q * self._scale
        for (s, y, inverse), weight in zip(self._pairs, reversed(weights), strict=True):
            q = q + (weight - inverse * (y * q).sum(1, keepdim=True)) * s
        return q

    def keep(self, rows: Tensor) -> None:
        self._pairs = [(s[rows], y[rows], inverse[rows]) for s, y, inverse in self._pairs]
        if self._last is not None and self._scale is not None:
            self._last, self._scale = (self._last[0][rows], self._last[1][rows]), self._scale[rows]


def build_optimiser(config: InversionConfig, like: Tensor) -> Optimiser:
    return Adam(like) if config.optimiser == "adam" else LBFGS()


def step_sizes(config: InversionConfig) -> Tensor:
    """The step size of each iteration, (iterations,)."""
    n = config.iterations
    # The fractions of Geiping et al. 2020, which later programs took over.
    milestones = [n * k // 8 for k in (3, 5, 7)]
    factors = {
        "steps": [0.1 ** sum(i >= m for m in milestones) for i in range(n)],
        "cosine": [(1 + math.cos(math.pi * i / n)) / 2 for i in range(n)],
        "constant": [1.0] * n,
    }[config.schedule]
    return torch.tensor(
        [config.step_size * f * min(1.0, (i + 1) / max(1, config.warmup)) for i, f in enumerate(factors)]
    )


def signs(gradient: Tensor, hard: Tensor, soft: Tensor, progress: float) -> Tensor:
    """The gradient (n, d), its sign where `hard` (n, 1), and where `soft` (n, 1) what goes from its tanh to itself.

    soft: tanh(s u) / s with s = 1 - progress, as in `breaching`, of u = gradient / mean |gradient|; there it is of the
    gradient itself, which for small gradients would leave it as it is.
    """
    # A candidate whose slope is zero everywhere must stay where it is instead of turning into NaN.
    unit = gradient / gradient.abs().mean(1, keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
    s = 1 - progress
    return torch.where(hard, gradient.sign(), torch.where(soft, torch.tanh(s * unit) / s, gradient))
