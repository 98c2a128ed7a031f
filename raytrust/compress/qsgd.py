"""QSGD (Alistarh, Grubic, Li, Tomioka & Vojnovic 2017): unbiased stochastic quantisation, bucket by bucket."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raytrust.channel import Channel, Message
from raytrust.compress.interface import Counting, Layout, Reduced, Vantage, chunks, senders, sent_by
from raytrust.compress.packing import pack_codes, unpack_codes
from raytrust.compress.views import IntervalView
from raytrust.config import QSGDConfig


class QSGD(Counting):
    """Each bucket of d entries is sent as its norm and, an entry, a level in -s..s of s = 2^(bits-1) - 1: stochastic
    rounding of s x / norm. Bytes: ceil(N bits / 8) + 4 ceil(N / d), without the entropy code of the paper.

    E[own] = x, and with the L2 norm E||own - x||^2 <= min(d / s^2, sqrt(d) / s) ||x||^2 (Alistarh et al. 2017, Lemma
    3.1); with the largest magnitude for a norm, as in the paper's experiments, it is at most d / (4 s^2) ||x||^2.
    The dice are each worker's own: a function of the seed, the step and the rank.
    """

    def __init__(self, config: QSGDConfig, layout: Layout, seed: int = 0):
        super().__init__(layout, seed)
        self._config = config
        self.levels = 2 ** (config.bits - 1) - 1

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        flat = self._input(grads)
        n, bits, bucket = len(flat), self._config.bits, self._config.bucket
        packed = self._scratch("packed", _bytes(n, bits), flat, torch.uint8)
        norms = self._scratch("norms", -(-n // bucket), flat)
        dice = _Dice(self._seed, self._step, channel.rank, flat.device)
        self._step += 1
        for part in self._chunks():
            codes, norm = self._quantise(flat[part], dice)
            norms[part.start // bucket : -(-part.stop // bucket)] = norm
            packed[_bytes(part.start, bits) : _bytes(part.stop, bits)] = pack_codes(codes, bits)
        gathered = channel.all_gather((norms, packed))
        mean = self._scratch("mean", n, flat)
        for part in self._chunks():
            torch.mul(self._dequantise(gathered[0], part), 1 / channel.world_size, out=mean[part])
            for theirs in gathered[1:]:
                mean[part].add_(self._dequantise(theirs, part), alpha=1 / channel.world_size)
        mine = gathered[channel.rank]

        def subtract(x: Tensor) -> None:
            for part in self._chunks():
                x[part] -= self._dequantise(mine, part)

        own = self._scratch("own", n, flat)
        return Reduced(self.layout.unflatten(mean), lambda: self._decode(mine, own), subtract)

    def decode(self, messages: Sequence[Message], vantage: Vantage) -> list[list[Tensor]]:
        return [self._decode(theirs, theirs[0].new_empty(self.layout.entries)) for theirs in senders(messages, vantage)]

    def view(self, messages: Sequence[Message], vantage: Vantage, victim: int = 0) -> IntervalView:
        """Every entry lies within one level of what was sent for it."""
        theirs = sent_by(messages, vantage, victim)
        norms = theirs[0]
        middle = self._decode(theirs, norms.new_empty(self.layout.entries))
        spread = (norms / self.levels).repeat_interleave(self._config.bucket)[: self.layout.entries]
        return IntervalView(middle, self.layout.unflatten(spread))

    def _chunks(self) -> list[slice]:
        return list(chunks(self.layout.entries, multiple=8 * self._config.bucket))

    def _quantise(self, x: Tensor, dice: _Dice) -> tuple[Tensor, Tensor]:
        """(n,) -> codes 0..2s, uint8 (n,), and the norm of each bucket."""
        n, s = len(x), self.levels
        rows = F.pad(x, (0, -n % self._config.bucket)).view(-1, self._config.bucket)
        # By the largest magnitude first: squares of what is huge or tiny leave the range of float32.
        peak = rows.abs().amax(1, keepdim=True)
        y = rows / peak.clamp_min(torch.finfo(torch.float32).tiny)
        factor = torch.ones_like(peak)
        if self._config.norm == "l2":
            factor = torch.linalg.vector_norm(y, dim=1, keepdim=True).clamp_min(1.0)
        y.mul_(s / factor).add_(dice(y.numel()).view_as(y)).floor_().clamp_(-s, s).add_(s)
        return y.view(-1)[:n].to(torch.uint8), (peak * factor).view(-1)

    def _dequantise(self, message: Sequence[Tensor], part: slice) -> Tensor:
        """The entries of a chunk, (n,), new."""
        norms, packed = message
        n, bits, bucket = part.stop - part.start, self._config.bits, self._config.bucket
        codes = unpack_codes(packed[_bytes(part.start, bits) : _bytes(part.stop, bits)], bits, n, zero=self.levels)
        scale = norms[part.start // bucket : -(-part.stop // bucket)] / self.levels
        whole = n - n % bucket
        codes[:whole].view(-1, bucket).mul_(scale[: whole // bucket, None])
        codes[whole:].mul_(scale[-1:])
        return codes

    def _decode(self, message: Sequence[Tensor], out: Tensor) -> list[Tensor]:
        for part in self._chunks():
            out[part] = self._dequantise(message, part)
        return self.layout.unflatten(out)


class _Dice:
    """Uniform numbers in [0, 1), float32 of 24 random bits."""

    def __init__(self, seed: int, step: int, rank: int, device: torch.device):
        self._device = device
        if device.type == "cpu":  # numpy's SFC64 is faster than torch's generator
            self._numpy = np.random.Generator(np.random.SFC64([seed, step, rank]))
        else:
            mixed = int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)
            self._torch = torch.Generator(device=device).manual_seed(mixed)

    def __call__(self, n: int) -> Tensor:
        if self._device.type == "cpu":
            return torch.from_numpy(self._numpy.random(n, dtype=np.float32))
        return torch.rand(n, generator=self._torch, device=self._device)


def _bytes(entries: int, bits: int) -> int:
    return -(-entries * bits // 8)
