"""Which failures are tried again, and what is reported of the others."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import tune
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from raytrust.cluster.failures import TrainingFailed, last_error, late, lost, one_line, report
from raytrust.cluster.searches import tell_of_attacks
from raytrust.cluster.tuning import Relay, run_trials
from raytrust.jobs.store import JobStore

DIED = ray.exceptions.ActorDiedError()
CRASHED = ray.exceptions.WorkerCrashedError()


def of_workers(*errors: Exception) -> Exception:
    return WorkerGroupError("a worker failed", dict(enumerate(errors)))


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DIED, True),
        (CRASHED, True),
        (ray.exceptions.NodeDiedError("gone"), True),
        (ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory."), True),
        (caused(RuntimeError("outer"), DIED), True),
        (ray.exceptions.RayTaskError("f", "traceback", DIED), True),
        (of_workers(WorkerHealthCheckFailedError("no answer", failure=DIED)), True),
        # The survivor says that its peer is gone; whose word comes first is chance.
        (of_workers(RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:33261"), DIED), True),
        (of_workers(RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:33261")), True),
        (ValueError("Expected rank=0 to be at least 1."), False),
        (FloatingPointError("The training loss became nan at step 3."), False),
        (of_workers(ValueError("mine"), ValueError("mine")), False),
        (RuntimeError("shapes do not match"), False),
        (OSError(28, "No space left on device"), False),
        (MemoryError(), False),
    ],
)
def test_what_was_lost_is_tried_again(error: Exception, expected: bool) -> None:
    assert lost(error) == expected


LATE = ControllerError(WorkerGroupStartupTimeoutError(2))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (LATE, True),
        (ray.exceptions.RayTaskError("f", "traceback", LATE), True),
        (ControllerError(WorkerGroupStartupFailedError("an actor died")), False),
        (DIED, False),
    ],
)
def test_workers_that_found_no_room(error: Exception, expected: bool) -> None:
    assert late(error) == expected


def test_the_reason_of_a_failed_training_is_its_workers() -> None:
    assert one_line(TrainingFailed("KeyError: 'q.3'")) == "KeyError: 'q.3'"
    assert not lost(TrainingFailed("RuntimeError: connection closed by peer"))  # which was tried often enough


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(tune, "report", found.append)
    return found


def test_a_result_is_reported_as_it_is(reported: list[dict[str, Any]]) -> None:
    report(lambda: {"ssim": 0.5}, ["ssim"])
    assert reported == [{"ssim": 0.5}]


def test_a_failure_is_reported_without_numbers(reported: list[dict[str, Any]]) -> None:
    def work() -> dict[str, Any]:
        raise FloatingPointError("The training loss became nan at step 3.")

    report(work, ["leakage", "accuracy"])
    (found,) = reported
    assert found.pop("failure") == "The training loss became nan at step 3."
    assert set(found) == {"leakage", "accuracy"}
    assert all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize("error", [DIED, KeyboardInterrupt()])
def test_what_is_tried_again_is_not_reported(reported: list[dict[str, Any]], error: BaseException) -> None:
    def work() -> dict[str, Any]:
        raise error

    with pytest.raises(type(error)):
        report(work, ["ssim"])
    assert reported == []


def test_the_last_line_of_a_lost_trial(tmp_path: Path) -> None:
    path = tmp_path / "error.txt"
    assert last_error(SimpleNamespace(error_file=None)) == "the trial was lost"
    assert last_error(SimpleNamespace(error_file=str(path))) == "the trial was lost"
    path.write_text("Failure # 1\nThe actor died.\nFailure # 2\nThe node died.\n\n")
    assert last_error(SimpleNamespace(error_file=str(path))) == "The node died."


class Listener:
    """Notes what it is told; raises what it is given."""

    def __init__(self, error: Exception | None = None):
        self.told: list[tuple[Any, ...]] = []
        self.error = error

    def started(self, *what: Any) -> None:
        self._tell("started", *what)

    def finished(self, *what: Any) -> None:
        self._tell("finished", *what)

    def failed(self, *what: Any) -> None:
        self._tell("failed", *what)

    def tick(self) -> None:
        pass

    def _tell(self, *what: Any) -> None:
        self.told.append(what)
        if self.error is not None:
            raise self.error


def trial(**result: Any) -> SimpleNamespace:
    return SimpleNamespace(config={"run": "a"}, last_result=result, error_file=None)


def relay(listener: Listener, **options: Any) -> Relay:
    return Relay("attacks", listener, lambda parameters: (parameters["run"], "name"), **options)


def test_a_failure_in_the_result_is_a_failure() -> None:
    listener, stored = Listener(), []
    passing = relay(listener, fail=lambda parameters, reason: stored.append(reason))
    passing.on_trial_start(trial())
    passing.on_trial_complete(trial(ssim=0.5))
    passing.on_trial_complete(trial(ssim=math.nan, failure="diverged"))
    passing.on_trial_error(trial())
    assert listener.told == [
        ("started", "attacks", "a", "name"),
        ("finished", "attacks", "a", {"run": "a", "ssim": 0.5}),
        ("failed", "attacks", "a", "diverged"),
        ("failed", "attacks", "a", "the trial was lost"),
    ]
    assert stored == ["diverged", "the trial was lost"]
    assert not passing.stop_all()


def test_figures_pass_as_text_by_tune_which_keeps_every_number() -> None:
    """A trial of three attacks is three items; the third has no result. One that was suggested twice is one."""
    listener = Listener()
    figures = [{"ssim": [0.25, 0.75], "seconds": 2.0}, {"ssim": [0.5], "seconds": 1.0}]
    batch = trial(ssim=0.5, figures=json.dumps(figures), values=json.dumps([0.5, 0.5, None, 0.5]))
    relay(listener, finish=partial(tell_of_attacks, listener)).on_trial_complete(batch)
    *finished, failed = listener.told
    assert [(key, result["figures"], result["ssim"], result["attack_seconds"]) for _, _, key, result in finished] == [
        ("a", figures[0], 0.5, 2.0),
        ("a", figures[1], 0.5, 1.0),
    ]
    assert failed[:3] == ("failed", "attacks", "a")


@pytest.mark.parametrize(("concurrent", "rounds"), [(1, [500, 500, 200]), (50, [500, 500, 200]), (100, [1000, 200])])
def test_rounds_keep_actors_warm(
    concurrent: int, rounds: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten trials each, or more."""
    sizes: list[int] = []

    class Tuner:
        def __init__(self, *_: Any, tune_config: Any, **__: Any):
            sizes.append(tune_config.num_samples)

        def fit(self) -> range:
            return range(sizes[-1])

    monkeypatch.setattr(tune, "Tuner", Tuner)
    store = JobStore(tmp_path, "data")
    run_trials("attacks", None, None, 1200, concurrent, store, relay(Listener()))
    assert sizes == rounds


def test_an_error_of_the_driver_ends_the_phase_and_fails_no_trial() -> None:
    """Tune would take it for the trial's, and try that again."""
    error = OSError(28, "No space left on device")
    listener = Listener(error)
    passing = relay(listener)
    passing.on_trial_complete(trial(ssim=0.5))
    assert passing.broken is error
    assert passing.stop_all()
    passing.on_trial_complete(trial(ssim=0.5))
    assert len(listener.told) == 1


def test_a_failure_of_the_cluster_itself_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tuner:
        def __init__(self, *_: Any, **__: Any):
            pass

        def fit(self) -> None:
            raise ray.exceptions.OutOfMemoryError("6 workers were killed.")

    monkeypatch.setattr(tune, "Tuner", Tuner)
    store = JobStore(tmp_path, "data")
    with pytest.raises(ConnectionError, match=r"\AThe cluster failed, --resume goes on: OutOfMemoryError: [^\n]+\Z"):
        run_trials("attacks", None, None, 1, 1, store, relay(Listener()))
