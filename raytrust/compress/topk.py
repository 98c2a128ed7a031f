"""Top-K sparsification, global or per layer (Aji & Heafield 2017; Alistarh et al. 2018; Stich et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytrust.compress.interface import Layout, Reduced
from raytrust.compress.powersgd import floats_sent
from raytrust.compress.sparse import Sparse, largest
from raytrust.config import TopKConfig, register
from raytrust.wire.channel import Channel


@register.compressor(TopKConfig)
class TopK(Sparse):
    """Sends the k entries of largest magnitude with their positions: float32 values and int32 indices, 8 k bytes.

    Guarantees ||x - decoded_own||^2 <= (1 - k/N) ||x||^2 (Stich et al. 2018, Lemma A.1); k = N is lossless. Per layer
    the k are shared out in proportion to the layers' sizes, at least one to each; the guarantee then holds by layer.
    """

    def __init__(self, config: TopKConfig, layout: Layout, seed: int = 0):
        super().__init__(config, layout)
        self.k = max(1, min(layout.entries, _k(config, layout))) if layout.entries else 0
        self.scope = config.scope
        if self.scope == "layer":
            self._ks = _share_out(self.k, layout.sizes)
            self.k = sum(self._ks)

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        flat = self._input(grads)
        return self._exchange(flat, self._choose(flat), channel)

    def _choose(self, flat: Tensor) -> Tensor:
        if self.scope == "global":
            return largest(flat, self.k)
        parts, start = [], 0
        for part, k in zip(flat.split(self.layout.sizes), self._ks, strict=True):
            parts.append(largest(part, k).add_(start))
            start += len(part)
        return torch.cat(parts) if parts else flat.new_empty(0, dtype=torch.int64)


def _k(config: TopKConfig, layout: Layout) -> int:
    if config.level is not None:
        return round(config.level * layout.entries)
    assert config.equal_to_rank is not None
    floats = floats_sent(layout.shapes, config.equal_to_rank)
    return floats if config.equal_by == "values" else floats // 2


def _share_out(k: int, sizes: Sequence[int]) -> list[int]:
    """k in proportion to the sizes, by largest remainder; at least 1 to each that has entries, even if k is smaller."""
    # At least 1, as a layer that never sends never learns.
    shares = [k * size / max(1, sum(sizes)) for size in sizes]
    ks = [min(size, max(1, int(share))) for size, share in zip(sizes, shares, strict=True)]
    by_remainder = sorted(range(len(sizes)), key=lambda i: int(shares[i]) - shares[i])
    for i in by_remainder:
        if sum(ks) < k and ks[i] < sizes[i]:
            ks[i] += 1
    # What the small ones took beyond their share comes off the largest, where it is least of the share.
    while sum(ks) > k and max(ks) > 1:
        ks[ks.index(max(ks))] -= 1
    return ks
