"""Where the time of a sweep went."""

from __future__ import annotations

import time
from typing import Any

from raytrust.jobs.listener import Silent


class Meter(Silent):
    """A listener that counts the CPU seconds of training and attacks, the defences that they were spent on, and what it
    took until the first could begin. began: when the program did, by `time.monotonic()`."""

    def __init__(self, began: float) -> None:
        self.busy = 0.0
        self._began = self._ready = self._last = began
        self._runs: set[str] = set()

    def started(self, phase: str, key: str, name: str) -> None:
        # Until the first job starts nothing but the program's own start takes time.
        if self._ready == self._began:
            self._ready = time.monotonic()

    def finished(self, phase: str, key: str, result: dict[str, Any]) -> None:
        # The first run's wait is the start of the workers, which belongs to the program's start.
        if not self._runs:
            self._ready += result.get("waited_seconds", 0.0)
        self._note(key)
        figures = result.get("figures") or []
        # An evaluation brings the figures of all attacks on a defence, a trial of the search those of one.
        each = figures if isinstance(figures, list) else [figures]
        self.busy += result.get("cpu_seconds", 0.0) + sum(f["cpu_seconds"] for f in each)

    def failed(self, phase: str, key: str, reason: str) -> None:
        # A defence that fails has taken its time as well, and belongs to the mean.
        self._note(key)

    def _note(self, key: str) -> None:
        self._runs.add(key)
        self._last = time.monotonic()

    def ends(self, wall: float) -> float:
        """Seconds, of `wall` since the program began, before the first run and after the last."""
        return self._ready - self._began + (self._began + wall - self._last)

    def beyond(self, wall: float, cpus: int) -> float:
        """Seconds a defence between these that were neither training nor attacks, had they kept all CPUs busy."""
        return max(0.0, wall - self.ends(wall) - self.busy / cpus) / max(1, len(self._runs))

    def text(self, wall: float, cpus: int) -> str:
        return (
            f"{wall:.0f} s; training and attacks took {self.busy:.0f} CPU seconds, {self.busy / cpus:.0f} s on {cpus} "
            f"CPUs; start and end {self.ends(wall):.0f} s; {self.beyond(wall, cpus):.1f} s a defence besides"
        )
