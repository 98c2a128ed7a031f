"""How long does a training step take with our hook, beside torch's own PowerSGD and plain DistributedDataParallel?

    python benchmarks/ddp_hook.py
    python benchmarks/ddp_hook.py --width 16 --rounds 5 --hook plain --hook ours
    python benchmarks/ddp_hook.py --rate 1 --hook none --hook "none, overlap"

Two gloo processes on this machine, one thread each: forward, backward with the hook, optimiser, of ResNet-18 at 32x32.
Every hook has a model of its own; they take steps in turns, so that what else the machine does meets all of them alike.
Given are medians over rounds, of the slower worker, and of the ratios to the first hook in the same round. `--rate`
stands for a network of so many Gbit/s: our hooks then wait as long as their bytes would take there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from raytrust.compress import build, ddp_comm_hook
from raytrust.config import ModelConfig, parse_defence
from raytrust.networks.build import build_model
from raytrust.wire.channel import Channel, GroupChannel, Message, Tap
from raytrust.wire.processes import in_processes

Registration = Callable[[DistributedDataParallel, "float | None"], None]


class Slow(Tap):
    """A channel that waits until its bytes would have crossed a network of `rate` Gbit/s."""

    def __init__(self, channel: Channel, rate: float):
        super().__init__(channel)
        self._rate = rate

    def note(self, message: Message) -> None:
        super().note(message)
        time.sleep(message.sent_bytes * 8e-9 / self._rate)


def ours(words: str, overlap: bool = False) -> Registration:
    def register(ddp: DistributedDataParallel, rate: float | None) -> None:
        compressor = build(parse_defence(words), ddp.module, overlap=overlap)
        channel: Channel = GroupChannel.apart() if overlap else GroupChannel()
        channel = channel if rate is None else Slow(channel, rate)
        ddp.register_comm_hook(ddp.module, ddp_comm_hook(compressor, channel))

    return register


def torchs(ddp: DistributedDataParallel, rate: float | None) -> None:
    state = PowerSGDState(None, 4, start_powerSGD_iter=2, min_compression_rate=0.5)
    ddp.register_comm_hook(state, powerSGD_hook)


HOOKS: dict[str, tuple[Registration, dict[str, Any]]] = {
    "plain": (lambda ddp, rate: None, {}),
    # One bucket: on gloo the callbacks of several wait for each other, and torch's hook hangs (docs/findings.md).
    "torch": (torchs, {"bucket_cap_mb": 1000}),
    "ours": (ours("powersgd:4:ef"), {}),
    "ours, overlap": (ours("powersgd:4:ef", overlap=True), {}),
    "none": (ours("none"), {}),
    "none, overlap": (ours("none", overlap=True), {}),
    "scaled sign": (ours("ef-signsgd"), {}),
    "scaled sign, overlap": (ours("ef-signsgd", overlap=True), {}),
}


@dataclass(frozen=True)
class Timing:
    """Seconds of every step of each hook, by round, of one worker."""

    hooks: tuple[str, ...]
    width: int
    batch: int
    rounds: int
    rate: float | None

    def __call__(self, channel: Channel) -> dict[str, list[float]]:
        generator = torch.Generator().manual_seed(channel.rank)
        images = torch.randn(self.batch, 3, 32, 32, generator=generator)
        labels = torch.randint(0, 10, (self.batch,), generator=generator)
        models = {name: self._model(name) for name in self.hooks}
        seconds: dict[str, list[float]] = {name: [] for name in self.hooks}
        # At first buckets are rebuilt, buffers made, and torch's hook does not compress.
        for number in range(-4, self.rounds):
            for name, (ddp, optimiser) in models.items():
                channel.all_mean(torch.zeros(1))  # all begin together
                start = time.perf_counter()
                optimiser.zero_grad()
                F.cross_entropy(ddp(images), labels).backward()
                optimiser.step()
                if number >= 0:
                    seconds[name].append(time.perf_counter() - start)
        return seconds

    def _model(self, name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
        register, options = HOOKS[name]
        ddp = DistributedDataParallel(build_model(ModelConfig(width=self.width), 3, 10, seed=0), **options)
        register(ddp, self.rate)
        return ddp, torch.optim.SGD(ddp.parameters(), lr=0.01, momentum=0.9)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--hook", action="append", choices=[*HOOKS], help="repeatable (default: all)")
    parser.add_argument("--width", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="images a worker (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="(default: %(default)s)")
    parser.add_argument("--rate", type=float, help="Gbit/s of a network; of our own hooks alone")
    options = parser.parse_args(arguments)
    hooks = tuple(dict.fromkeys(options.hook or HOOKS))
    if options.rate is not None and (options.rate <= 0 or {"plain", "torch"} & {*hooks}):
        print(f"ddp_hook.py: error: Expected rate={options.rate} above 0, and hooks of ours.", file=sys.stderr)
        return 2
    workers = in_processes(Timing(hooks, options.width, options.batch, options.rounds, options.rate), 2)
    slower = {name: [max(pair) for pair in zip(*(w[name] for w in workers), strict=True)] for name in hooks}
    print(f"ResNet-18 of width {options.width}, {options.batch} images a worker, 2 workers, {options.rounds} rounds")
    print(f"| hook | ms a step | to {hooks[0]} (quartiles) |\n|---|---|---|")
    for name in hooks:
        ratios = [s / first for s, first in zip(slower[name], slower[hooks[0]], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        print(
            f"| {name} | {1e3 * statistics.median(slower[name]):.0f} | "
            f"{statistics.median(ratios):.2f} ({low:.2f}, {high:.2f}) |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
