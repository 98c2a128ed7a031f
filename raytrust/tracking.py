"""The sweep in MLflow. The only module that imports mlflow.

One run for the sweep, below it one for each defence, below that one for each attack of the search. All is logged by
the driver, from the store. DIR/mlflow.jsonl says what is logged already, so a resumed sweep goes on in its own runs.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
# A server that is away must not hold up a sweep: what could not be sent is sent later.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from raytrust.capture import atomic_write, make_private

UNREACHABLE = (MlflowException, OSError)  # what a tracking store that is away, full or read-only raises

PARENT = "sweep"
FAILURE = "raytrust.failure"
MAX_CAPTURE_BYTES = 64 * 2**20  # a larger capture is not copied into the artifact store, only named


def default_uri(root: Path) -> str:
    """A database of its own in the sweep's directory."""
    return f"sqlite:///{root.resolve()}/mlflow.db"


class Tracker:
    """Logs one sweep to one tracking store. All paths are absolute: Ray changes its workers' directories.

    Whatever is logged twice is there once, so a sweep that was cut off anywhere can be logged again from its store.
    Raises ValueError if the tracking store can't be used.
    """

    def __init__(self, uri: str, root: Path, experiment: str):
        self._root = root.resolve()
        self._uri = uri
        self._ledger = _Ledger(self._root / "mlflow.jsonl")
        self._runs = self._ledger.read()
        try:
            self.expect_server()
            self._client = MlflowClient(tracking_uri=uri)
            self._experiment = self._experiment_id(experiment, uri)
        except Exception as error:  # of MLflow, of a database's driver or of the network: nearly anything
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(
                f"Expected tracking_uri={uri!r} to be an MLflow store that can be used: {reason}"
            ) from error

    def expect_server(self) -> None:
        """Raises OSError if nothing listens at an http address; MLflow would go on trying for a while."""
        _expect_server(self._uri)

    def begin_sweep(self, name: str, parameters: dict[str, Any], tags: dict[str, Any]) -> str:
        """Begin or reopen the parent run; returns its id."""
        run = self._open(PARENT, name, None, {**versions(), **tags})
        if not run.data.params:
            self._log(run.info.run_id, parameters=parameters)
        if run.info.status != "RUNNING":
            self._client.update_run(run.info.run_id, status="RUNNING")
        return run.info.run_id

    def end_sweep(self, status: str, artifacts: Iterable[Path] = (), metrics: dict[str, float] | None = None) -> None:
        """End the parent run as "FINISHED", "FAILED" or "KILLED". What is still open below it did not finish."""
        run = self._runs[PARENT]
        self._log(run, metrics=metrics)
        for path in artifacts:
            self._client.log_artifact(run, str(path))
        self._client.set_terminated(run, status)
        still_open = f"attributes.status = 'RUNNING' and tags.`raytrust.sweep` = '{run}'"
        while children := self._client.search_runs([self._experiment], still_open):  # a page of them
            for child in children:
                self._client.set_terminated(child.info.run_id, "FAILED" if status == "FINISHED" else status)

    def trained(self, key: str, name: str, parameters: dict[str, Any], training: dict[str, Any]) -> None:
        """A defence has been trained: its parameters, loss and wire bytes step by step, accuracy."""
        opened = self._open(key, name, self._runs[PARENT], {"raytrust.kind": "defence"})
        if "train_seconds" in opened.data.metrics:  # logged last
            return
        run = opened.info.run_id
        if opened.info.status != "RUNNING":  # it failed before, or was interrupted
            self._client.update_run(run, status="RUNNING")
        sent = training["bytes_per_step"]
        summary = {
            "accuracy": training["correct"] / training["n_test"],
            "bytes_per_step": sent,
            "compression_ratio": training["dense_bytes"] / sent,
        }  # first: the UI's comparison starts with the metric that was logged first
        self._log(run, parameters=parameters, metrics=summary)
        now = int(time.time() * 1000)
        steps = [Metric("train_loss", loss, now, step) for step, loss in enumerate(training["losses"])]
        steps += [Metric("wire_bytes", sent * (step + 1), now, step) for step in range(len(training["losses"]))]
        for first in range(0, len(steps), 1000):  # the most that one call may hold
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

    def evaluated(self, key: str, metrics: dict[str, float], tags: dict[str, Any], artifacts: Iterable[Path]) -> None:
        """A defence has its place on the frontier: the figures of its row, and the reconstructions."""
        run = self._runs[key]
        self._log(run, metrics=metrics, tags=tags)
        if FAILURE in self._client.get_run(run).data.tags:  # of an earlier try
            self._client.delete_tag(run, FAILURE)
        for path in artifacts:
            self._client.log_artifact(run, str(path))
        self._client.set_terminated(run, "FINISHED")

    def log_capture(self, key: str, directory: Path) -> None:
        """The captured step as an artifact, without the truth; where it is large, only where it lies."""
        run = self._runs[key]
        files = [p for p in sorted(directory.glob("*.pt")) if not p.name.startswith("truth")]
        self._client.set_tag(run, "raytrust.capture", str(directory))
        if sum(p.stat().st_size for p in files) <= MAX_CAPTURE_BYTES:
            for path in files:
                self._client.log_artifact(run, str(path), artifact_path=f"capture/{directory.name}")

    def failed(self, key: str, name: str, parameters: dict[str, Any], reason: str) -> None:
        """A defence has failed: its run says why, and has no figures."""
        run = self._open(key, name, self._runs[PARENT], {"raytrust.kind": "defence"})
        if not run.data.params:
            self._log(run.info.run_id, parameters=parameters)
        self._client.set_tag(run.info.run_id, FAILURE, reason)
        self._client.set_terminated(run.info.run_id, "FAILED")

    def measured(self, key: str, name: str, parameters: dict[str, Any], metrics: dict[str, float], reason: str) -> None:
        """A piece of a report: its figures, or why it has none."""
        run = self._open(key, name, self._runs[PARENT], {"raytrust.kind": "cell"})
        self._log(run.info.run_id, parameters={} if run.data.params else parameters, metrics=metrics)
        if reason:
            self._client.set_tag(run.info.run_id, FAILURE, reason)
        elif FAILURE in run.data.tags:  # of an earlier try
            self._client.delete_tag(run.info.run_id, FAILURE)
        self._client.set_terminated(run.info.run_id, "FAILED" if reason else "FINISHED")

    def _experiment_id(self, name: str, uri: str) -> str:
        """The experiment of this name, made if there is none; a local store keeps its artifacts beside itself."""
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        location = (self._root / "mlartifacts").as_uri() if uri == default_uri(self._root) else None
        return self._client.create_experiment(name, artifact_location=location)

    def _open(self, key: str, name: str, parent: str | None, tags: dict[str, Any]) -> Run:
        """The run of this key as it is, a new one if there is none."""
        if (run := self._runs.get(key)) is not None:
            try:
                return self._client.get_run(run)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                del self._runs[key]  # the store is another one than before
        if parent is not None:
            tags = {**tags, "mlflow.parentRunId": parent, "raytrust.sweep": self._runs[PARENT]}
        created = self._client.create_run(
            self._experiment, run_name=name, tags={k: str(v) for k, v in tags.items() if v is not None}
        )
        self._runs[key] = created.info.run_id
        self._ledger.append(key, created.info.run_id)
        return created

    def _log(
        self,
        run: str,
        parameters: dict[str, Any] | None = None,
        metrics: dict[str, float] | None = None,
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
            file.flush()
            os.fsync(file.fileno())


def versions() -> dict[str, str | None]:
    """Tags that say what ran: the git revision of this code, and the versions of what it stands on."""
    packages = ("raytrust", "torch", "torchvision", "ray", "optuna", "mlflow")
    tags: dict[str, str | None] = {f"version.{name}": _version(name) for name in packages}
    return tags | {"version.python": platform.python_version(), "mlflow.source.git.commit": _revision()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _revision() -> str | None:
    """The commit that this file is checked out from, marked where the tree has changes; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # an environment may lie in somebody else's checkout
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None
    except (OSError, subprocess.SubprocessError):
        return None


def _expect_server(uri: str) -> None:
    """Raises OSError if nothing listens at an http address; MLflow would go on trying for minutes."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        return
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname):
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((parts.hostname, port), timeout=10).close()
