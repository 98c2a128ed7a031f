"""Pieces of work of a report, spread over the cluster: one Ray task each, single-threaded, on one CPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
import torch

from raytrust.cluster.failures import LOST, RETRIES, one_line
from raytrust.data import Dataset
from raytrust.persample.memory import keep_freed_memory
from raytrust.studies.paper.units import Unit, UnitStore, Watcher


def run_units(
    jobs: Sequence[tuple[UnitStore, Unit]], data: dict[str, Dataset], watcher: Watcher, until: float | None = None
) -> None:
    """Do all units in their order. One that fails is recorded with its reason; the others go on.

    data: by fingerprint. A unit whose machine was lost is tried again. until: by each machine's clock, when the last
    unit may be begun; those that are not begun by then are left out, and the watcher is not told of them.
    """
    references = {fingerprint: ray.put(dataset) for fingerprint, dataset in data.items()}
    task = ray.remote(_run).options(num_cpus=1, max_retries=RETRIES)
    waiting: dict[Any, tuple[UnitStore, Unit]] = {}
    for store, unit in jobs:
        waiting[task.remote(store, unit, [references[store.fingerprint]], until)] = (store, unit)
    while waiting:
        done, _ = ray.wait(list(waiting), timeout=0.5)
        for ref in done:
            store, unit = waiting.pop(ref)
            try:
                if (seconds := ray.get(ref)) is not None:
                    watcher.ended(unit, seconds)
            except (ray.exceptions.RayError, *LOST) as error:
                store.fail(unit, one_line(error))
                watcher.ended(unit, None, one_line(error))


def _run(store: UnitStore, unit: Unit, data: list[ray.ObjectRef], until: float | None) -> float | None:
    """Wrapped in a list, the data stays a reference until it is needed. None if it is too late to begin.

    All units are handed to Ray at once, so that a cluster which grows sees what is wanted: only here one begins.
    """
    if until is not None and time.time() >= until:
        return None
    torch.set_num_threads(1)
    keep_freed_memory()
    return store.run(unit, ray.get(data[0]))
