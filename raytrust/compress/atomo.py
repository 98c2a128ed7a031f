"""Spectral ATOMO (Wang, Sievert, Liu, Charles, Papailiopoulos & Wright 2018): a sample of singular triples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raytrust.compress.base import Payload, Stochastic
from raytrust.compress.interface import Layout, Reduced, Vantage, payloads_by_worker
from raytrust.compress.spectrum import spectrum_of
from raytrust.config import AtomoConfig, register
from raytrust.wire.channel import Channel, Message

Triples = list[tuple[Tensor, Tensor, Tensor]]  # of each matrix: (r,), (r, n), (r, m)


@register.compressor(AtomoConfig)
class Atomo(Stochastic):
    """Each gradient, as the n x m matrix view(shape[0], -1), is sent as singular triples (s_i / p_i, u_i, v_i), each
    kept by a coin of its own with probability p_i, on average `rank` of them; tensors of one dimension are sent whole.

    The p_i are min(1, c s_i) with c such that they sum to `rank` (Wang et al. 2018, Algorithm 1: the least variance of
    all unbiased choices), so E[decoded_own] = x and E||decoded_own - x||^2 = sum s_i^2 (1 / p_i - 1). The number of
    triples differs between steps and workers: a first all-gather tells it for each matrix (int32), a second one carries
    the floats, 4 sum r (n + m + 1). The coins are each worker's own, and private: a function of seed, step and rank.
    """

    def __init__(self, config: AtomoConfig, layout: Layout, seed: int = 0):
        super().__init__(config, layout, seed)
        self._rank = config.rank
        self._matrices = [i for i, s in enumerate(layout.shapes) if len(s) >= 2 and s.numel()]
        self.vectors = [i for i in range(len(layout.shapes)) if i not in self._matrices]
        self._sizes = [(layout.shapes[i][0], layout.shapes[i][1:].numel()) for i in self._matrices]
        self._largest = max((n * m for n, m in self._sizes), default=0)

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        flat = self._input(grads)
        tensors = self.layout.unflatten(flat)
        coins = np.random.default_rng([self._seed, self._step, channel.rank])
        self._step += 1
        triples = [
            self._sample(tensors[i].reshape(size), coins) for i, size in zip(self._matrices, self._sizes, strict=True)
        ]
        count = torch.tensor([len(s) for s, _, _ in triples], dtype=torch.int32, device=flat.device)
        parts = [x.reshape(-1) for triple in triples for x in triple] + [tensors[i].reshape(-1) for i in self.vectors]
        # How many triples each worker sends is told first, as a gather needs the lengths of what it receives.
        floats = torch.cat(parts) if parts else flat.new_empty(0)
        counts = channel.all_gather((count,))
        gathered = channel.all_gather((floats,), [self._length(theirs.tolist()) for (theirs,) in counts])
        payloads = [(*theirs, *count) for theirs, count in zip(gathered, counts, strict=True)]
        return self._reduced(self._sum(payloads, share=1 / channel.world_size), payloads[channel.rank])

    def decode(self, messages: Sequence[Message], vantage: Vantage) -> list[list[Tensor]]:
        first, second = messages
        counts, floats = payloads_by_worker([first], vantage), payloads_by_worker([second], vantage)
        return [self._decoded((*theirs, *count)) for theirs, count in zip(floats, counts, strict=True)]

    def _sample(self, matrix: Tensor, coins: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        wide = matrix.shape[0] <= matrix.shape[1]
        short = matrix if wide else matrix.T
        buffer = self._scratch("matrix", self._largest, matrix, torch.float64)
        a = buffer[: matrix.numel()].view(short.shape).copy_(short)
        spectrum = spectrum_of(a)
        p = _probabilities(spectrum.values, self._rank)
        kept = coins.random(len(p)) < p
        # The vectors, which take as long as the values and on the other side longer, of those triples that are sent.
        left = spectrum.vectors(np.flatnonzero(kept))
        right = left @ a
        s = right.norm(dim=1)
        right /= s.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
        weights = s / torch.from_numpy(p[kept]).to(s)
        u, v = (left, right) if wide else (right, left)
        return weights.float(), u.float(), v.float()

    def _length(self, ranks: Sequence[int]) -> int:
        floats = sum(r * (n + m + 1) for r, (n, m) in zip(ranks, self._sizes, strict=True))
        return floats + sum(self.layout.sizes[i] for i in self.vectors)

    def _split(self, payload: Payload) -> tuple[Triples, list[Tensor]]:
        """payload: the floats, and how many triples of each matrix they hold."""
        floats, count = payload
        ranks = count.tolist()
        lengths = [k for r, (n, m) in zip(ranks, self._sizes, strict=True) for k in (r, r * n, r * m)]
        parts = floats.split([*lengths, *(self.layout.sizes[i] for i in self.vectors)])
        triples = [
            (parts[3 * j], parts[3 * j + 1].view(r, n), parts[3 * j + 2].view(r, m))
            for j, (r, (n, m)) in enumerate(zip(ranks, self._sizes, strict=True))
        ]
        vectors = [x.view(self.layout.shapes[i]) for i, x in zip(self.vectors, parts[len(lengths) :], strict=True)]
        return triples, vectors

    def _add(self, x: Tensor, payload: Payload, share: float = 1.0) -> Tensor:
        targets = self.layout.unflatten(x)
        triples, vectors = self._split(payload)
        for i, size, (s, u, v) in zip(self._matrices, self._sizes, triples, strict=True):
            targets[i].view(size).addmm_((s[:, None] * u).T, v, alpha=share)
        for i, vector in zip(self.vectors, vectors, strict=True):
            targets[i].add_(vector, alpha=share)
        return x


def _probabilities(s: Tensor, rank: int) -> np.ndarray:
    """p_i = min(1, c s_i) of sum min(rank, number of s_i > 0) (Wang et al. 2018, Algorithm 1). s: decreasing."""
    values = s.double().cpu().numpy()
    positive = int((values > 0).sum())
    p = np.zeros(len(values))
    if positive <= rank:
        p[:positive] = 1.0
        return p
    # Sums of each value and all that follow, added from the smallest on, so that none is lost beside a larger one.
    rest = np.cumsum(values[::-1])[::-1]
    certain = 0
    # Where c s_i would reach 1 the triple is certain, and c grows for the others: at most `rank` rounds.
    while (rank - certain) * values[certain] >= rest[certain]:
        certain += 1
    p[:certain] = 1.0
    p[certain:positive] = (rank - certain) * values[certain:positive] / rest[certain]
    return p
