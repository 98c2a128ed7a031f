"""What sparse methods share: finding the largest entries fast, and messages of values with their positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raytrust.compress.base import Base
from raytrust.compress.interface import CHUNK, Layout, Reduced, Vantage, chunks, senders, sent_by
from raytrust.compress.packing import compare
from raytrust.compress.views import SparseView
from raytrust.wire.channel import Channel, Message

EXACT_BELOW = 2**16  # entries: a plain selection is faster there
SAMPLE = 2**16  # entries from which a threshold is estimated


def largest(flat: Tensor, k: int) -> Tensor:
    """Positions, in increasing order, of the k entries of largest magnitude of (n,): exactly k, whatever the ties.

    A threshold estimated from a sample leaves few candidates (Lin et al. 2018, section 3.3), from which the k are
    selected exactly: the sample decides the speed, not the result.
    """
    n = len(flat)
    if k >= n:
        return torch.arange(n, device=flat.device)
    if n <= EXACT_BELOW or k > n // 4:
        return flat.abs().topk(k, sorted=False).indices.sort().values
    sample = flat[:: max(1, n // SAMPLE)].abs()
    share = k / n * len(sample)
    kept = int(share + 4 * share**0.5 + 16)  # four standard deviations above, so that one try nearly always suffices
    candidates = above(flat, float(sample.topk(min(kept, len(sample)), sorted=True).values[-1]))
    if len(candidates) < k:  # the sample misled: structure of the same period as its stride
        candidates = torch.arange(n, device=flat.device)
    magnitudes = flat[candidates].abs()
    smallest = magnitudes.kthvalue(len(magnitudes) - k + 1).values
    chosen = magnitudes > smallest
    ties = (magnitudes == smallest).nonzero().flatten()
    chosen[ties[: k - int(chosen.sum())]] = True
    return candidates[chosen]


def above(flat: Tensor, threshold: float) -> Tensor:
    """Positions, in increasing order, of the entries that are not zero and of magnitude at least `threshold`."""
    found = []
    least = max(threshold, torch.finfo(torch.float32).smallest_normal * 2.0**-23)
    magnitudes = flat.new_empty(min(CHUNK, len(flat)))
    for part in chunks(len(flat)):
        n = part.stop - part.start
        chosen = torch.empty(n, dtype=torch.bool, device=flat.device)
        compare(np.greater_equal, torch.abs(flat[part], out=magnitudes[:n]), least, chosen)
        if flat.device.type == "cpu":  # numpy's is faster than torch's
            positions = torch.from_numpy(np.flatnonzero(chosen.numpy()))
        else:
            positions = chosen.nonzero().flatten()
        found.append(positions.add_(part.start))
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=flat.device)


class Sparse(Base):
    """Methods whose last message is an all-gather of float32 values and int32 positions in the flat gradient."""

    def _exchange(
        self, flat: Tensor, indices: Tensor, channel: Channel, counts: Sequence[int] | None = None
    ) -> Reduced:
        """Send the entries at `indices`; the mean is that of what all workers sent."""
        gathered = channel.all_gather((flat[indices], indices.to(torch.int32)), counts)
        mean = self._scratch("mean", len(flat), flat).zero_()
        for values, theirs in gathered:  # in the order of ranks, so that all workers round alike
            mean.index_add_(0, theirs, values)
        mean.div_(channel.world_size)
        values, positions = gathered[channel.rank][0], indices
        return Reduced(
            self.layout.unflatten(mean),
            lambda: self._scatter(values, positions, self._scratch("own", len(flat), flat)),
            lambda x: x.index_fill_(0, positions, 0.0),
        )

    def decode(self, messages: Sequence[Message], vantage: Vantage) -> list[list[Tensor]]:
        return [
            self._scatter(values, indices, values.new_empty(self.layout.entries))
            for values, indices in senders(messages, vantage)
        ]

    def view(self, messages: Sequence[Message], vantage: Vantage, victim: int = 0) -> SparseView:
        values, indices = sent_by(messages, vantage, victim)
        return sparse_view(self.layout, values, indices.long())

    def _scatter(self, values: Tensor, indices: Tensor, out: Tensor) -> list[Tensor]:
        return self.layout.unflatten(out.zero_().index_copy_(0, indices.long(), values))


def sparse_view(layout: Layout, values: Tensor, indices: Tensor, bounded: bool = True) -> SparseView:
    """The view of the entries at `indices`, in increasing order, one part a parameter."""
    starts = torch.tensor([0, *layout.sizes], device=indices.device).cumsum(0)
    cuts = torch.searchsorted(indices.contiguous(), starts).tolist()
    positions = [indices[a:b] - start for a, b, start in zip(cuts[:-1], cuts[1:], starts.tolist(), strict=False)]
    observed = list(values.split([len(p) for p in positions]))
    bound = values.abs().min() if bounded and len(values) else None
    return SparseView(observed, positions, layout.shapes, bound)
