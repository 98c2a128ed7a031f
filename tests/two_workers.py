"""What is checked between processes: `run_workers` starts them, `everything` runs in each."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from toys import DEFENCES, SHAPES, gradients, synthetic

from raytrust.channel import Channel, GroupChannel, Message, Tap
from raytrust.compress import ErrorFeedback, Layout, build
from raytrust.compress.powersgd import PowerSGD
from raytrust.config import CaptureConfig, Defence, ModelConfig, PowerSGDConfig, Threat, TrainConfig
from raytrust.train import train

STEPS = 3


def run_workers(function: Callable[[Channel], Any], workers: int, directory: Path, timeout: float = 120.0) -> list[Any]:
    """Run a module's function in new processes of one gloo group, and return what each returned, by rank.

    A failure of one ends all, and is raised here; so does `timeout` (seconds).
    """
    context = mp.spawn(_worker, (function, workers, str(directory), timeout), workers, join=False)
    deadline = time.monotonic() + timeout
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{workers} workers took more than {timeout} s.")
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(workers)]


def _worker(rank: int, function: Callable[[Channel], Any], workers: int, directory: str, timeout: float) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/rendezvous", workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=workers, timeout=timedelta(seconds=timeout))
    try:
        torch.save(function(GroupChannel()), f"{directory}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def everything(channel: Channel) -> dict[str, Any]:
    return {
        "channel": collectives(channel),
        "reductions": {name: reductions(channel, defence) for name, defence in DEFENCES.items()},
        "low rank": low_rank_mean(channel),
        "dense training": list(train(DENSE_TRAINING, synthetic(), channel)),
        "peer training": list(train(PEER_TRAINING, synthetic(), channel)),
    }


def collectives(channel: Channel) -> dict[str, Any]:
    """Both calls, on a tensor that is not contiguous and on mixed dtypes; what they return is then overwritten."""
    x = torch.arange(6.0).view(2, 3).T * (channel.rank + 1)
    xs = (torch.arange(3, dtype=torch.int8) + channel.rank, torch.tensor([0.1, 0.2]) * (channel.rank + 1))
    before = [t.clone() for t in (x, *xs)]
    mean, gathered = channel.all_mean(x), channel.all_gather(xs)
    found = {"mean": mean.clone(), "gathered": [tuple(t.clone() for t in ts) for ts in gathered]}
    for tensor in (mean, *(t for ts in gathered for t in ts)):
        tensor.zero_()
    assert all(map(torch.equal, (x, *xs), before))
    return found


@dataclass(frozen=True)
class Reduction:
    """One step of one worker. wire_bytes: of the tensors given to torch.distributed."""

    inputs: list[Tensor]  # with the residual, if there is one
    mean: list[Tensor]
    own: list[Tensor]
    residual: list[Tensor] | None
    messages: list[Message]
    public_state: dict[str, Tensor]  # before the step
    sent_bytes: int
    wire_bytes: int


def reductions(channel: Channel, defence: Defence, scribble: bool = False) -> list[Reduction]:
    """Some steps, with other gradients on each worker. scribble: write over whatever a step returned."""
    compressor = build(defence, SHAPES, seed=5)
    found = []
    for step in range(STEPS):
        grads = gradients(100 * step + channel.rank)
        inputs = grads
        if isinstance(compressor, ErrorFeedback) and compressor.residual is not None:
            inputs = [g + e for g, e in zip(grads, compressor.residual, strict=True)]
        inputs = [x.clone() for x in inputs]
        before, rng, state = [g.clone() for g in grads], torch.random.get_rng_state(), compressor.public_state()
        tap = Tap(channel)
        with intercepted() as payloads:
            reduced = compressor.reduce(grads, tap)
        assert all(map(torch.equal, grads, before)), "the gradients were changed"
        assert torch.equal(torch.random.get_rng_state(), rng), "the global RNG was used"
        residual = copy.deepcopy(compressor.residual) if isinstance(compressor, ErrorFeedback) else None
        found.append(
            Reduction(
                inputs,
                [m.clone() for m in reduced.mean],
                [o.clone() for o in reduced.own],
                residual,
                tap.messages,
                state,
                tap.sent_bytes,
                sum(payloads),
            )
        )
        if scribble:
            for tensor in (*reduced.mean, *reduced.own, *grads):
                tensor.fill_(torch.nan)
    return found


@contextmanager
def intercepted() -> Iterator[list[int]]:
    """The bytes of each tensor that is handed to torch.distributed while the block runs."""
    sizes: list[int] = []
    all_reduce: Any = dist.all_reduce
    all_gather: Any = dist.all_gather

    def counted_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, **kwargs)

    def counted_gather(buffers: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel() * tensor.element_size())
        return all_gather(buffers, tensor, *args, **kwargs)

    dist.all_reduce, dist.all_gather = counted_reduce, counted_gather  # type: ignore[assignment]
    try:
        yield sizes
    finally:
        dist.all_reduce, dist.all_gather = all_reduce, all_gather


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
