"""Rand-K sparsification (Stich et al. 2018; Wangni et al. 2018): entries drawn at random from a shared seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raytrust.compress.base import Payload, Stochastic
from raytrust.compress.interface import Layout, Reduced, Vantage, payloads_by_worker
from raytrust.compress.state import State
from raytrust.config import RandKConfig, register
from raytrust.wire.channel import Channel, Message


@register.compressor(RandKConfig)
class RandK(Stochastic):
    """Sends k entries drawn without replacement, the same ones on all workers: one all-reduce of values, 4 k bytes.

    As it is, E||x - decoded_own||^2 = (1 - k/N) ||x||^2 (Stich et al. 2018, Lemma A.1), to be used with error feedback.
    `unbiased` scales what arrives by N/k: E[decoded_own] = x, E||decoded_own - x||^2 = (N/k - 1) ||x||^2. The positions
    follow from the seed and the step, which are public.
    """

    def __init__(self, config: RandKConfig, layout: Layout, seed: int = 0):
        super().__init__(config, layout, seed)
        self.k = min(layout.entries, max(1, round(config.level * layout.entries)))
        self._scale = layout.entries / self.k if config.unbiased and self.k else 1.0

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        flat = self._input(grads)
        indices = self.positions(flat.device)
        self._step += 1
        sent = flat[indices]
        return self._reduced(self._sum([(channel.all_mean(sent), indices)]), (sent, indices))

    def decode(self, messages: Sequence[Message], vantage: Vantage) -> list[list[Tensor]]:
        payloads = payloads_by_worker(messages, vantage)
        return [self._decoded((values, self.positions(values.device))) for (values,) in payloads]

    def positions(self, device: torch.device) -> Tensor:
        """Which entries of the flat gradient the coming step sends: (k,), increasing."""
        generator = np.random.default_rng([self._seed, self._step])
        chosen = generator.choice(self.layout.entries, self.k, replace=False, shuffle=False)
        # Sorted, so that memory is touched in its order.
        return torch.from_numpy(np.sort(chosen)).to(device)

    def public_state(self) -> dict[str, Tensor]:
        return self._tensors()

    def _take_public(self, state: State) -> None:
        self._take(state)

    def _add(self, x: Tensor, payload: Payload, share: float = 1.0) -> Tensor:
        values, indices = payload
        return x.index_add_(0, indices, values, alpha=share * self._scale)
