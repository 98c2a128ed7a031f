"""Transforms of a gradient: clipping, noise, pruning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from raytrust.config import (
    ClipConfig,
    DPSGDConfig,
    MixupConfig,
    NoiseConfig,
    PruneConfig,
    SoteriaConfig,
    TransformConfig,
    register,
)


class Transform(Protocol):
    """What a worker does to its own gradient, without a word to others.

    One that adds noise, and nothing besides that an attacker would mind, has a method `variance(images)`: of the noise
    in each entry, for a batch of so many images. Of one from outside the package that has none, nobody knows what it
    does, and it never "resists".
    """

    def __call__(self, grads: Sequence[Tensor], generator: torch.Generator) -> None:
        """Change the gradients, float32, one tensor a parameter, in place.

        generator: of what is random; of this worker and this step alone, and private.
        """
        ...


@register.transform(ClipConfig)
class Clip:
    """Scales the gradient by min(1, norm / its L2 norm): ||result|| <= norm, and its direction stays."""

    def __init__(self, config: ClipConfig):
        self.norm = config.norm

    def __call__(self, grads: Sequence[Tensor], generator: torch.Generator) -> None:
        if not grads:
            return
        length = torch.stack(torch._foreach_norm(list(grads))).norm()
        # Not by `clamp` of the quotient: a gradient of zero would be divided by.
        if length > self.norm:
            torch._foreach_mul_(list(grads), float(self.norm / length))


@register.transform(NoiseConfig)
class Noise:
    """Adds independent noise of mean 0 and standard deviation `deviation` to each entry: Gaussian, or Laplace noise of
    scale deviation / sqrt(2)."""

    def __init__(self, config: NoiseConfig):
        self.deviation, self.kind = config.deviation, config.kind

    def __call__(self, grads: Sequence[Tensor], generator: torch.Generator) -> None:
        for g in grads:
            if self.kind == "gaussian":
                g.add_(torch.randn(g.shape, generator=generator, device=g.device), alpha=self.deviation)
            else:
                g.add_(laplace(g, generator), alpha=self.deviation / math.sqrt(2))

    def variance(self, images: int) -> float:
        return self.deviation**2


def laplace(like: Tensor, generator: torch.Generator) -> Tensor:
    """Laplace noise of scale 1, so of variance 2."""
    # The difference of two exponentials; the inverse of the distribution function would take the logarithm of 0.
    ends = (torch.empty_like(like).exponential_(generator=generator) for _ in range(2))
    return next(ends) - next(ends)


@register.transform(PruneConfig)
class Prune:
    """Sets the `fraction` of the entries of each tensor, or of all, that are of the least magnitude to zero.

    Of n entries, ceil((1 - fraction) n) stay, at least one; those of equal magnitude by their place.
    """

    def __init__(self, config: PruneConfig):
        self.fraction, self.scope = config.fraction, config.scope

    def __call__(self, grads: Sequence[Tensor], generator: torch.Generator) -> None:
        if self.scope == "layer":
            for g in grads:
                g.copy_(self._pruned(g.flatten()).view_as(g))
            return
        whole = self._pruned(torch.cat([g.flatten() for g in grads])) if grads else torch.empty(0)
        for g, part in zip(grads, whole.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))

    def _pruned(self, flat: Tensor) -> Tensor:
        # A count that is whole but for rounding stays itself: 0.1 x 10 is more than 1 in floating point.
        kept = flat.abs().topk(min(len(flat), max(1, math.ceil((1 - self.fraction) * len(flat) - 1e-9)))).indices
        return torch.zeros_like(flat).index_copy(0, kept, flat[kept])


@register.transform(MixupConfig)
@register.transform(SoteriaConfig)
class Beforehand:
    """Stands for what has been done already, where the images were known."""

    def __init__(self, config: TransformConfig):
        self.config = config

    def __call__(self, grads: Sequence[Tensor], generator: torch.Generator) -> None:
        """Nothing: see `raytrust.train.gradient`."""


@register.transform(DPSGDConfig)
class PerImage(Beforehand):
    """Of DP-SGD, whose noise is known."""

    config: DPSGDConfig

    def variance(self, images: int) -> float:
        return (self.config.noise * self.config.clip / images) ** 2
