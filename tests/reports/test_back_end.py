"""MLflow as a team has it: a server on PostgreSQL, and its pages in a browser. Screenshots stay in test-artifacts/."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from sweep_fixtures import TINY, Logged, MlflowServer, Sweep, save_images

from raytrust.studies.frontier.row import load_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ARTIFACTS = Path(__file__).resolve().parents[2] / "test-artifacts"
BINARIES = [*Path("/usr/lib/postgresql").glob("*/bin"), *map(Path, os.environ.get("PATH", "").split(":"))]


def binary(name: str) -> str:
    for folder in BINARIES:
        if (folder / name).exists():
            return str(folder / name)
    pytest.skip(f"needs PostgreSQL's {name}")


class Postgres:
    """A database server of its own on the loopback interface; PostgreSQL refuses to run as root."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._data = folder / "data"
        self._as = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if self._as:
            shutil.chown(folder, "postgres")
        self._run("initdb", "--pgdata", str(self._data), "--auth", "trust", "--username", "mlflow", "--no-sync")
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {folder} -c fsync=off"
        self._run(
            "pg_ctl", "--pgdata", str(self._data), "--wait", "--options", options, "--log", f"{folder}/log", "start"
        )
        self.uri = f"postgresql+psycopg2://mlflow@127.0.0.1:{self.port}/postgres"

    def _run(self, name: str, *arguments: str) -> str:
        command = [*self._as, binary(name), *arguments]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/", check=False
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def ask(self, question: str) -> str:
        options = "options='-c default_transaction_read_only=off'"  # of this session, whatever the database's default
        database = f"dbname=postgres user=mlflow host=127.0.0.1 port={self.port} {options}"
        return self._run("psql", "--dbname", database, "--tuples-only", "--no-align", "--command", question).strip()

    def read_only(self, on: bool) -> None:
        self.ask(f"ALTER DATABASE postgres SET default_transaction_read_only = {'on' if on else 'off'}")
        self.ask(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname <> ''"
        )

    def stop(self) -> None:
        self._run("pg_ctl", "--pgdata", str(self._data), "--mode", "immediate", "stop")


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    pytest.importorskip("psycopg2")
    binary("initdb")
    with tempfile.TemporaryDirectory(prefix="rt-postgres-") as folder:  # another user can't enter pytest's own
        found = Postgres(Path(folder))
        yield found
        found.stop()


@pytest.fixture(scope="module")
def server(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    found = MlflowServer(tmp_path_factory.mktemp("server"), postgres.uri)
    found.start()
    yield found
    found.kill()


class Swept:
    """A sweep of two defences that logged to the server."""

    def __init__(self, folder: Path, server: MlflowServer):
        self.root = folder / "results"
        images = str(save_images(folder / "images.npz"))
        named = ("--workers", "1", "--defence", "none", "--defence", "powersgd:1", "--trials", "2", *TINY)
        sweep = Sweep(("--data", images, "--output", "results", "--tracking-uri", server.uri, *named), folder)
        try:
            assert sweep.wait() == 0, sweep.output + sweep.errors
        finally:
            sweep.end()
        assert f"\n  {server.uri}\n" in sweep.output
        self.logged = Logged(server.uri, self.root)


@pytest.fixture(scope="module")
def swept(server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    return Swept(tmp_path_factory.mktemp("swept"), server)


def test_a_sweep_on_postgresql(swept: Swept, postgres: Postgres) -> None:
    logged = swept.logged
    assert logged.statuses() == {"FINISHED"}
    assert set(logged.defences) == {"none", "PowerSGD rank 1"}
    for row in load_rows(swept.root / "frontier.json"):
        metrics = logged.defences[row["name"]].data.metrics
        assert (metrics["accuracy"], metrics["leakage_ssim"]) == (row["accuracy"], row["leakage_ssim"])
        assert "reconstructions.png" in logged.artifacts(logged.defences[row["name"]])
    assert int(postgres.ask("SELECT count(*) FROM runs")) == 1 + len(logged.below)
    assert not list(swept.root.glob("mlflow.db"))


def test_a_database_that_is_read_only_for_a_while(
    postgres: Postgres, server: MlflowServer, swept: Swept, tmp_path: Path
) -> None:
    """From the beginning of training until all else is done; another sweep is in the database and stays as it was."""
    before = int(postgres.ask("SELECT count(*) FROM runs"))
    root = tmp_path / "results"
    images = str(save_images(tmp_path / "images.npz"))
    named = ("--workers", "1", "--defence", "none", "--trials", "1", *TINY, "--attack-trials", "0")
    sweep = Sweep(("--data", images, "--output", "results", "--tracking-uri", server.uri, *named), tmp_path)
    try:
        sweep.wait_for(lambda: list(root.glob("captures/*/config.json")))
        postgres.read_only(True)
        sweep.wait_for(lambda: (root / "frontier.json").exists())
        assert "MLflow can't be reached" in sweep.output
        assert int(postgres.ask("SELECT count(*) FROM runs")) == before + 1
        postgres.read_only(False)
        assert sweep.wait() == 0, sweep.output + sweep.errors
    finally:
        sweep.end()
        postgres.read_only(False)
    assert "MLflow is back and has everything" in sweep.output
    (row,) = load_rows(root / "frontier.json")
    logged = Logged(server.uri, root)
    assert logged.statuses() == {"FINISHED"}
    assert logged.defences["none"].data.metrics["accuracy"] == row["accuracy"]


@pytest.fixture
def browse(tmp_path: Path) -> Callable[[str, str], str]:
    """Opens a page, keeps what it looks like, and returns what it holds."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1600,1300", "--hide-scrollbars")
    patience = ("--virtual-time-budget=60000", f"--user-data-dir={tmp_path}/profile")

    def open_page(url: str, name: str) -> str:
        ARTIFACTS.mkdir(exist_ok=True)
        picture = ARTIFACTS / f"{name}.png"
        picture.unlink(missing_ok=True)
        for what in (f"--screenshot={picture}", "--dump-dom"):
            done = subprocess.run(
                [browser, *flags, *patience, what, url], capture_output=True, text=True, timeout=600, check=False
            )
            assert done.returncode == 0, done.stderr
        with Image.open(picture) as image:
            assert image.size[0] == 1600
            colours = image.convert("RGB").getcolors(2**24)
            assert colours is not None
            assert len(colours) > 50, "an empty page"
        return done.stdout

    return open_page


def test_the_pages_of_mlflow(swept: Swept, server: MlflowServer, browse: Callable[[str, str], str]) -> None:
    """The runs of the experiment, the parent with its children, and the comparison that the README promises."""
    logged = swept.logged
    experiment = logged.parent.info.experiment_id
    base = f"{server.uri}/#/experiments/{experiment}"
    page = browse(f"{base}/runs", "mlflow-runs")
    assert logged.parent.info.run_name in page
    page = browse(f"{base}/runs/{logged.parent.info.run_id}", "mlflow-parent")
    for name in logged.defences:
        assert name in page, f"the parent's page does not show its child {name}"
    runs = json.dumps([run.info.run_id for run in logged.defences.values()])
    query = urllib.parse.urlencode({"runs": runs, "experiments": json.dumps([experiment])})
    page = browse(f"{server.uri}/#/compare-runs?{query}", "mlflow-comparison")
    for word in (*logged.defences, "compression_ratio", "leakage_ssim", "accuracy"):
        assert word in page, f"the comparison does not show {word}"
