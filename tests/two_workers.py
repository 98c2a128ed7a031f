"""What is checked between processes: `everything` runs in each."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from toys import COMPRESSORS, DEFENCES, SHAPES, contract_of, gradients, synthetic

from raytrust.compress import ErrorFeedback, Layout, build
from raytrust.compress.contract import check
from raytrust.compress.powersgd import PowerSGD
from raytrust.config import (
    CaptureConfig,
    CompressorConfig,
    Defence,
    DGCConfig,
    LocalConfig,
    ModelConfig,
    PowerSGDConfig,
    SignSGDConfig,
    Threat,
    TrainConfig,
)
from raytrust.train.loop import train
from raytrust.wire.channel import Channel, GroupChannel, LocalChannel, Message, Tap

STEPS = 3


def everything(channel: Channel) -> dict[str, Any]:
    return {
        "channel": collectives(channel),
        "subgroup": subgroup(channel),
        "reductions": {name: reductions(channel, defence) for name, defence in DEFENCES.items()},
        "same gradient": {name: same_gradient(channel, config) for name, config in COMPRESSORS.items()},
        "contract": {name: broken_guarantee(defence, channel) for name, defence in DEFENCES.items()},
        "nothing": {name: nothing(channel, defence) for name, defence in DEFENCES.items()},
        "low rank": low_rank_mean(channel),
        "dense training": list(train(DENSE_TRAINING, synthetic(), channel)),
        "peer training": list(train(PEER_TRAINING, synthetic(), channel)),
        "local training": list(train(LOCAL_TRAINING, synthetic(), channel)),
    }


def broken_guarantee(defence: Defence, channel: Channel) -> str:
    """Which one of `contract.check`, or nothing."""
    try:
        check(defence, channel, **contract_of(defence))
    except AssertionError as error:
        return str(error)
    return ""


def collectives(channel: Channel) -> dict[str, Any]:
    """All calls, on a tensor that is not contiguous and on mixed dtypes; what they return is then overwritten."""
    x = torch.arange(6.0).view(2, 3).T * (channel.rank + 1)
    xs = (torch.arange(3, dtype=torch.int8) + channel.rank, torch.tensor([0.1, 0.2]) * (channel.rank + 1))
    before = [t.clone() for t in (x, *xs)]
    mean, gathered = channel.all_mean(x), channel.all_gather(xs)
    out = torch.full((3, 2), torch.nan)
    assert channel.all_mean(x, out=out) is out
    longer = [t[: channel.rank] for t in xs]  # rank 0 has nothing to say, rank 1 one entry
    lengths = list(range(channel.world_size))
    with intercepted() as payloads:
        unequal = channel.all_gather(longer, lengths)
    found = {
        "mean": mean.clone(),
        "mean in place": out.clone(),
        "gathered": [tuple(t.clone() for t in ts) for ts in gathered],
        "unequal": [tuple(t.clone() for t in ts) for ts in unequal],
        "unequal bytes": sum(payloads),
    }
    for tensor in (mean, out, *(t for ts in (*gathered, *unequal) for t in ts)):
        tensor.zero_()
    assert all(map(torch.equal, (x, *xs), before))
    return found


def subgroup(channel: Channel) -> list[tuple[Tensor, ...]] | None:
    """A gather of unequal lengths in a group whose rank 0 is rank 1 of the world."""
    group = dist.new_group([1])
    return GroupChannel(group).all_gather([torch.arange(3.0)], [3]) if channel.rank == 1 else None


def same_gradient(channel: Channel, config: CompressorConfig) -> list[Message]:
    """What this worker sends of a gradient that all workers have, at its second step."""
    compressor = build(Defence(config), SHAPES, seed=5)
    compressor.reduce(gradients(0), channel)
    tap = Tap(channel, keep=True)
    compressor.reduce(gradients(1), tap)
    return tap.messages


def nothing(channel: Channel, defence: Defence) -> list[list[Tensor]]:
    """The means of gradients without parameters, without entries, and of zeros."""
    found = []
    for shapes in [], [torch.Size((0,)), torch.Size((3, 0))], SHAPES:
        compressor = build(defence, shapes)
        found.append([m.clone() for m in compressor.reduce([torch.zeros(s) for s in shapes], channel).mean])
        compressor.reduce([torch.zeros(s) for s in shapes], channel)  # nor does a second step fail
    return found


class Memory:
    """What the messages of a method without error feedback are of, by the book: the momentum of Signum (Bernstein et
    al. 2018, Algorithm 2), the v of DGC (Lin et al. 2018, Algorithm 4), with all others the gradient itself."""

    def __init__(self, config: CompressorConfig):
        self._config = config
        self._u = [torch.zeros(shape) for shape in SHAPES]
        self._v = [torch.zeros(shape) for shape in SHAPES]

    def add(self, grads: list[Tensor], workers: int) -> list[Tensor]:
        match self._config:
            case SignSGDConfig(momentum=momentum) if momentum:
                self._v = [momentum * m + (1 - momentum) * g for m, g in zip(self._v, grads, strict=True)]
            case DGCConfig(momentum=momentum, clip=clip):
                length = float(torch.cat([g.flatten() for g in grads]).norm())
                factor = 1.0 if clip is None else min(1.0, clip / workers**0.5 / length)
                self._u = [momentum * u + factor * g for u, g in zip(self._u, grads, strict=True)]
                self._v = [v + u for v, u in zip(self._v, self._u, strict=True)]
            case _:
                return grads
        return self._v

    def remove(self, own: list[Tensor]) -> None:
        if isinstance(self._config, DGCConfig):
            self._v = [v.masked_fill(o != 0, 0) for v, o in zip(self._v, own, strict=True)]
            if self._config.masking:
                self._u = [u.masked_fill(o != 0, 0) for u, o in zip(self._u, own, strict=True)]


@dataclass(frozen=True)
class Reduction:
    """One step of one worker. wire_bytes: of the tensors given to torch.distributed."""

    inputs: list[Tensor]  # what the messages are of: with the residual or the momentum, if there is one
    mean: list[Tensor]
    own: list[Tensor]
    residual: list[Tensor] | None  # what is kept of the inputs for the next step
    messages: list[Message]
    public_state: dict[str, Tensor]  # before the step
    sent_bytes: int
    wire_bytes: int


def reductions(channel: Channel, defence: Defence) -> list[Reduction]:
    """Some steps, with other gradients on each worker."""
    compressor, memory = build(defence, SHAPES, seed=5), Memory(defence.compressor)
    found = []
    for step in range(STEPS):
        grads = gradients(100 * step + channel.rank)
        inputs = memory.add(grads, channel.world_size)
        if isinstance(compressor, ErrorFeedback) and compressor.residual is not None:
            inputs = [g + e for g, e in zip(grads, compressor.residual, strict=True)]
        inputs = [x.clone() for x in inputs]
        before, rng, state = [g.clone() for g in grads], global_rng(), compressor.public_state()
        tap = Tap(channel, keep=True)
        with intercepted() as payloads:
            reduced = compressor.reduce(grads, tap)
        mean, own = [m.clone() for m in reduced.mean], [o.clone() for o in reduced.decoded_own]
        assert all(map(torch.equal, reduced.mean, mean)), "reading own changed the mean"
        assert all(map(torch.equal, grads, before)), "the gradients were changed"
        assert global_rng() == rng, "the global RNG was used"
        memory.remove(own)
        residual = copy.deepcopy(compressor.residual) if isinstance(compressor, ErrorFeedback) else None
        if isinstance(defence.compressor, DGCConfig):
            kept = compressor.state_dict()
            residual = [kept[f"v.{name}"] for name in compressor.layout.names]
        found.append(Reduction(inputs, mean, own, residual, tap.messages, state, tap.sent_bytes, sum(payloads)))
    return found


@cache
def alone(name: str) -> list[Reduction]:
    """The steps of one worker."""
    return reductions(LocalChannel(), DEFENCES[name])


def global_rng() -> tuple[Any, ...]:
    """The states of torch's, numpy's and Python's global generators."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return torch.random.get_rng_state().tolist(), name, keys.tolist(), rest, random.getstate()


@contextmanager
def intercepted() -> Iterator[list[int]]:
    """The bytes of each tensor that is handed to torch.distributed while the block runs."""
    sizes: list[int] = []
    all_reduce: Any = dist.all_reduce
    all_gather: Any = dist.all_gather
    broadcast: Any = dist.broadcast

    def counted_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, **kwargs)

    def counted_gather(buffers: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel() * tensor.element_size())
        return all_gather(buffers, tensor, *args, **kwargs)

    def counted_broadcast(tensor: Tensor, src: int, *args: Any, **kwargs: Any) -> Any:
        if src == dist.get_rank():
            sizes.append(tensor.numel() * tensor.element_size())
        return broadcast(tensor, src, *args, **kwargs)

    dist.all_reduce, dist.all_gather, dist.broadcast = counted_reduce, counted_gather, counted_broadcast  # type: ignore[assignment]
    try:
        yield sizes
    finally:
        dist.all_reduce, dist.all_gather, dist.broadcast = all_reduce, all_gather, broadcast


def low_rank_mean(channel: Channel) -> tuple[Tensor, Tensor]:
    """(mean of rank 2, what PowerSGD of rank 2 makes of it) where each worker's own matrix has full rank."""
    generator = torch.Generator().manual_seed(0)
    a, b, noise = (torch.randn(s, generator=generator) for s in [(12, 2), (2, 20), (12, 20)])
    sign = 1 if channel.rank == 0 else -1
    compressor = PowerSGD(PowerSGDConfig(rank=2), Layout([torch.Size((12, 20))]))
    return a @ b, compressor.reduce([a @ b + sign * noise], channel).mean[0]


DENSE_TRAINING = TrainConfig(
    model=ModelConfig("convnet", width=4),
    capture=CaptureConfig(steps=(0, 5), tuning=1, evaluation=1),
    workers=2,
    batch_size=4,
    steps=6,
)

# Three private batches for two workers: the last round is short. With batch norm, so that there are buffers.
PEER_TRAINING = TrainConfig(
    defence=Defence(PowerSGDConfig(rank=2), error_feedback=True),
    model=ModelConfig("resnet18", width=2),
    threat=Threat(vantage="peer", batch_size=2),
    capture=CaptureConfig(steps=(0, 3), tuning=1, evaluation=2),
    workers=2,
    batch_size=4,
    steps=4,
    learning_rate=0.01,
)

LOCAL_TRAINING = TrainConfig(
    model=ModelConfig("convnet", width=4),
    threat=Threat(batch_size=2),
    capture=CaptureConfig(steps=(0, 2), tuning=1, evaluation=1),
    workers=2,
    batch_size=4,
    steps=3,
    local=LocalConfig(3, 0.05, 1),
)
