"""The scaled sign of EF-signSGD (Karimireddy, Rebjock, Stich & Jaggi 2019, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytrust.compress.base import Base, Payload
from raytrust.compress.interface import CHUNK, Layout, Reduced
from raytrust.compress.signs import SignCode
from raytrust.config import ScaledSignConfig, register
from raytrust.wire.channel import Channel


@register.compressor(ScaledSignConfig)
class ScaledSign(Base):
    """Sends every tensor x as mean|x| sign(x): one bit an entry and a float32 a tensor, ceil(N/8) + 4 x tensors bytes.

    With error feedback this is EF-signSGD. Guarantees ||x - decoded_own||^2 = (1 - ||x||_1^2 / (d ||x||_2^2)) ||x||^2
    for a tensor of d entries (Karimireddy et al. 2019, Lemma 8). A zero counts as positive.
    """

    per_parameter = True

    def __init__(self, config: ScaledSignConfig, layout: Layout, seed: int = 0):
        super().__init__(config, layout)
        self._code = SignCode(layout, self._scratch)

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        flat = self._input(grads)
        gathered = channel.all_gather(self._encode(flat))
        return self._reduced(self._sum(gathered, share=1 / channel.world_size), gathered[channel.rank])

    def _encode(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """The mean magnitude of each tensor, (parameters,), and the signs, uint8 (ceil(entries / 8),)."""
        n = self.layout.entries
        magnitudes = self._scratch("magnitudes", CHUNK, flat)
        packed = self._scratch("packed", (n + 7) // 8, flat, torch.uint8)
        sums = [flat.new_zeros(()) for _ in self.layout.sizes]
        encoded = 0
        # All passes over a piece while it is in the cache: it comes from memory once. Two of them for its sum are
        # faster than torch's norm.
        for i, part in self._code.pieces:
            sums[i] += torch.abs(flat[part], out=magnitudes[: part.stop - part.start]).sum()
            # As far as whole bytes go: what is left of the last one goes with the next piece.
            last = part.stop if part.stop == n else part.stop // 8 * 8
            if last > encoded:
                self._code.encode_part(flat, slice(encoded, last), packed)
                encoded = last
        sizes = torch.tensor(self.layout.sizes, device=flat.device).clamp_min(1)
        return torch.stack(sums) / sizes if sums else flat.new_empty(0), packed

    def _add(self, x: Tensor, payload: Payload, share: float = 1.0) -> Tensor:
        return self._code.add(x, payload[1], self._pieces(payload[0], share))

    def _write(self, out: Tensor, payload: Payload, share: float = 1.0) -> Tensor:
        return self._code.write(out, payload[1], self._pieces(payload[0], share))

    def _pieces(self, scales: Tensor, share: float) -> list[tuple[slice, float]]:
        # One transfer for all tensors: on a GPU, each number that is read by itself waits for the device.
        factors = (scales * share).tolist()
        return [(part, factors[i]) for i, part in self._code.pieces]
