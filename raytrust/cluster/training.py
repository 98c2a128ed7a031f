"""Training one defence on the cluster: what a trial asks of a warm group, and what each worker of the group runs."""

from __future__ import annotations

import importlib
import itertools
import time
from dataclasses import dataclass
from typing import Any

import ray
import ray.train.torch
import torch

from raytrust.cluster.failures import TrainingFailed, lost, one_line
from raytrust.cluster.process_group import HostChannel, ProcessState
from raytrust.config import TrainConfig, from_dict, to_dict
from raytrust.data import Dataset
from raytrust.networks.device import exact
from raytrust.studies.frontier.jobs import train_and_capture
from raytrust.studies.frontier.store import Store
from raytrust.wire.channel import Channel, GroupChannel


def train_on_cluster(config: TrainConfig, store: Store, queue: Any) -> dict[str, Any]:
    """Train once, with the captures written by the workers into the store, and return the result.

    queue: of a `raytrust.cluster.groups.TrainingGroups`. A run that the store holds is not trained again. Keys: those
    of `raytrust.studies.frontier.jobs.train_and_capture` for worker 0, "total_seconds" (from asking to having it) and
    "waited_seconds" (of these, until a group began with it: for the group to start, or to finish other runs). Raises
    TrainingFailed with the reason of the workers.
    """
    key = store.run_id(config)
    if (result := store.training(config)) is None:
        started = time.perf_counter()
        outcome = ray.get(queue.train.remote(key, to_dict(config), ray.get_runtime_context().get_node_id()))
        if "failure" in outcome:
            ray.get(queue.settle.remote(key))
            raise TrainingFailed(outcome["failure"])
        result = {**outcome["result"], "waited_seconds": outcome["waited"]}
        result["total_seconds"] = time.perf_counter() - started
        store.finish_training(config, result)
    ray.get(queue.settle.remote(key))
    return result


@dataclass(frozen=True)
class Crew:
    """What all workers of one group are told. `data` is a reference to the data set, alone in a list."""

    name: str
    queue: Any
    data: list[ray.ObjectRef]
    store: Store
    on_cuda: bool
    through_host: bool


def work(arguments: dict[str, Any]) -> None:
    """What each worker of a group runs: one job of the queue after another, until there is none.

    A failure that all workers share leaves the group as it was. After one that they don't, others may wait for this
    worker in a collective: it is reported, then raised, which ends the group.
    """
    crew: Crew = arguments["crew"]
    # More threads than cores slow each other down: workers times threads must not exceed them.
    torch.set_num_threads(1)
    device = ray.train.torch.get_device() if crew.on_cuda else torch.device("cpu")
    if device.type == "cuda":
        # Else each process would make a context, of hundreds of MB, on GPU 0 too.
        torch.cuda.set_device(device)
    rank, queue = ray.train.get_context().get_world_rank(), crew.queue
    data = ray.get(crew.data[0])
    # This import takes a second or two, which the first optimiser would else spend inside the measured training.
    importlib.import_module("torch._dynamo")
    state = ProcessState()
    for number in itertools.count():
        job = ray.get(queue.job.remote(crew.name, number, rank))
        if job is None:
            return
        state.restore()
        try:
            with exact(device):
                report = _train(from_dict(TrainConfig, job), data, crew, rank, str(device))
        except FloatingPointError as error:
            if not ray.get(queue.failed.remote(crew.name, number, rank, one_line(error))):
                raise
        except Exception as error:
            # Whatever it is, it fails this job alone.
            if not lost(error):
                ray.get(queue.spoiled.remote(crew.name, number, one_line(error)))
            raise
        else:
            ray.get(queue.done.remote(crew.name, number, rank, report))
        if device.type == "cuda":
            # Attacks share this GPU, and can't use what the allocator keeps for us.
            torch.cuda.empty_cache()


def _train(config: TrainConfig, data: Dataset, crew: Crew, rank: int, device: str) -> dict[str, Any]:
    """The result of `train_on_cluster`, as this worker sees it, less the times outside the loop."""
    directory = crew.store.run_directory(config)
    if rank == 0:
        crew.store.begin(config)
        ray.get(crew.queue.begun.remote(crew.name))
    channel: Channel = GroupChannel()
    if crew.through_host:
        channel = HostChannel(channel)
    return train_and_capture(config, data, channel, directory, device)
