from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INVALID_PARAMETER_VALUE,
    PERMISSION_DENIED,
    RESOURCE_DOES_NOT_EXIST,
    TEMPORARILY_UNAVAILABLE,
)
from mlflow.tracking._tracking_service import utils as mlflow_utils

import raytrust.reports.versions
from raytrust.reports import mlflow as tracking
from raytrust.reports.mlflow import Tracker, default_uri, versions

PARAMETERS = {"rank": 2, "level": None, "error_feedback": False}
TRAINING = {
    "losses": [2.3, 2.1, 1.9],
    "bytes_per_step": 100,
    "dense_bytes": 1500,
    "correct": 3,
    "n_test": 4,
    "seconds": 1.5,
}
FIGURES = {
    "attack": {"objective": "aware", "tv": 0.1},
    "ssim": [0.2, 0.4],
    "psnr": [10.0, 20.0],
    "oracle_ssim": [0.3, 0.5],
    "objective": [1.0],
    "seconds": 0.5,
}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store for all tests: making one takes seconds."""
    uri = default_uri(tmp_path_factory.mktemp("store"))
    MlflowClient(tracking_uri=uri).search_experiments()
    return uri


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri)


@pytest.fixture
def tracker(uri: str, tmp_path: Path) -> Tracker:
    """With a sweep begun in `tmp_path`."""
    tracker = open_tracker(uri, tmp_path)
    tracker.begin_sweep("sweep", {"data": "digits"}, {"seeds": [0]})
    return tracker


def open_tracker(uri: str, root: Path) -> Tracker:
    return Tracker(uri, root, experiment=f"of {root}")


def train(tracker: Tracker, key: str = "run") -> None:
    tracker.trained(key, f"PowerSGD {key}", PARAMETERS, TRAINING)


def attack(tracker: Tracker, key: str = "run", which: str = "attack") -> None:
    tracker.attacked(key, which, "aware tv=0.1", FIGURES)


def runs(client: MlflowClient, root: Path) -> dict[str, Run]:
    """All runs of the sweep in `root`, by name."""
    experiment = client.get_experiment_by_name(f"of {root}")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert len({r.info.run_name for r in found}) == len(found)
    return {r.info.run_name: r for r in found}


def test_a_sweep_from_beginning_to_end(tracker: Tracker, client: MlflowClient, tmp_path: Path) -> None:
    train(tracker)
    attack(tracker)
    step = tmp_path / "captures" / "step-000000"
    step.mkdir(parents=True)
    for name in ("model.pt", "seen-000.pt", "truth-000.pt"):
        (step / name).write_bytes(b"content")
    tracker.log_capture("run", step)
    (tmp_path / "figure.png").write_bytes(b"png")
    tracker.evaluated("run", {"leakage_ssim": 0.25}, {"pareto": True}, [tmp_path / "figure.png"])
    assert runs(client, tmp_path)["sweep"].info.status == "RUNNING"
    tracker.end_sweep("FINISHED", [tmp_path / "figure.png"], {"defences_finished": 1})

    found = runs(client, tmp_path)
    assert list(found) == ["aware tv=0.1", "PowerSGD run", "sweep"]  # the newest first
    assert {r.info.status for r in found.values()} == {"FINISHED"}
    sweep, defence, tried = found["sweep"], found["PowerSGD run"], found["aware tv=0.1"]
    assert sweep.data.params == {"data": "digits"}
    assert sweep.data.tags["seeds"] == "[0]"
    assert {k: v for k, v in sweep.data.tags.items() if k in versions()} == {
        k: v for k, v in versions().items() if v is not None
    }
    assert sweep.data.metrics == {"defences_finished": 1}
    assert "mlflow.parentRunId" not in sweep.data.tags
    assert [f.path for f in client.list_artifacts(sweep.info.run_id)] == ["figure.png"]

    assert defence.data.tags["mlflow.parentRunId"] == sweep.info.run_id
    assert defence.data.params == {"rank": "2", "error_feedback": "False"}  # what is None isn't logged
    expected = {"accuracy": 0.75, "bytes_per_step": 100, "compression_ratio": 15, "train_seconds": 1.5}
    assert defence.data.metrics == expected | {"leakage_ssim": 0.25, "train_loss": 1.9, "wire_bytes": 300}
    assert defence.data.tags["pareto"] == "True"
    for metric, values in {"train_loss": TRAINING["losses"], "wire_bytes": [100, 200, 300]}.items():
        history = client.get_metric_history(defence.info.run_id, metric)
        assert [(m.step, m.value) for m in history] == list(enumerate(values))  # type: ignore[arg-type]
    assert {f.path for f in client.list_artifacts(defence.info.run_id)} == {"figure.png", "capture"}
    captured = [f.path for f in client.list_artifacts(defence.info.run_id, "capture/step-000000")]
    assert captured == ["capture/step-000000/model.pt", "capture/step-000000/seen-000.pt"]  # and not the truth
    assert defence.data.tags["raytrust.capture"] == str(step)

    assert tried.data.tags["mlflow.parentRunId"] == defence.info.run_id
    assert tried.data.params == {"objective": "aware", "tv": "0.1"}
    assert tried.data.metrics == pytest.approx(
        {"tuning_ssim": 0.3, "tuning_psnr": 15, "tuning_oracle_ssim": 0.4, "matching_objective": 1, "seconds": 0.5}
    )


def test_what_is_logged_twice_is_there_once(tracker: Tracker, client: MlflowClient, uri: str, tmp_path: Path) -> None:
    """The second time by another process, which knows of the first by what is on disk."""
    for attempt in range(3):
        again = open_tracker(uri, tmp_path) if attempt == 2 else tracker
        again.begin_sweep("sweep", {"data": "digits"}, {"seeds": [0]})
        train(again)
        attack(again)
    found = runs(client, tmp_path)
    assert len(found) == 3
    history = client.get_metric_history(found["PowerSGD run"].info.run_id, "wire_bytes")
    assert [m.value for m in history] == [100, 200, 300]
    assert len(client.get_metric_history(found["aware tv=0.1"].info.run_id, "tuning_ssim")) == 1
    lines = [json.loads(line) for line in (tmp_path / "mlflow.jsonl").read_text().splitlines()]
    assert {line["run"] for line in lines} == {r.info.run_id for r in found.values()}


def test_a_sweep_goes_on_in_its_own_runs(tracker: Tracker, client: MlflowClient, uri: str, tmp_path: Path) -> None:
    train(tracker)
    tracker.end_sweep("KILLED")
    assert {r.info.status for r in runs(client, tmp_path).values()} == {"KILLED"}
    again = open_tracker(uri, tmp_path)
    again.begin_sweep("sweep", {"data": "digits", "trials": 9}, {})  # how many trials there are may have changed
    assert runs(client, tmp_path)["sweep"].info.status == "RUNNING"
    train(again)
    attack(again)
    again.evaluated("run", {"leakage_ssim": 0.5}, {}, [])
    again.end_sweep("FINISHED")
    found = runs(client, tmp_path)
    assert len(found) == 3
    assert {r.info.status for r in found.values()} == {"FINISHED"}
    assert found["sweep"].data.params == {"data": "digits"}


def cut_off(monkeypatch: pytest.MonkeyPatch, call: str, action: Callable[[], None]) -> None:
    """Do something that the driver's end interrupts at one of the client's calls."""

    def end(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(MlflowClient, call, end)
        with pytest.raises(KeyboardInterrupt):
            action()


@pytest.mark.parametrize("call", ["log_batch", "set_terminated"])
def test_what_was_cut_off_is_logged_the_next_time(
    tracker: Tracker, client: MlflowClient, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    if call == "log_batch":
        cut_off(monkeypatch, call, lambda: train(tracker))
    else:
        train(tracker)
    cut_off(monkeypatch, call, lambda: attack(tracker))
    assert {r.info.status for r in runs(client, tmp_path).values()} == {"RUNNING"}
    again = open_tracker(uri, tmp_path)
    again.begin_sweep("sweep", {"data": "digits"}, {})
    train(again)
    attack(again)
    again.evaluated("run", {}, {}, [])
    again.end_sweep("FINISHED")
    found = runs(client, tmp_path)
    assert len(found) == 3
    assert {r.info.status for r in found.values()} == {"FINISHED"}
    assert found["PowerSGD run"].data.metrics["accuracy"] == 0.75
    assert found["PowerSGD run"].data.params == {"rank": "2", "error_feedback": "False"}
    assert len(client.get_metric_history(found["PowerSGD run"].info.run_id, "train_loss")) == 3
    assert found["aware tv=0.1"].data.metrics["tuning_ssim"] == pytest.approx(0.3)


def test_a_failed_defence_has_a_reason_and_no_figures(tracker: Tracker, client: MlflowClient, tmp_path: Path) -> None:
    tracker.failed("run", "PowerSGD run", PARAMETERS, "the loss became nan")
    tracker.end_sweep("FINISHED")
    found = runs(client, tmp_path)
    assert {name: r.info.status for name, r in found.items()} == {"sweep": "FINISHED", "PowerSGD run": "FAILED"}
    assert found["PowerSGD run"].data.metrics == {}
    assert found["PowerSGD run"].data.params["rank"] == "2"
    assert found["PowerSGD run"].data.tags["raytrust.failure"] == "the loss became nan"


def test_a_failed_defence_can_succeed_when_it_is_tried_again(
    tracker: Tracker, client: MlflowClient, tmp_path: Path
) -> None:
    tracker.failed("run", "PowerSGD run", PARAMETERS, "the loss became nan")
    train(tracker)
    assert runs(client, tmp_path)["PowerSGD run"].info.status == "RUNNING"
    tracker.evaluated("run", {"leakage_ssim": 0.5}, {}, [])
    run = runs(client, tmp_path)["PowerSGD run"]
    assert run.info.status == "FINISHED"
    assert (run.data.metrics["accuracy"], run.data.metrics["leakage_ssim"]) == (0.75, 0.5)
    assert "raytrust.failure" not in run.data.tags


@pytest.mark.parametrize(("status", "below"), [("KILLED", "KILLED"), ("FAILED", "FAILED"), ("FINISHED", "FAILED")])
def test_no_run_stays_open_at_the_end(
    tracker: Tracker, client: MlflowClient, tmp_path: Path, status: str, below: str
) -> None:
    """A defence that a finished sweep could not evaluate has failed."""
    train(tracker, "a")
    train(tracker, "b")
    tracker.evaluated("b", {}, {}, [])
    tracker.end_sweep(status)
    found = {name: r.info.status for name, r in runs(client, tmp_path).items()}
    assert found == {"sweep": status, "PowerSGD a": below, "PowerSGD b": "FINISHED"}


def test_two_sweeps_share_a_store(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    first, second = (Tracker(uri, tmp_path / name, experiment=f"of {tmp_path}") for name in "ab")
    first.begin_sweep("first", {}, {})
    second.begin_sweep("second", {}, {})
    train(first, "a")
    train(second, "b")
    first.end_sweep("KILLED")
    found = {name: r.info.status for name, r in runs(client, tmp_path).items()}
    assert found == {"first": "KILLED", "PowerSGD a": "KILLED", "second": "RUNNING", "PowerSGD b": "RUNNING"}


def test_another_store_begins_anew(tracker: Tracker, client: MlflowClient, uri: str, tmp_path: Path) -> None:
    train(tracker)
    for run in runs(client, tmp_path).values():  # as in a store that doesn't have them
        client.delete_run(run.info.run_id)
    ledger = tmp_path / "mlflow.jsonl"
    ledger.write_text(
        ledger.read_text().replace(tracker._runs["run"], "0" * 32).replace(tracker._runs["sweep"], "1" * 32)
    )
    again = open_tracker(uri, tmp_path)
    again.begin_sweep("sweep", {"data": "digits"}, {})
    train(again)
    found = runs(client, tmp_path)
    assert set(found) == {"sweep", "PowerSGD run"}
    assert found["PowerSGD run"].data.tags["mlflow.parentRunId"] == found["sweep"].info.run_id


def test_a_line_of_the_ledger_that_was_cut_off_is_forgotten(
    tracker: Tracker, client: MlflowClient, uri: str, tmp_path: Path
) -> None:
    ledger = tmp_path / "mlflow.jsonl"
    train(tracker, "a")
    whole = ledger.read_text()
    for cut in ("", '{"key": "b", "ru'):
        ledger.write_text(whole + cut)
        again = open_tracker(uri, tmp_path)
        assert set(again._runs) == {"sweep", "a"}
        assert ledger.read_text() == whole
    train(again, "b")
    assert [json.loads(line)["key"] for line in ledger.read_text().splitlines()] == ["sweep", "a", "b"]
    assert stat.S_IMODE(ledger.stat().st_mode) == 0o600
    ledger.write_text("{}\n")
    with pytest.raises(ValueError, match=r"\AExpected [^\n]+ to hold a key and a run a line"):
        open_tracker(uri, tmp_path)


def test_a_store_that_is_away_is_not_another_store(
    tracker: Tracker, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or each outage would begin the sweep's runs anew."""
    train(tracker)

    def away(*_: Any, **__: Any) -> None:
        raise MlflowException("API request failed: Max retries exceeded")

    with monkeypatch.context() as context:
        context.setattr(MlflowClient, "get_run", away)
        with pytest.raises(MlflowException):
            train(tracker)
    train(tracker)
    attack(tracker)
    assert set(runs(client, tmp_path)) == {"sweep", "PowerSGD run", "aware tv=0.1"}


def test_a_long_training_is_logged_in_full(tracker: Tracker, client: MlflowClient, tmp_path: Path) -> None:
    """MLflow takes a thousand values a call."""
    tracker.trained("run", "long", PARAMETERS, TRAINING | {"losses": [1.0] * 1200})
    run = runs(client, tmp_path)["long"].info.run_id
    assert len(client.get_metric_history(run, "train_loss")) == 1200
    assert client.get_metric_history(run, "wire_bytes")[-1].value == 120_000


def test_a_large_capture_is_named_and_not_copied(
    tracker: Tracker, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "MAX_CAPTURE_BYTES", 10)
    (tmp_path / "model.pt").write_bytes(b"0" * 11)
    train(tracker)
    tracker.log_capture("run", tmp_path)
    run = runs(client, tmp_path)["PowerSGD run"]
    assert run.data.tags["raytrust.capture"] == str(tmp_path)
    assert client.list_artifacts(run.info.run_id) == []


def test_a_local_store_keeps_artifacts_beside_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the process goes; a store that was given keeps them where it says."""
    monkeypatch.chdir(tmp_path)
    tracker = Tracker(default_uri(Path("results")), Path("results"), "experiment")
    tracker.begin_sweep("sweep", {}, {})
    (tmp_path / "figure.png").write_bytes(b"png")
    monkeypatch.chdir("/")
    tracker.end_sweep("FINISHED", [tmp_path / "figure.png"])
    assert [p.name for p in (tmp_path / "results" / "mlartifacts").rglob("*.png")] == ["figure.png"]
    assert (tmp_path / "results" / "mlflow.db").exists()
    assert not (tmp_path / "mlruns").exists()


def test_a_given_database_keeps_artifacts_beside_itself_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not where the first of its sweeps happened to be started."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    tracker = open_tracker(f"sqlite:///{tmp_path}/databases/my.db", tmp_path / "results")
    tracker.begin_sweep("sweep", {}, {})
    (tmp_path / "figure.png").write_bytes(b"png")
    tracker.end_sweep("FINISHED", [tmp_path / "figure.png"])
    assert [p.name for p in (tmp_path / "databases" / "mlartifacts").rglob("*.png")] == ["figure.png"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


# Directories that were moved or copied


def log_everything(root: Path, picture: str) -> None:
    """A sweep in its own database, whose files show private images."""
    tracker = Tracker(default_uri(root), root, "experiment")
    tracker.begin_sweep("sweep", {}, {})
    train(tracker)
    step = root / "captures" / "run" / "step-000000"
    step.mkdir(parents=True, exist_ok=True)
    (step / "seen-000.pt").write_bytes(b"gradients")
    (root / picture).write_bytes(b"png")
    tracker.log_capture("run", step)
    tracker.evaluated("run", {}, {}, [root / picture])
    tracker.end_sweep("FINISHED", [root / picture])


@pytest.fixture
def another_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Forgets what MLflow knows of runs that it has met in this process."""
    return lambda: monkeypatch.setattr(mlflow_utils, "_artifact_repos_cache", OrderedDict())


def files(folder: Path) -> dict[Path, int]:
    return {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("carry", [shutil.move, shutil.copytree], ids=["moved", "copied"])
def test_what_goes_on_in_another_place_writes_only_there(
    tmp_path: Path, carry: Callable[[Path, Path], object], another_process: Callable[[], None]
) -> None:
    """What somebody else keeps in the same database stays where it is."""
    old, new = tmp_path / "old", tmp_path / "new place/für alle #1"
    log_everything(old, "first.png")
    theirs = "s3://bucket/mlartifacts"
    MlflowClient(tracking_uri=default_uri(old)).create_experiment("theirs", artifact_location=theirs)
    new.parent.mkdir(exist_ok=True)
    carry(old, new)
    before = files(old)
    another_process()
    log_everything(new, "second.png")
    assert files(old) == before
    assert old.exists() == (carry is shutil.copytree)
    client = MlflowClient(tracking_uri=default_uri(new))
    experiment = client.get_experiment_by_name("experiment")
    assert experiment is not None
    assert experiment.artifact_location == (new / "mlartifacts").as_uri()
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(found) == {"sweep", "PowerSGD run"}  # it goes on in its own runs, which keep what they had
    for run in found.values():
        paths = [f.path for f in client.list_artifacts(run.info.run_id) if not f.is_dir]
        assert paths == ["first.png", "second.png"]
        assert run.info.artifact_uri.startswith(experiment.artifact_location + "/")
    assert found["PowerSGD run"].data.tags["raytrust.capture"].startswith(str(new))
    assert {e.artifact_location for e in client.search_experiments()} >= {theirs}


def test_a_database_without_tables_is_filled(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    open_tracker(default_uri(tmp_path), tmp_path).begin_sweep("sweep", {}, {})


@pytest.mark.parametrize("name", ["mlflow.db", "other.db"])
def test_a_database_that_is_none_is_refused_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no database" * 100)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"\AExpected tracking_uri=[^\n]+ can be used: [^\n]*file is not a database\Z"):
        open_tracker(f"sqlite:///{tmp_path}/{name}", tmp_path)
    assert time.monotonic() - started < 10


# What somebody has deleted


def test_a_deleted_experiment_is_refused_with_the_command_that_restores_it(
    tracker: Tracker, client: MlflowClient, uri: str, tmp_path: Path
) -> None:
    experiment = client.get_experiment_by_name(f"of {tmp_path}")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    with pytest.raises(ValueError, match=r"\AExpected tracking_uri=[^\n]+ has been deleted; [^\n]+\Z") as error:
        open_tracker(uri, tmp_path)
    command = str(error.value).partition("restore it with: ")[2]
    subprocess.run([sys.executable, "-m", *shlex.split(command)[2:]], check=True, env=restoring(command))
    open_tracker(uri, tmp_path).begin_sweep("sweep", {"data": "digits"}, {})


def restoring(command: str) -> dict[str, str]:
    """The environment in which the command runs."""
    env, variable, *rest = shlex.split(command)
    assert (env, rest[:3]) == ("env", ["mlflow", "experiments", "restore"])
    name, _, value = variable.partition("=")
    return os.environ | {name: value}


def test_a_deleted_experiment_is_not_worth_waiting_for(tracker: Tracker, client: MlflowClient, tmp_path: Path) -> None:
    experiment = client.get_experiment_by_name(f"of {tmp_path}")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    with pytest.raises(MlflowException, match="must be in the 'active' state") as error:
        train(tracker)
    assert not tracker.curable(error.value)
    assert "\n" not in tracker.reason(error.value)


@pytest.mark.parametrize("deleted", ["sweep", "PowerSGD run", "aware tv=0.1"])
@pytest.mark.parametrize("meanwhile", [True, False], ids=["while it runs", "before it goes on"])
def test_a_deleted_run_begins_anew(
    tracker: Tracker, client: MlflowClient, uri: str, tmp_path: Path, deleted: str, meanwhile: bool
) -> None:
    """With all that was below it."""
    train(tracker)
    attack(tracker)
    gone = runs(client, tmp_path)[deleted].info.run_id
    client.delete_run(gone)
    if not meanwhile:
        tracker = open_tracker(uri, tmp_path)
        tracker.begin_sweep("sweep", {"data": "digits"}, {"seeds": [0]})
    assert tracker.lacks("run") == (deleted == "PowerSGD run")
    train(tracker)
    attack(tracker)
    tracker.evaluated("run", {"leakage_ssim": 0.5}, {}, [])
    tracker.end_sweep("FINISHED", metrics={"defences_finished": 1})
    found = runs(client, tmp_path)
    assert set(found) == {"sweep", "PowerSGD run", "aware tv=0.1"}
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert gone not in {run.info.run_id for run in found.values()}
    sweep, defence, tried = found["sweep"], found["PowerSGD run"], found["aware tv=0.1"]
    assert sweep.data.params == {"data": "digits"}
    assert defence.data.metrics["accuracy"] == 0.75
    assert tried.data.metrics["tuning_psnr"] == 15
    assert defence.data.tags["mlflow.parentRunId"] == sweep.info.run_id
    assert tried.data.tags["mlflow.parentRunId"] == defence.info.run_id
    assert {run.data.tags["raytrust.sweep"] for run in (defence, tried)} == {sweep.info.run_id}


@pytest.mark.parametrize(
    ("error", "curable"),
    [
        (ConnectionRefusedError(), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (requests.ConnectionError(), True),
        (PermissionError(), False),
        (FileNotFoundError(), False),
        (MlflowException("too many 503 error responses"), True),
        (MlflowException("database is locked", TEMPORARILY_UNAVAILABLE), True),
        (MlflowException("Permission denied", PERMISSION_DENIED), False),
        (MlflowException("not in the 'active' state", INVALID_PARAMETER_VALUE), False),
        (MlflowException("no such run", RESOURCE_DOES_NOT_EXIST), False),
    ],
)
def test_what_a_retry_may_cure(tracker: Tracker, error: Exception, curable: bool) -> None:
    assert tracker.curable(error) == curable


# Passwords


def test_a_refusal_shows_no_password(closed_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    for uri in (f"http://me:s3cret@127.0.0.1:{closed_port}", f"postgresql://me:s3cret@127.0.0.1:{closed_port}/mlflow"):
        with pytest.raises(ValueError, match=r"\AExpected tracking_uri=[^\n]+\Z") as error:
            Tracker(uri, tmp_path, "experiment")
        assert f"127.0.0.1:{closed_port}" in str(error.value)
        assert "s3cret" not in str(error.value)


def test_a_later_error_shows_no_password(uri: str, tmp_path: Path) -> None:
    tracker = open_tracker(uri, tmp_path)
    tracker._uri = "http://me:s3/cr#t@host:5000"
    error = MlflowException("API request to http://me:s3/cr#t@host:5000/api failed\nin two lines")
    assert tracker.reason(error) == "API request to http://host:5000/api failed"


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port on which nobody listens, kept from others for the while."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.mark.parametrize("uri", ["nonsense://x", "http://127.0.0.1:PORT", "./mlruns", "sqlite:////dev/null/x.db"])
def test_a_store_that_cannot_be_used_is_refused_in_a_line(
    uri: str, closed_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)
    uri = uri.replace("PORT", str(closed_port))
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"\AExpected tracking_uri=[^\n]+ to be an MLflow store[^\n]+\Z") as info:
        Tracker(uri, tmp_path, "experiment")
    assert repr(uri) in str(info.value)
    assert time.monotonic() - started < 10
    assert not (tmp_path / "mlflow.jsonl").exists()


# Where the code comes from


def git(folder: Path, *arguments: str) -> str:
    identity = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    for who in ("AUTHOR", "COMMITTER"):
        identity |= {f"GIT_{who}_NAME": "somebody", f"GIT_{who}_EMAIL": "somebody@example.com"}
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | identity).stdout.strip()


def test_the_commit_is_that_of_this_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "package" / "versions.py"
    module.parent.mkdir()
    module.write_text("1\n")
    monkeypatch.setattr(raytrust.reports.versions, "__file__", str(module))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def revision() -> str | None:
        return versions()["mlflow.source.git.commit"]

    assert revision() is None  # no checkout
    git(tmp_path, "init", "--quiet")
    (tmp_path / "other").write_text("")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "--quiet", "--message", "somebody else's")
    assert revision() is None  # installed inside somebody else's
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "--quiet", "--message", "ours")
    git(tmp_path, "tag", "v1")
    assert revision() == git(tmp_path, "rev-parse", "HEAD")
    module.write_text("2\n")
    assert revision() == git(tmp_path, "rev-parse", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert revision() is None  # no git
