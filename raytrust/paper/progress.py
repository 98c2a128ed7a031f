"""What the terminal shows while the units are done: how many are, and how long the rest will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO

from raytrust.paper.units import Unit

RATES = {"training": 0.1, "attack": 0.1, "theory": 0.1, "models": 10.0}  # CPU seconds a cost, until some are measured


class Progress:
    """A watcher of units, and a listener to the models of an audit. The time left follows from measured costs.

    expect: says what there is to do, before it is all known by name; the estimate then covers it.
    """

    def __init__(self, parallel: int, stream: TextIO | None = None, every: float = 5.0):
        self._parallel, self._stream, self._every = parallel, stream or sys.stdout, every
        self._started = time.monotonic()
        self._printed = -every
        self._seconds: dict[str, float] = {}
        self._measured: dict[str, float] = {}
        self._left: dict[str, float] = {}
        self._done = self._total = 0

    def expect(self, kind: str, count: int, cost: float) -> None:
        """What is left of a kind of work; replaces what was expected of it before."""
        self._left[kind] = cost
        self._counts = {**getattr(self, "_counts", {}), kind: count}
        self._total = self._done + sum(self._counts.values())

    def ended(self, unit: Unit, seconds: float | None, reason: str = "") -> None:
        self._count(unit.kind, unit.cost, seconds)
        if seconds is None:
            self.say(f"{unit.kind} FAILED: {reason} ({unit.victim.name})")
        else:
            self._tell(unit.kind)

    def started(self, phase: str, key: str, what: str) -> None:
        self._began = getattr(self, "_began", None) or time.process_time()

    def finished(self, phase: str, key: str, result: dict[str, Any]) -> None:
        now = time.monotonic()
        elapsed = now - getattr(self, "_last_model", getattr(self, "_audit", now))
        self._last_model = now
        self._count("models", 1.0, elapsed * self._parallel)
        self._tell("models")

    def failed(self, phase: str, key: str, reason: str) -> None:
        self._count("models", 1.0, None)
        self.say(f"a model FAILED: {reason}")

    def tick(self) -> None:
        pass

    def audit_begins(self) -> None:
        self._audit = time.monotonic()

    def say(self, text: str) -> None:
        """A line with the time since the start."""
        self._printed = time.monotonic() - self._started
        minutes, seconds = divmod(round(self._printed), 60)
        print(f"[{minutes}:{seconds:02d}] {text}", file=self._stream, flush=True)

    def minutes_left(self) -> float:
        left = 0.0
        for kind, cost in self._left.items():
            measured = self._measured.get(kind, 0.0)
            rate = self._seconds[kind] / measured if measured else RATES.get(kind, 0.1)
            left += max(0.0, cost) * rate
        return left / self._parallel / 60

    def _count(self, kind: str, cost: float, seconds: float | None) -> None:
        self._done += 1
        self._left[kind] = self._left.get(kind, 0.0) - cost
        counts = getattr(self, "_counts", {})
        counts[kind] = max(0, counts.get(kind, 0) - 1)
        if seconds is not None:
            self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds
            self._measured[kind] = self._measured.get(kind, 0.0) + cost

    def _tell(self, kind: str) -> None:
        if time.monotonic() - self._started - self._printed >= self._every:
            total = max(self._total, self._done)
            self.say(f"{self._done}/{total} pieces done ({kind}), about {self.minutes_left():.0f} min left")


def costs(units: Iterable[Unit]) -> dict[str, tuple[int, float]]:
    """By kind, how many there are, and their cost."""
    found: dict[str, tuple[int, float]] = {}
    for unit in units:
        count, cost = found.get(unit.kind, (0, 0.0))
        found[unit.kind] = count + 1, cost + unit.cost
    return found
