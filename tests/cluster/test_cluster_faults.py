"""Several nodes on one machine: one that vanishes with its trial, two sweeps at once, workers nobody else may reach."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from sweep_fixtures import TINY, Logged, Sweep, save_images

from raytrust.jobs.files import read_json
from raytrust.reports.mlflow import default_uri
from raytrust.studies.frontier.row import load_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="watches processes in /proc"),
]
ONE = ("--workers", "1", "--trials", "1", "--defence", "none", *TINY, "--attack-trials", "0")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without work, and two nodes of one CPU and one slot."""
    with pytest.MonkeyPatch.context() as context:
        context.setenv("RAY_AUTH_MODE", "disabled")
        context.setenv("RAY_health_check_period_ms", "1000")
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 * 2**20})
        for _ in range(2):
            add_node(found)
        yield found
        found.shutdown()


def add_node(cluster: Cluster) -> None:
    cluster.add_node(num_cpus=1, resources={"trial_slot": 1}, object_store_memory=100 * 2**20)


@pytest.fixture
def sweeps(tmp_path: Path) -> Iterator[list[Sweep]]:
    started: list[Sweep] = []
    yield started
    for sweep in started:
        sweep.end()


def start(cluster: Cluster, folder: Path, output: str, *arguments: str) -> Sweep:
    images = str(save_images(folder / "images.npz"))
    return Sweep(("--data", images, "--output", output, "--address", cluster.address, *ONE, *arguments), folder)


def pids(title: str) -> dict[int, int]:
    """Processes with this title, and their parents."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and title in (entry / "cmdline").read_text():
                found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    return found


def test_a_node_that_vanishes_with_its_trial(cluster: Cluster, tmp_path: Path, sweeps: list[Sweep]) -> None:
    """The trial is tried again on another node."""
    root = tmp_path / "results"
    sweep = start(cluster, tmp_path, "results", "--steps", "300")
    sweeps.append(sweep)
    sweep.wait_for(lambda: list(root.glob("captures/*/step-000020/seen-*.pt")))
    raylets = {n.all_processes["raylet"][0].process.pid: n for n in cluster.worker_nodes}
    holders = {parent for parent in pids("ray::RayTrainWorker").values() if parent in raylets}
    (holder,) = holders
    cluster.remove_node(raylets[holder], allow_graceful=False)
    assert not list(root.glob("captures/*.json"))
    add_node(cluster)
    assert sweep.wait() == 0, sweep.output + sweep.errors
    (row,) = load_rows(root / "frontier.json")
    assert row["status"] == "finished", row["reason"]
    assert "FAILED" not in sweep.output
    training = read_json(root / "captures" / f"{row['run']}.json")
    assert len(training["losses"]) == 300
    assert Logged(default_uri(root), root).statuses() == {"FINISHED"}


def test_two_sweeps_on_one_cluster(cluster: Cluster, tmp_path: Path, sweeps: list[Sweep]) -> None:
    for name in ("first", "second"):
        sweeps.append(start(cluster, tmp_path, name))
    for sweep, name in zip(sweeps, ("first", "second"), strict=True):
        assert sweep.wait() == 0, sweep.output + sweep.errors
        (row,) = load_rows(tmp_path / name / "frontier.json")
        assert row["status"] == "finished"
    first, second = (load_rows(tmp_path / name / "frontier.json")[0] for name in ("first", "second"))
    assert first["accuracy"] == second["accuracy"]  # the same sweep, whatever ran beside it


PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
from raytrust.compress import Base
from raytrust.config import CompressorConfig, register

@dataclass(frozen=True)
class Options(CompressorConfig):
    method: ClassVar[str] = "doubled"
    level: float = 0.5

@register.compressor(Options)
class Doubled(Base):
    pass
"""


def test_a_plugin_reaches_workers_on_other_machines(cluster: Cluster, tmp_path: Path) -> None:
    """The file itself is handed to them; on this machine they import the user's own."""
    path = tmp_path / "doubled_plugin.py"
    path.write_text(PLUGIN)
    program = [sys.executable, str(Path(__file__).parents[1] / "plugged.py"), str(path)]
    for address in ([], [cluster.address]):
        done = subprocess.run([*program, *address], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        known = json.loads(done.stdout)
        assert known["same"]
        assert known["config"]["compressor"] == {"method": "doubled", "level": 0.25}
        assert (known["file"] == str(path)) == (address == [])


# As the kernel writes 127.0.0.1, ::1 and the first in a socket of both kinds.
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def test_all_that_a_local_sweep_starts_listens_on_the_loopback_interface(tmp_path: Path) -> None:
    """Ray's servers and workers, torch's process group of two workers and its meeting point."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    run = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "listeners.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = [line.split(maxsplit=1) for line in run.stdout.splitlines()]
    titles = " ".join(title for _, title in found)
    for name in ("gcs_server", "raylet", "RayTrainWorker"):
        assert name in titles
    assert {address for address, _ in found} <= LOOPBACK, run.stdout


LOCAL = """
import sys
import ray
from raytrust.cluster.runtime import cluster
with cluster(None, 1):
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.readline()
"""
GUEST = """
import os, sys
import ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
print("in", ray.cluster_resources()["CPU"])
"""


def test_a_local_cluster_lets_nobody_else_in(tmp_path: Path) -> None:
    """Other users of the machine reach its loopback interface."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    environment["HOME"] = str(tmp_path)  # without a token of the user's
    host = subprocess.Popen(
        [sys.executable, "-c", LOCAL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert host.stdout is not None
    assert host.stdin is not None
    try:
        address = host.stdout.readline().strip()
        assert address, "no cluster"
        for mode in ({}, {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
            guest = subprocess.run(
                [sys.executable, "-c", GUEST, address],
                capture_output=True,
                text=True,
                env=environment | mode | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},  # so that it asks on 127.0.0.1
                timeout=300,
                check=False,
            )
            assert guest.returncode != 0
            assert guest.stdout == ""
            assert "uthenticat" in guest.stderr, guest.stderr
        assert not (tmp_path / ".ray" / "auth_token").exists()
    finally:
        host.communicate("\n", timeout=120)
    assert host.returncode == 0
