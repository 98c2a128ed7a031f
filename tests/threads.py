"""Several workers in the threads of one process, where starting processes would be too slow."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from raytrust.wire.channel import Channel


class Threads:
    """One of several workers, each in a thread of its own."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier):
        self.world_size, self.rank = len(slots), rank
        self._slots, self._barrier = slots, barrier

    def all_mean(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        mean = torch.stack([t for (t,) in self.all_gather([x])]).mean(0)
        return mean if out is None else out.copy_(mean)

    def all_gather(self, xs: Sequence[Tensor], counts: Sequence[int] | None = None) -> list[tuple[Tensor, ...]]:
        self._slots[self.rank] = tuple(x.detach().clone() for x in xs)
        self._barrier.wait(60)
        found = [tuple(x.clone() for x in slot) for slot in self._slots]
        self._barrier.wait(60)
        return found


def on_workers(function: Callable[[Channel], Any], workers: int) -> list[Any]:
    """What the function returns on each worker, by rank."""
    slots: list[Any] = [None] * workers
    barrier, found = threading.Barrier(workers), [None] * workers

    def run(rank: int) -> None:
        try:
            found[rank] = function(Threads(rank, slots, barrier))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in found
    return found
