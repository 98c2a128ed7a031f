"""Settings of the attacks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from raytrust.config.compressors import Defence, DenseConfig
from raytrust.config.values import expect, expect_choices


@dataclass(frozen=True)
class InversionConfig:
    """Gradient inversion (Geiping et al. 2020): minimise matching distance + tv * total variation over the image.

    objective: "naive" takes the decoded gradient for the whole gradient, as published attacks do; "aware" compares only
        what the compressor let through (`View.distance`).
    tv: weight of the mean absolute difference of neighbouring pixels, in normalised pixel units.
    step_size: of Adam, in normalised pixel units; it falls by 10 after 3/8, 5/8 and 7/8 of the iterations.
    signed: Adam is fed the sign of the gradient.
    restarts: independent random starts, run as one batch; the one with the least objective is returned.
    capture_step: the training step whose messages are attacked.
    """

    objective: Literal["naive", "aware"] = "aware"
    tv: float = 1e-2
    step_size: float = 0.1
    iterations: int = 400
    restarts: int = 1
    signed: bool = True
    capture_step: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        expect_choices(self)
        expect(0 <= self.tv < math.inf, "tv", self.tv, "to be at least 0 and finite")
        expect(0 < self.step_size < math.inf, "step_size", self.step_size, "to be positive and finite")
        expect(self.iterations >= 1, "iterations", self.iterations, "to be at least 1")
        expect(self.restarts >= 1, "restarts", self.restarts, "to be at least 1")
        expect(self.capture_step >= 0, "capture_step", self.capture_step, "to be at least 0")
        expect(0 <= self.seed < 2**31, "seed", self.seed, "in [0, 2**31)")

    @property
    def name(self) -> str:
        """A short name for tables, such as "aware tv=0.01 lr=0.1 r=2 s=0"."""
        return f"{self.objective} tv={self.tv:.2g} lr={self.step_size:.2g} r={self.restarts} s={self.capture_step}"

    def against(self, defence: Defence) -> InversionConfig:
        """This attack as it applies to a defence: without a compressor the two objectives are one, called naive."""
        return replace(self, objective="naive") if isinstance(defence.compressor, DenseConfig) else self
