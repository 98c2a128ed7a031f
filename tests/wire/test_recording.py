"""What a communication hook sends is heard, on one process and on two; and nothing is changed by listening."""

from __future__ import annotations

import os
import sys
import threading
from itertools import chain
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from raytrust.compress import build, ddp_comm_hook
from raytrust.config import Defence, TopKConfig
from raytrust.wire.channel import Channel, LocalChannel, Message, Record, Tap, overheard
from raytrust.wire.processes import copied, default_group, in_processes
from raytrust.wire.recording import record

STEPS, FIRST = 5, 2  # PowerSGD compresses from the third on
RANK = 2


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 12))


def trained(channel: Channel, hook: Any, state: Any, listens: bool) -> tuple[list[Tensor], list[list[Message]]]:
    """(weights at the end, messages of each step)"""
    model = net()
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(state, hook)
    optimiser = torch.optim.SGD(ddp.parameters(), lr=0.1)
    found = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(10 * step + channel.rank)
        x, y = torch.randn(4, 20, generator=generator), torch.randn(4, 12, generator=generator)
        loss = (ddp(x) - y).square().mean()
        optimiser.zero_grad()
        if listens:
            with record() as recorded:
                loss.backward()
            found.append(recorded.messages)
        else:
            loss.backward()
        optimiser.step()
    return [p.detach().clone() for p in model.parameters()], found


def powersgd() -> PowerSGDState:
    return PowerSGDState(None, RANK, start_powerSGD_iter=FIRST, min_compression_rate=1)


def everything(channel: Channel) -> dict[str, Any]:
    model = net()
    ours = ddp_comm_hook(build(Defence(TopKConfig(level=0.1)), model), tap := Tap(channel))
    return {
        "powersgd": trained(channel, powerSGD_hook, powersgd(), listens=True),
        "powersgd unheard": trained(channel, powerSGD_hook, powersgd(), listens=False),
        "fp16": trained(channel, fp16_compress_hook, None, listens=True),
        "topk": (trained(channel, ours, None, listens=True), tap.sent_bytes),
        "collectives": collectives(channel),
    }


def collectives(channel: Channel) -> list[Message]:
    """One of each, sent by worker 0 where one worker sends."""
    x, two = torch.arange(2.0) + 10 * channel.rank, [torch.zeros(2) for _ in range(2)]
    with record() as recorded:
        dist.all_reduce(x.clone(), op=dist.ReduceOp.MAX)
        dist.all_gather([t.clone() for t in two], x)
        dist.all_gather_into_tensor(torch.zeros(4), x)
        dist.broadcast(x.clone(), src=0)
        dist.reduce(x.clone(), dst=0)
        dist.gather(x, two if channel.rank == 0 else None)
        dist.all_reduce(y := x.clone(), async_op=True).get_future().then(lambda _: y.zero_()).wait()
        if channel.rank == 0:
            dist.send(x, 1)
        else:
            dist.recv(x.clone(), 0)
    return recorded.messages


@pytest.fixture(scope="module")
def workers() -> list[dict[str, Any]]:
    return in_processes(everything, 2)


def test_listening_changes_no_training(workers: list[dict[str, Any]]) -> None:
    for worker in workers:
        assert all(map(torch.equal, worker["powersgd"][0], worker["powersgd unheard"][0]))
    assert all(map(torch.equal, workers[0]["powersgd"][0], workers[1]["powersgd"][0]))


def test_all_that_powersgd_sends_is_heard(workers: list[dict[str, Any]]) -> None:
    entries = 20 * 30 + 30 + 30 * 12 + 12
    ps, qs = RANK * (30 + 12), RANK * (20 + 30)
    for worker in workers:
        for step, messages in enumerate(worker["powersgd"][1]):
            sizes = [entries] if step < FIRST else [30 + 12, ps, qs]
            assert [(m.op, m.sent[0].numel(), m.sent_bytes) for m in messages] == [
                ("all_reduce", n, 4 * n) for n in sizes
            ]
    # What came back is the sum of what was handed over, before the hook wrote over it.
    for one, other in zip(*([*chain(*worker["powersgd"][1])] for worker in workers), strict=True):
        assert torch.equal(one.received[0], other.received[0])
        torch.testing.assert_close(one.received[0], one.sent[0] + other.sent[0])


def test_two_halves_are_two_bytes_an_entry(workers: list[dict[str, Any]]) -> None:
    (message,) = workers[0]["fp16"][1][0]
    assert message.sent[0].dtype == torch.float16
    assert message.sent_bytes == 2 * (20 * 30 + 30 + 30 * 12 + 12)


def test_our_own_hook_is_heard_as_the_tap_hears_it(workers: list[dict[str, Any]]) -> None:
    for worker in workers:
        (_, steps), tapped = worker["topk"]
        assert sum(m.sent_bytes for messages in steps for m in messages) == tapped > 0


def test_each_collective_is_heard_as_it_was(workers: list[dict[str, Any]]) -> None:
    for rank, worker in enumerate(workers):
        mine, first, both = ([10.0 * rank, 10.0 * rank + 1], [0.0, 1.0], [[0.0, 1.0], [10.0, 11.0]])
        root = rank == 0
        expected = [
            ("all_reduce max", [mine], both[1:]),
            ("all_gather", [mine], both),
            ("all_gather", [mine], both),
            ("broadcast", [mine] if root else [], [first]),
            ("reduce", [mine], [[10.0, 12.0]] if root else []),
            ("gather", [mine], both if root else []),
            ("all_reduce", [mine], [[10.0, 12.0]]),
            *([("send", [mine], [])] if root else []),
        ]
        found = [(m.op, [x.tolist() for x in m.sent], [x.tolist() for x in m.received]) for m in worker["collectives"]]
        assert found == expected


def test_all_is_as_before_also_after_an_error() -> None:
    before = dict(vars(dist.ProcessGroup))
    with record():
        assert vars(dist.ProcessGroup)["allreduce"] is not before["allreduce"]
    with pytest.raises(ZeroDivisionError), record(), record():
        raise ZeroDivisionError
    assert dict(vars(dist.ProcessGroup)) == before
    with default_group():
        dist.all_reduce(torch.zeros(3))


def test_records_end_in_any_order() -> None:
    before, ended, started = dict(vars(dist.ProcessGroup)), threading.Event(), threading.Event()
    heard: list[Record] = []

    def other() -> None:
        with record(keep=False) as recorded:
            heard.append(recorded)
            started.set()
            ended.wait(10)

    with default_group():
        thread = threading.Thread(target=other)
        with record() as first:
            thread.start()
            started.wait(10)
            dist.all_reduce(torch.zeros(3))
        dist.all_reduce(torch.zeros(5))
        ended.set()
        thread.join()
        dist.all_reduce(torch.zeros(7))
    assert first.sent_bytes == 12
    assert heard[0].sent_bytes == 32
    with pytest.raises(ValueError, match=r"^Expected keep=False to be True for a record whose messages are read\.$"):
        _ = heard[0].messages
    assert dict(vars(dist.ProcessGroup)) == before


def test_a_group_of_one_leaves_no_trace() -> None:
    before = sys.excepthook, os.environ.get("GLOO_SOCKET_IFNAME")
    with default_group() as workers:
        assert workers == dist.get_world_size() == 1
        with default_group() as inner:
            assert inner == 1
        assert dist.is_initialized()
    assert not dist.is_initialized()
    assert (sys.excepthook, os.environ.get("GLOO_SOCKET_IFNAME")) == before


def test_a_copied_state_shares_groups_and_modules_alone() -> None:
    model = net()
    with default_group():
        state = powersgd()
        state.process_group = dist.group.WORLD
        state.error_dict = {0: torch.ones(2)}
        held = {"state": state, "model": model, "groups": [dist.group.WORLD]}
        twin = copied(held, {})
        assert twin["model"] is model
        assert twin["state"].process_group is twin["groups"][0] is dist.group.WORLD
        twin["state"].error_dict[0].zero_()
        twin["state"].rng.randint(10)
        assert twin["state"].matrix_approximation_rank == RANK
    assert state.error_dict[0].tolist() == [1, 1]
    assert state.rng.get_state()[2] != twin["state"].rng.get_state()[2]
    with pytest.raises(ValueError, match="Expected state of lock to be one that can be copied"):
        copied(threading.Lock(), {})


def test_every_tap_on_a_channel_is_told() -> None:
    inner = Tap(LocalChannel(), keep=True)
    outer = Tap(inner)
    overheard(outer, [Message("all_reduce", (torch.ones(2),), (torch.ones(2),))])
    outer.all_mean(torch.ones(3))
    assert outer.sent_bytes == inner.sent_bytes == 20
    assert [m.op for m in inner.messages] == ["all_reduce", "all_mean"]
