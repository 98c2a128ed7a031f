from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from two_workers import collectives

from raytrust.compress import build
from raytrust.config import Defence, TopKConfig
from raytrust.wire.channel import LocalChannel, Message, Tap, pack, unpack

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.float32,
    torch.int64,
    torch.float64,
]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randint(0, 100, shape, generator=generator).to(dtype)
    return x.mT if x.ndim >= 2 and draw(st.booleans()) else x  # also not contiguous


@given(st.lists(tensors(), min_size=1, max_size=5))
def test_unpack_is_the_inverse_of_pack(xs: list[Tensor]) -> None:
    packed = pack(xs)
    assert packed.dtype == torch.uint8
    assert packed.shape == (sum(x.numel() * x.element_size() for x in xs),)
    unpacked = unpack(packed, xs)
    assert [(y.dtype, y.shape) for y in unpacked] == [(x.dtype, x.shape) for x in xs]
    assert all(map(torch.equal, unpacked, xs))


def test_packing_keeps_every_bit() -> None:
    x = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    (y,) = unpack(pack([x]), [x])
    assert torch.equal(y.view(torch.int32), x.view(torch.int32))


def test_one_worker_hears_itself() -> None:
    found = collectives(LocalChannel())
    assert (LocalChannel.world_size, LocalChannel.rank) == (1, 0)
    assert torch.equal(found["mean"], torch.arange(6.0).view(2, 3).T)
    assert torch.equal(found["mean in place"], found["mean"])
    ((a, b),) = found["gathered"]
    assert torch.equal(a, torch.arange(3, dtype=torch.int8))
    assert torch.equal(b, torch.tensor([0.1, 0.2]))


def test_two_workers_hear_the_same(group: list[dict[str, Any]]) -> None:
    first, second = (worker["channel"] for worker in group)
    assert torch.equal(first["mean"], 1.5 * torch.arange(6.0).view(2, 3).T)
    assert torch.equal(first["mean"], second["mean"])
    assert torch.equal(first["mean in place"], first["mean"])
    assert torch.equal(second["mean in place"], first["mean"])
    for found in (first, second):  # in the order of ranks
        for rank, (a, b) in enumerate(found["gathered"]):
            assert torch.equal(a, torch.arange(3, dtype=torch.int8) + rank)
            assert torch.equal(b, torch.tensor([0.1, 0.2]) * (rank + 1))


def test_two_workers_gather_unequal_lengths_without_padding(group: list[dict[str, Any]]) -> None:
    for rank, worker in enumerate(group):
        found = worker["channel"]
        assert [[x.tolist() for x in xs] for xs in found["unequal"]] == [[[], []], [[1], [pytest.approx(0.2)]]]
        assert [[x.dtype for x in xs] for xs in found["unequal"]] == [[torch.int8, torch.float32]] * 2
        assert found["unequal bytes"] == 5 * rank


def test_ranks_are_those_of_the_group(group: list[dict[str, Any]]) -> None:
    assert group[0]["subgroup"] is None
    assert [[x.tolist() for x in xs] for xs in group[1]["subgroup"]] == [[[0, 1, 2]]]


def test_the_tap_counts_and_keeps_what_was_sent() -> None:
    tap = Tap(LocalChannel(), keep=True)
    assert (tap.world_size, tap.rank, tap.sent_bytes) == (1, 0, 0)
    x, indices = torch.arange(5.0), torch.arange(3, dtype=torch.int32)
    mean = tap.all_mean(x)
    ((values, theirs),) = tap.all_gather([x, indices])
    for buffer in (x, indices, mean, values, theirs):
        buffer.zero_()  # a compressor that uses its buffers again
    first, second = tap.messages
    assert (first.op, second.op) == ("all_mean", "all_gather")
    assert [t.tolist() for t in (*first.sent, *first.received)] == [[0, 1, 2, 3, 4]] * 2
    assert [t.tolist() for t in second.sent] == [t.tolist() for t in second.received] == [[0, 1, 2, 3, 4], [0, 1, 2]]
    assert [m.sent_bytes for m in tap.messages] == [20, 32]
    assert tap.sent_bytes == 52


def test_a_tap_keeps_nothing_unless_told() -> None:
    """It may live as long as a training: a step leaves no tensor behind."""
    compressor, grads = build(Defence(TopKConfig(level=0.5)), [torch.Size((64,))]), [torch.arange(64.0)]
    tap = Tap(LocalChannel())

    def held() -> int:
        compressor.reduce(grads, tap)
        gc.collect()
        return sum(type(x) is Tensor for x in gc.get_objects())

    held()  # buffers are made in the first step
    assert held() == held()
    assert tap.sent_bytes == 3 * 8 * 32
    with pytest.raises(ValueError, match=r"^Expected keep=False to be True for a tap whose messages are read\.$"):
        _ = tap.messages


def test_a_message_names_what_each_rank_contributed() -> None:
    parts = tuple(torch.tensor([float(i)]) for i in range(6))
    message = Message("all_gather", parts[2:4], parts)
    assert [message.received_from(rank) for rank in range(3)] == [parts[0:2], parts[2:4], parts[4:6]]


def test_a_hidden_payload_stays_hidden_when_moved() -> None:
    message = Message("all_mean", (torch.empty(3, device="meta"),), (torch.ones(3),)).to("cpu")
    assert message.sent[0].is_meta
    assert message.sent_bytes == 12
    assert torch.equal(message.received[0], torch.ones(3))


@pytest.mark.gpu
def test_a_message_moves_to_a_gpu() -> None:
    message = Message("all_mean", (torch.empty(3, device="meta"),), (torch.ones(3),)).to("cuda")
    assert message.sent[0].is_meta
    assert message.received[0].is_cuda
