"""The scaled sign of EF-signSGD (Karimireddy, Rebjock, Stich & Jaggi 2019, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from raytrust.channel import Channel, Message
from raytrust.compress.interface import Base, Layout, Reduced, Vantage, chunks, senders, sent_by
from raytrust.compress.packing import pack_signs, unpack_signs
from raytrust.compress.views import SignView


class ScaledSign(Base):
    """Sends every tensor x as mean|x| sign(x): one bit an entry and a float32 a tensor, ceil(N/8) + 4 x tensors bytes.

    With error feedback this is EF-signSGD. Guarantees ||x - own||^2 = (1 - ||x||_1^2 / (d ||x||_2^2)) ||x||^2 for a
    tensor of d entries (Karimireddy et al. 2019, Lemma 8). A zero counts as positive.
    """

    def __init__(self, layout: Layout):
        super().__init__(layout)
        starts = [sum(layout.sizes[:i]) for i in range(len(layout.sizes))]
        # Pieces of one tensor each, small enough for a cache: (tensor, start, stop) in the flat gradient.
        self._pieces = [
            (i, start + part.start, start + part.stop)
            for i, (start, size) in enumerate(zip(starts, layout.sizes, strict=True))
            for part in chunks(size)
        ]

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        flat = self._input(grads)
        n, workers = len(flat), channel.world_size
        packed = self._scratch("packed", (n + 7) // 8, flat, torch.uint8)
        for part in chunks(n):
            pack_signs(flat[part], packed[part.start // 8 : (part.stop + 7) // 8])
        tensors = self.layout.unflatten(flat)
        scales = torch.stack([x.norm(1) / max(1, x.numel()) for x in tensors]) if tensors else flat.new_empty(0)
        gathered = channel.all_gather((scales, packed))
        mean = self._scratch("mean", n, flat)
        decoded = [self._decoded(theirs) for theirs in gathered]
        for pieces in zip(*decoded, strict=True):
            (start, stop, sign, scale), *others = pieces
            torch.mul(sign, scale / workers, out=mean[start:stop])
            for _, _, sign, scale in others:
                mean[start:stop].add_(sign, alpha=scale / workers)
        mine = gathered[channel.rank]

        def subtract(x: Tensor) -> None:
            for start, stop, sign, scale in self._decoded(mine):
                x[start:stop].add_(sign, alpha=-scale)

        own = self._scratch("own", n, flat)
        return Reduced(self.layout.unflatten(mean), lambda: self._decode(mine, own), subtract)

    def decode(self, messages: Sequence[Message], vantage: Vantage) -> list[list[Tensor]]:
        return [self._decode(theirs, theirs[0].new_empty(self.layout.entries)) for theirs in senders(messages, vantage)]

    def view(self, messages: Sequence[Message], vantage: Vantage, victim: int = 0) -> SignView:
        scales, packed = sent_by(messages, vantage, victim)
        ones = torch.ones_like(scales)
        return SignView(self._decode((ones, packed), scales.new_empty(self.layout.entries)), scales)

    def _decoded(self, message: Sequence[Tensor]) -> Iterator[tuple[int, int, Tensor, float]]:
        """Piece by piece: (start, stop, signs, scale)."""
        scales, packed = message
        factors = scales.tolist()
        for i, start, stop in self._pieces:
            yield start, stop, unpack_signs(packed, start, stop), factors[i]

    def _decode(self, message: Sequence[Tensor], out: Tensor) -> list[Tensor]:
        for start, stop, sign, scale in self._decoded(message):
            torch.mul(sign, scale, out=out[start:stop])
        return self.layout.unflatten(out)
