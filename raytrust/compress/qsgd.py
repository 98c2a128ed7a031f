"""QSGD (Alistarh, Grubic, Li, Tomioka & Vojnovic 2017): unbiased stochastic quantisation, bucket by bucket."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raytrust.compress.base import Payload, Stochastic
from raytrust.compress.interface import Layout, Reduced, chunks
from raytrust.compress.packing import pack_codes, unpack_codes
from raytrust.config import QSGDConfig, register
from raytrust.wire.channel import Channel

WORDS = 2**15  # of 64 bits that are drawn at a time: 256 KiB, which stay in the cache while they become floats


@register.compressor(QSGDConfig)
class QSGD(Stochastic):
    """Each bucket of d entries is sent as its norm and, an entry, a level in -s..s of s = 2^(bits-1) - 1: stochastic
    rounding of s x / norm. Bytes: ceil(N bits / 8) + 4 ceil(N / d), without the entropy code of the paper.

    E[decoded_own] = x, and with the L2 norm E||decoded_own - x||^2 <= min(d / s^2, sqrt(d) / s) ||x||^2 (Alistarh et
    al. 2017, Lemma 3.1); with the largest magnitude for a norm, as in the paper's experiments, it is at most
    d / (4 s^2) ||x||^2. The dice are each worker's own, and private: a function of the seed, the step and the rank.
    """

    def __init__(self, config: QSGDConfig, layout: Layout, seed: int = 0):
        super().__init__(config, layout, seed)
        self._config: QSGDConfig = config
        self.levels = 2 ** (config.bits - 1) - 1
        longest = max((part.stop - part.start for part in self._chunks()), default=0)
        self._chunk = -(-longest // config.bucket) * config.bucket

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
        return self._reduced(self._sum(gathered, share=1 / channel.world_size), gathered[channel.rank])

    def _add(self, x: Tensor, payload: Payload, share: float = 1.0) -> Tensor:
        decoded = self._scratch("decoded", self._chunk, x)
        for part in self._chunks():
            x[part].add_(self._dequantise(payload, part, decoded[: part.stop - part.start]), alpha=share)
        return x

    def _write(self, out: Tensor, payload: Payload, share: float = 1.0) -> Tensor:
        for part in self._chunks():
            decoded = self._dequantise(payload, part, out[part])
            if share != 1.0:
                decoded.mul_(share)
        return out

    # A chunk holds whole buckets and, as their codes are packed in bytes, a multiple of 8 of them: then it can be
    # encoded and decoded without a look at its neighbours.
    def _chunks(self) -> list[slice]:
        return list(chunks(self.layout.entries, multiple=8 * self._config.bucket))

    def _quantise(self, x: Tensor, dice: _Dice) -> tuple[Tensor, Tensor]:
        """(n,) -> codes 0..2s, uint8 (n,), and the norm of each bucket."""
        n, s, bucket = len(x), self.levels, self._config.bucket
        rows = (x if n % bucket == 0 else F.pad(x, (0, -n % bucket))).view(-1, bucket)
        norms = _norms(rows, self._config.norm)
        y = self._scratch("levels", self._chunk, x)[: rows.numel()]
        dice(y)
        # Not below what keeps the inverse finite, for a bucket of zeros.
        inverse = s / norms.clamp_min(s * torch.finfo(torch.float32).tiny)
        # floor(y + u) with u uniform in [0, 1) rounds up with the fraction of y as its probability: so the dice are the
        # buffer that the levels are added to, and rounding costs no comparison.
        torch.addcmul(y.view_as(rows), rows, inverse[:, None], out=y.view_as(rows)).add_(s)
        codes = self._scratch("codes", self._chunk, x, torch.uint8)[: rows.numel()]
        # By + s nothing is negative, so that dropping the fraction rounds down. numpy converts faster than torch.
        np.copyto(codes.numpy(), y.numpy(), casting="unsafe") if y.device.type == "cpu" else codes.copy_(y)
        return codes[:n].clamp_(max=2 * s), norms

    def _dequantise(self, payload: Payload, part: slice, out: Tensor) -> Tensor:
        """The entries of a chunk, (n,), in `out`."""
        norms, packed = payload
        n, bits, bucket = len(out), self._config.bits, self._config.bucket
        padded = -(-n // bucket) * bucket
        codes = self._scratch("codes", self._chunk, packed, torch.uint8)[:padded]
        unpack_codes(packed[_bytes(part.start, bits) : _bytes(part.stop, bits)], bits, codes[:n])
        # Shifted as bytes, a quarter of the memory of floats: what is below zero wraps around, and is that as int8.
        # First the shift, then the scale: so level 0 is exactly zero.
        levels = self._scratch("levels", self._chunk, norms)[:padded].copy_(codes.sub_(self.levels).view(torch.int8))
        scale = norms[part.start // bucket : -(-part.stop // bucket), None] / self.levels
        rows = levels.view(-1, bucket)
        if n == padded:
            torch.mul(rows, scale, out=out.view(-1, bucket))
            return out
        return out.copy_(rows.mul_(scale).view(-1)[:n])


def _norms(rows: Tensor, kind: str) -> Tensor:
    """(buckets, d) -> (buckets,): the L2 norm, or the largest magnitude."""
    if kind == "max":
        return torch.linalg.vector_norm(rows, ord=torch.inf, dim=1)
    norms = torch.linalg.vector_norm(rows, dim=1)
    # Beyond these, squares may have left the range of float32. Seldom, so that the CPU does not always make the second
    # pass; a GPU does, as it is quicker than to wait for the device.
    beyond = (norms < 1e-15) | (norms > 1e15)
    on_cpu = rows.device.type == "cpu"
    if on_cpu and not bool(beyond.any()):
        return norms
    peak = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1)
    safe = peak.clamp_min(torch.finfo(torch.float32).tiny)
    scaled = peak * torch.linalg.vector_norm(rows / safe[:, None], dim=1)
    return scaled if on_cpu else torch.where(beyond, scaled, norms)


class _Dice:
    """Uniform numbers in [0, 1), float32 of 24 random bits."""

    def __init__(self, seed: int, step: int, rank: int, device: torch.device):
        # numpy's SFC64 is faster than torch's generator on the CPU, and does not exist on a GPU: so the draws, alike in
        # distribution, differ between devices.
        if device.type == "cpu":
            self._numpy = np.random.SFC64([seed, step, rank])
        else:
            mixed = int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)
            self._torch = torch.Generator(device=device).manual_seed(mixed)

    def __call__(self, out: Tensor) -> None:
        if out.device.type != "cpu":
            out.uniform_(generator=self._torch)
            return
        # What Generator.random(dtype=float32) makes of the same bits, in less than half its time, as that asks for each
        # half of a word by a call: the low half of each word first, and of a half its upper 24 bits.
        numbers = out.numpy()
        for start in range(0, len(numbers), 2 * WORDS):
            part = numbers[start : start + 2 * WORDS]
            halves = self._numpy.random_raw(-(-len(part) // 2)).astype("<u8", copy=False).view("<u4")[: len(part)]
            np.right_shift(halves, 8, out=halves)
            # From int32, which numpy converts faster than uint32.
            np.copyto(part, halves.view("<i4"), casting="unsafe")
            np.multiply(part, np.float32(2.0**-24), out=part)


def _bytes(entries: int, bits: int) -> int:
    return -(-entries * bits // 8)
