"""signSGD with majority vote, and Signum (Bernstein, Wang, Azizzadenesheli & Anandkumar 2018, Algorithms 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from raytrust.compress.base import Base, Payload
from raytrust.compress.interface import FlatGradients, Layout, Reduced, chunks
from raytrust.compress.signs import SignCode
from raytrust.config import SignSGDConfig, register
from raytrust.wire.channel import Channel


@register.compressor(SignSGDConfig)
class SignSGD(Base):
    """Sends the sign of every entry, one bit: ceil(N/8) bytes. The step is the majority's sign, 0 where votes tie.

    With `momentum` (Signum) the sign is that of m = momentum m + (1 - momentum) g. A zero counts as positive. `mean` is
    the sign of the mean of `decoded_own`, not the mean: entries are -1, 0 or 1, so it wants a learning rate of its own.
    All workers count the votes of all, where Bernstein et al. have a server do so.
    """

    per_parameter = True

    def __init__(self, config: SignSGDConfig, layout: Layout, seed: int = 0):
        super().__init__(config, layout, memory=["momentum"] if config.momentum else [])
        self._momentum = config.momentum
        self._code = SignCode(layout, self._scratch)

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        if self._momentum:
            flat = self._input(grads)
            (m,) = self._memory.vectors(channel, flat.device)
            grads = FlatGradients(m.lerp_(flat, 1 - self._momentum), self.layout)
        elif not isinstance(grads, FlatGradients):
            self.layout.check(grads)
        votes = channel.all_gather((self._code.encode(grads),))
        # Whole votes, not shares of one: sums of 1 / workers need not cancel to 0 where votes tie.
        majority = self._sum(votes)
        # One voter's signs are the majority's; the pass over them is spared.
        if len(votes) > 1:
            majority.sign_()
        return self._reduced(majority, votes[channel.rank])

    def _add(self, x: Tensor, payload: Payload, share: float = 1.0) -> Tensor:
        return self._code.add(x, payload[0], [(part, share) for part in chunks(len(x))])

    def _write(self, out: Tensor, payload: Payload, share: float = 1.0) -> Tensor:
        return self._code.write(out, payload[0], [(part, share) for part in chunks(len(out))])
