"""A compressor's step in which the workers' gradients are taken together by a rule, not by the mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from raytrust.compress.hook import HookCompressor
from raytrust.compress.interface import Compressor
from raytrust.wire.channel import Channel, LocalChannel, Tap


def reduce_by(
    rule: Callable[[Tensor], Tensor], compressor: Compressor, grads: Sequence[Tensor], channel: Channel
) -> list[Tensor]:
    """The step of `compressor.reduce` by a rule: (workers, entries) -> (entries,); one tensor a parameter.

    Where a compressor gathers messages, as Top-K, signs and QSGD do, everyone decodes that of each worker, and the rule
    is for what they decode to: nothing else crosses the wire. Where it sums them, as PowerSGD, Rand-K and no
    compression do, nobody sees a single one: they are gathered instead, at `workers` times the bytes received, and the
    rule is for the messages, each of a step for itself. PowerSGD's P, with what it sends whole, are such a message, and
    so are its Q', so that no single worker chooses the basis either. Error feedback goes on as it would with the mean.

    Raises ValueError for a hook, which talks to others by itself.
    """
    if isinstance(compressor, HookCompressor):
        raise ValueError(
            "Expected a compressor of the package or a plugin for a robust rule: a hook reduces by itself."
        )
    tap = Tap(_Gathered(channel, rule), keep=True)
    reduced = compressor.reduce(grads, tap)
    if tap.messages[-1].op == "all_mean":
        return reduced.mean
    decoded = [torch.cat([g.flatten() for g in peer]) for peer in compressor.decode(tap.messages, "peer")]
    return compressor.layout.unflatten(rule(torch.stack(decoded)))


def gathers(compressor: Compressor) -> bool:
    """Whether everyone sees each worker's message; a step of the compressor, whose state it changes."""
    tap = Tap(LocalChannel(), keep=True)
    compressor.reduce([torch.ones(shape) for shape in compressor.layout.shapes], tap)
    return tap.messages[-1].op == "all_gather"


class _Gathered:
    """A channel whose mean is a rule's: what others would sum is gathered."""

    def __init__(self, channel: Channel, rule: Callable[[Tensor], Tensor]):
        self._channel, self._rule = channel, rule
        self.world_size, self.rank = channel.world_size, channel.rank

    def all_mean(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        stack = torch.stack([sent.flatten().float() for (sent,) in self._channel.all_gather((x,))])
        found = self._rule(stack).to(x.dtype).view(x.shape)
        return found if out is None else out.copy_(found)

    def all_gather(self, xs: Sequence[Tensor], counts: Sequence[int] | None = None) -> list[tuple[Tensor, ...]]:
        return self._channel.all_gather(xs, counts)
