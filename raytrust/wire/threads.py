"""Several workers in threads of one process, of which one runs at a time: a group without processes.

For studies of many small trainings, where starting processes would take longer than to train, and for workers that
share what a simulation has to know. What they compute is what the processes of a gloo group compute: of two workers to
the bit, of more to rounding, as gloo sums in an order of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from raytrust.wire.channel import Channel


def in_threads(function: Callable[[Channel], Any], workers: int) -> list[Any]:
    """Call a function for each worker of a group, and return what each returned, by rank.

    Workers take turns, and hand over at collectives alone: so the global state that a worker sets between two of them
    is its own, and a run is a function of its arguments. Raises what a worker raises, after all have ended;
    RuntimeError where one ends while others wait for it.
    """
    turns, results, threads = _Turns(workers), [None] * workers, torch.get_num_threads()

    def work(rank: int) -> None:
        torch.set_num_threads(threads)
        try:
            turns.wait(rank)
            results[rank] = function(ThreadChannel(turns, rank))
            turns.ended.append(rank)
            turns.hand_on(rank)
        # Whatever it is: the others wait for this one, and would do so for ever.
        except BaseException as error:
            turns.stop(error)

    started = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(workers)]
    try:
        for thread in started:
            thread.start()
        turns.hand_on(workers - 1)
        for thread in started:
            thread.join()
    except BaseException as error:
        turns.stop(error)
        raise
    if turns.error is not None:
        raise turns.error
    return results


class ThreadChannel:
    """The channel of one worker of `in_threads`."""

    def __init__(self, turns: _Turns, rank: int):
        self._turns, self.rank, self.world_size = turns, rank, turns.workers

    def all_mean(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        mean = self._turns.exchange(self.rank, x.detach().clone(memory_format=torch.contiguous_format), _mean)
        return mean.clone() if out is None else out.copy_(mean)

    def all_gather(self, xs: Sequence[Tensor], counts: Sequence[int] | None = None) -> list[tuple[Tensor, ...]]:
        heard = self._turns.exchange(self.rank, tuple(x.detach().clone() for x in xs), list)
        return [tuple(x.clone() for x in of_one) for of_one in heard]


def _mean(xs: list[Tensor]) -> Tensor:
    # In the order of ranks, and sum and divide, as a group does.
    total = xs[0].clone()
    for x in xs[1:]:
        total += x
    return total.div_(len(xs))


class _Turns:
    """Who runs, and what was said. A worker's turn ends when it has spoken; it hears the answer in its next turn."""

    def __init__(self, workers: int):
        self.workers = workers
        self.error: BaseException | None = None
        self._said: list[Any] = [None] * workers
        self.ended: list[int] = []
        self._spoken = [0] * workers  # how often
        self._answers = 0
        self._heard: Any = None
        self._gates = [threading.Semaphore(0) for _ in range(workers)]

    def exchange(self, rank: int, said: Any, join: Callable[[list[Any]], Any]) -> Any:
        self._said[rank] = said
        self._spoken[rank] += 1
        self._miss(rank)
        # By then all others have spoken, and heard the answer before.
        if rank == self.workers - 1:
            self._heard = join(self._said)
            self._answers += 1
        self.hand_on(rank)
        self.wait(rank)
        if self._answers < self._spoken[rank]:
            self._miss(rank)
        return self._heard

    def _miss(self, rank: int) -> None:
        if any(self._spoken[other] < self._spoken[rank] for other in self.ended):
            raise RuntimeError(f"Expected all {self.workers} workers to make the same collectives, but one has ended.")

    def hand_on(self, rank: int) -> None:
        self._gates[(rank + 1) % self.workers].release()

    def wait(self, rank: int) -> None:
        self._gates[rank].acquire()
        if self.error is not None:
            raise self.error

    def stop(self, error: BaseException) -> None:
        """End all workers at their next collective; the first error stays."""
        self.error = self.error or error
        for gate in self._gates:
            gate.release()
