"""No compression, and the plain baseline: the whole gradient in float32, or in 16 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytrust.compress.base import Base, Payload
from raytrust.compress.interface import FlatGradients, Layout, Reduced, chunks
from raytrust.config import DenseConfig, HalfConfig, register
from raytrust.wire.channel import Channel


class _Whole(Base):
    """One all-reduce of all entries."""

    per_parameter = True

    def _add(self, x: Tensor, payload: Payload, share: float = 1.0) -> Tensor:
        (flat,) = payload
        return x.add_(flat, alpha=share)


@register.compressor(DenseConfig)
class Dense(_Whole):
    """Sends 4 bytes an entry; decoded_own == grads."""

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        flat = self._input(grads)
        mean = channel.all_mean(flat, out=self._scratch("mean", len(flat), flat))
        # Error feedback writes over the vector that it handed in, and what was sent has to outlast that.
        if isinstance(grads, FlatGradients):
            flat = self._scratch("sent", len(flat), flat).copy_(flat)
        return self._reduced(mean, (flat,))


@register.compressor(HalfConfig)
class Half(_Whole):
    """Sends 2 bytes an entry, rounded to nearest: fp16 (5 bits of exponent) or bf16 (8), as DDP's own hooks do.

    An entry beyond the format's largest number / workers (fp16: 65,504 / workers, and slightly less for each worker
    after the first) is clipped to it, so that the sum cannot overflow. The mean is summed in 16 bits, so it is the mean
    of `decoded_own` to rounding in the format.
    """

    def __init__(self, config: HalfConfig, layout: Layout, seed: int = 0):
        super().__init__(config, layout)
        self._dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}[config.dtype]

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        flat = self._input(grads)
        n = len(flat)
        # Each addition of the sum may round upwards; the power leaves room for all of them.
        info, workers = torch.finfo(self._dtype), channel.world_size
        limit = info.max / workers * (1 - info.eps) ** (workers - 1)
        sent = self._scratch("sent", n, flat, self._dtype)
        # By chunks, as `clamp` of the whole would allocate a second gradient in float32.
        for part in chunks(n):
            sent[part] = flat[part].clamp(-limit, limit)
        received = channel.all_mean(sent, out=self._scratch("received", n, flat, self._dtype))
        return self._reduced(self._scratch("mean", n, flat).copy_(received), (sent,))
