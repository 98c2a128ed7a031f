"""The sweep's command line as a user runs it, the processes that it starts, and what it leaves in MLflow."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from toys import synthetic

SCRIPT = Path(__file__).resolve().parents[1] / "sweeps" / "privacy_frontier.py"
TINY = ("--width", "4", "--steps", "2", "--iterations", "2", "--images", "2", "--attack-trials", "1")
PATIENCE = 600.0  # seconds: of a machine that has much else to do


def load_script() -> ModuleType:
    """The script as a module of its own, for calls of its `main` in this process."""
    spec = importlib.util.spec_from_file_location("privacy_frontier", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_images(path: Path, **changes: Any) -> Path:
    """An .npz of 64 + 24 images of 8x8 pixels; a change replaces an array, or leaves it out where it is None."""
    data = synthetic(channels=1)
    arrays = {f"{n}_images": getattr(data, f"{n}_images").permute(0, 2, 3, 1).numpy() for n in ("train", "test")}
    arrays |= {f"{n}_labels": getattr(data, f"{n}_labels").numpy() for n in ("train", "test")}
    np.savez(path, **{key: value for key, value in (arrays | changes).items() if value is not None})
    return path


def _default_signals() -> None:
    """A shell that starts the tests in the background, or nohup, has them ignore these, and children inherit that."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@dataclass
class Sweep:
    """A run of the script in a session of its own, as a terminal starts it. Its processes are known by a variable."""

    arguments: tuple[str, ...]
    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self._files = [(self.folder / f"{self.mark}.{name}").open("w+") for name in ("out", "err")]
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *self.arguments],
            cwd=self.folder,
            stdout=self._files[0],
            stderr=self._files[1],
            # A busy machine would starve Ray's workers, which are nicer than others by default.
            env=os.environ | {"RAYTRUST_TEST": self.mark, "RAY_worker_niceness": "0"},
            start_new_session=True,
            preexec_fn=_default_signals,
        )

    @property
    def output(self) -> str:
        return self._read(0)

    @property
    def errors(self) -> str:
        return self._read(1)

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"still running after {seconds} s:\n{self.output}\n{self.errors}") from None

    def wait_for(self, condition: Callable[[], Any]) -> None:
        until = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None or time.monotonic() > until:
                self.end()
                raise AssertionError(f"what was waited for didn't happen:\n{self.output}\n{self.errors}")
            time.sleep(0.05)

    def alive(self) -> list[int]:
        """The processes that the run started, and itself, as far as they still live."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                marked = entry.name.isdigit() and self.mark.encode() in (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0] if marked else ""
            except OSError:  # it has just ended, or isn't ours
                continue
            if marked and state != "Z":
                found.append(int(entry.name))
        return found

    def named(self, title: str) -> list[int]:
        """The processes below the run that bear this title, which Ray writes where the environment was."""
        parents = {}
        titled = []
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdigit():
                    continue
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if title in (entry / "cmdline").read_text():
                    titled.append(int(entry.name))
            except OSError:
                continue

        def below(pid: int) -> bool:
            return pid == self.process.pid or (pid in parents and below(parents[pid]))

        return [pid for pid in titled if below(pid)]

    def left_over(self, seconds: float) -> list[int]:
        """The processes that still live after this time."""
        until = time.monotonic() + seconds
        while (found := self.alive()) and time.monotonic() < until:
            time.sleep(0.2)
        return found

    def end(self) -> None:
        """Kill the run, and wait until nothing of it is left."""
        for pid in [self.process.pid, *self.left_over(0)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        self.left_over(20)

    def _read(self, which: int) -> str:
        return Path(self._files[which].name).read_text()


@dataclass
class MlflowServer:
    """`mlflow server` on a port of its own, in a session of its own."""

    folder: Path
    backend: str

    def __post_init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        options = ("--workers", "1", "--host", "127.0.0.1", "--port", str(self.port))
        places = ("--backend-store-uri", self.backend, "--artifacts-destination", str(self.folder / "artifacts"))
        self._log = (self.folder / "mlflow-server.log").open("a")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *options, *places],
            cwd=self.folder,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            start_new_session=True,
        )
        until = time.monotonic() + PATIENCE
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > until:
                raise AssertionError((self.folder / "mlflow-server.log").read_text())
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200
        except OSError:
            return False

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()


class Logged:
    """What MLflow holds of one sweep: the parent run, its defences by name, and the attacks on each of these."""

    def __init__(self, uri: str, root: Path, sweep: str = "privacy_frontier"):
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=uri)
        experiments = [e.experiment_id for e in self.client.search_experiments()]
        runs = self.client.search_runs(experiments, max_results=1000)
        self.parents = [r for r in runs if r.info.run_name == f"{sweep} {root.name}"]
        self.parent = self.parents[0]
        sweeps = {r.info.run_id for r in self.parents}
        self.below = [r for r in runs if r.data.tags.get("raytrust.sweep") in sweeps]
        self.defences = {r.info.run_name: r for r in self.below if self._parent_of(r) == self.parent.info.run_id}

    def attacks(self, defence: str) -> list[Any]:
        return [r for r in self.below if self._parent_of(r) == self.defences[defence].info.run_id]

    def statuses(self) -> set[str]:
        return {r.info.status for r in [*self.parents, *self.below]}

    def history(self, defence: str, metric: str) -> list[tuple[int, float]]:
        found = self.client.get_metric_history(self.defences[defence].info.run_id, metric)
        return sorted((m.step, m.value) for m in found)

    def artifacts(self, run: Any, path: str | None = None) -> set[str]:
        """The files of a run, those in folders too."""
        found = self.client.list_artifacts(run.info.run_id, path)
        below = [self.artifacts(run, f.path) for f in found if f.is_dir]
        return {f.path for f in found if not f.is_dir}.union(*below)

    @staticmethod
    def _parent_of(run: Any) -> str | None:
        return run.data.tags.get("mlflow.parentRunId")
