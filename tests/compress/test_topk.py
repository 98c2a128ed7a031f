from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from raytrust.compress import Layout
from raytrust.compress.topk import TopK
from raytrust.config import TopKConfig
from raytrust.leak import view_of
from raytrust.wire.channel import LocalChannel, Tap

numbers = st.floats(-100, 100, width=32, allow_subnormal=False)


def sent(values: Sequence[float], level: float) -> Tensor:
    x = torch.tensor(values)
    return TopK(TopKConfig(level=level), Layout([x.shape])).reduce([x], LocalChannel()).decoded_own[0]


@settings(deadline=None)
@given(st.lists(numbers, min_size=1, max_size=40), st.floats(0, 1, exclude_min=True))
@example([1.0, -1.0, 1.0, -1.0], 0.5)
def test_contraction(values: list[float], level: float) -> None:
    """||x - own||^2 <= (1 - k/N) ||x||^2, with equality where all magnitudes are equal."""
    x = torch.tensor(values, dtype=torch.float64)
    k = max(1, min(len(x), round(level * len(x))))
    own = sent(values, level).double()
    left, right = float((x - own).square().sum()), (1 - k / len(x)) * float(x.square().sum())
    assert left <= right * (1 + 1e-12)
    if len(set(map(abs, values))) == 1:
        assert left == pytest.approx(right)


@settings(deadline=None)
@given(st.lists(numbers, min_size=1, max_size=40), st.floats(0, 1, exclude_min=True))
def test_the_largest_magnitudes_are_sent_as_they_are(values: list[float], level: float) -> None:
    x = torch.tensor(values)
    compressor, tap = TopK(TopKConfig(level=level), Layout([x.shape])), Tap(LocalChannel(), keep=True)
    own = compressor.reduce([x], tap).decoded_own[0]
    values_sent, indices = tap.messages[0].sent
    assert (values_sent.dtype, indices.dtype) == (torch.float32, torch.int32)
    assert len(values_sent) == len(set(indices.tolist())) == compressor.k
    assert torch.equal(own[indices.long()], x[indices.long()])
    rest = torch.ones(len(x), dtype=torch.bool)
    rest[indices.long()] = False
    assert torch.equal(own[rest], torch.zeros_like(own[rest]))
    if rest.any():
        assert x[rest].abs().max() <= values_sent.abs().min()


def test_magnitudes_count_and_not_signs() -> None:
    assert sent([-3.0, 1.0, -2.0, 0.5], 0.5).tolist() == [-3, 0, -2, 0]
    assert sent([-4.0, -3.0, -2.0, -1.0], 0.25).tolist() == [-4, 0, 0, 0]


def test_ties_keep_exactly_k() -> None:
    own = sent([2.0, -2.0] * 50, 0.1)
    assert int((own != 0).sum()) == 10
    assert int((sent([0.0] * 10, 0.3) != 0).sum()) == 0


def test_one_entry() -> None:
    assert sent([5.0], 1e-9).tolist() == [5]
    assert (
        TopK(TopKConfig(equal_to_rank=1), Layout([torch.Size((1,))])).k == 1
    )  # half of one float, but nothing is no message


@pytest.mark.parametrize(("level", "k"), [(1e-9, 1), (0.01, 2), (0.5, 100), (1.0, 200)])
def test_level_is_the_fraction_of_entries(level: float, k: int) -> None:
    assert TopK(TopKConfig(level=level), Layout([torch.Size((10, 19)), torch.Size((10,))])).k == k


def test_never_more_than_all_entries() -> None:
    assert TopK(TopKConfig(equal_to_rank=99, equal_by="values"), Layout([torch.Size((3, 3))])).k == 9


def test_the_choice_is_over_the_whole_gradient() -> None:
    grads = [torch.tensor([1.0, 2.0]), torch.tensor([[30.0, -40.0]])]
    own = TopK(TopKConfig(level=0.5), Layout([g.shape for g in grads])).reduce(grads, LocalChannel()).decoded_own
    assert [o.tolist() for o in own] == [[0, 0], [[30, -40]]]


def test_at_full_level_nothing_is_lost() -> None:
    grads = [torch.randn(5, 3), torch.randn(4)]
    mean, own = TopK(TopKConfig(level=1.0), Layout([g.shape for g in grads])).reduce(grads, LocalChannel())
    assert all(map(torch.equal, mean, grads))
    assert all(map(torch.equal, own, grads))


def per_layer(grads: Sequence[Tensor], level: float) -> list[Tensor]:
    config = TopKConfig(level=level, scope="layer")
    return TopK(config, Layout([g.shape for g in grads])).reduce(grads, LocalChannel()).decoded_own


def test_per_layer_the_choice_is_within_each() -> None:
    grads = [torch.tensor([1.0, -2.0, 0.5, 0.1]), torch.tensor([[30.0, -40.0]])]
    assert [o.tolist() for o in per_layer(grads, 0.5)] == [[1, -2, 0, 0], [[0, -40]]]


def test_per_layer_no_layer_waits_for_ever() -> None:
    """However small it is beside the others, or its entries beside theirs."""
    grads = [torch.full((1000,), 100.0), torch.tensor([1e-3]), torch.full((2, 3), 1e-6)]
    own = per_layer(grads, 0.01)
    assert [int((o != 0).sum()) for o in own] == [8, 1, 1]
    whole = TopK(TopKConfig(level=0.01), Layout([g.shape for g in grads])).reduce(grads, LocalChannel()).decoded_own
    assert [int((o != 0).sum()) for o in whole] == [10, 0, 0]


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.floats(0, 1, exclude_min=True))
def test_per_layer_as_many_are_sent_in_all(sizes: list[int], level: float) -> None:
    """k in all, in proportion to the sizes to within one, and at least one from each layer that has entries."""
    layout = Layout([torch.Size((size,)) for size in sizes])
    grads = [1.0 + torch.rand(size, generator=torch.Generator().manual_seed(0)) for size in sizes]
    compressor = TopK(TopKConfig(level=level, scope="layer"), layout)
    counts = [int((o != 0).sum()) for o in compressor.reduce(grads, LocalChannel()).decoded_own]
    layers = sum(size > 0 for size in sizes)
    k = round(level * sum(sizes))
    assert sum(counts) == compressor.k == min(sum(sizes), max(k, layers))
    for count, size in zip(counts, sizes, strict=True):
        assert (count >= 1) == (size > 0)
        assert count <= 1 + max(1, level * size)


@settings(deadline=None)
@given(st.lists(numbers, min_size=6, max_size=40), st.floats(0.2, 1))
def test_per_layer_the_contraction_holds_for_each(values: list[float], level: float) -> None:
    x = torch.tensor(values)
    grads = list(x.split([2, 1, len(x) - 3]))
    compressor = TopK(TopKConfig(level=level, scope="layer"), Layout([g.shape for g in grads]))
    tap = Tap(LocalChannel(), keep=True)
    own, view = compressor.reduce(grads, tap).decoded_own, view_of(compressor, tap.messages, "link")
    for g, o, positions in zip(grads, own, view.positions, strict=True):
        left, right = (float(e.double().square().sum()) for e in (g - o, g))
        assert left <= (1 - len(positions) / len(g)) * right * (1 + 1e-12)


def test_many_ties_are_not_cut_off_by_position_before_larger_ones() -> None:
    """A sampled threshold lets too many pass here; those that are dropped are the smallest, not the last."""
    x = torch.ones(200_000)
    x[-1500:] = -2.0
    own = TopK(TopKConfig(level=0.01), Layout([x.shape])).reduce([x], LocalChannel()).decoded_own[0]
    assert int((own == -2).sum()) == 1500
    assert int((own == 1).sum()) == 500
