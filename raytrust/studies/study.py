"""A question: what is to be done to answer it, phase by phase, and the loop that does it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias

from raytrust.data import Dataset
from raytrust.jobs.job import Job
from raytrust.jobs.progress import Progress, clock
from raytrust.jobs.runner import Bundle, Runner, too_late
from raytrust.jobs.store import JobStore

Phase: TypeAlias = tuple[str, Sequence[Bundle]]
"""What is done, in words, and the jobs that it takes."""


class Study(Protocol):
    """Work whose results lie in job stores. kinds: of its jobs. data: what they are about, by fingerprint."""

    @property
    def kinds(self) -> tuple[str, ...]: ...

    @property
    def data(self) -> Mapping[str, Dataset]: ...

    @property
    def stores(self) -> Sequence[JobStore]: ...

    def phases(self) -> Iterator[Phase]:
        """What is to be done, each phase known when the one before it is done."""
        ...

    def left(self) -> list[Job]:
        """The jobs that are neither finished nor failed; of phases that are not known yet a guess."""
        ...


def answer(study: Study, runner: Runner, progress: Progress, until: float | None = None) -> None:
    """Do what is left of a study; no job is begun after `until`, by `time.time`."""
    for name, bundles in study.phases():
        count = sum(len(store.missing(jobs)) for store, jobs in bundles)
        # A resumed run passes silently through the phases that it did before.
        if count:
            # Anew in every phase, because what a search has chosen turns guesses about later phases into known jobs.
            progress.expect_jobs(study.kinds, study.left())
            seconds = progress.seconds_left()
            left = "" if seconds is None else f"; about {clock(seconds)} left in all"
            progress.say(f"{name}: {count} jobs{left}")
            runner.run(bundles, progress, until)
        # Later phases are chosen by the results of this one, which may have been cut short.
        if too_late(until):
            return
