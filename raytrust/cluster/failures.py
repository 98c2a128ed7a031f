"""Failures of trials: which are worth another try, and what is said of the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from raytrust.jobs import errors

RETRIES = 3  # of a trial whose machine was lost, as spot machines are
LOST = (
    ray.exceptions.LocalRayletDiedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.OutOfMemoryError,  # a crowded node ends whom it likes: another time or place may have room
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
SEVERED = ("connection closed by peer", "connection reset by peer", "remote process exited")  # a worker lost its peer


class TrainingFailed(ValueError):
    """A training run failed in its workers. The message is the reason, in one line."""


def lost(error: BaseException) -> bool:
    """Whether a process or a machine was lost on the way, rather than that the work itself failed."""
    return any(
        isinstance(e, LOST) or (isinstance(e, RuntimeError) and any(s in str(e).lower() for s in SEVERED))
        for e in _chain(error)
    )


def late(error: BaseException) -> bool:
    """Whether workers could not be placed in time, rather than that they failed."""
    return any(isinstance(e, WorkerGroupStartupTimeoutError) for e in _chain(error))


def one_line(error: BaseException) -> str:
    """What went wrong, without the way there: `raytrust.jobs.errors.one_line` of the innermost error."""
    while causes := _below(error):
        error = causes[0]
    return errors.one_line(error)


def report(work: Callable[[], dict[str, Any]], metrics: Sequence[str]) -> None:
    """Report a trial's result to Tune, or why there is none: "failure", with NaN for the metrics.

    Where a machine was lost the error passes through, so that Tune tries the trial again, elsewhere if need be.
    """
    # Imported here, because a training worker imports this module, and Tune takes seconds.
    from ray import tune

    try:
        result = work()
    except Exception as error:
        # Whatever it is, it fails this trial alone and stands in its row.
        if lost(error):
            raise
        result = {**dict.fromkeys(metrics, math.nan), "failure": one_line(error)}
    tune.report(result)


def last_error(trial: Any) -> str:
    """Why a trial was lost for good: the last line that Tune wrote down for it."""
    path = trial.error_file
    lines = Path(path).read_text().split("\n") if path and Path(path).exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "the trial was lost")


def _below(error: BaseException) -> list[BaseException]:
    """What an error was caused by: one error, or one a worker."""
    cause = getattr(error, "cause", None) or getattr(error, "controller_failure", None) or error.__cause__
    if cause is not None:
        return [cause]
    failures = getattr(error, "worker_failures", None) or getattr(error, "_worker_failures", None) or {}
    return list(failures.values())


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and all that it was caused by."""
    yield error
    for cause in _below(error):
        yield from _chain(cause)
