"""Pieces of work of a report, spread over the cluster: one Ray task each, single-threaded, on one CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
import torch

from raytrust.attacks.inversion.memory import keep_freed_memory
from raytrust.cluster.failures import LOST, RETRIES, one_line
from raytrust.data import Dataset
from raytrust.paper.units import Unit, UnitStore, Watcher


def run_units(jobs: Sequence[tuple[UnitStore, Unit]], data: dict[str, Dataset], watcher: Watcher) -> None:
    """Do all units that are not done, dear ones first. One that fails is recorded with its reason; the others go on.

    data: by fingerprint. A unit whose machine was lost is tried again.
    """
    references = {fingerprint: ray.put(dataset) for fingerprint, dataset in data.items()}
    task = ray.remote(_run).options(num_cpus=1, max_retries=RETRIES)
    waiting: dict[Any, tuple[UnitStore, Unit]] = {}
    for store, unit in sorted(jobs, key=lambda job: -job[1].cost):
        waiting[task.remote(store, unit, [references[store.fingerprint]])] = (store, unit)
    while waiting:
        done, _ = ray.wait(list(waiting), timeout=0.5)
        for ref in done:
            store, unit = waiting.pop(ref)
            try:
                watcher.ended(unit, ray.get(ref))
            except (ray.exceptions.RayError, *LOST) as error:
                store.fail(unit, one_line(error))
                watcher.ended(unit, None, one_line(error))


def _run(store: UnitStore, unit: Unit, data: list[ray.ObjectRef]) -> float:
    """Wrapped in a list, the data stays a reference until it is needed."""
    torch.set_num_threads(1)
    keep_freed_memory()
    return store.run(unit, ray.get(data[0]))
