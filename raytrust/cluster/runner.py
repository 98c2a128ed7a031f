"""A runner on Ray: every bundle of jobs is one task, single-threaded, on one CPU and, of attacks, a share of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raytrust.cluster.failures import LOST, RETRIES, one_line
from raytrust.data import Dataset
from raytrust.jobs.job import Job, Place
from raytrust.jobs.listener import Listener
from raytrust.jobs.runner import Bundle, Outcome, tell, too_late, work
from raytrust.jobs.store import JobStore
from raytrust.persample.memory import keep_freed_memory, take_share


class OnRay:
    """The runner of `raytrust.jobs.runner` on the cluster that Ray is connected to.

    data: by fingerprint. parallel: how many tasks have room at once. gpu: the share that each takes. A task whose
    machine was lost is tried again.
    """

    def __init__(self, data: Mapping[str, Dataset], parallel: int, device: str = "cpu", gpu: float = 0.0):
        self.parallel = parallel
        self._data, self._device, self._task = data, device, remote(do, 1.0, gpu)
        self._references: dict[str, ray.ObjectRef] = {}

    def run(self, bundles: Sequence[Bundle], listener: Listener, until: float | None = None) -> None:
        # All that can begin is handed to Ray at once, so that a cluster which grows sees what is wanted.
        pending = [(store, tuple(store.missing(jobs))) for store, jobs in bundles]
        waiting: dict[ray.ObjectRef, Bundle] = {}
        while pending or waiting:
            ready = [
                (store, jobs) for store, jobs in pending if all(map(store.knows, (b for j in jobs for b in j.after())))
            ]
            if not ready and not waiting:
                if too_late(until):
                    return
                # What these jobs wait for is no part of this run; they say so when they fail.
                ready = pending
            pending = [bundle for bundle in pending if bundle not in ready]
            for store, jobs in ready:
                if jobs:
                    waiting[self._hand_over(store, jobs, until)] = (store, jobs)
                    for job in jobs:
                        listener.started(job.kind, store.key(job), job.name)
            done: list[ray.ObjectRef] = []
            while waiting and not done:
                done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0.5)
                listener.tick()
            for reference in done:
                store, jobs = waiting.pop(reference)
                try:
                    for outcome in ray.get(reference):
                        tell(listener, store, outcome)
                except (ray.exceptions.RayError, *LOST) as error:
                    # Which of the jobs ended the process, shows when each has a process of its own.
                    if len(jobs) > 1:
                        pending += [(store, (job,)) for job in jobs]
                    else:
                        store.fail(jobs[0], one_line(error))
                        tell(listener, store, Outcome(jobs[0], 0.0, one_line(error)))

    def _hand_over(self, store: JobStore, jobs: Sequence[Job], until: float | None) -> ray.ObjectRef:
        data = self._data.get(store.fingerprint)
        if data is not None and store.fingerprint not in self._references:
            self._references[store.fingerprint] = ray.put(data)
        references = [] if data is None else [self._references[store.fingerprint]]
        return self._task.remote(store, jobs, references, self._device, until)


def remote(function: Callable[..., Any], cpus: float, gpu: float) -> Any:
    """A function as a Ray task that takes so much."""
    return ray.remote(
        num_cpus=cpus,
        num_gpus=gpu,
        max_retries=RETRIES,
        max_calls=100 if gpu else 0,  # on a GPU Ray would start a new process for each call
        scheduling_strategy=PlacementGroupSchedulingStrategy(None),  # not inside the slot of a trial that asks for it
    )(function)


def do(
    store: JobStore, jobs: Sequence[Job], data: Sequence[ray.ObjectRef], device: str, until: float | None = None
) -> list[Outcome]:
    """`raytrust.jobs.runner.work` in a Ray worker, unless it is too late by its clock.

    data: a reference to the data set, or nothing. In a list it stays a reference until it is needed.
    """
    if too_late(until):
        return []
    torch.set_num_threads(1)
    # The process is a Ray worker's, so that tuning its allocator surprises nobody.
    keep_freed_memory()
    if device.startswith("cuda"):
        given = ray.get_runtime_context().get_assigned_resources().get("GPU", 1.0)
        # Several whole GPUs are more than a job knows to use.
        take_share(min(1.0, given))
    return work(store, jobs, Place(ray.get(data[0]) if data else None, device))
