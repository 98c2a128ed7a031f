"""Doing jobs: in this process, or by whoever is handed to a program, such as `raytrust.cluster.runner`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, TypeAlias

import torch

from raytrust.data import Dataset
from raytrust.jobs.errors import one_line
from raytrust.jobs.job import Job, Place, Result
from raytrust.jobs.listener import Listener
from raytrust.jobs.store import JobStore
from raytrust.networks.device import exact

Bundle: TypeAlias = tuple[JobStore, tuple[Job, ...]]
"""Jobs of one store that one process does together."""


@dataclass(frozen=True)
class Outcome:
    """What became of a job. seconds: of one processor, its share of what the bundle took. reason: why it failed."""

    job: Job
    seconds: float
    reason: str | None = None


class Runner(Protocol):
    """Does jobs. parallel: how many at once."""

    parallel: int

    def run(self, bundles: Sequence[Bundle], listener: Listener, until: float | None = None) -> None:
        """Do what the stores do not know yet, in this order where the jobs allow it, and keep what comes of it.

        A job that fails is kept with its reason, and the others go on. until: by `time.time`, when the last may be
        begun; the listener is not told of those that are left out. It is told of a job by its kind and key, in the end
        with "job_seconds" and "job_cost" beside the figures.
        """
        ...


class Local:
    """A runner for this process, on one thread. data: by fingerprint."""

    parallel = 1

    def __init__(self, data: Mapping[str, Dataset], device: str = "cpu"):
        self._data, self._device = data, device

    def run(self, bundles: Sequence[Bundle], listener: Listener, until: float | None = None) -> None:
        # As on a cluster, where a process has one core: sums in another order would change a job's figures.
        torch.set_num_threads(1)
        for store, jobs in bundles:
            if not (missing := store.missing(jobs)):
                continue
            if too_late(until):
                return
            place = Place(self._data.get(store.fingerprint), self._device)
            for job in missing:
                listener.started(job.kind, store.key(job), job.name)
            for outcome in work(store, missing, place):
                tell(listener, store, outcome)
            listener.tick()


def too_late(until: float | None) -> bool:
    return until is not None and time.time() >= until


def each(store: JobStore, jobs: Sequence[Job]) -> list[Bundle]:
    """A bundle of its own for each job that the store does not know."""
    return [(store, (job,)) for job in store.missing(jobs)]


def work(store: JobStore, jobs: Sequence[Job], place: Place) -> list[Outcome]:
    """Do these jobs in this process, unless they are known, and keep what comes of each."""
    return [outcome for _, alike in groupby(store.missing(jobs), type) for outcome in _work(store, list(alike), place)]


def _work(store: JobStore, jobs: list[Job], place: Place) -> Iterator[Outcome]:
    # Processor time, which other programs on the machine do not lengthen as they do the time on the wall.
    started = time.process_time()
    # Sums in another order, or rounded otherwise, would change a job's figures.
    with exact(place.device):
        results = _results(store, jobs, place)
    seconds = (time.process_time() - started) / len(jobs)
    for job, result in zip(jobs, results, strict=True):
        if isinstance(result, Exception):
            store.fail(job, one_line(result))
            yield Outcome(job, seconds, one_line(result))
        else:
            store.put(job, result)
            yield Outcome(job, seconds)


def _results(store: JobStore, jobs: list[Job], place: Place) -> list[Result | Exception]:
    try:
        return type(jobs[0]).run_together(jobs, store, place)
    except Exception as error:
        # Whatever it is, it fails one job alone: a sweep of days does not end for one attack that runs out of memory.
        if len(jobs) == 1:
            return [error]
        # Which of them it was, shows when each is done on its own.
        return [result for job in jobs for result in _results(store, [job], place)]


def tell(listener: Listener, store: JobStore, outcome: Outcome) -> None:
    """Tell a listener what became of a job."""
    job, key = outcome.job, store.key(outcome.job)
    if outcome.reason is not None:
        listener.failed(job.kind, key, outcome.reason)
    else:
        figures = store.result(job) or {}
        listener.finished(job.kind, key, {**figures, "job_seconds": outcome.seconds, "job_cost": job.cost})
