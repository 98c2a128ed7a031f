"""A tracking store that is away: what is to be logged waits, in order, and nothing is lost or doubled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST, INVALID_PARAMETER_VALUE, INVALID_STATE, PERMISSION_DENIED
from toys import synthetic

from raytrust.config import (
    CaptureConfig,
    Defence,
    InversionConfig,
    ModelConfig,
    PowerSGDConfig,
    SweepConfig,
    TrainConfig,
    to_dict,
)
from raytrust.reports import frontier_log as module
from raytrust.reports import mlflow as tracking
from raytrust.reports import outbox
from raytrust.reports.frontier_log import SweepLog
from raytrust.reports.outbox import PATIENCE, PAUSE
from raytrust.studies.frontier.store import Store

SWEEP = SweepConfig(
    train=TrainConfig(model=ModelConfig("convnet", width=4), capture=CaptureConfig((0,), 1, 1), workers=1, steps=1),
    defences=(Defence(), Defence(PowerSGDConfig(1))),
    trials=2,
)
TRAINING = {"correct": 1, "n_test": 2, "losses": [1.0], "bytes_per_step": 1.0, "dense_bytes": 1, "seconds": 1.0}
FIGURES = {"attack": to_dict(InversionConfig("naive")), "ssim": [0.5], "seconds": 0.1}


class Tracker:
    """Notes what it is sent, unless it is away. Its errors are judged as those of a true one."""

    errors = tracking.Tracker.errors
    curable = tracking.Tracker.curable

    def reason(self, error: Exception) -> str:
        return str(error)

    def lacks(self, key: str) -> bool:
        return False

    def __init__(self, *_: Any, **__: Any):
        self.sent: list[tuple[str, ...]] = []
        self.away: Exception | None = None

    def expect_server(self) -> None:
        if isinstance(self.away, ConnectionRefusedError):
            raise self.away

    def _note(self, *what: str) -> None:
        if self.away is not None:
            raise self.away
        self.sent.append(what)

    def begin_sweep(self, *_: Any) -> None:
        self._note("begin")

    def trained(self, key: str, name: str, *_: Any) -> None:
        self._note("trained", name)

    def attacked(self, key: str, attack: str, *_: Any) -> None:
        self._note("attacked", key)

    def failed(self, key: str, name: str, parameters: Any, reason: str) -> None:
        self._note("failed", name, reason)

    def end_sweep(self, status: str, *_: Any) -> None:
        self._note("end", status)


class Logged:
    """A log with its tracker and what it said; the clock is the test's."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        self.said: list[str] = []
        monkeypatch.setattr(module, "Tracker", Tracker)
        monkeypatch.setattr(outbox.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(outbox.time, "sleep", self._sleep)
        self.store = Store(root, "data")
        self.keys = []
        for defence in SWEEP.defences:
            train = module.replace(SWEEP.train, defence=defence)
            self.store.begin(train)
            self.keys.append(self.store.run_id(train))
        self.log = SweepLog(SWEEP, self.store, synthetic(), "http://127.0.0.1:1", self.said.append)
        self.tracker: Any = self.log._tracker
        self.back_at: float | None = None

    def train(self, i: int) -> None:
        self.store.finish_training(module.replace(SWEEP.train, defence=SWEEP.defences[i]), TRAINING)
        self.log.finished("defences", self.keys[i], {"attack_seconds": 0.1})

    def _sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.back_at is not None and self.now >= self.back_at:
            self.tracker.away = None


@pytest.fixture
def logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Logged:
    return Logged(tmp_path, monkeypatch)


def answer(status: int) -> requests.Response:
    response = requests.Response()
    response.status_code = status
    return response


AWAY = [
    ConnectionRefusedError("[Errno 111] Connection refused"),
    MlflowException("API request failed: Max retries exceeded"),
    MlflowException("(sqlite3.OperationalError) attempt to write a readonly database"),
]


def test_a_database_that_refuses_to_write_is_waited_for(tmp_path: Path) -> None:
    """To MLflow it is a bad request, and SQLAlchemy says first how it came to ask."""
    tracker = tracking.Tracker(tracking.default_uri(tmp_path), tmp_path, experiment="e")
    answered = "(psycopg2.errors.ReadOnlySqlTransaction) cannot execute INSERT in a read-only transaction"
    asked = "(raised as a result of Query-invoked autoflush; consider using a session.no_autoflush block)"
    error = MlflowException(f"{asked}\n{answered}\n[SQL: INSERT INTO runs]", BAD_REQUEST)
    assert tracker.curable(error)
    assert tracker.reason(error) == answered
    assert not tracker.curable(MlflowException("(psycopg2.errors.StringDataRightTruncation) too long", BAD_REQUEST))


@pytest.mark.parametrize("error", AWAY, ids=["refused", "no answer", "read-only"])
def test_what_happens_meanwhile_is_sent_later_and_in_order(logged: Logged, error: Exception) -> None:
    with logged.log.open_run():
        logged.train(0)
        logged.tracker.away = error
        logged.train(1)
        logged.log.finished("attacks", logged.keys[0], {"figures": FIGURES, "attack_seconds": 0.1})
        logged.log.failed("evaluation", logged.keys[1], "lost")
        assert logged.tracker.sent == [("begin",), ("trained", "none")]
        assert logged.said == [f"MLflow can't be reached, what is to be logged waits: {error}"]
        logged.log.tick()  # not at every tick: a try may take seconds
        logged.tracker.away = None
        logged.log.tick()
        assert len(logged.tracker.sent) == 2
        logged.now += PAUSE
        logged.log.tick()
        assert logged.tracker.sent[2:] == [
            ("trained", "PowerSGD rank 1"),
            ("attacked", logged.keys[0]),
            ("failed", "PowerSGD rank 1", "lost"),
        ]
        assert logged.said[1:] == ["MLflow is back and has everything"]
        logged.log.tick()
        assert len(logged.tracker.sent) == 5


def test_the_end_waits_for_it(logged: Logged) -> None:
    with logged.log.open_run():
        logged.tracker.away, logged.back_at = AWAY[0], 60.0
        logged.log.finish([{"status": "failed"}], [], {"wall_seconds": 1.0}, "FINISHED")
    assert logged.tracker.sent[-1] == ("end", "FINISHED")
    assert 60 <= logged.now <= 60 + PAUSE


def test_the_end_does_not_wait_for_ever(logged: Logged) -> None:
    with logged.log.open_run():
        logged.tracker.away = AWAY[0]
        logged.train(0)
        logged.log.finish([{"status": "failed"}], [], {"wall_seconds": 1.0}, "FINISHED")
    assert logged.tracker.sent == [("begin",)]
    assert PATIENCE <= logged.now <= PATIENCE + 2 * PAUSE
    assert logged.said[-1] == "MLflow lacks the end of this sweep; --resume sends it"


REFUSED = [
    MlflowException("The run x must be in the 'active' state.", error_code=INVALID_PARAMETER_VALUE),
    MlflowException("The experiment 1 must be in the 'active' state.", error_code=INVALID_STATE),
    MlflowException("Permission denied", error_code=PERMISSION_DENIED),
    PermissionError(13, "Permission denied", "/elsewhere/mlartifacts"),
    requests.HTTPError("403 Client Error: Forbidden", response=answer(403)),
]


@pytest.mark.parametrize("error", REFUSED, ids=["run", "experiment", "permission", "folder", "upload"])
def test_what_no_retry_can_cure_is_said_at_once_and_left_out(logged: Logged, error: Exception) -> None:
    """One line for all that it befalls, no second is waited, and the rest is sent."""
    with logged.log.open_run():
        logged.tracker.away = error
        logged.train(0)
        logged.log.finished("attacks", logged.keys[0], {"figures": FIGURES, "attack_seconds": 0.1})
        assert logged.said == [f"MLflow refused an entry, the sweep goes on: {error}"]
        logged.tracker.away = None
        logged.train(1)
        logged.log.finish([{"status": "failed"}], [], {"wall_seconds": 1.0}, "FINISHED")
    assert logged.tracker.sent == [("begin",), ("trained", "PowerSGD rank 1"), ("end", "FINISHED")]
    assert logged.said[1:] == ["MLflow lacks what it refused of this sweep; --resume tries it again"]
    assert logged.now == 0


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_is_busy_is_waited_for(logged: Logged, status: int) -> None:
    with logged.log.open_run():
        logged.tracker.away = requests.HTTPError("busy", response=answer(status))
        logged.train(0)
        logged.tracker.away = None
        logged.now += PAUSE
        logged.log.tick()
    assert logged.tracker.sent == [("begin",), ("trained", "none")]


def test_an_interruption_passes_through_a_store_that_is_away(logged: Logged) -> None:
    def interrupt() -> None:
        with logged.log.open_run():
            logged.tracker.away = AWAY[1]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert logged.tracker.sent == [("begin",)]


def test_a_mistake_of_ours_does_not_wait(logged: Logged) -> None:
    with pytest.raises(AssertionError), logged.log.open_run():
        logged.log.finished("defences", logged.keys[0], {"attack_seconds": 0.1})  # not trained
