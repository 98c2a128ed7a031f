"""A sweep on a cluster that begins with a head alone: a true autoscaler adds nodes for it and removes them after it.

The provider is Ray's own fake one, whose nodes are processes on this machine; the autoscaler is the one of a cloud.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from sweep_fixtures import PATIENCE, TINY, Sweep, save_images

from raytrust.studies.frontier.row import load_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="watches processes in /proc"),
]
HEAD = "FAKE_HEAD_NODE_ID"  # by this name the provider knows the node that runs it


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Scaled:
    """A head without work, with an autoscaler that may add two nodes of one CPU and one slot each."""

    def __init__(self, folder: Path):
        port = free_port()
        address = subprocess.run(
            [sys.executable, "-c", "import ray; print(ray.util.get_node_ip_address())"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        self.address = f"{address}:{port}"
        node = {"node_config": {}, "min_workers": 0, "max_workers": 2, "resources": {"CPU": 1, "trial_slot": 1}}
        config = {
            "cluster_name": "raytrust",
            "max_workers": 2,
            "idle_timeout_minutes": 0.1,
            "upscaling_speed": 10.0,
            "provider": {
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "gcs_address": self.address,
                "head_node_id": HEAD,
                "launch_multiple": True,
                "disable_node_updaters": True,  # nobody to log in to: the nodes run Ray already
            },
            "available_node_types": {
                "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},  # as the provider calls it
                "worker": node,
            },
            "head_node_type": "ray.head.default",
        }
        config |= {"file_mounts": {}, "cluster_synced_files": [], "auth": {}, "docker": {}}
        for name in ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray"):
            config[f"{name}_commands"] = []
        path = folder / "autoscaler.yaml"
        path.write_text(yaml.safe_dump(config))
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "disabled",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        }
        ray = Path(sys.executable).with_name("ray")
        options = ("--head", "--block", "--num-cpus=0", f"--port={port}", f"--autoscaling-config={path}")
        rest = ("--include-dashboard=false", "--object-store-memory=104857600", "--disable-usage-stats")
        self._log = (folder / "head.log").open("w+")
        self.process = subprocess.Popen(
            [str(ray), "start", *options, *rest],
            env=self.environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def up(self) -> bool:
        host, _, port = self.address.partition(":")
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            return False
        return True

    def raylets(self) -> set[int]:
        """The nodes' own processes, without what they are about to become when they start a worker."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace") if entry.name.isdigit() else ""
                words = command.split("\0")
                if words[0].endswith("raylet/raylet") and f"--gcs-address={self.address}" in words:
                    found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
        return {pid for pid, parent in found.items() if parent not in found}

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for pid in self.raylets():
            os.kill(pid, signal.SIGKILL)
        self._log.close()


@pytest.fixture
def scaled(tmp_path: Path) -> Iterator[Scaled]:
    found = Scaled(tmp_path)
    try:
        wait(found.up, "the head does not answer")
        yield found
    finally:
        found.stop()


def wait(condition: object, otherwise: str, seconds: float = PATIENCE) -> None:
    assert callable(condition)
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, otherwise
        time.sleep(0.2)


def test_nodes_come_for_a_sweep_and_go_after_it(
    scaled: Scaled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait(lambda: len(scaled.raylets()) == 1, "the head's node is missing")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    images = str(save_images(tmp_path / "images.npz"))
    named = ("--workers", "1", "--defence", "none", "--defence", "powersgd:1", "--trials", "2", *TINY)
    sweep = Sweep(
        (
            "--data",
            images,
            "--output",
            "results",
            "--address",
            scaled.address,
            "--parallel",
            "2",
            *named,
            "--attack-trials",
            "0",
        ),
        tmp_path,
    )
    most = 1
    try:
        until = time.monotonic() + PATIENCE
        while sweep.process.poll() is None and time.monotonic() < until:
            most = max(most, len(scaled.raylets()))
            time.sleep(0.2)
        assert sweep.wait() == 0, sweep.output + sweep.errors
    finally:
        sweep.end()
    assert most >= 2, "no node was added"
    assert most <= 3, "more nodes than the configuration allows"
    rows = load_rows(tmp_path / "results" / "frontier.json")
    assert [row["status"] for row in rows] == ["finished"] * 2
    assert re.search(r"2/2 defences trained", sweep.output)
    wait(lambda: len(scaled.raylets()) == 1, "idle nodes stay")
