"""Workers in threads of one process are the workers of a gloo group, to the bit where there are two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import DEFENCES, SHAPES, contract_of, gradients, synthetic
from two_workers import DENSE_TRAINING, PEER_TRAINING, STEPS

from raytrust.compress import build
from raytrust.compress.contract import check
from raytrust.config import TrainConfig
from raytrust.train.loop import Evaluation, Step, Trained, train
from raytrust.wire.channel import Channel, Tap
from raytrust.wire.threads import in_threads


def steps_of(name: str, channel: Channel) -> list[tuple[list[torch.Tensor], int]]:
    compressor, found = build(DEFENCES[name], SHAPES, seed=5), []
    for step in range(STEPS):
        tap = Tap(channel)
        mean = compressor.reduce(gradients(100 * step + channel.rank), tap).mean
        found.append(([m.clone() for m in mean], tap.sent_bytes))
    return found


@pytest.mark.parametrize("name", DEFENCES)
def test_steps_are_those_of_processes_to_the_bit(name: str, group: list[dict[str, Any]]) -> None:
    for of_thread, process in zip(in_threads(lambda channel: steps_of(name, channel), 2), group, strict=True):
        for (mean, sent), step in zip(of_thread, process["reductions"][name], strict=True):
            assert all(map(torch.equal, mean, step.mean))
            assert sent == step.sent_bytes


@pytest.mark.parametrize(
    ("config", "name"),
    [(DENSE_TRAINING, "dense training"), (PEER_TRAINING, "peer training")],
    ids=["dense", "powersgd"],
)
def test_training_is_that_of_processes_to_the_bit(
    config: TrainConfig, name: str, group: list[dict[str, Any]], global_rng_untouched: None
) -> None:
    for records, process in zip(
        in_threads(lambda channel: list(train(config, synthetic(), channel)), 2), group, strict=True
    ):
        assert [type(r) for r in records] == [type(r) for r in process[name]]
        for ours, theirs in zip(records, process[name], strict=True):
            match ours:
                case Step() | Evaluation():
                    assert ours == theirs
                case Trained(weights=weights, buffers=buffers):
                    for found, expected in ((weights, theirs.weights), (buffers, theirs.buffers)):
                        assert found.keys() == expected.keys()
                        assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("name", ["dense", "powersgd-3+EF", "topk+EF", "threshold", "signsgd", "atomo", "qsgd"])
def test_four_workers_keep_every_guarantee(name: str) -> None:
    in_threads(lambda channel: check(DEFENCES[name], channel, **contract_of(DEFENCES[name])), 4)


def test_what_is_heard_is_each_workers_own() -> None:
    def work(channel: Channel) -> list[list[float]]:
        x = torch.full((2,), float(channel.rank))
        mean, into = channel.all_mean(x), torch.empty(2)
        assert channel.all_mean(x, into) is into
        gathered = channel.all_gather((x, x.long()))
        assert [int(n[0]) for _, n in gathered] == [0, 1, 2]
        x.fill_(9)  # what was said stays, though the next worker hears it later
        for tensor in (mean, *(y for ys in gathered for y in ys)):
            tensor += channel.rank
        unequal = channel.all_gather((torch.ones(channel.rank),), [0, 1, 2])
        return [mean.tolist(), into.tolist(), [float(len(y)) for (y,) in unequal]]

    assert in_threads(work, 3) == [[[1.0 + rank] * 2, [1.0, 1.0], [0.0, 1.0, 2.0]] for rank in range(3)]


def test_one_runs_at_a_time_in_the_order_of_ranks() -> None:
    order: list[int] = []

    def work(channel: Channel) -> None:
        for _ in range(3):
            order.append(channel.rank)
            channel.all_mean(torch.zeros(1))

    in_threads(work, 3)
    assert order == [0, 1, 2] * 3


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_worker_that_fails_ends_all(failing: int) -> None:
    def work(channel: Channel) -> None:
        channel.all_mean(torch.zeros(1))
        if channel.rank == failing:
            raise FloatingPointError("The loss became nan.")
        channel.all_mean(torch.zeros(1))

    with pytest.raises(FloatingPointError, match=r"^The loss became nan\.$"):
        in_threads(work, 3)


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_a_worker_that_ends_early_is_missed(silent: int) -> None:
    def work(channel: Channel) -> None:
        if channel.rank != silent:
            channel.all_mean(torch.zeros(1))

    with pytest.raises(RuntimeError, match=r"^Expected all 3 workers to make the same collectives, but one has ended"):
        in_threads(work, 3)
