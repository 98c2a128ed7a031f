"""Warm training groups: Ray Train runs whose workers train one defence after another.

To start two worker processes costs 8 to 15 s, to train a small network with one defence less. So a group outlives its
defence: its workers ask a queue for the next one. Groups start while jobs wait, and end when there are none.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import LoggingConfig  # not exported elsewhere
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytrust.cluster.failures import RETRIES, late, one_line
from raytrust.cluster.job_queue import JobQueue
from raytrust.cluster.placement import Placement, decide
from raytrust.cluster.process_group import OnLoopback
from raytrust.cluster.runtime import GROWTH, SLOT, capacity
from raytrust.cluster.training import Crew, work
from raytrust.data import Dataset
from raytrust.networks.device import Device
from raytrust.studies.frontier.store import Store

IDLE = 30.0  # seconds that a group waits for a job before it gives its CPUs back; to start one takes half of it
POLL = 0.2  # seconds that the managing thread stays inside Ray
ENDING = 30.0  # seconds that workers may take to end


@dataclass
class _Group:
    """A group that was started: its task, and since when it has been on its way."""

    name: str
    task: ray.ObjectRef
    node: str
    began: float
    said: bool = False


class TrainingGroups:
    """As many groups of `workers` workers as jobs wait, `most` at least 1 at once, for one data set and store.

    say: is told, once a group, that it waits for room on the cluster. growing: nodes may come for it, within GROWTH
    seconds. A context: what still runs at the block's end is ended.
    """

    def __init__(
        self,
        workers: int,
        data: Dataset,
        store: Store,
        placement: Placement,
        most: int = 1,
        *,
        growing: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.placement = placement
        self.broken: str | None = None
        self._workers, self._store, self._growing, self._say = workers, store, growing, say
        # On a machine of our own nobody else wants what an idle group holds, so that it need not end to make room.
        self._alone = ip_address(ray.util.get_node_ip_address()).is_loopback
        self._data = ray.put(data)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.queue = (
            ray.remote(JobQueue)
            # The queue lives on the driver's node: one that comes and goes would take the queue with it.
            .options(num_cpus=0, max_concurrency=100_000, scheduling_strategy=here)
            .remote(workers, most, RETRIES, None if self._alone else IDLE)
        )
        self._closed = self._abandoned = False
        self._groups: list[_Group] = []
        self._manager = threading.Thread(target=self._manage, name="training groups", daemon=True)
        self._manager.start()

    def start(self) -> None:
        """Begin to start a first group, before there is work for it. Waits for the queue, not for the group."""
        enrolled = self.queue.enrol.remote("first")
        offering = [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get(SLOT, 0) >= 1]
        self._begin("first", next(iter(offering), ""))
        # Calls of an async actor run in any order: a job that came before this one would ask for another group.
        ray.get(enrolled)

    def expect(self, jobs: int) -> None:
        """After so many jobs, groups end at once: attacks want their CPUs."""
        ray.get(self.queue.expect.remote(jobs))

    def check(self) -> None:
        """Raises ConnectionError if no group can be started any more."""
        if self.broken is not None:
            raise ConnectionError(f"The cluster failed, --resume goes on: {self.broken}")

    def close(self) -> None:
        """End all groups, when they have finished what they train, and wait for it. Raises what `check` does."""
        if self._closed:
            return
        self._closed = True
        try:
            ray.get(self.queue.close.remote())
            self._manager.join(ENDING)
        except ray.exceptions.RayError as error:
            self.broken = self.broken or one_line(error)
        self._abandon()
        for group in self._groups:  # that had no room yet
            ray.cancel(group.task, force=True)
        ray.kill(self.queue)
        self.check()

    def __enter__(self) -> TrainingGroups:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                self.close()
        finally:
            # After this the cluster may end, and with it all that these threads use.
            self._abandon()

    def _abandon(self) -> None:
        """Ray must not be shut down while a thread is inside of it: that is a segmentation fault."""
        self._closed = self._abandoned = True
        self._manager.join()

    def _begin(self, name: str, node: str) -> None:
        self._groups.append(_Group(name, self._task(name, node), node, time.monotonic()))

    def _task(self, name: str, node: str) -> ray.ObjectRef:
        """Start a group from a process of its own, on the node of the trial that waits for it.

        Train's controllers stay where they are started, each with some 0.3 GB: a driver's node has no room for many.
        """
        crew = Crew(
            name, self.queue, [self._data], self._store, self.placement.device == "cuda", self.placement.through_host
        )
        there = NodeAffinitySchedulingStrategy(node, soft=True) if node else "DEFAULT"
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(run_group)
        return task.remote(crew, self._workers, self.placement, self._alone)

    def _manage(self) -> None:
        """In a thread: start a group whenever the queue wants one, and tell it which have ended."""
        try:
            wanted = [self.queue.wanted.remote()]
            while not self._abandoned and (wanted or self._groups):
                done, _ = ray.wait([*wanted, *(g.task for g in self._groups)], timeout=POLL)
                for group in [g for g in self._groups if g.task in done]:
                    self._end(group)
                if wanted and wanted[0] in done:
                    answer = ray.get(wanted.pop())
                    if answer is not None:  # it is closed
                        self._begin(*answer)
                        wanted = [self.queue.wanted.remote()]
        except Exception as error:
            # This is a thread: nobody else would hear of the error.
            self.broken = self.broken or one_line(error)

    def _end(self, group: _Group) -> None:
        """A group has ended by itself, was lost, or has not found room: then it tries again."""
        reason, too_late = None, False
        try:
            ray.get(group.task)
        except (ray.exceptions.RayError, ray.train.TrainingFailedError) as error:
            reason = one_line(error)
            if late(error):
                seconds = time.monotonic() - group.began
                needs = f"{self._workers} x {self.placement.worker}"
                too_late = self._closed or (self._growing and seconds > GROWTH)
                reason = f"the cluster had no room for {needs} within {seconds:.0f} s"
                if not too_late:
                    if not group.said:
                        self._say(f"a training group waits for room on the cluster: {needs}")
                    group.said, group.task = True, self._task(group.name, group.node)
                    return
        self._groups.remove(group)
        self.broken = ray.get(self.queue.ended.remote(group.name, reason, too_late)) or self.broken


def run_group(crew: Crew, workers: int, placement: Placement, on_loopback: bool) -> None:
    """A Train run of `workers` workers, until the queue has no more jobs for them."""
    backend = "nccl" if crew.on_cuda and not crew.through_host else "gloo"
    with tempfile.TemporaryDirectory(prefix="raytrust-") as meeting:
        (_LocalTrainer if on_loopback else _Trainer)(
            work,
            train_loop_config={"crew": crew},
            torch_config=OnLoopback(backend=backend, meeting=meeting) if on_loopback else TorchConfig(backend=backend),
            scaling_config=ScalingConfig(
                num_workers=workers, use_gpu=placement.worker_gpu > 0, resources_per_worker=placement.worker
            ),
            run_config=RunConfig(
                name=f"group-{crew.name}-{time.time_ns()}",
                storage_path=str(Path(crew.store.root) / "ray" / "train"),
                # Ray's own retries would start the group anew without its job; the queue hands jobs out again.
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        ).fit()


class _Trainer(TorchTrainer):
    """Without processes of Train's that we don't need, as each imports all of Ray Train."""

    # Ray would start a manager of its own data sets, of which we have none.
    needless = frozenset({"DatasetsCallback"})

    def _create_default_callbacks(self) -> list[Any]:
        return [c for c in super()._create_default_callbacks() if type(c).__name__ not in self.needless]


class _LocalTrainer(_Trainer):
    """Also without what removes placement groups after a lost controller.

    It asks Ray's dashboard, which a cluster of this machine alone does not have, and then takes 12 s to stop.
    """

    needless = _Trainer.needless | {"PlacementGroupCleanerCallback"}


def training_groups(
    workers: int,
    data: Dataset,
    store: Store,
    device: Device = "auto",
    parallel: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> TrainingGroups:
    """Groups for the cluster that Ray is connected to: as many as trials run at once, and as have room.

    parallel: trials at once, for which the cluster may start nodes. say: is told what the user should know. Raises
    ValueError if there is no room for one group, and none can come.
    """
    growing = parallel is not None
    placement = decide(workers, device, say, growing)
    most = parallel or max(1, min(capacity(SLOT), placement.groups))
    return TrainingGroups(workers, data, store, placement, most, growing=growing, say=say)
