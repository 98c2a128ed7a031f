"""Threshold dropping (Aji & Heafield 2017): send what exceeds a threshold that a sample of the gradient sets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytrust.compress.interface import Layout, Reduced
from raytrust.compress.sparse import Sparse, above
from raytrust.config import ThresholdConfig, register
from raytrust.wire.channel import Channel


@register.compressor(ThresholdConfig)
class Threshold(Sparse):
    """Sends the entries whose magnitude is at least the (1 - level) quantile of a sample's magnitudes, zeros never.

    How many these are differs between steps and workers: a first all-gather tells their number (int32, 4 bytes), a
    second one carries 8 bytes an entry. With `sample=1` the quantile is exact: ||x - decoded_own||^2 <= (1 - level)
    ||x||^2; entries tied with the threshold are all sent. The sample is every (1/sample)-th entry.
    """

    def __init__(self, config: ThresholdConfig, layout: Layout, seed: int = 0):
        super().__init__(config, layout)
        self._level = config.level
        self._stride = max(1, round(1 / config.sample))

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        flat = self._input(grads)
        indices = above(flat, self._threshold(flat))
        # Told first, as an all-gather needs the lengths of what it receives; to pad to the longest would cost bytes.
        count = torch.tensor([len(indices)], dtype=torch.int32, device=flat.device)
        counts = [int(theirs) for (theirs,) in channel.all_gather((count,))]
        return self._exchange(flat, indices, channel, counts)

    def _threshold(self, flat: Tensor) -> float:
        # Every n-th entry, not a draw: a strided read costs less than random ones, and needs no seed.
        sample = flat[:: self._stride].abs()
        k = max(1, round(self._level * len(sample)))
        return float(sample.kthvalue(len(sample) - k + 1).values) if len(sample) else 0.0
