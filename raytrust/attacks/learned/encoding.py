"""Decoded messages as inputs of a network: normalised, and hashed to a fixed length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from raytrust.config import LearnedInverterConfig


class CountSketch:
    """Feature hashing with signs (Weinberger et al. 2009; Charikar et al. 2002): h_j = sum of s_i x_i over i in bin j.

    The bin and the sign s_i of each entry are drawn from the seed. It is linear; over seeds E <h(x), h(y)> = <x, y> and
    Var <h(x), h(y)> = sum over i != j of (x_i^2 y_j^2 + x_i y_i x_j y_j) / dimension.
    """

    def __init__(self, entries: int, dimension: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.dimension, self._entries = dimension, entries
        self._bins = torch.randint(dimension, (entries,), generator=generator)
        self._signs = torch.randint(2, (entries,), generator=generator).float() * 2 - 1
        self._moved: dict[tuple[torch.device, str], Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """(n, entries) -> (n, dimension)."""
        signs = self._on(x.device, "signs", lambda: self._signs)
        if x.device.type == "cpu":
            return x.new_zeros(len(x), self.dimension).index_add_(1, self._bins, x * signs)
        # A GPU adds to indices in any order, so that each run would have other roundings: entries are gathered instead.
        members = self._on(x.device, "members", self._members)
        return F.pad(x * signs, (0, 1))[:, members.flatten()].unflatten(1, members.shape).sum(2)

    def _members(self) -> Tensor:
        """The entries of each bin, (dimension, most), filled up with the number of entries, where a zero lies."""
        counts = self._bins.bincount(minlength=self.dimension)
        order = self._bins.argsort(stable=True)
        bins = self._bins[order]
        places = torch.arange(self._entries) - (counts.cumsum(0) - counts)[bins]
        members = torch.full((self.dimension, int(counts.max())), self._entries)
        members[bins, places] = order
        return members

    def _on(self, device: torch.device, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A table on the device, moved there once."""
        if (device, name) not in self._moved:
            self._moved[device, name] = make().to(device)
        return self._moved[device, name]


class Encoder:
    """(n, entries) decoded messages -> (n, length): their directions, whole or hashed, and their norms' logarithms.

    Norms vary by orders of magnitude from image to image, so that a network learns from directions. They are those of
    the message, or tensor by tensor, each brought to the share of the squared norm that it has of the entries. Nothing
    is lost by this but what is below 1e-6 of the message, and a message of zeros.

    sizes: entries of each parameter.
    """

    def __init__(self, sizes: Sequence[int], config: LearnedInverterConfig):
        self._total = sum(sizes)
        self._sizes = list(sizes) if config.scale == "tensor" else [self._total]
        hashed = config.input == "hashed"
        self._sketch = CountSketch(self._total, config.dimension, config.seed) if hashed else None

    def __call__(self, decoded: Tensor) -> Tensor:
        least = (1e-6 * decoded.norm(dim=1)).clamp_min(torch.finfo(decoded.dtype).tiny)
        parts = decoded.split(self._sizes, 1)
        norms = torch.stack([part.norm(dim=1).maximum(least) for part in parts], 1)
        scales = norms / torch.tensor([size / self._total for size in self._sizes], device=norms.device).sqrt()
        scaled = torch.cat([part / scale[:, None] for part, scale in zip(parts, scales.unbind(1), strict=True)], 1)
        return torch.cat([scaled if self._sketch is None else self._sketch(scaled), norms.log()], 1)
