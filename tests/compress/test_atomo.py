from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import assert_unbiased, draws, relative_variance

from raytrust.compress import Layout
from raytrust.compress.atomo import Atomo
from raytrust.config import AtomoConfig
from raytrust.wire.channel import LocalChannel, Tap


def matrix(n: int = 4, m: int = 6, seed: int = 0) -> Tensor:
    """Singular values that fall by half."""
    generator = torch.Generator().manual_seed(seed)
    k = min(n, m)
    u, v = (torch.linalg.qr(torch.randn(side, k, generator=generator)).Q for side in (n, m))
    return u @ torch.diag(8.0 * 0.5 ** torch.arange(k)) @ v.T


def by_water_filling(s: list[float], rank: int) -> list[float]:
    """p_i = min(1, c s_i) that sum to `rank`: c by bisection."""
    low, high = 0.0, 1e6 / max(s)
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if sum(min(1.0, c * x) for x in s) < rank else (low, c)
    return [min(1.0, low * x) for x in s]


def triples(x: Tensor, config: AtomoConfig, steps: int) -> list[int]:
    compressor, counts = Atomo(config, Layout([x.shape])), []
    for _ in range(steps):
        tap = Tap(LocalChannel(), keep=True)
        compressor.reduce([x], tap)
        counts.append(int(tap.messages[0].sent[0]))
    return counts


@pytest.mark.parametrize(("rank", "shape"), [(1, (4, 6)), (2, (6, 4)), (3, (4, 6))])
def test_it_is_unbiased_with_the_variance_of_its_coins(rank: int, shape: tuple[int, int]) -> None:
    """E||own - x||^2 = sum s_i^2 (1 / p_i - 1): coins of their own for every triple."""
    x = matrix(*shape)
    samples, flat = draws(AtomoConfig(rank), [x], 1500), x.flatten().double()
    assert_unbiased(samples, flat)
    s = torch.linalg.svdvals(x.double()).tolist()
    p = by_water_filling(s, rank)
    expected = sum(a * a * (1 / b - 1) for a, b in zip(s, p, strict=True)) / sum(a * a for a in s)
    found, error = relative_variance(samples, flat)
    assert found == pytest.approx(expected, abs=4 * error)


def test_the_number_of_triples_varies_around_the_rank() -> None:
    """Redrawing until exactly `rank` were picked would be biased."""
    x, count = matrix(), 1000
    found = torch.tensor(triples(x, AtomoConfig(2), count)).double()
    p = by_water_filling(torch.linalg.svdvals(x.double()).tolist(), 2)
    deviation = sum(q * (1 - q) for q in p) ** 0.5
    assert set(found.tolist()) >= {1, 2, 3}
    assert float(found.mean()) == pytest.approx(2, abs=4 * deviation / count**0.5)
    assert float(found.std()) == pytest.approx(deviation, rel=0.1)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), st.integers(0, 9))
def test_a_matrix_of_at_most_that_rank_is_exact(n: int, m: int, rank: int, seed: int) -> None:
    """All triples are certain; so are they all in a layer whose smaller side is at most `rank`."""
    x = matrix(n, m, seed)
    k = min(n, m)
    for low in {min(rank, k), k if k <= rank else min(rank, k)}:
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        y = u[:, :low] @ torch.diag(s[:low]) @ v[:low]
        own = draws(AtomoConfig(max(rank, low)), [y], 2)
        error = float((own - y.flatten()).norm()) / float(y.norm())
        assert error < 1e-5 or k > rank  # rounding leaves a k x k matrix of lower rank some tiny singular values
        assert error < 1e-2


def test_equal_singular_values_have_equal_chances() -> None:
    samples = draws(AtomoConfig(2), [torch.eye(5)], 1000).view(-1, 5, 5)
    kept = samples.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(kept.mean(0), torch.ones(5, dtype=torch.float64), rtol=0, atol=0.2)


def test_what_is_sent_are_singular_triples() -> None:
    """(s_i / p_i, u_i, v_i), the same s_i / p_i for all that are not certain; tensors of one dimension as they are."""
    x, bias = matrix(), torch.tensor([1.0, -2.0, 3.0])
    compressor, tap = Atomo(AtomoConfig(2), Layout([x.shape, bias.shape]), seed=3), Tap(LocalChannel(), keep=True)
    (own, own_bias) = compressor.reduce([x, bias], tap).decoded_own
    counts, payload = (message.sent[0] for message in tap.messages)
    assert counts.dtype == torch.int32
    r = int(counts)
    assert r >= 2
    weights, u, v = payload[:r], payload[r : 5 * r].view(r, 4), payload[5 * r : 11 * r].view(r, 6)
    assert torch.equal(payload[11 * r :], bias)
    assert torch.equal(own_bias, bias)
    for a in (u, v):
        torch.testing.assert_close(a @ a.T, torch.eye(r), rtol=0, atol=1e-5)
    s = (u @ x @ v.T).diagonal()
    p = dict(zip([8.0, 4.0, 2.0, 1.0], by_water_filling([8.0, 4.0, 2.0, 1.0], 2), strict=True))
    for weight, value in zip(weights.tolist(), s.tolist(), strict=True):
        nearest = min(p, key=lambda known: abs(known - value))
        assert value == pytest.approx(nearest, rel=1e-4)
        assert weight == pytest.approx(nearest / p[nearest], rel=1e-4)
    torch.testing.assert_close(own, u.T @ torch.diag(weights) @ v, rtol=1e-4, atol=1e-5)
