"""Warm training groups as processes: what they train, whether alone or after others, and what becomes of failures."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_group

from raytrust.config import TrainConfig
from raytrust.jobs.captures import load_captures, save_capture
from raytrust.leak.observation import Capture
from raytrust.studies.frontier.store import Store
from raytrust.train.loop import Evaluation, Step, train
from raytrust.wire.channel import Channel
from raytrust.wire.processes import in_processes

pytestmark = [
    pytest.mark.timeout(900),  # of a busy machine; a quiet one needs half a minute
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="watches processes in /proc"),
]


def in_a_group(folder: Path, mode: str) -> dict[str, Any]:
    program = str(Path(warm_group.__file__))
    run = subprocess.run(
        [sys.executable, program, str(folder), mode], capture_output=True, text=True, timeout=800, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == "" or mode == "killed", run.stderr  # Ray itself says that a worker died
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def alone(channel: Channel) -> dict[str, Any]:
    """The third run of the program in processes that train nothing else."""
    found: dict[str, Any] = {"losses": [], "captures": []}
    for record in train(warm_group.THIRD, warm_group.images(), channel):
        match record:
            case Step():
                found["losses"].append(record.loss)
            case Capture():
                found["captures"].append(record)
            case Evaluation():
                found["evaluation"] = record
    return found


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, tensors inside included."""
    match a:
        case torch.Tensor():
            return a.dtype == b.dtype and torch.equal(a, b)
        case dict():
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        case list() | tuple():
            return len(a) == len(b) and all(map(same, a, b))
    return same(vars(a), vars(b)) if hasattr(a, "__dict__") else bool(a == b)


def captures(store: Store, config: TrainConfig) -> list[Capture]:
    return [c for step in config.capture.steps for c in load_captures(store.run_directory(config), step, range(2))]


def test_a_defence_is_trained_as_if_it_were_the_only_one(tmp_path: Path) -> None:
    """By two processes, of which one defence failed before it; on the CPU, as torch has no GPU, whatever Ray says."""
    found = in_a_group(tmp_path / "store", "diverging")
    first, second, third = found["outcomes"]
    assert (found["runs"], found["workers"]) == (1, 2)
    assert found["free"] == 2
    assert "is not finite at step" in second or "became" in second
    assert len(first["losses"]) == warm_group.STEPS
    assert first["waited_seconds"] < first["total_seconds"]
    refused, told = found["said"]
    assert refused.startswith("Expected device='cuda' to be one that torch can use, but Ray counts a GPU, but torch")
    assert told.startswith("training and attacks run on the CPU: Ray counts a GPU, but torch")
    assert not any("\n" in text for text in found["said"])

    references = in_processes(alone, 2)
    assert third["losses"] == references[0]["losses"]
    assert third["correct"] == references[0]["evaluation"].correct
    assert third["test_loss"] == references[0]["evaluation"].loss
    expected = Store(tmp_path / "alone", "data")
    for capture in [c for rank in references for c in rank["captures"]]:
        save_capture(expected.run_directory(warm_group.THIRD), capture)
    store = Store(tmp_path / "store", warm_group.images().fingerprint())
    assert same(captures(store, warm_group.THIRD), captures(expected, warm_group.THIRD))
    assert not same(captures(store, warm_group.FIRST), captures(expected, warm_group.THIRD))


@pytest.mark.slow
def test_a_failure_of_one_worker_leaves_no_other_waiting(tmp_path: Path) -> None:
    """The group is replaced, and trains what comes next."""
    found = in_a_group(tmp_path, "alone")
    first, second, third = found["outcomes"]
    assert second == "OSError: [Errno 28] No space left on device"
    assert len(first["losses"]) == len(third["losses"]) == warm_group.STEPS
    assert (found["runs"], found["workers"]) == (2, 4)
    assert found["free"] == 2


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(tmp_path: Path) -> None:
    """And what it trained is trained again, from its beginning."""
    found = in_a_group(tmp_path, "killed")
    first, second, third = found["outcomes"]
    assert len(first["losses"]) == len(third["losses"]) == warm_group.STEPS
    assert len(second["losses"]) == warm_group.LONG.steps
    assert (found["runs"], found["workers"]) == (2, 4)
    assert found["free"] == 2
    assert len(captures(Store(tmp_path, warm_group.images().fingerprint()), warm_group.LONG)) == 4


@pytest.mark.slow
def test_workers_and_an_attack_share_a_gpu(tmp_path: Path) -> None:
    """As far as Ray counts: a task finds room on the GPU beside two warm workers, and no CPU is left to wait for."""
    found = in_a_group(tmp_path, "shared")
    assert [len(outcome["losses"]) for outcome in found["outcomes"]] == [warm_group.STEPS] * 3
    assert found["said"][1:] == ["GPU [0]"] * 3
    assert (found["runs"], found["workers"]) == (1, 2)
    assert found["free"] == 2


@pytest.mark.slow
def test_workers_without_room_are_not_waited_for_in_silence(tmp_path: Path) -> None:
    """Here there are two CPUs for three workers, and a cluster that may grow is given 15 seconds."""
    found = in_a_group(tmp_path, "crowded")
    assert len(set(found["outcomes"])) == 1
    assert re.fullmatch(r"the cluster had no room for 3 x {'CPU': 1.0} within \d+ s", found["outcomes"][0])
    _, waits, ended = found["said"]
    assert waits == "a training group waits for room on the cluster: 3 x {'CPU': 1.0}"
    assert ended == f"The cluster failed, --resume goes on: {found['outcomes'][0]}"
    assert found["workers"] == 0
