"""No compression, and the plain baseline: the whole gradient in float32, or in 16 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytrust.compress.base import Base
from raytrust.compress.interface import FlatGradients, Layout, Reduced, Vantage, chunks
from raytrust.compress.views import LinearView, identity_view
from raytrust.config import DenseConfig, HalfConfig, register
from raytrust.wire.channel import Channel, Message


class _Whole(Base):
    """One all-reduce of all entries."""

    def decode(self, messages: Sequence[Message], vantage: Vantage) -> list[list[Tensor]]:
        (message,) = messages
        (flat,) = message.sent if vantage == "link" else message.received
        return [self.layout.unflatten(flat.float())]

    def view(self, messages: Sequence[Message], vantage: Vantage, victim: int = 0) -> LinearView:
        return identity_view(self.decode(messages, vantage)[0])


@register.compressor(DenseConfig)
class Dense(_Whole):
    """Sends 4 bytes an entry; own == grads."""

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        flat = self._input(grads)
        mean = channel.all_mean(flat, out=self._scratch("mean", len(flat), flat))
        if isinstance(grads, FlatGradients):  # whoever made them may write to them
            flat = self._scratch("own", len(flat), flat).copy_(flat)
        return Reduced(self.layout.unflatten(mean), lambda: self.layout.unflatten(flat))


@register.compressor(HalfConfig)
class Half(_Whole):
    """Sends 2 bytes an entry, rounded to nearest: fp16 (5 bits of exponent) or bf16 (8), as DDP's own hooks do.

    An entry beyond the format's largest number / workers (fp16: 65,504 / workers, and slightly less for each worker
    after the first) is clipped to it, so that the sum cannot overflow. The mean is summed in 16 bits: to rounding in
    the format it is the mean of `own`, and what the view measures of the true gradient is what was observed.
    """

    def __init__(self, config: HalfConfig, layout: Layout, seed: int = 0):
        super().__init__(config, layout)
        self._dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}[config.dtype]

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        flat = self._input(grads)
        n = len(flat)
        # The power makes up for each addition's rounding, upwards in the worst case.
        info, workers = torch.finfo(self._dtype), channel.world_size
        limit = info.max / workers * (1 - info.eps) ** (workers - 1)
        sent = self._scratch("sent", n, flat, self._dtype)
        for part in chunks(n):
            sent[part] = flat[part].clamp(-limit, limit)
        received = channel.all_mean(sent, out=self._scratch("received", n, flat, self._dtype))
        mean = self._scratch("mean", n, flat).copy_(received)
        return Reduced(
            self.layout.unflatten(mean),
            lambda: self.layout.unflatten(self._scratch("own", n, flat).copy_(sent)),
            lambda x: x.sub_(sent),
        )
