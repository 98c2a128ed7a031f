"""The queue between trials and training groups: who gets which job, what is tried again, and when groups end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from raytrust.cluster.job_queue import BAD_STARTS, JobQueue

RETRIES = 2
Body = Callable[[JobQueue], Coroutine[Any, Any, None]]


def run(body: Body, workers: int = 2, most: int = 1, idle: float = 5.0, grace: float = 5.0) -> None:
    async def within() -> None:
        await asyncio.wait_for(body(JobQueue(workers, most, RETRIES, idle, grace)), 20)

    asyncio.run(within())


def ask(queue: JobQueue, key: str) -> asyncio.Task[dict[str, Any]]:
    return asyncio.create_task(queue.train(key, {"of": key}))


async def start(queue: JobQueue) -> str:
    """A group that is wanted."""
    name, _ = await soon(queue.wanted())
    return str(name)


async def soon(awaitable: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(awaitable, 2)


async def never(awaitable: Awaitable[Any]) -> None:
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(awaitable, 0.05)


async def take(queue: JobQueue, group: str, number: int) -> Any:
    """The job as both ranks see it, begun."""
    job = await soon(queue.job(group, number, 0))
    if job is not None:
        await queue.begun(group)
    assert await soon(queue.job(group, number, 1)) == job
    return job


async def finish(queue: JobQueue, group: str, number: int) -> None:
    for rank in (1, 0):
        await queue.done(group, number, rank, {"rank": rank})


def test_jobs_are_trained_in_order_by_one_group() -> None:
    async def body(queue: JobQueue) -> None:
        asked = [ask(queue, key) for key in "abc"]
        group = await start(queue)
        for number, key in enumerate("abc"):
            assert await take(queue, group, number) == {"of": key}
            assert await take(queue, group, number) == {"of": key}  # asking again changes nothing
            await finish(queue, group, number)
            assert (await soon(asked[number]))["result"] == {"rank": 0}
        await never(queue.wanted())

    run(body)


def test_a_job_is_read_by_others_only_when_its_directory_is_ready() -> None:
    async def body(queue: JobQueue) -> None:
        ask(queue, "a")
        group = await start(queue)
        assert await soon(queue.job(group, 0, 0)) == {"of": "a"}
        await never(queue.job(group, 0, 1))
        await queue.begun(group)
        assert await soon(queue.job(group, 0, 1)) == {"of": "a"}

    run(body)


def test_a_result_waits_for_all_ranks_and_for_who_asks_again() -> None:
    async def body(queue: JobQueue) -> None:
        first = ask(queue, "a")
        group = await start(queue)
        await take(queue, group, 0)
        await queue.done(group, 0, 0, {"rank": 0})
        await never(asyncio.shield(first))
        await queue.done(group, 0, 1, {"rank": 1})
        assert (await soon(first))["result"] == {"rank": 0}
        assert (await soon(ask(queue, "a")))["result"] == {"rank": 0}  # the trial that had asked was lost
        await queue.settle("a")
        await never(ask(queue, "a"))  # a new job

    run(body)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_as_many_groups_as_jobs_wait_but_no_more_than_allowed(most: int) -> None:
    async def body(queue: JobQueue) -> None:
        await never(queue.wanted())
        asked = [ask(queue, key) for key in "ab"]
        for _ in range(min(most, len(asked))):
            assert await soon(queue.wanted())
        await never(queue.wanted())

    run(body, most=most)


def test_a_group_on_its_way_or_at_leisure_is_enough() -> None:
    async def body(queue: JobQueue) -> None:
        await queue.enrol("first")
        ask(queue, "a")
        await never(queue.wanted())
        await take(queue, "first", 0)
        ask(queue, "b")
        assert await soon(queue.wanted())

    run(body, most=5)


def test_an_idle_group_ends_and_another_comes_for_later_jobs() -> None:
    async def body(queue: JobQueue) -> None:
        await queue.enrol("first")
        assert await take(queue, "first", 0) is None
        later = ask(queue, "a")
        await never(queue.wanted())  # one at a time
        await queue.ended("first")
        group = await start(queue)
        await take(queue, group, 0)
        await finish(queue, group, 0)
        assert "result" in await soon(later)

    run(body, idle=0.1)


@pytest.mark.parametrize("end", ["expected", "closed"])
def test_groups_end_at_once_when_there_is_nothing_more_to_do(end: str) -> None:
    async def body(queue: JobQueue) -> None:
        await queue.expect(2)
        ask(queue, "a")
        group = await start(queue)
        await take(queue, group, 0)
        await finish(queue, group, 0)
        await queue.settle("a")
        waiting = asyncio.create_task(take(queue, group, 1))
        await never(asyncio.shield(waiting))
        await (queue.settle("known all along") if end == "expected" else queue.close())
        assert await waiting is None
        if end == "closed":
            assert await soon(queue.wanted()) is None

    run(body, idle=100)


def test_the_job_of_a_lost_group_is_the_next_one_and_is_given_up_in_the_end() -> None:
    async def body(queue: JobQueue) -> None:
        first, second = ask(queue, "a"), ask(queue, "b")
        for attempt in range(RETRIES + 1):
            group = await start(queue)
            assert await take(queue, group, 0) == {"of": "a"}, attempt
            assert not first.done()
            assert await queue.ended(group, "ActorDiedError: gone") is None
        assert await soon(first) == {"failure": "ActorDiedError: gone"}
        group = await start(queue)
        assert await take(queue, group, 0) == {"of": "b"}
        await finish(queue, group, 0)
        assert "result" in await soon(second)

    run(body)


def test_a_finished_job_is_not_trained_again_when_its_group_is_lost() -> None:
    async def body(queue: JobQueue) -> None:
        first, second = ask(queue, "a"), ask(queue, "b")
        group = await start(queue)
        await take(queue, group, 0)
        await finish(queue, group, 0)
        await take(queue, group, 1)
        await queue.ended(group, "lost")
        assert "result" in await soon(first)
        group = await start(queue)
        assert await take(queue, group, 0) == {"of": "b"}
        await never(asyncio.shield(second))

    run(body)


def test_a_failure_of_all_ranks_leaves_the_group_to_the_next_job() -> None:
    async def body(queue: JobQueue) -> None:
        first, second = ask(queue, "a"), ask(queue, "b")
        group = await start(queue)
        await take(queue, group, 0)
        told = [asyncio.create_task(queue.failed(group, 0, rank, f"nan at {rank}")) for rank in (1, 0)]
        assert await soon(asyncio.gather(*told)) == [True, True]
        assert (await soon(first))["failure"] == "nan at 0"
        assert await take(queue, group, 1) == {"of": "b"}
        await finish(queue, group, 1)
        assert "result" in await soon(second)

    run(body)


def test_a_failure_that_the_others_do_not_share_ends_the_group() -> None:
    """They may be waiting in a collective."""

    async def body(queue: JobQueue) -> None:
        first = ask(queue, "a")
        group = await start(queue)
        await take(queue, group, 0)
        assert await soon(queue.failed(group, 0, 1, "nan")) is False
        assert (await soon(first))["failure"] == "nan"

    run(body, grace=0.1)


def test_a_failure_of_one_rank_fails_its_job_alone() -> None:
    async def body(queue: JobQueue) -> None:
        first, second = ask(queue, "a"), ask(queue, "b")
        group = await start(queue)
        await take(queue, group, 0)
        await queue.spoiled(group, 0, "OSError: disk full")
        assert (await soon(first))["failure"] == "OSError: disk full"
        await queue.ended(group, "RuntimeError: connection closed by peer")
        assert (await soon(first))["failure"] == "OSError: disk full"
        group = await start(queue)
        assert await take(queue, group, 0) == {"of": "b"}
        await finish(queue, group, 0)
        assert "result" in await soon(second)

    run(body)


def test_groups_that_never_start_fail_what_waits() -> None:
    async def body(queue: JobQueue) -> None:
        first, second = ask(queue, "a"), ask(queue, "b")
        for attempt in range(BAD_STARTS):
            broken = await queue.ended(await start(queue), "ImportError: no torch")
            assert (broken is not None) == (attempt == BAD_STARTS - 1)
        assert [await soon(first), await soon(second)] == [{"failure": "ImportError: no torch"}] * 2
        assert await soon(ask(queue, "c")) == {"failure": "ImportError: no torch"}
        await never(queue.wanted())

    run(body)


def test_a_group_without_room_is_done_without_if_others_run() -> None:
    async def body(queue: JobQueue) -> None:
        asked = [ask(queue, key) for key in "abc"]
        one, two = await start(queue), await start(queue)
        await take(queue, one, 0)
        assert await queue.ended(two, "no room", late=True) is None
        await never(queue.wanted())  # the cluster does not grow
        for number in range(3):
            assert await take(queue, one, number) == {"of": "abc"[number]}
            await finish(queue, one, number)
        for outcome in await soon(asyncio.gather(*asked)):
            assert "result" in outcome

    run(body, most=2)


def test_without_any_room_all_fails() -> None:
    async def body(queue: JobQueue) -> None:
        first = ask(queue, "a")
        assert await queue.ended(await start(queue), "no room", late=True) == "no room"
        assert await soon(first) == {"failure": "no room"}

    run(body)


def test_waiting_is_measured_until_a_group_begins() -> None:
    async def body(queue: JobQueue) -> None:
        first = ask(queue, "a")
        group = await start(queue)
        await asyncio.sleep(0.2)
        await take(queue, group, 0)
        await asyncio.sleep(0.3)
        await finish(queue, group, 0)
        assert 0.15 < (await soon(first))["waited"] < 0.45

    run(body)


def test_a_group_is_started_where_a_trial_waits_for_it() -> None:
    async def body(queue: JobQueue) -> None:
        asked = [asyncio.create_task(queue.train(key, {}, f"node of {key}")) for key in "ab"]
        assert [(await soon(queue.wanted()))[1] for _ in range(2)] == ["node of a", "node of b"]
        assert not any(a.done() for a in asked)

    run(body, most=2)
