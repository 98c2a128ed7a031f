"""Decoded messages as inputs of a network: normalised, and hashed to a fixed length."""

from __future__ import annotations

import torch
from torch import Tensor

from raytrust.config import LearnedInverterConfig


class CountSketch:
    """Feature hashing with signs (Weinberger et al. 2009; Charikar et al. 2002): h_j = sum of s_i x_i over i in bin j.

    The bin and the sign s_i of each entry are drawn from the seed. It is linear; over seeds E <h(x), h(y)> = <x, y> and
    Var <h(x), h(y)> = sum over i != j of (x_i^2 y_j^2 + x_i y_i x_j y_j) / dimension.
    """

    def __init__(self, entries: int, dimension: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.dimension = dimension
        self._bins = torch.randint(dimension, (entries,), generator=generator)
        self._signs = torch.randint(2, (entries,), generator=generator).float() * 2 - 1

    def __call__(self, x: Tensor) -> Tensor:
        """(n, entries) -> (n, dimension), on the CPU."""
        return x.new_zeros(len(x), self.dimension).index_add_(1, self._bins, x * self._signs)


class Encoder:
    """(n, entries) decoded messages -> (n, length): their directions, whole or hashed, and their norms' logarithms.

    Norms vary by orders of magnitude from image to image, so that a network learns from directions; no message is lost
    by this, but one of zeros, which has none.
    """

    def __init__(self, entries: int, config: LearnedInverterConfig):
        hashed = config.input == "hashed"
        self._sketch = CountSketch(entries, config.dimension, config.seed) if hashed else None

    def __call__(self, decoded: Tensor) -> Tensor:
        norms = decoded.norm(dim=1, keepdim=True).clamp_min(torch.finfo(decoded.dtype).tiny)
        directions = decoded / norms
        return torch.cat([directions if self._sketch is None else self._sketch(directions), norms.log()], 1)
