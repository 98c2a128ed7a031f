"""Top-K sparsification, global or per layer (Aji & Heafield 2017; Alistarh et al. 2018; Stich et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytrust.compress.interface import Layout, Reduced, Vantage
from raytrust.compress.powersgd import floats_sent
from raytrust.compress.sparse import Sparse, largest
from raytrust.compress.views import SparseView
from raytrust.config import TopKConfig, register
from raytrust.wire.channel import Channel, Message


@register.compressor(TopKConfig)
class TopK(Sparse):
    """Sends the k entries of largest magnitude with their positions: float32 values and int32 indices, 8 k bytes.

    Guarantees ||x - own||^2 <= (1 - k/N) ||x||^2 (Stich et al. 2018, Lemma A.1); k = N is lossless. Per layer the k are
    shared out in proportion to the layers' sizes, at least one to each, for a layer that never sends never learns; the
    guarantee then holds layer by layer.
    """

    def __init__(self, config: TopKConfig, layout: Layout, seed: int = 0):
        super().__init__(config, layout)
        self.k = max(1, min(layout.entries, _k(config, layout))) if layout.entries else 0
        self._ks = _share_out(self.k, layout.sizes) if config.scope == "layer" else None
        if self._ks is not None:
            self.k = sum(self._ks)

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        flat = self._input(grads)
        return self._exchange(flat, self._choose(flat), channel)

    def view(self, messages: Sequence[Message], vantage: Vantage, victim: int = 0) -> SparseView:
        view = super().view(messages, vantage, victim)
        if not self._ks:
            return view
        bounds = [v.abs().min() if len(v) else v.new_zeros(()) for v in view.observed]
        return SparseView(view.observed, view.positions, self.layout.shapes, torch.stack(bounds))

    def _choose(self, flat: Tensor) -> Tensor:
        if not self._ks:
            return largest(flat, self.k)
        parts, start = [], 0
        for part, k in zip(flat.split(self.layout.sizes), self._ks, strict=True):
            parts.append(largest(part, k).add_(start))
            start += len(part)
        return torch.cat(parts)


def _k(config: TopKConfig, layout: Layout) -> int:
    if config.level is not None:
        return round(config.level * layout.entries)
    assert config.equal_to_rank is not None
    floats = floats_sent(layout.shapes, config.equal_to_rank)
    return floats if config.equal_by == "values" else floats // 2


def _share_out(k: int, sizes: Sequence[int]) -> list[int]:
    """k in proportion to the sizes, by largest remainder; at least 1 to each that has entries, even if k is smaller."""
    shares = [k * size / max(1, sum(sizes)) for size in sizes]
    ks = [min(size, max(1, int(share))) for size, share in zip(sizes, shares, strict=True)]
    by_remainder = sorted(range(len(sizes)), key=lambda i: int(shares[i]) - shares[i])
    for i in by_remainder:
        if sum(ks) < k and ks[i] < sizes[i]:
            ks[i] += 1
    while sum(ks) > k and max(ks) > 1:  # what the small ones took beyond their share
        ks[ks.index(max(ks))] -= 1
    return ks
