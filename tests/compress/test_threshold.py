from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from raytrust.compress import Layout
from raytrust.compress.threshold import Threshold
from raytrust.config import ThresholdConfig
from raytrust.wire.channel import LocalChannel, Tap

numbers = st.floats(-100, 100, width=32, allow_subnormal=False)


def sent(x: Tensor, level: float, sample: float = 1.0) -> tuple[Tensor, Tap]:
    tap = Tap(LocalChannel(), keep=True)
    return Threshold(ThresholdConfig(level, sample), Layout([x.shape])).reduce([x], tap).decoded_own[0].clone(), tap


@settings(deadline=None, max_examples=60)
@given(st.lists(numbers, min_size=1, max_size=40), st.floats(0, 1, exclude_min=True))
@example([1.0, -1.0, 1.0, -1.0], 0.25)
def test_contraction(values: list[float], level: float) -> None:
    """||x - own||^2 <= (1 - k/N) ||x||^2 with k = level N: what is sent are the largest, and all that tie with them."""
    x = torch.tensor(values)
    own, tap = sent(x, level)
    k = max(1, round(level * len(x)))
    x, own = x.double(), own.double()
    assert float((x - own).square().sum()) <= (1 - k / len(x)) * float(x.square().sum()) * (1 + 1e-12)
    chosen = own != 0
    assert torch.equal(own[chosen], x[chosen])
    threshold = float(x.abs().sort(descending=True).values[k - 1])
    assert torch.equal(chosen, (x.abs() >= threshold) & (x != 0))
    assert len(tap.messages[1].sent[0]) == int(chosen.sum())


def test_ties_are_all_sent() -> None:
    assert sent(torch.tensor([2.0, -2.0, 1.0, 2.0]), level=0.25)[0].tolist() == [2, -2, 0, 2]


def test_zeros_are_never_sent() -> None:
    own, tap = sent(torch.zeros(50), level=0.5)
    assert own.tolist() == [0] * 50
    assert [m.sent_bytes for m in tap.messages] == [4, 0]
    assert sent(torch.tensor([0.0, 1.0, 0.0, 0.0]), level=1.0)[1].sent_bytes == 4 + 8


def test_the_threshold_is_of_magnitudes() -> None:
    assert sent(torch.tensor([-4.0, -3.0, -2.0, 1.0]), level=0.25)[0].tolist() == [-4, 0, 0, 0]


def test_what_is_sent() -> None:
    _, tap = sent(torch.tensor([0.0, -4.0, 1.0, 3.0]), level=0.5)
    count, (values, indices) = tap.messages[0].sent, tap.messages[1].sent
    assert [x.tolist() for x in count] == [[2]]
    assert (values.dtype, indices.dtype) == (torch.float32, torch.int32)
    assert (values.tolist(), indices.tolist()) == ([-4, 3], [1, 3])


@pytest.mark.parametrize("sample", [1.0, 0.1, 0.01])
def test_a_sample_sets_about_the_same_threshold(sample: float) -> None:
    """The number that exceeds the quantile of n magnitudes varies by a share of about 1 / sqrt(level n)."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    count = int((sent(x, 0.05, sample)[0] != 0).sum())
    assert abs(count / 10_000 - 1) <= (0 if sample == 1 else 4 / (10_000 * sample) ** 0.5)


def test_the_sample_is_every_nth_entry() -> None:
    x = torch.tensor([1.0, 9.0, 8.0, 2.0, 9.0, 8.0, 3.0, 9.0, 8.0])
    assert sent(x, level=0.34, sample=1 / 3)[0].tolist() == [0, 9, 8, 0, 9, 8, 3, 9, 8]


def at_level(levels: Sequence[float]) -> list[int]:
    x = torch.arange(1.0, 101.0)
    return [int((sent(x, level)[0] != 0).sum()) for level in levels]


def test_level_is_the_fraction_of_entries() -> None:
    assert at_level([1e-9, 0.01, 0.1, 0.5, 1.0]) == [1, 1, 10, 50, 100]
