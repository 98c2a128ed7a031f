"""Rand-K sparsification (Stich et al. 2018; Wangni et al. 2018): entries drawn at random from a shared seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raytrust.compress.base import Counting
from raytrust.compress.interface import Layout, Reduced, Vantage
from raytrust.compress.sparse import sparse_view
from raytrust.compress.state import State
from raytrust.compress.views import SparseView
from raytrust.config import RandKConfig, register
from raytrust.wire.channel import Channel, Message


@register.compressor(RandKConfig)
class RandK(Counting):
    """Sends k entries drawn without replacement, the same ones on all workers: one all-reduce of values, 4 k bytes.

    As it is, E||x - own||^2 = (1 - k/N) ||x||^2 (Stich et al. 2018, Lemma A.1), to be used with error feedback.
    `unbiased` scales what arrives by N/k: E[own] = x, E||own - x||^2 = (N/k - 1) ||x||^2. The positions follow from
    the seed and the step, which are public.
    """

    def __init__(self, config: RandKConfig, layout: Layout, seed: int = 0):
        super().__init__(config, layout, seed)
        self.k = min(layout.entries, max(1, round(config.level * layout.entries)))
        self._scale = layout.entries / self.k if config.unbiased and self.k else 1.0

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        flat = self._input(grads)
        indices = self._indices(flat.device)
        self._step += 1
        sent = flat[indices]
        received = channel.all_mean(sent)
        return Reduced(
            self._scatter(received, indices, self._scratch("mean", len(flat), flat)),
            lambda: self._scatter(sent, indices, self._scratch("own", len(flat), flat)),
            lambda x: x.index_add_(0, indices, sent, alpha=-self._scale),
        )

    def decode(self, messages: Sequence[Message], vantage: Vantage) -> list[list[Tensor]]:
        values = self._values(messages, vantage)
        return [self._scatter(values, self._indices(values.device), values.new_empty(self.layout.entries))]

    def view(self, messages: Sequence[Message], vantage: Vantage, victim: int = 0) -> SparseView:
        values = self._values(messages, vantage)
        return sparse_view(self.layout, values, self._indices(values.device), bounded=False)

    def public_state(self) -> dict[str, Tensor]:
        return self._tensors()

    def _take_public(self, state: State) -> None:
        self._take(state)

    def _values(self, messages: Sequence[Message], vantage: Vantage) -> Tensor:
        (message,) = messages
        (values,) = message.sent if vantage == "link" else message.received
        return values

    def _indices(self, device: torch.device) -> Tensor:
        """(k,), in increasing order: memory is touched in order, too."""
        generator = np.random.default_rng([self._seed, self._step])
        chosen = generator.choice(self.layout.entries, self.k, replace=False, shuffle=False)
        return torch.from_numpy(np.sort(chosen)).to(device)

    def _scatter(self, values: Tensor, indices: Tensor, out: Tensor) -> list[Tensor]:
        return self.layout.unflatten(out.zero_().index_copy_(0, indices, values * self._scale))
