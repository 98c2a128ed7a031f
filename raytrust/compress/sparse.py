"""What sparse methods share: finding the largest entries fast, and messages of values with their positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raytrust.compress.base import Base, Payload
from raytrust.compress.interface import Reduced, chunks
from raytrust.compress.packing import compare
from raytrust.wire.channel import Channel

# Entries below which a plain selection is faster than a threshold, and from which a threshold is estimated.
EXACT_BELOW = 2**16
SAMPLE = 2**16


def largest(flat: Tensor, k: int) -> Tensor:
    """Positions, in increasing order, of the k entries of largest magnitude of (n,): exactly k, whatever the ties."""
    n = len(flat)
    if k >= n:
        return torch.arange(n, device=flat.device)
    # On a GPU too, as each number that the threshold needs, and each chunk's count, would wait for the device.
    if n <= EXACT_BELOW or k > n // 4 or flat.device.type != "cpu":
        return flat.abs().topk(k, sorted=False).indices.sort().values
    # A threshold estimated from a sample leaves few candidates (Lin et al. 2018, section 3.3), from which the k are
    # selected exactly: the sample decides the speed, not the result.
    sample = flat[:: max(1, n // SAMPLE)].abs()
    share = k / n * len(sample)
    # Four standard deviations above, so that one try nearly always suffices.
    kept = int(share + 4 * share**0.5 + 16)
    candidates = above(flat, float(sample.topk(min(kept, len(sample)), sorted=True).values[-1]))
    # The sample misled, as the gradient has a structure of the same period as its stride.
    if len(candidates) < k:
        candidates = torch.arange(n, device=flat.device)
    # All above the k-th, and as many of those equal to it as are left: k is also what is counted on the wire.
    magnitudes = flat[candidates].abs()
    smallest = magnitudes.kthvalue(len(magnitudes) - k + 1).values
    chosen = magnitudes > smallest
    ties = (magnitudes == smallest).nonzero().flatten()
    chosen[ties[: k - int(chosen.sum())]] = True
    return candidates[chosen]


def above(flat: Tensor, threshold: float) -> Tensor:
    """Positions, in increasing order, of the entries that are not zero and of magnitude at least `threshold`."""
    found = []
    # The least positive float32: zeros are not worth their positions.
    least = max(threshold, torch.finfo(torch.float32).smallest_normal * 2.0**-23)
    parts = list(chunks(len(flat), device=flat.device))
    magnitudes = flat.new_empty(max((part.stop - part.start for part in parts), default=0))
    for part in parts:
        n = part.stop - part.start
        chosen = torch.empty(n, dtype=torch.bool, device=flat.device)
        compare(np.greater_equal, torch.abs(flat[part], out=magnitudes[:n]), least, chosen)
        # numpy's is faster than torch's.
        if flat.device.type == "cpu":
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
        return self._reduced(self._sum(gathered).div_(channel.world_size), gathered[channel.rank])

    def _add(self, x: Tensor, payload: Payload, share: float = 1.0) -> Tensor:
        values, indices = payload
        return x.index_add_(0, indices, values, alpha=share)
