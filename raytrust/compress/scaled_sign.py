"""The scaled sign of EF-signSGD (Karimireddy, Rebjock, Stich & Jaggi 2019, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytrust.compress.base import Base
from raytrust.compress.interface import CHUNK, FlatGradients, Layout, Reduced, Vantage, senders, sent_by
from raytrust.compress.signs import SignCode
from raytrust.compress.views import SignView
from raytrust.config import ScaledSignConfig, register
from raytrust.wire.channel import Channel, Message


@register.compressor(ScaledSignConfig)
class ScaledSign(Base):
    """Sends every tensor x as mean|x| sign(x): one bit an entry and a float32 a tensor, ceil(N/8) + 4 x tensors bytes.

    With error feedback this is EF-signSGD. Guarantees ||x - own||^2 = (1 - ||x||_1^2 / (d ||x||_2^2)) ||x||^2 for a
    tensor of d entries (Karimireddy et al. 2019, Lemma 8). A zero counts as positive.
    """

    def __init__(self, config: ScaledSignConfig, layout: Layout, seed: int = 0):
        super().__init__(config, layout)
        self._code = SignCode(layout, self._scratch)

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        flat = self._input(grads)
        n, workers = len(flat), channel.world_size
        gathered = channel.all_gather((self._scales(flat), self._code.encode(FlatGradients(flat, self.layout))))
        mean = self._scratch("mean", n, flat)
        self._decode(gathered[0], mean, share=1 / workers)
        for theirs in gathered[1:]:
            self._add(mean, theirs, share=1 / workers)
        mine = gathered[channel.rank]
        own = self._scratch("own", n, flat)
        return Reduced(self.layout.unflatten(mean), lambda: self._decode(mine, own), lambda x: self._add(x, mine, -1.0))

    def decode(self, messages: Sequence[Message], vantage: Vantage) -> list[list[Tensor]]:
        return [self._decode(theirs, theirs[0].new_empty(self.layout.entries)) for theirs in senders(messages, vantage)]

    def view(self, messages: Sequence[Message], vantage: Vantage, victim: int = 0) -> SignView:
        scales, packed = sent_by(messages, vantage, victim)
        ones = torch.ones_like(scales)
        return SignView(self._decode((ones, packed), scales.new_empty(self.layout.entries)), scales)

    def _scales(self, flat: Tensor) -> Tensor:
        """The mean magnitude of each tensor, (parameters,)."""
        magnitudes = self._scratch("magnitudes", CHUNK, flat)
        sums = [flat.new_zeros(()) for _ in self.layout.sizes]
        for i, part in self._code.pieces:  # faster than a norm over memory that no cache holds
            sums[i] += torch.abs(flat[part], out=magnitudes[: part.stop - part.start]).sum()
        sizes = torch.tensor(self.layout.sizes, device=flat.device).clamp_min(1)
        return torch.stack(sums) / sizes if sums else flat.new_empty(0)

    def _decode(self, message: Sequence[Tensor], out: Tensor, share: float = 1.0) -> list[Tensor]:
        scales, packed = message
        factors = (scales * share).tolist()
        for i, part in self._code.pieces:
            self._code.decode(packed, part, factors[i], out[part])
        return self.layout.unflatten(out)

    def _add(self, x: Tensor, message: Sequence[Tensor], share: float) -> None:
        """x += share x what was sent."""
        scales, packed = message
        factors = (scales * share).tolist()
        for i, part in self._code.pieces:
            x[part] += self._code.decode(packed, part, factors[i])
