"""Settings of the learned inverter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from raytrust.config.values import expect, expect_choices


@dataclass(frozen=True)
class LearnedInverterConfig:
    """Learning to Invert (Wu et al. 2023): a network from messages to images, trained on images of the attacker's own.

    The defaults are sized for a CPU; the paper's program trains on 50,000 images, with hidden=3000, learning_rate=1e-4
    and batches of 256, for 200 epochs.

    auxiliary: how many of the attacker's images are used, the first ones. The share `held_out` of them, drawn from the
        seed, says when to stop: after `patience` epochs without a smaller loss on it, or after all `epochs`. The
        network of the least loss is kept. The learning rate falls by 10 after three quarters of the epochs.
    input: messages enter by a count-sketch of length `dimension` ("hashed"), or "whole", without one.
    scale: whether a message is brought to norm 1 as a whole, or tensor by tensor, so that none drowns in another.
    hidden, layers: the width of a hidden layer, and how many there are. dropout: the share of their outputs that is
        left out in training.
    ssim: in [0, 1], the weight of 1 - SSIM in the loss; that of the squared error is 1 - ssim. The paper's is 0.
    """

    auxiliary: int = 5000
    input: Literal["hashed", "whole"] = "hashed"
    dimension: int = 4096
    scale: Literal["message", "tensor"] = "message"
    hidden: int = 1000
    layers: int = 2
    dropout: float = 0.0
    epochs: int = 60
    patience: int = 5
    learning_rate: float = 1e-3
    batch_size: int = 128
    held_out: float = 0.1
    ssim: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        expect_choices(self)
        for name in ("dimension", "hidden", "layers", "epochs", "patience", "batch_size"):
            expect(getattr(self, name) >= 1, name, getattr(self, name), "to be at least 1")
        expect(0 < self.held_out < 1, "held_out", self.held_out, "in (0, 1), a share of the auxiliary images")
        least = "to leave at least one image to train on and one to stop by"
        expect(1 <= self.validation < self.auxiliary, "auxiliary", self.auxiliary, least)
        expect(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        expect(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "to be positive and finite")
        expect(0 <= self.ssim <= 1, "ssim", self.ssim, "in [0, 1]")
        expect(0 <= self.seed < 2**31, "seed", self.seed, "in [0, 2**31)")

    @property
    def validation(self) -> int:
        """How many auxiliary images are held out."""
        return round(self.held_out * self.auxiliary)

    @property
    def name(self) -> str:
        """A short name for tables, such as "learned n=5000 hashed=4096 h=1000x2"."""
        size = f"hashed={self.dimension}" if self.input == "hashed" else self.input
        name = f"learned n={self.auxiliary} {size} h={self.hidden}x{self.layers}"
        name += f" scale={self.scale}" if self.scale != "message" else ""
        return name + "".join(f" {x}={getattr(self, x):.2g}" for x in ("dropout", "ssim") if getattr(self, x))
