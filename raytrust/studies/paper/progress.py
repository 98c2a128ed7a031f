"""What the terminal shows while the units are done: how many are, and how long the rest will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO

from raytrust.studies.paper.units import Unit

RATES = {"training": 0.1, "attack": 0.1, "theory": 0.1, "models": 10.0}  # CPU seconds a cost, until some are measured


class Progress:
    """A watcher of units, and a listener to the models of an audit. The time left follows from measured costs.

    parallel: how many are done at once. every: seconds between two lines.
    """

    def __init__(self, parallel: int, stream: TextIO | None = None, every: float = 5.0):
        self._parallel, self._stream, self._every = parallel, stream or sys.stdout, every
        self._started = self._last_model = time.monotonic()
        self._printed = -every
        self._done = 0
        self._counts: dict[str, int] = {}  # by kind, what is left
        self._left: dict[str, float] = {}
        self._measured: dict[str, tuple[float, float]] = {}  # by kind, seconds and the cost that took them

    def expect(self, kind: str, count: int, cost: float) -> None:
        """What is left of a kind of work; replaces what was expected of it before."""
        self._counts[kind], self._left[kind] = count, cost

    def ended(self, unit: Unit, seconds: float | None, reason: str = "") -> None:
        self._count(unit.kind, unit.cost, seconds)
        if seconds is None:
            self.say(f"{unit.kind} FAILED: {reason} ({unit.victim.name})")

    def audit_begins(self) -> None:
        """From here on models are trained, `parallel` at once."""
        self._last_model = time.monotonic()

    def started(self, phase: str, key: str, what: str) -> None:
        pass

    def finished(self, phase: str, key: str, result: dict[str, Any]) -> None:
        now = time.monotonic()
        seconds, self._last_model = (now - self._last_model) * self._parallel, now
        self._count("models", 1.0, seconds)

    def failed(self, phase: str, key: str, reason: str) -> None:
        self._count("models", 1.0, None)
        self.say(f"a model FAILED: {reason}")

    def tick(self) -> None:
        pass

    def say(self, text: str) -> None:
        """A line with the time since the start."""
        self._printed = time.monotonic() - self._started
        minutes, seconds = divmod(round(self._printed), 60)
        print(f"[{minutes}:{seconds:02d}] {text}", file=self._stream, flush=True)

    def pieces_left(self) -> int:
        return sum(self._counts.values())

    def minutes_left(self) -> float:
        left = 0.0
        for kind, cost in self._left.items():
            seconds, measured = self._measured.get(kind, (0.0, 0.0))
            left += max(0.0, cost) * (seconds / measured if measured else RATES[kind])
        return left / self._parallel / 60

    def _count(self, kind: str, cost: float, seconds: float | None) -> None:
        self._done += 1
        self._counts[kind] = max(0, self._counts.get(kind, 0) - 1)
        self._left[kind] = self._left.get(kind, 0.0) - cost
        if seconds is not None:
            before, measured = self._measured.get(kind, (0.0, 0.0))
            self._measured[kind] = before + seconds, measured + cost
        if time.monotonic() - self._started - self._printed >= self._every:
            total = self._done + self.pieces_left()
            self.say(f"{self._done}/{total} pieces done ({kind}), about {self.minutes_left():.0f} min left")


def costs(units: Iterable[Unit]) -> dict[str, tuple[int, float]]:
    """By kind, how many there are, and their cost."""
    found: dict[str, tuple[int, float]] = {}
    for unit in units:
        count, cost = found.get(unit.kind, (0, 0.0))
        found[unit.kind] = count + 1, cost + unit.cost
    return found
