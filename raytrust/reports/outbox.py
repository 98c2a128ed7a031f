"""What is to be logged waits, in order, while a tracking store is away; what the store refuses for good is left out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

# What waits needs no MLflow to be installed.
if TYPE_CHECKING:
    from raytrust.reports.mlflow import Tracker

# Seconds between two tries to reach a tracking store that is away: a try may take seconds itself.
PAUSE = 5.0
# Seconds to wait for it when everything else is done: what it then lacks, the next resumption sends.
PATIENCE = 120.0


class Outbox:
    """Sends actions to a tracking store, each once and in order.

    While the store is away they wait. One that the store refuses, as into an experiment that was deleted, is said and
    left out. say: prints a line. noun: what the program runs.
    """

    def __init__(self, store: Tracker, say: Callable[[str], None], noun: str = "sweep"):
        self._store, self._say, self._noun = store, say, noun
        self._waiting: deque[Callable[[], None]] = deque()
        self._away_until: float | None = None
        self._refusals: set[str] = set()

    def send(self, action: Callable[[], None]) -> None:
        self._waiting.append(action)
        if self._away_until is None:
            self._flush()

    def tick(self) -> None:
        """Try again, if it is time."""
        if self._away_until is not None and time.monotonic() >= self._away_until:
            self._flush()

    def finish(self) -> None:
        """Wait for a store that is away, though not for ever."""
        until = time.monotonic() + PATIENCE
        while self._waiting and time.monotonic() < until:
            time.sleep(PAUSE)
            self._flush()
        if self._waiting:
            self._say(f"MLflow lacks the end of this {self._noun}; --resume sends it")
        elif self._refusals:
            self._say(f"MLflow lacks what it refused of this {self._noun}; --resume tries it again")

    def _flush(self) -> None:
        """Send what waits, as far as the tracking store can be reached."""
        while self._waiting:
            try:
                # MLflow would go on trying for a while, and hold up what runs.
                self._store.expect_server()
                self._waiting[0]()
            except self._store.errors as error:
                reason = self._store.reason(error)
                if self._store.curable(error):
                    if self._away_until is None:
                        self._say(f"MLflow can't be reached, what is to be logged waits: {reason}")
                    self._away_until = time.monotonic() + PAUSE
                    return
                self._refuse(reason)
            self._waiting.popleft()
        if self._away_until is not None:
            self._say("MLflow is back and has everything")
            self._away_until = None

    def _refuse(self, reason: str) -> None:
        # It is said once, however many entries it befalls.
        if reason not in self._refusals:
            self._say(f"MLflow refused an entry, the {self._noun} goes on: {reason}")
        self._refusals.add(reason)


@contextmanager
def tracked(
    tracker: Tracker, outbox: Outbox, name: str, parameters: dict[str, Any], tags: dict[str, Any]
) -> Iterator[None]:
    """The parent run in MLflow, ended as KILLED or FAILED if the block raises; else the block ends it."""
    tracker.begin_sweep(name, parameters, tags)
    try:
        yield
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        outbox.send(lambda: tracker.end_sweep(status))
        raise
