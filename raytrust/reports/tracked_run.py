"""The run of a whole program in MLflow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from raytrust.reports.outbox import Outbox

if TYPE_CHECKING:
    from raytrust.reports.mlflow import Tracker


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
