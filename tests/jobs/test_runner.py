"""The runner of this process: each job once, failures with their reasons, an end in time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from jobs_toys import Batch, Notes, Root, Square

from raytrust.jobs.job import Place
from raytrust.jobs.runner import Local, each, work
from raytrust.jobs.store import JobStore


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path)


def test_each_job_is_done_once_and_told_of(store: JobStore) -> None:
    notes = Notes()
    jobs = [Square(3), Square(-1), Root(Square(3)), Square(3)]
    Local({}).run(each(store, jobs), notes)
    assert [told[0] for told in notes.told] == ["started", "finished", "started", "failed", "started", "finished"]
    result = notes.told[1][2]
    assert (result["square"], result["job_cost"]) == (9, 3.0)
    assert result["job_seconds"] >= 0
    assert notes.told[3] == ("failed", "squares", "Expected number=-1 to be at least 0.")
    assert store.result(Root(Square(3)))["root"] == 3  # type: ignore[index]
    Local({}).run([(store, tuple(jobs))], again := Notes())
    assert again.told == []


def test_an_error_that_nobody_foresaw_fails_one_job_of_a_batch(store: JobStore) -> None:
    good = work(store, [Batch(1), Batch(2)], Place())
    assert [store.result(o.job)["together"] for o in good] == [[1, 2]] * 2  # type: ignore[index]
    outcomes = work(store, [Batch(3), Batch(99), Batch(4)], Place())
    assert [o.reason for o in outcomes] == [None, "MemoryError: no room", None]
    assert store.failure(Batch(99)) == "MemoryError: no room"


def test_no_job_is_begun_when_time_is_up(store: JobStore) -> None:
    Local({}).run(each(store, [Square(1)]), notes := Notes(), until=time.time() - 1)
    assert notes.told == []
    assert not store.knows(Square(1))


def test_an_interrupt_passes_and_leaves_what_is_done(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Square.run

    def interrupted(self: Square, *arguments: object) -> object:
        if self.number == 2:
            raise KeyboardInterrupt
        return run(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Square, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Local({}).run(each(store, [Square(1), Square(2), Square(3)]), Notes())
    assert [store.knows(Square(n)) for n in (1, 2, 3)] == [True, False, False]


def test_a_job_without_the_data_that_it_needs_says_so() -> None:
    with pytest.raises(ValueError, match=r"Expected data for this job, got data=None\."):
        _ = Place().images
