from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raytrust.compress.sparse import EXACT_BELOW, SAMPLE, above, largest

N = 3 * SAMPLE + 41  # entries: the threshold is then estimated from every third


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def misleading(n: int) -> Tensor:
    """Large exactly where the sample looks: its threshold lets too few pass."""
    x = torch.rand(n, generator=generator())
    x[:: n // SAMPLE] += 10
    return x


def hidden(n: int) -> Tensor:
    """Large everywhere but where the sample looks."""
    x = 10 + torch.rand(n, generator=generator())
    x[:: n // SAMPLE] = 0
    return x


VECTORS: dict[str, Callable[[int], Tensor]] = {
    "normal": lambda n: torch.randn(n, generator=generator()),
    "heavy tails": lambda n: torch.randn(n, generator=generator()) ** 9,
    "negative": lambda n: -torch.rand(n, generator=generator()) - 1,
    "ties": lambda n: torch.randint(-3, 4, (n,), generator=generator()).float(),
    "one magnitude": lambda n: torch.randn(n, generator=generator()).sign(),
    "zeros": lambda n: torch.zeros(n),
    "nearly all zeros": lambda n: torch.zeros(n).index_fill(0, torch.arange(5, n, 9973), -1.0),
    "rising": lambda n: torch.linspace(-1, 1, n),
    "huge": lambda n: 1e37 * torch.randn(n, generator=generator()),
    "subnormal": lambda n: 1e-42 * torch.randn(n, generator=generator()),
    "misleading": misleading,
    "hidden": hidden,
}


@pytest.mark.parametrize("k", [1, 7, N // 1000, N // 100, N // 5, N // 3, N - 1, N])
@pytest.mark.parametrize("name", VECTORS)
def test_the_largest_are_exactly_those_of_a_full_selection(name: str, k: int) -> None:
    """Of the same magnitudes, exactly k, in increasing order: the sample decides the speed, not the result."""
    assert N > EXACT_BELOW
    x = VECTORS[name](N)
    found = largest(x, k)
    assert (found.dtype, found.shape) == (torch.int64, (k,))
    assert (found.diff() > 0).all()
    assert torch.equal(x[found].abs().sort().values, x.abs().topk(k).values.sort().values)


@settings(deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(1, 30))
def test_the_largest_of_a_short_vector(values: list[int], k: int) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    found = largest(x, k).tolist()
    assert found == sorted(set(found))
    assert sorted(abs(values[i]) for i in found) == sorted(map(abs, values))[-min(k, len(values)) :]


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0, 2.0])
def test_above(name: str, threshold: float) -> None:
    x = VECTORS[name](N)
    expected = ((x.abs() >= threshold) & (x != 0)).nonzero().flatten()
    assert torch.equal(above(x, threshold), expected)


def test_above_a_threshold_of_nothing() -> None:
    assert above(torch.empty(0), 0.0).tolist() == []
