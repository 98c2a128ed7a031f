"""Trains on a local cluster with two workers, and prints where it listened meanwhile. A program for a test."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from raytrust.cluster.runtime import cluster  # first: it says what Ray reads when it is imported

import ray  # isort: skip
from raytrust.cluster.groups import training_groups
from raytrust.cluster.training import train_on_cluster
from raytrust.config import CaptureConfig, ModelConfig, TrainConfig
from raytrust.data import load
from raytrust.studies.frontier.store import Store


def parents() -> dict[int, int]:
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit():
                found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    return found


def sockets() -> Iterator[tuple[str, str]]:
    """The sockets of this process and of those below it, with the titles of these."""
    known = parents()
    for process in known:
        ancestor: int | None = process
        while ancestor not in (os.getpid(), None):
            ancestor = known.get(ancestor or 0)
        try:
            names = [os.readlink(link) for link in Path(f"/proc/{process}/fd").iterdir()] if ancestor else []
            title = Path(f"/proc/{process}/cmdline").read_text().partition("\0")[0]
        except OSError:
            continue
        yield from ((name[8:-1], title) for name in names if name.startswith("socket:["))


def listening() -> Iterator[tuple[str, str]]:
    """Addresses as the kernel writes them, and who listens there."""
    owners = dict(sockets())
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in owners:
                yield fields[1].partition(":")[0], owners[fields[9]]


def main(root: Path) -> None:
    model, capture = ModelConfig("convnet", width=2), CaptureConfig((0,), 1, 1)
    config = TrainConfig(model=model, capture=capture, workers=2, batch_size=8, steps=200)
    data = load("digits")
    store = Store(root, data.fingerprint())
    found: set[tuple[str, str]] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            found.update(listening())

    watcher = threading.Thread(target=watch)
    with cluster(None, 2):
        watcher.start()
        try:
            with training_groups(2, data, store) as groups:
                ray.get(ray.remote(num_cpus=0)(train_on_cluster).remote(config, store, groups.queue))
        finally:
            done.set()
            watcher.join()
    for address, title in sorted(found):
        print(address, title)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
