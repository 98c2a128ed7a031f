"""What every program does around its study: one run in a directory at a time, MLflow, Ray or none, an end in time."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from raytrust.jobs.lock import exclusive
from raytrust.jobs.progress import Progress, clock
from raytrust.jobs.runner import Local, Runner
from raytrust.networks.device import Device, usable
from raytrust.reports.mlflow import Tracker, default_uri
from raytrust.reports.outbox import Outbox, tracked
from raytrust.studies.study import Study, answer, too_late

# CPU seconds a cost, until some are measured: attacks cost iterations of an image at width 64, models one each.
RATES = {"training": 0.1, "attack": 0.1, "theory": 0.1, "models": 10.0, "properties": 10.0}


S = TypeVar("S", bound=Study)


class Program(ABC, Generic[S]):
    """A study with its report. Subclasses say what is specific; `run` is the same for all.

    noun: what is run, in messages. experiment, name, parameters, tags: of the parent run in MLflow.
    """

    noun: str
    experiment: str
    name: str
    parameters: dict[str, Any]
    tags: dict[str, Any]
    study: S

    def __init__(self, root: Path, parallel: int):
        self.root = root
        self.progress = Progress(parallel, rates=RATES)

    @abstractmethod
    def introduce(self) -> None:
        """Say what is about to be done."""

    @abstractmethod
    def report(self, tracker: Tracker, outbox: Outbox) -> tuple[list[Path], dict[str, float]]:
        """Write the report of what is finished and log it; returns its files, and metrics of the whole."""

    def run(
        self,
        address: str | None,
        cpus: int,
        uri: str | None,
        hours: float | None,
        spread: bool,
        device: Device = "auto",
    ) -> None:
        """Do what is not done yet, write the report, log it.

        hours: after which no further job is begun; those that run are finished. spread: over Ray; without, all is done
        in this process. device: "auto" is "cuda" where torch can use one. KeyboardInterrupt passes through, after the
        report of what is finished. Raises ValueError if another run goes on in the directory, and for a device that
        there is not.
        """
        until = None if hours is None else time.time() + 3600 * hours
        # Kept until the report is written, as what is finished by then is worth reading.
        interrupt: KeyboardInterrupt | None = None
        with exclusive(self.root), self.progress:
            for store in self.study.stores:
                store.clear_failures()
            self.introduce()
            tracker = Tracker(uri or default_uri(self.root), self.root, experiment=self.experiment)
            outbox = Outbox(tracker, self.progress.say, self.noun)
            with tracked(tracker, outbox, self.name, self.parameters, self.tags):
                try:
                    with self._runner(spread, address, cpus, device) as runner:
                        answer(self.study, runner, self.progress, until)
                except KeyboardInterrupt as error:
                    interrupt = error
                unfinished = self._say_what_is_left(interrupt is not None, until)
                artifacts, metrics = self.report(tracker, outbox)
            outbox.send(lambda: tracker.end_sweep("KILLED" if unfinished else "FINISHED", artifacts, metrics))
            if interrupt is not None:
                raise interrupt
            outbox.finish()
            self.progress.say("done")

    @contextmanager
    def _runner(self, spread: bool, address: str | None, cpus: int, device: Device) -> Iterator[Runner]:
        if not spread:
            yield Local(self.study.data, usable(device))
            return
        # Ray takes a second to import, and is not needed in one process.
        from raytrust.cluster.placement import decide
        from raytrust.cluster.runner import OnRay
        from raytrust.cluster.runtime import cluster
        from raytrust.cluster.searches import places

        with cluster(address, cpus):
            # A cluster that has scaled to zero has no CPU until the first job asks for one.
            placement = decide(1, device, self.progress.say, growing=address is not None)
            self.progress.parallel = places(placement)
            yield OnRay(self.study.data, self.progress.parallel, placement.device, placement.attack_gpu)

    def _say_what_is_left(self, interrupted: bool, until: float | None) -> int:
        """How many jobs; a line, if there are any."""
        left = self.study.left()
        if left and (interrupted or too_late(until)):
            self.progress.expect_jobs(self.study.kinds, left)
            seconds = self.progress.seconds_left()
            about = "" if seconds is None else f", about {clock(seconds)}"
            self.progress.say(f"{'interrupted' if interrupted else 'time is up'}: {len(left)} jobs are left{about}")
        return len(left)
