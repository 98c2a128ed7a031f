"""signSGD with majority vote, and Signum (Bernstein, Wang, Azizzadenesheli & Anandkumar 2018, Algorithms 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytrust.compress.base import Base
from raytrust.compress.interface import FlatGradients, Layout, Reduced, Vantage, chunks, senders, sent_by
from raytrust.compress.signs import SignCode
from raytrust.compress.views import SignView
from raytrust.config import SignSGDConfig, register
from raytrust.wire.channel import Channel, Message


@register.compressor(SignSGDConfig)
class SignSGD(Base):
    """Sends the sign of every entry, one bit: ceil(N/8) bytes. The step is the majority's sign, 0 where votes tie.

    With `momentum` (Signum) the sign is that of m = momentum m + (1 - momentum) g. A zero counts as positive. `mean` is
    the sign of the mean of `own`, not the mean: entries are -1, 0 or 1, so it wants a learning rate of its own. All
    workers count the votes of all, where Bernstein et al. have a server do so.
    """

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
        votes = [theirs for (theirs,) in channel.all_gather((self._code.encode(grads),))]
        n = self.layout.entries
        mean = self._scratch("mean", n, votes[0])
        self._decode(votes[0], mean)
        for theirs in votes[1:]:
            for part in chunks(n):
                mean[part] += self._code.decode(theirs, part)
        if len(votes) > 1:
            mean.sign_()
        mine, own = votes[channel.rank], self._scratch("own", n, votes[0])

        def subtract(x: Tensor) -> None:
            for part in chunks(n):
                x[part] -= self._code.decode(mine, part)

        return Reduced(self.layout.unflatten(mean), lambda: self._decode(mine, own), subtract)

    def decode(self, messages: Sequence[Message], vantage: Vantage) -> list[list[Tensor]]:
        found = [packed for (packed,) in senders(messages, vantage)]
        return [self._decode(packed, packed.new_empty(self.layout.entries, dtype=torch.float32)) for packed in found]

    def view(self, messages: Sequence[Message], vantage: Vantage, victim: int = 0) -> SignView:
        (packed,) = sent_by(messages, vantage, victim)
        signs = self._decode(packed, packed.new_empty(self.layout.entries, dtype=torch.float32))
        return SignView(signs)

    def _decode(self, packed: Tensor, out: Tensor) -> list[Tensor]:
        for part in chunks(len(out)):
            self._code.decode(packed, part, out=out[part])
        return self.layout.unflatten(out)
