"""vqSGD (Gandikota, Kane, Maity & Mazumdar 2022): random vertices of a cross-polytope that contains the gradient."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raytrust.compress.base import Payload, Stochastic
from raytrust.compress.interface import Layout, Reduced, chunks
from raytrust.compress.packing import pack_words, unpack_words
from raytrust.config import VqSGDConfig, register
from raytrust.wire.channel import Channel


@register.compressor(VqSGDConfig)
class VqSGD(Stochastic):
    """The gradient, of norm n in d dimensions, lies in the hull of the 2d points +-n sqrt(d) e_i. It is sent as n and
    `samples` of these vertices, drawn so that their mean is the gradient: 4 + ceil(samples ceil(log2 2d) / 8) bytes.

    Vertex sign(x_i) e_i has probability |x_i| / (n sqrt(d)) and what is left, 1 - |x|_1 / (n sqrt(d)), is shared evenly
    among all 2d (Gandikota et al. 2022, section 4.2 and equation 7). E[decoded_own] = x and E||decoded_own - x||^2 <=
    (d - 1) / samples ||x||^2. The dice are each worker's own, and private: a function of seed, step and rank.
    """

    def __init__(self, config: VqSGDConfig, layout: Layout, seed: int = 0):
        super().__init__(config, layout, seed)
        self._samples = config.samples if layout.entries else 0
        self._width = max(1, (2 * layout.entries - 1).bit_length())

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        flat = self._input(grads)
        # In float64, as squares of what is huge or tiny leave the range of float32.
        squares = [float(flat[part].double().square_().sum()) for part in chunks(len(flat))]
        norm = flat.new_tensor(sum(squares) ** 0.5)
        vertices = self._draw(flat, float(norm), channel.rank)
        self._step += 1
        gathered = channel.all_gather((norm.view(1), pack_words(vertices, self._width)))
        return self._reduced(self._sum(gathered, share=1 / channel.world_size), gathered[channel.rank])

    def _draw(self, flat: Tensor, norm: float, rank: int) -> Tensor:
        """(samples,) vertices, int64: 2 i for n sqrt(d) e_i, 2 i + 1 for its negative."""
        dice = np.random.default_rng([self._seed, self._step, rank])
        d = len(flat)
        if d == 0:
            return flat.new_empty(0, dtype=torch.int64)
        # By the inverse of the running sum of |x|. It is made chunk by chunk, from the mass of each: as one vector in
        # float64 it would be twice the gradient, and in float32 its end would not tell entries apart.
        parts = list(chunks(d))
        masses = np.array([float(flat[part].abs().sum(dtype=torch.float64)) for part in parts])
        share = masses.sum() / (norm * d**0.5) if norm > 0 else 0.0
        even = dice.random(self._samples) >= share
        vertices = torch.from_numpy(dice.integers(0, 2 * d, self._samples)).to(flat.device)
        # Sorted, so that those of a chunk lie together.
        points = np.sort(dice.random(self._samples - even.sum()) * masses.sum())
        ends = masses.cumsum()
        drawn = []
        for part, mass, end, mine in zip(
            parts, masses, ends, np.split(points, np.searchsorted(points, ends[:-1])), strict=True
        ):
            running = flat[part].abs().cumsum(0, dtype=torch.float64)
            inside = torch.from_numpy(mine - (end - mass)).to(flat.device)
            # From the right, so that an entry of zero mass is never found. Clamped, as the mass of a chunk and the end
            # of its running sum round differently.
            found = torch.searchsorted(running, inside, right=True).clamp_(max=part.stop - part.start - 1)
            drawn.append(2 * (found + part.start) + (flat[part][found] < 0))
        vertices[torch.from_numpy(~even).to(flat.device)] = torch.cat(drawn)
        return vertices

    def _add(self, x: Tensor, payload: Payload, share: float = 1.0) -> Tensor:
        norm, packed = payload
        vertices = unpack_words(packed, self._width, self._samples)
        length = norm * (share * self.layout.entries**0.5 / max(1, self._samples))
        # A vertex may be drawn many times. A GPU adds floats to one entry in any order, which shows in the last bit,
        # and replicas would drift apart. Integers are exact in any order, and then no entry is added to twice.
        positions, places = torch.unique(vertices // 2, return_inverse=True)
        counts = torch.zeros_like(positions).index_add_(0, places, 1 - 2 * (vertices % 2))
        return x.index_add_(0, positions, counts * length)
