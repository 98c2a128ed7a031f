"""The sweep in MLflow. The only module that imports mlflow.

One run for the sweep, below it one for each defence, below that one for each attack of the search. All is logged by
the driver, from the store. DIR/mlflow.jsonl says what is logged already, so a resumed sweep goes on in its own runs.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# What goes wrong is an exception too, and said in one line here.
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
# A server that is away must not hold up a sweep: what could not be sent is sent later.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from raytrust.jobs.files import atomic_write, make_private
from raytrust.reports.tracking_store import bring_along, expect_database, expect_server
from raytrust.reports.tracking_uri import artifact_location, database_path, default_uri, scrub, without_password
from raytrust.reports.versions import versions

# What may pass: a server that is away or overloaded, a database that is locked, away or read-only.
CURABLE = {"ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL_ERROR", "IO_ERROR", "REQUEST_LIMIT_EXCEEDED"}
CURABLE |= {"RESOURCE_EXHAUSTED", "TEMPORARILY_UNAVAILABLE"}
# A database that refuses to write for a while is a bad request to MLflow; as PostgreSQL, MySQL and SQLite say it.
READ_ONLY = ("read-only transaction", "--read-only option", "readonly database")
INCURABLE = (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)

Metrics = Mapping[str, float]

PARENT = "sweep"
# A tag. MLflow's own names a run's parent alone, and can't be searched for what lies two levels below.
SWEEP = "raytrust.sweep"
FAILURE = "raytrust.failure"
GIVE_IT_AGAIN = "; no password is kept: give --tracking-uri with it again, or MLFLOW_TRACKING_URI in the environment"
# A larger capture is only named: gradients of a large model would fill the artifact store.
MAX_CAPTURE_BYTES = 64 * 2**20


class Tracker:
    """Logs one sweep to one tracking store. All paths are absolute: Ray changes its workers' directories.

    Whatever is logged twice is there once, so a sweep that was cut off anywhere can be logged again from its store.
    Raises ValueError if the tracking store can't be used.
    """

    errors: tuple[type[Exception], ...] = (MlflowException, OSError)

    def __init__(self, uri: str, root: Path, experiment: str):
        self._root = root.resolve()
        self._uri = uri
        self._ledger = _Ledger(self._root / "mlflow.jsonl")
        self._runs = self._ledger.read()
        with self._usable():
            self.expect_server()
            if database_path(uri) == database_path(default_uri(self._root)):
                bring_along(self._root)
            if (path := database_path(uri)) is not None:
                make_private(path.parent)
            expect_database(uri)
            self._client = MlflowClient(tracking_uri=uri)
            self._experiment = self._experiment_id(experiment)

    def expect_server(self) -> None:
        """Raises OSError if nothing listens at the store's address; MLflow would go on trying for a while."""
        expect_server(self._uri)

    def curable(self, error: Exception) -> bool:
        """Whether the same call may succeed later, as far as one can tell."""
        if isinstance(error, MlflowException):
            return error.error_code in CURABLE or any(words in str(error) for words in READ_ONLY)
        # An error of requests, where a server refused a file.
        if (response := getattr(error, "response", None)) is not None:
            return response.status_code >= 500 or response.status_code in (408, 429)
        return not isinstance(error, INCURABLE)

    def reason(self, error: Exception) -> str:
        """What went wrong, in one line and without passwords."""
        # SQLAlchemy begins with how it came to ask, and then says what the database answered.
        lines = [line for line in str(error).strip().splitlines() if "autoflush" not in line]
        return scrub(next(iter(lines), type(error).__name__), self._uri)

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        # Of MLflow, of a database's driver or of the network: it may be nearly anything.
        except Exception as error:
            public, reason = without_password(self._uri), self.reason(error)
            hint = GIVE_IT_AGAIN if any(word in reason.lower() for word in ("password", "401", "unauth")) else ""
            raise ValueError(
                f"Expected tracking_uri={public!r} to be an MLflow store that can be used: {reason}{hint}"
            ) from error

    def begin_sweep(self, name: str, parameters: dict[str, Any], tags: dict[str, Any]) -> str:
        """Begin or reopen the parent run; returns its id. Raises ValueError if the store refuses it."""
        self._parent = (name, parameters, {**versions(), **tags})
        with self._usable():
            return self._begin()

    def _begin(self) -> str:
        name, parameters, tags = self._parent
        run = self._open(PARENT, name, None, tags)
        # MLflow refuses another value for a parameter, as of a sweep that goes on with more trials.
        if not run.data.params:
            self._log(run.info.run_id, parameters=parameters)
        if run.info.status != "RUNNING":
            self._client.update_run(run.info.run_id, status="RUNNING")
        return run.info.run_id

    def end_sweep(self, status: str, artifacts: Iterable[Path] = (), metrics: Metrics | None = None) -> None:
        """End the parent run as "FINISHED", "FAILED" or "KILLED". What is still open below it did not finish."""
        run = self._begin()
        self._log(run, metrics=metrics)
        for path in artifacts:
            self._client.log_artifact(run, str(path))
        self._client.set_terminated(run, status)
        still_open = f"attributes.status = 'RUNNING' and tags.`{SWEEP}` = '{run}'"
        # MLflow gives a page of them at a time.
        while children := self._client.search_runs([self._experiment], still_open):
            for child in children:
                self._client.set_terminated(child.info.run_id, "FAILED" if status == "FINISHED" else status)

    def trained(self, key: str, name: str, parameters: dict[str, Any], training: dict[str, Any]) -> None:
        """A defence has been trained: its parameters, loss and wire bytes step by step, accuracy."""
        opened = self._open(key, name, self._runs[PARENT], {"raytrust.kind": "defence"})
        # It is logged last, so that a training that was cut off between its metrics is logged again.
        if "train_seconds" in opened.data.metrics:
            return
        run = opened.info.run_id
        # It failed before, or was interrupted.
        if opened.info.status != "RUNNING":
            self._client.update_run(run, status="RUNNING")
        sent = training["bytes_per_step"]
        # The UI's comparison starts with the metric that was logged first.
        summary = {
            "accuracy": training["correct"] / training["n_test"],
            "bytes_per_step": sent,
            "compression_ratio": training["dense_bytes"] / sent,
        }
        self._log(run, parameters=parameters, metrics=summary)
        now = int(time.time() * 1000)
        steps = [Metric("train_loss", loss, now, step) for step, loss in enumerate(training["losses"])]
        steps += [Metric("wire_bytes", sent * (step + 1), now, step) for step in range(len(training["losses"]))]
        # A thousand are the most that one call may hold.
        for first in range(0, len(steps), 1000):
            self._client.log_batch(run, metrics=steps[first : first + 1000])
        self._log(run, metrics={"train_seconds": training["seconds"]})

    def attacked(self, key: str, attack_key: str, name: str, figures: dict[str, Any]) -> None:
        """An attack of the search on a defence has finished: its settings, and what it reached on the tuning images."""
        opened = self._open(f"{key}/{attack_key}", name, self._runs[key], {"raytrust.kind": "attack"})
        if opened.info.status == "FINISHED":
            return
        run = opened.info.run_id
        count = len(figures["ssim"])
        metrics = {f"tuning_{m}": sum(figures[m]) / count for m in ("ssim", "psnr", "oracle_ssim")}
        metrics |= {"matching_objective": sum(figures["objective"]) / len(figures["objective"])}
        self._log(run, parameters=figures["attack"], metrics=metrics | {"seconds": figures["seconds"]})
        self._client.set_terminated(run, "FINISHED")

    def evaluated(self, key: str, metrics: Metrics, tags: dict[str, Any], artifacts: Iterable[Path]) -> None:
        """A defence has its place on the frontier: the figures of its row, and the reconstructions."""
        run = self._client.get_run(self._runs[key])
        self._log(run.info.run_id, metrics=metrics, tags=tags)
        for path in artifacts:
            self._client.log_artifact(run.info.run_id, str(path))
        self._end(run, "")

    def log_capture(self, key: str, directory: Path) -> None:
        """The captured step as an artifact, without the truth; where it is large, only where it lies."""
        run = self._runs[key]
        # The truth stays here: who may see the tracking store need not see private images.
        files = [p for p in sorted(directory.glob("*.pt")) if not p.name.startswith("truth")]
        self._client.set_tag(run, "raytrust.capture", str(directory))
        if sum(p.stat().st_size for p in files) <= MAX_CAPTURE_BYTES:
            for path in files:
                self._client.log_artifact(run, str(path), artifact_path=f"capture/{directory.name}")

    def failed(self, key: str, name: str, parameters: dict[str, Any], reason: str) -> None:
        """A defence has failed: its run says why, and has no figures."""
        self.measured(key, name, parameters, {}, reason, "defence")

    def measured(
        self, key: str, name: str, parameters: dict[str, Any], metrics: Metrics, reason: str, kind: str = "cell"
    ) -> None:
        """A piece of a report: its figures, or why it has none."""
        run = self._open(key, name, self._runs[PARENT], {"raytrust.kind": kind})
        self._log(run.info.run_id, parameters={} if run.data.params else parameters, metrics=metrics)
        self._end(run, reason)

    def _end(self, run: Run, reason: str) -> None:
        """End a run as failed for this reason; without one as finished, whatever went wrong in an earlier try."""
        if reason:
            self._client.set_tag(run.info.run_id, FAILURE, reason)
        elif FAILURE in run.data.tags:
            self._client.delete_tag(run.info.run_id, FAILURE)
        self._client.set_terminated(run.info.run_id, "FAILED" if reason else "FINISHED")

    def lacks(self, key: str) -> bool:
        """Whether the run of this key has been deleted, or there was none."""
        return self._run(key) is None

    def _experiment_id(self, name: str) -> str:
        """The experiment of this name, made if there is none; beside a local database are the files of its runs."""
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            return self._client.create_experiment(name, artifact_location=artifact_location(self._uri))
        if experiment.lifecycle_stage == "deleted":
            store = shlex.quote(f"MLFLOW_TRACKING_URI={without_password(self._uri)}")
            restore = f"env {store} mlflow experiments restore --experiment-id {experiment.experiment_id}"
            raise ValueError(f"its experiment {name!r} has been deleted; restore it with: {restore}")
        return experiment.experiment_id

    def _run(self, key: str) -> Run | None:
        """The run of this key as it is; None if it has been deleted, or the store is another one than before."""
        if key not in self._runs:
            return None
        try:
            run = self._client.get_run(self._runs[key])
        except MlflowException as error:
            # A store that is away may have it: a new run would split the sweep in two.
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return None if run.info.lifecycle_stage == "deleted" else run

    def _open(self, key: str, name: str, parent: str | None, tags: dict[str, Any]) -> Run:
        """The run of this key as it is. If there is none, or it has been deleted, a new one, with all below the old."""
        if (run := self._run(key)) is not None:
            return run
        before = self._runs.get(key)
        if parent is not None:
            tags = {**tags, "mlflow.parentRunId": parent, SWEEP: self._runs[PARENT]}
        created = self._client.create_run(
            self._experiment, run_name=name, tags={k: str(v) for k, v in tags.items() if v is not None}
        )
        self._runs[key] = created.info.run_id
        self._ledger.append(key, created.info.run_id)
        if before is not None:
            self._move(before, created.info.run_id)
        return created

    def _move(self, before: str, after: str) -> None:
        for tag in ("mlflow.parentRunId", SWEEP):
            while runs := self._client.search_runs([self._experiment], f"tags.`{tag}` = '{before}'"):
                for run in runs:
                    self._client.set_tag(run.info.run_id, tag, after)

    def _log(
        self,
        run: str,
        parameters: dict[str, Any] | None = None,
        metrics: Metrics | None = None,
        tags: dict[str, Any] | None = None,
    ) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(
            run,
            params=[Param(k, str(v)) for k, v in (parameters or {}).items() if v is not None],
            metrics=[Metric(k, float(v), now, 0) for k, v in (metrics or {}).items() if v is not None],
            tags=[RunTag(k, str(v)) for k, v in (tags or {}).items()],
        )


class _Ledger:
    """Which run is whose, a line each: what it costs to add one does not depend on how many there are."""

    def __init__(self, path: Path):
        self._path = path

    def read(self) -> dict[str, str]:
        """The runs by key, the last line of a key counts. A line that was cut off is forgotten."""
        text = self._path.read_text() if self._path.exists() else ""
        # A process that was killed may have left half a line.
        whole, _, cut = text.rpartition("\n")
        if cut:
            with atomic_write(self._path) as file:
                file.write(f"{whole}\n".encode() if whole else b"")
        try:
            return {line["key"]: line["run"] for line in map(json.loads, whole.splitlines())}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"Expected {self._path} to hold a key and a run a line: {error!r}.") from error

    def append(self, key: str, run: str) -> None:
        make_private(self._path.parent)
        with os.fdopen(os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w") as file:
            file.write(json.dumps({"key": key, "run": run}) + "\n")
            # A run that MLflow has and the ledger has not would be begun again.
            file.flush()
            os.fsync(file.fileno())
