"""Trains several runs in one warm group of two workers, and prints what became of each. A program for tests.

    warm_group.py DIRECTORY diverging      the second run diverges, on both workers
    warm_group.py DIRECTORY alone          the second run fails on one worker, while the other waits for it
    warm_group.py DIRECTORY killed         a worker is killed while it trains the second run
    warm_group.py DIRECTORY shared         the workers share a GPU, on which an attack runs between the runs
    warm_group.py DIRECTORY crowded        there is no room for the workers, nor does any come

Ray is told of a GPU that isn't there, so that what has a share of it runs on the CPU.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from listeners import parents

from raytrust.cluster.runtime import cluster  # first: it says what Ray reads when it is imported

import ray  # isort: skip
from toys import synthetic

import raytrust.cluster.groups
from raytrust.cluster.failures import TrainingFailed
from raytrust.cluster.groups import TrainingGroups, training_groups
from raytrust.cluster.placement import Placement, place
from raytrust.cluster.runner import remote
from raytrust.cluster.training import train_on_cluster
from raytrust.config import CaptureConfig, Defence, ModelConfig, PowerSGDConfig, TrainConfig
from raytrust.data import Dataset
from raytrust.studies.frontier.store import Store

STEPS = 6
RUN = TrainConfig(
    model=ModelConfig("convnet", width=2), capture=CaptureConfig((0, 3), 1, 1), workers=2, batch_size=4, steps=STEPS
)
FIRST, THIRD = RUN, replace(RUN, defence=Defence(PowerSGDConfig(1), error_feedback=True))
DIVERGING = replace(RUN, learning_rate=1e30)
LONG = replace(RUN, steps=400)


@dataclass(frozen=True, eq=False)
class Faulty(Dataset):
    """Images that the second worker can't read while the file `marker` exists."""

    marker: str = ""

    def __getattribute__(self, name: str) -> Any:
        marker = object.__getattribute__(self, "marker")
        if name == "train_images" and os.environ.get("RANK") == "1" and os.path.exists(marker):
            raise OSError(28, "No space left on device")
        return object.__getattribute__(self, name)


def images(marker: str = "") -> Dataset:
    data = synthetic(channels=1)
    fields = data.train_images, data.train_labels, data.test_images, data.test_labels, data.classes
    return Faulty("faulty", *fields, marker=marker) if marker else data


def workers() -> set[int]:
    """The Train workers below this process."""
    known = parents()
    found = set()
    for process in known:
        ancestor: int | None = process
        while ancestor not in (os.getpid(), None):
            ancestor = known.get(ancestor or 0)
        try:
            if ancestor and "ray::RayTrainWorker" in Path(f"/proc/{process}/cmdline").read_text():
                found.add(process)
        except OSError:
            continue
    return {process for process in found if known[process] not in found}  # no child that has yet to become another


def shares() -> str:
    """The GPU that a task may use."""
    return f"GPU {ray.get_gpu_ids()}"


def outcome(
    config: TrainConfig, second: TrainConfig, mode: str, groups: TrainingGroups, marker: Path, said: list[str]
) -> Any:
    """The result of a run, or why it failed."""
    if config is second and mode == "alone":
        marker.touch()
    try:
        return train_on_cluster(config, groups._store, groups.queue)
    except TrainingFailed as error:
        return str(error)
    finally:
        marker.unlink(missing_ok=True)
        if mode == "shared":  # while the warm group holds both CPUs and most of the GPU
            said.append(ray.get(remote(shares, 0.0, groups.placement.attack_gpu).remote(), timeout=120))


def main(root: Path, mode: str) -> None:
    marker = root / "full"
    data = images(str(marker)) if mode == "alone" else images()
    second = {"diverging": DIVERGING, "killed": LONG}.get(mode, replace(RUN, seed=1))
    store = Store(root, images().fingerprint())
    said: list[str] = []
    seen: set[int] = set()
    done = threading.Event()

    def watch() -> None:
        killing = mode == "killed"
        while not done.wait(0.05):
            seen.update(alive := workers())
            if killing and list(store.run_directory(second).glob("step-000003/seen-*.pt")):
                os.kill(max(alive), signal.SIGKILL)
                killing = False

    ray.init = functools.partial(ray.init, num_gpus=1)
    watcher = threading.Thread(target=watch)
    outcomes: list[Any] = []
    if mode == "crowded":
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "1"
        raytrust.cluster.groups.GROWTH = 15.0
    with cluster(None, 2):
        watcher.start()
        try:
            try:
                training_groups(2, data, store, "cuda")
            except ValueError as error:
                said.append(str(error))
            if mode == "shared":
                placement = replace(place(2, [{"CPU": 2, "GPU": 1}], sees_cuda=True), device="cpu")
                groups = TrainingGroups(2, data, store, placement)
            elif mode == "crowded":
                groups = TrainingGroups(3, data, store, Placement("cpu", 0), growing=True, say=said.append)
            else:
                groups = training_groups(2, data, store, "auto", say=said.append)
            try:
                with groups:
                    groups.start()
                    outcomes += [
                        outcome(config, second, mode, groups, marker, said) for config in (FIRST, second, THIRD)
                    ]
            except ConnectionError as error:
                said.append(str(error))
            started = time.monotonic()
            while ray.available_resources().get("CPU") != 2 and time.monotonic() < started + 30:
                time.sleep(0.05)
            free = ray.available_resources().get("CPU")
        finally:
            done.set()
            watcher.join()
    runs = len(list((root / "ray" / "train").glob("group-*")))
    print(json.dumps({"said": said, "outcomes": outcomes, "workers": len(seen), "free": free, "runs": runs}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
