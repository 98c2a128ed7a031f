"""Which training group trains what: the queue between the trials that ask and the groups that train.

Runs as one Ray actor on the driver's node, and knows nothing of Ray itself. All its methods run on one event loop, so
between two awaits nothing else happens: there are no locks.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

GRACE = 60.0  # seconds in which all ranks of a group must have noticed a failure that all of them raise
BAD_STARTS = 3  # groups in a row that end without having asked for a job


@dataclass
class Job:
    """One training run, asked for from a node. `outcome` becomes {"result": ...} or {"failure": reason}."""

    key: str
    config: dict[str, Any]
    node: str
    outcome: asyncio.Future[dict[str, Any]]
    asked: float
    waited: float = 0.0
    losses: int = 0  # of groups that had begun with it


@dataclass
class Group:
    """What a group of workers was given, in order; None is the end. `ready` of these may be read by all ranks."""

    jobs: list[Job | None] = field(default_factory=list)
    ready: int = 0
    reports: dict[int, dict[int, dict[str, Any]]] = field(default_factory=dict)  # by number of the job, by rank

    @property
    def free(self) -> bool:
        return not self.jobs or (self.jobs[-1] is not None and self.jobs[-1].outcome.done())


class JobQueue:
    """Hands each job to one group, again if that group is lost, and its outcome to whoever asked for it.

    workers: ranks of a group. most: groups at once. retries: of a job whose group was lost. idle: seconds that a group
    waits for another job, None for as long as it takes.
    """

    def __init__(self, workers: int, most: int, retries: int, idle: float | None, grace: float = GRACE):
        self._workers, self._most, self._retries, self._idle, self._grace = workers, most, retries, idle, grace
        self._jobs: dict[str, Job] = {}
        self._waiting: deque[Job] = deque()
        self._groups: dict[str, Group] = {}
        self._settled: set[str] = set()
        self._expected: int | None = None
        self._closed = False
        self._bad_starts = 0
        self._broken: str | None = None
        self._changed = asyncio.Event()

    # For trials

    async def train(self, key: str, config: dict[str, Any], node: str = "") -> dict[str, Any]:
        """The outcome of a job, which is new or known by its key: a trial that was lost may ask again."""
        if self._broken is not None:
            return {"failure": self._broken}
        if key not in self._jobs:
            self._jobs[key] = Job(key, config, node, asyncio.get_running_loop().create_future(), time.monotonic())
            self._waiting.append(self._jobs[key])
            self._notify()
        self._jobs[key].node = node
        # A trial that goes away must not take the outcome from others who wait for the same run.
        return await asyncio.shield(self._jobs[key].outcome)

    async def settle(self, key: str) -> None:
        """This job needs nothing more: its outcome is kept elsewhere, or has been all along."""
        self._jobs.pop(key, None)
        self._settled.add(key)
        self._notify()

    # For the driver

    async def wanted(self) -> tuple[str, str] | None:
        """Returns the name of a group to be started, once one is needed, and the node whose trial waits for it; None
        when the queue is closed."""
        await self._until(lambda: self._closed or self._wants_group())
        if self._closed:
            return None
        name, node = uuid.uuid4().hex[:12], self._waiting[self._free()].node
        self._groups[name] = Group()
        return name, node

    async def enrol(self, name: str) -> None:
        """A group is on its way before there is a job."""
        self._groups[name] = Group()

    async def expect(self, jobs: int) -> None:
        """From now on, when so many jobs are settled, groups end at once instead of waiting for more."""
        self._expected = jobs
        self._settled.clear()
        self._notify()

    async def ended(self, name: str, reason: str | None = None, late: bool = False) -> str | None:
        """A group is gone: by itself, or for a reason. late: its workers could not be placed in time.

        Its unfinished job goes to another group. Returns why no job can be trained any more, if so it is.
        """
        group = self._groups.pop(name)
        reason = reason or "the workers ended"
        for job in group.jobs:
            if job is not None and not job.outcome.done():
                job.losses += 1
                if job.losses > self._retries:
                    job.outcome.set_result({"failure": reason})
                else:
                    self._waiting.appendleft(job)
        self._bad_starts = 0 if group.jobs else self._bad_starts + 1
        if late:
            # A group that can't start shows that the cluster does not grow any further.
            self._most = max(1, len(self._groups))
        if not self._groups and not self._closed and (late or self._bad_starts >= BAD_STARTS):
            self._broken = reason
            while self._waiting:
                self._waiting.popleft().outcome.set_result({"failure": reason})
        self._notify()
        return self._broken

    async def close(self) -> None:
        self._closed = True
        self._notify()

    # For the ranks of a group

    async def job(self, name: str, number: int, rank: int) -> dict[str, Any] | None:
        """The config of the group's job of this number, or None at its end; rank 0 must then say `begun`.

        Rank 0 leads: it takes a job, waiting for one no longer than `idle` seconds, and makes its directory ready. Then
        the others read which one it is.
        """
        group = self._groups[name]
        if rank == 0 and number == len(group.jobs):
            await self._until(lambda: self._closed or self._waiting or self._complete(), self._idle)
            group.jobs.append(self._take() if self._waiting and not self._closed else None)
            # No rank is more than one job behind, so that older results can be forgotten: a queue may live for days.
            if number >= 2:
                group.jobs[number - 2] = None
            group.ready += group.jobs[-1] is None
            self._notify()
        elif rank != 0:
            await self._until(lambda: number < group.ready)
        job = group.jobs[number]
        return None if job is None else job.config

    async def begun(self, name: str) -> None:
        self._groups[name].ready += 1
        self._notify()

    async def done(self, name: str, number: int, rank: int, report: dict[str, Any]) -> None:
        """One rank has trained. The job's result is that of rank 0, when all ranks are done."""
        self._note(name, number, rank, report)

    async def failed(self, name: str, number: int, rank: int, reason: str) -> bool:
        """One rank has failed as all should in the same step. Returns whether they did, and the group can go on."""
        job = self._groups[name].jobs[number]
        reports = self._note(name, number, rank, {"failure": reason})
        if await self._until(lambda: len(reports) == self._workers, self._grace):
            return True
        self._settle_as(job, {"failure": reason})
        return False

    async def spoiled(self, name: str, number: int, reason: str) -> None:
        """One rank has failed alone: the others may wait for it in a collective, so the group must end."""
        self._settle_as(self._groups[name].jobs[number], {"failure": reason})

    # Inside

    def _wants_group(self) -> bool:
        return len(self._waiting) > self._free() and len(self._groups) < self._most and self._broken is None

    def _free(self) -> int:
        """Groups that will take what waits."""
        return sum(group.free for group in self._groups.values())

    def _complete(self) -> bool:
        return self._expected is not None and len(self._settled) >= self._expected

    def _take(self) -> Job:
        job = self._waiting.popleft()
        job.waited = time.monotonic() - job.asked
        return job

    def _note(self, name: str, number: int, rank: int, report: dict[str, Any]) -> dict[int, dict[str, Any]]:
        group = self._groups[name]
        reports = group.reports.setdefault(number, {})
        reports[rank] = report
        if len(reports) == self._workers:
            first = next((reports[r] for r in sorted(reports) if "failure" in reports[r]), None)
            self._settle_as(group.jobs[number], first or {"result": reports[0]})
            del group.reports[number]
        self._notify()
        return reports

    def _settle_as(self, job: Job | None, outcome: dict[str, Any]) -> None:
        assert job is not None
        if not job.outcome.done():
            job.outcome.set_result(outcome | {"waited": job.waited})
        self._notify()

    async def _until(self, ready: Callable[[], Any], seconds: float | None = None) -> bool:
        """Wait until `ready()`, or for so long at most; returns whether it is."""
        end = None if seconds is None else time.monotonic() + seconds
        while not ready():
            changed = self._changed
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return False
            try:
                await asyncio.wait_for(changed.wait(), left)
            except asyncio.TimeoutError:
                continue
        return True

    def _notify(self) -> None:
        self._changed.set()
        # An event stays set; whoever waits from now on must wait for the next change.
        self._changed = asyncio.Event()
