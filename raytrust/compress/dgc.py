"""Deep Gradient Compression (Lin, Han, Mao, Wang & Dally 2018): Top-K with momentum correction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytrust.compress.interface import Layout, Reduced
from raytrust.compress.sparse import Sparse, largest
from raytrust.compress.state import State
from raytrust.config import DGCConfig, register
from raytrust.wire.channel import Channel


@register.compressor(DGCConfig)
class DGC(Sparse):
    """Sends the k largest entries of v, the local sum of momentum-corrected gradients: 8 k bytes.

    A step (Lin et al. 2018, Algorithm 4): the worker's gradient is clipped to the norm clip / sqrt(workers), if `clip`
    is given; u = momentum u + g; v += u; the k entries of v of largest magnitude are sent, and v and (with `masking`,
    momentum factor masking) u are zeroed there. In the warm-up, of `warmup_steps` in four equal stages, the share sent
    is 25 %, 6.25 %, 1.56 % and 0.39 %, or `level` where that is more.

    It holds its own memory, hence takes no error feedback; the optimiser should have no momentum of its own. Messages
    reveal v: at the first step the gradient itself, later the gradient with what is left of earlier ones.
    """

    def __init__(self, config: DGCConfig, layout: Layout, seed: int = 0):
        super().__init__(config, layout, memory=("u", "v"))
        self._config: DGCConfig = config
        self._step = 0

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        flat = self._input(grads)
        u, v = self._memory.vectors(channel, flat.device)
        u.mul_(self._config.momentum).add_(flat, alpha=self._clipping(flat, channel.world_size))
        v.add_(u)
        # Not error feedback around Top-K: what is not sent gathers momentum while it waits, as if it had been applied.
        indices = largest(v, self.k)
        reduced = self._exchange(v, indices, channel)
        v.index_fill_(0, indices, 0.0)
        # Otherwise momentum of before an entry was sent would push it on, in a direction that is by now stale.
        if self._config.masking:
            u.index_fill_(0, indices, 0.0)
        self._step += 1
        return reduced

    @property
    def k(self) -> int:
        """How many entries the coming step sends."""
        level, warmup = self._config.level, self._config.warmup_steps
        if self._step < warmup:
            level = max(level, 0.25 ** (1 + 4 * self._step // warmup))
        return min(self.layout.entries, max(1, round(level * self.layout.entries)))

    @property
    def carried(self) -> float:
        """How much of u an entry that was sent still gets in the next step: the momentum, 0 with masking."""
        return 0.0 if self._config.masking else self._config.momentum

    # Public, as everyone on the wire counts steps, and k follows from it; u and v are the worker's.
    def public_state(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(self._step)}

    def _take_public(self, state: State) -> None:
        self._step = int(state["step"])

    def _clipping(self, flat: Tensor, workers: int) -> float:
        """The factor that local gradient clipping (Lin et al. 2018, section 3.2) puts on the gradient."""
        if self._config.clip is None:
            return 1.0
        return min(1.0, self._config.clip * workers**-0.5 / max(float(flat.norm()), torch.finfo(torch.float32).tiny))
