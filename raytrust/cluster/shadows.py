"""The models of a membership audit, spread over the cluster: one Ray task each, single-threaded, on one CPU."""

from __future__ import annotations

import time
from typing import Any

import ray
import torch

from raytrust.cluster.failures import LOST, RETRIES, one_line
from raytrust.cluster.runtime import Listener
from raytrust.config import MembershipConfig, from_dict, to_dict
from raytrust.data import Dataset
from raytrust.persample.memory import keep_freed_memory
from raytrust.studies.membership.shadows import Kind, ShadowStore


def train_shadows(
    config: MembershipConfig, data: Dataset, store: ShadowStore, listener: Listener, until: float | None = None
) -> None:
    """Train every model that the store does not hold. One that fails is recorded with its reason; the others go on. One
    whose machine was lost is tried again.

    until: by each machine's clock, when the last model may be begun; the others are left out, and the listener is not
    told. It hears of each model under its arm's id; the result's keys are "kind" and "model".
    """
    jobs = [job for job in store.jobs(config) if not store.path(config, job[1], job[2], job[0]).exists()]
    if not jobs:
        return
    data_ref = ray.put(data)
    task = ray.remote(_train).options(num_cpus=1, max_retries=RETRIES)
    waiting: dict[Any, tuple[Kind, Any, int]] = {}
    for kind, arm, model in jobs:
        place = config.arms.index(arm)
        waiting[task.remote(store, to_dict(config), place, model, kind, [data_ref], until)] = (kind, arm, model)
        listener.started("models", store.arm_id(config, arm), arm.name)
    while waiting:
        done, _ = ray.wait(list(waiting), timeout=0.5)
        listener.tick()
        for ref in done:
            kind, arm, model = waiting.pop(ref)
            try:
                if ray.get(ref):
                    listener.finished("models", store.arm_id(config, arm), {"kind": kind, "model": model})
            except (ray.exceptions.RayError, *LOST) as error:
                store.fail(config, arm, model, kind, one_line(error))
                listener.failed("models", store.arm_id(config, arm), one_line(error))


def _train(
    store: ShadowStore,
    config: dict[str, Any],
    place: int,
    model: int,
    kind: Kind,
    data: list[ray.ObjectRef],
    until: float | None,
) -> bool:
    """A model of the arm at this place, unless it is too late. Wrapped in a list, the data stays a reference until it
    is needed."""
    if until is not None and time.time() >= until:
        return False
    torch.set_num_threads(1)
    keep_freed_memory()
    audit = from_dict(MembershipConfig, config)
    store.run(audit, audit.arms[place], model, kind, ray.get(data[0]))
    return True
