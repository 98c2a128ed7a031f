"""Top-K sparsification over the whole gradient (Aji & Heafield 2017; Alistarh et al. 2018; Stich et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytrust.channel import Channel, Message
from raytrust.compress.interface import LinearView, Reduced, Vantage, flatten, unflatten
from raytrust.compress.powersgd import floats_sent
from raytrust.config import TopKConfig


class TopK:
    """Sends the k entries of largest magnitude with their positions: float32 values and int32 indices, 8 k bytes.

    Guarantees ||x - own||^2 <= (1 - k/N) ||x||^2 (Stich et al. 2018, Lemma A.1); k = N is lossless.
    """

    def __init__(self, config: TopKConfig, shapes: Sequence[torch.Size]):
        self._shapes = list(shapes)
        self.entries = sum(s.numel() for s in shapes)
        self.k = max(1, min(self.entries, _k(config, self._shapes, self.entries)))

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        flat = flatten(grads)
        # In increasing order the indices touch memory in order when they are scattered.
        indices = flat.abs().topk(self.k, sorted=False).indices.sort().values
        gathered = channel.all_gather((flat[indices], indices.to(torch.int32)))
        mean = torch.zeros_like(flat)
        for values, theirs in gathered:  # in the order of ranks, so that all workers round alike
            mean.index_add_(0, theirs, values)
        mean.div_(channel.world_size)
        own = self._scatter(*gathered[channel.rank])
        return Reduced(unflatten(mean, self._shapes), own)

    def decode(self, messages: Sequence[Message], vantage: Vantage) -> list[list[Tensor]]:
        (message,) = messages
        if vantage == "link":
            return [self._scatter(*message.sent)]
        workers = len(message.received) // len(message.sent)
        return [self._scatter(*message.received_from(rank)) for rank in range(workers)]

    def view(self, messages: Sequence[Message], vantage: Vantage, victim: int = 0) -> LinearView:
        (message,) = messages
        values, indices = message.sent if vantage == "link" else message.received_from(victim)
        sizes = [s.numel() for s in self._shapes]
        starts = torch.tensor([0, *sizes[:-1]], device=indices.device).cumsum(0)
        owner = torch.searchsorted(starts, indices.long(), right=True) - 1
        # One part a parameter: positions inside it, and the values sent for it.
        positions = [indices[owner == i].long() - starts[i] for i in range(len(sizes))]
        observed = [values[owner == i] for i in range(len(sizes))]

        def measure(grads: Sequence[Tensor]) -> list[Tensor]:
            return [g.flatten(1)[:, p] for g, p in zip(grads, positions, strict=True)]

        def adjoint(measured: Sequence[Tensor]) -> list[Tensor]:
            return [
                m.new_zeros(len(m), size).index_copy(1, p, m).view(len(m), *shape)
                for m, p, size, shape in zip(measured, positions, sizes, self._shapes, strict=True)
            ]

        return LinearView(observed, measure, adjoint)

    def public_state(self) -> dict[str, Tensor]:
        return {}

    def load_public_state(self, state: dict[str, Tensor]) -> None:
        pass

    def _scatter(self, values: Tensor, indices: Tensor) -> list[Tensor]:
        flat = values.new_zeros(self.entries).index_copy_(0, indices.long(), values)
        return unflatten(flat, self._shapes)


def _k(config: TopKConfig, shapes: Sequence[torch.Size], entries: int) -> int:
    if config.level is not None:
        return round(config.level * entries)
    assert config.equal_to_rank is not None
    floats = floats_sent(shapes, config.equal_to_rank)
    return floats if config.equal_by == "values" else floats // 2
