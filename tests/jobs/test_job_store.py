"""What is kept of jobs, and what is said of those that have nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs_toys import Batch, Root, Square

from raytrust.jobs.files import read_json
from raytrust.jobs.job import Place, Result
from raytrust.jobs.store import FORMAT, JobStore, claim


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path, "data")


def test_equal_jobs_are_one_job_and_others_are_not(store: JobStore) -> None:
    keys = [store.key(job) for job in (Square(2), Square(3), Batch(2), Root(Square(2)))]
    assert len(set(keys)) == 4
    assert store.key(Square(2)) == keys[0]
    assert JobStore(store.root, "other").key(Square(2)) != keys[0]
    assert JobStore(store.root / "elsewhere", "data").key(Square(2)) == keys[0]


def test_a_result_comes_back(store: JobStore) -> None:
    job = Square(4)
    assert store.result(job) is None
    assert not store.knows(job)
    store.put(job, Result({"square": 16}, {"row": np.arange(4), "table/0": np.ones((2, 2))}))
    assert store.result(job) == {"square": 16, "job": {"number": 4, "mark": ""}}
    assert np.array_equal(store.arrays(job)["row"], np.arange(4))
    assert list(store.arrays(job, "table/")) == ["0"]
    assert {p.stat().st_mode & 0o777 for p in (store.root / "squares").iterdir()} == {0o600}


def test_arrays_of_what_is_not_done_are_refused_with_the_reason(store: JobStore) -> None:
    with pytest.raises(ValueError, match=r"Expected this to be done: square of 4, but it is not finished\."):
        store.arrays(Square(4))
    store.fail(Square(4), "no luck")
    with pytest.raises(ValueError, match="but no luck"):
        store.arrays(Square(4))


def test_a_job_that_failed_is_known_until_it_is_tried_again(store: JobStore) -> None:
    jobs = [Square(1), Square(2), Square(1), Square(3)]
    store.put(Square(2), Result({}))
    store.fail(Square(3), "no luck")
    assert store.missing(jobs) == [Square(1)]
    assert (store.failure(Square(3)), store.failure(Square(1))) == ("no luck", None)
    assert [f["reason"] for f in store.failures("squares")] == ["no luck"]
    store.clear_failures()
    assert store.missing(jobs) == [Square(1), Square(3)]
    store.fail(Square(3), "no luck")
    store.put(Square(3), Result({}))
    assert store.failure(Square(3)) is None


def test_children_lie_with_their_parent(store: JobStore) -> None:
    for number in (2, 3):
        store.put(Root(Square(number)), Result({"root": number}))
    store.fail(Root(Square(4)), "no luck")
    assert [f["root"] for f in store.results("roots", Square(3))] == [3]
    assert store.results("roots") == []
    assert store.failures("roots", Square(4))[0]["job"] == {"square": {"number": 4, "mark": ""}}
    store.clear_failures()
    assert store.failures("roots", Square(4)) == []


def test_nothing_is_finished_before_its_figures_are_there(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr("raytrust.jobs.store.write_json", full)
        with pytest.raises(OSError, match="No space"):
            store.put(Square(4), Result({"square": 16}, {"row": np.arange(4)}))
    assert not store.knows(Square(4))


def test_a_damaged_file_is_named(store: JobStore) -> None:
    store.put(Square(4), Square(4).run(store, Place()))
    path = next((store.root / "squares").glob("*.npz"))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"Expected .*\.npz to be a job's arrays, but it can't be read"):
        store.arrays(Square(4))


def test_a_directory_holds_one_run(tmp_path: Path) -> None:
    path = tmp_path / "run.json"

    def go_on(a: int, b: int = 0) -> None:
        claim(path, {"a": a, "b": b}, lambda kept: kept["a"], "run")

    go_on(1)
    go_on(1, b=2)  # may change
    assert read_json(path) == {"format": FORMAT, "a": 1, "b": 2}
    with pytest.raises(ValueError, match="to be empty or to hold this run, but it holds another one"):
        go_on(2)
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="but another version of raytrust made it"):
        go_on(1)
