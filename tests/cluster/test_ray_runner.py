"""Jobs on a real Ray: order, failures, lost processes, and an end in time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs_toys import Notes, Root, Square

from raytrust.cluster.runner import OnRay
from raytrust.cluster.runtime import cluster
from raytrust.jobs.runner import each
from raytrust.jobs.store import JobStore


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        tests = str(Path(__file__).parents[1])  # where Ray's workers find the jobs of these tests
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (tests, os.environ.get("PYTHONPATH")))))
        with cluster(None, 2):
            yield


@pytest.mark.usefixtures("ray_cluster")
def test_jobs_on_ray(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    lost_once = Square(13, str(tmp_path / "mark"))
    lost = Square(13)
    jobs = [Root(Square(3)), Square(-1), *(Square(n) for n in range(4)), lost_once, Root(Square(-1))]
    notes = Notes()
    OnRay({}, 2).run([*each(store, jobs), (store, (lost, Square(5)))], notes)
    assert store.missing([*jobs, lost, Square(5)]) == []
    assert store.result(Root(Square(3)))["root"] == 3  # type: ignore[index]  # after what it reads
    assert store.failure(Root(Square(-1))) == (
        "Expected this to be done: square of -1, but Expected number=-1 to be at least 0."
    )
    assert store.finished(lost_once)  # tried again
    reason = store.failure(lost)
    assert reason is not None
    assert "\n" not in reason
    assert store.finished(Square(5))  # which was in one task with it
    processes = {store.result(Square(n))["process"] for n in range(4)}  # type: ignore[index]
    assert os.getpid() not in processes
    assert sum(told[0] == "finished" for told in notes.told) == 7
    assert sum(told[0] == "failed" for told in notes.told) == 3


@pytest.mark.usefixtures("ray_cluster")
def test_none_is_begun_when_time_is_up(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    OnRay({}, 2).run(each(store, [Square(1), Root(Square(1))]), Notes(), until=time.time() - 1)
    assert store.missing([Square(1), Root(Square(1))]) == [Square(1), Root(Square(1))]
