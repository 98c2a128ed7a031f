"""Who is told, in the driver, what a run is doing."""

from __future__ import annotations

from typing import Any, Protocol


class Listener(Protocol):
    """Progress on the terminal, MLflow, a meter. `phase` is a kind of jobs, `key` names one of them."""

    def started(self, phase: str, key: str, name: str) -> None: ...

    def finished(self, phase: str, key: str, result: dict[str, Any]) -> None: ...

    def failed(self, phase: str, key: str, reason: str) -> None: ...

    def tick(self) -> None:
        """Called a few times a second while a phase runs."""
        ...


class Silent:
    """A listener that does nothing; a base for those that care for a part."""

    def tick(self, *_: Any, **__: Any) -> None:
        pass

    started = finished = failed = tick


class ListenerGroup:
    """Tells several listeners."""

    def __init__(self, *listeners: Listener):
        self._listeners = listeners

    def started(self, phase: str, key: str, name: str) -> None:
        for listener in self._listeners:
            listener.started(phase, key, name)

    def finished(self, phase: str, key: str, result: dict[str, Any]) -> None:
        for listener in self._listeners:
            listener.finished(phase, key, result)

    def failed(self, phase: str, key: str, reason: str) -> None:
        for listener in self._listeners:
            listener.failed(phase, key, reason)

    def tick(self) -> None:
        for listener in self._listeners:
            listener.tick()
