"""What a terminal shows of a run: what is done, and how long the rest will take by what was measured so far."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from raytrust.jobs.job import Job


class Progress:
    """A listener that prints lines, and on a terminal keeps a bar below them for as long as its context is open.

    parallel: how many jobs run at once. every: seconds between two lines that only count. heartbeat: seconds of silence
    after which it says what is running. rates: seconds a unit of cost, by kind, until some are measured.
    """

    def __init__(
        self,
        parallel: int,
        *,
        stream: TextIO | None = None,
        every: float = 5.0,
        heartbeat: float = 10.0,
        rates: dict[str, float] | None = None,
    ):
        self.parallel = parallel
        self._every, self._heartbeat, self._rates = every, heartbeat, rates or {}
        self._started = self._printed = time.monotonic()
        # So long ago that the first job to finish is shown at once.
        self._counted = -every
        self._done: dict[str, int] = {}
        self._count: dict[str, int] = {}  # by kind, what is left
        self._cost: dict[str, float] = {}
        self._measured: dict[str, tuple[float, float]] = {}  # by kind, seconds and the cost that took them
        self._names: dict[str, str] = {}
        self._running: dict[tuple[str, str], str] = {}
        # Neither colour nor wrapping: a line is a line for whoever greps it.
        self._console = Console(file=stream or sys.stdout, soft_wrap=True, highlight=False, markup=False, emoji=False)
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"),
            console=self._console, transient=True, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None, left="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def expect(self, kind: str, count: int, cost: float) -> None:
        """Say what is left of a kind of jobs; replaces what was expected of it before."""
        self._count[kind], self._cost[kind] = count, cost

    def expect_jobs(self, kinds: Iterable[str], jobs: Iterable[Job]) -> None:
        """`expect` for these kinds, of which these jobs are left in all."""
        left = list(jobs)
        for kind in kinds:
            costs = [job.cost for job in left if job.kind == kind]
            self.expect(kind, len(costs), sum(costs))

    def started(self, phase: str, key: str, name: str) -> None:
        self._running[phase, key] = self._names[key] = name

    def finished(self, phase: str, key: str, result: dict[str, Any]) -> None:
        self.end(phase, key, result["job_cost"])
        self.measure(phase, result["job_seconds"], result["job_cost"])
        if time.monotonic() - self._started - self._counted >= self._every:
            self._counted = time.monotonic() - self._started
            self.line(phase, "")

    def failed(self, phase: str, key: str, reason: str) -> None:
        self.line(phase, f"{self.end(phase, key)}: FAILED, {reason}")

    def tick(self) -> None:
        if time.monotonic() - self._printed >= self._heartbeat and self._running:
            names = list(dict.fromkeys(self._running.values()))[: self.parallel]
            self.line(next(iter(self._running))[0], "running " + ", ".join(names))

    def say(self, text: str) -> None:
        """Print a line with the time since the start."""
        self._printed = time.monotonic()
        self._console.print(f"[{clock(self._printed - self._started)}] {text}")

    def end(self, phase: str, key: str, cost: float = 1.0) -> str:
        """Count a job as over, and return its name."""
        self._done[phase] = self._done.get(phase, 0) + 1
        self._count[phase] = max(0, self._count.get(phase, 0) - 1)
        self._cost[phase] = max(0.0, self._cost.get(phase, 0.0) - cost)
        self._running.pop((phase, key), None)
        return self._names.get(key, key)

    def measure(self, kind: str, seconds: float, cost: float = 1.0) -> None:
        """Learn from what took so long."""
        total, costs = self._measured.get(kind, (0.0, 0.0))
        self._measured[kind] = total + seconds, costs + cost

    def rate(self, kind: str) -> float | None:
        """Seconds a unit of cost, None if nothing is known."""
        seconds, cost = self._measured.get(kind, (0.0, 0.0))
        return seconds / cost if cost else self._rates.get(kind)

    @property
    def jobs_left(self) -> int:
        return sum(self._count.values())

    def seconds_left(self) -> float | None:
        """For all that is expected, None if nothing is known yet."""
        rates = {kind: self.rate(kind) for kind, count in self._count.items() if count}
        if any(rate is None for rate in rates.values()):
            return None
        return sum(self._cost[kind] * (rate or 0.0) for kind, rate in rates.items()) / self.parallel

    def counted(self, phase: str) -> str:
        """How many of a phase are done, in words."""
        return f"{self._done.get(phase, 0)}/{self._done.get(phase, 0) + self._count.get(phase, 0)} {phase}"

    def line(self, phase: str, text: str) -> None:
        """Print how much of a phase is done, this text, and the time that is left."""
        seconds = self.seconds_left()
        left = "" if seconds is None else f"about {clock(seconds)} left"
        self.say(" | ".join(part for part in (self.counted(phase), text, left) if part))
        done = sum(self._done.values())
        self._bar.update(self._task, description=phase, completed=done, total=done + self.jobs_left, left=left)


def clock(seconds: float) -> str:
    """Minutes and seconds, and hours if there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
