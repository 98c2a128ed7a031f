"""Singular values, and the vectors of some of them, against torch's whole decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from raytrust.compress.atomo import Atomo
from raytrust.compress.interface import Layout
from raytrust.compress.spectrum import PARTIAL_FROM, spectrum_of
from raytrust.config import AtomoConfig
from raytrust.wire.channel import LocalChannel, Tap


def matrix(k: int, m: int, rank: int | None = None) -> Tensor:
    """float64, of singular values that fall by about a thousand."""
    generator = torch.Generator().manual_seed(k + m)
    x = torch.randn(k, rank or k, generator=generator, dtype=torch.float64)
    weights = torch.logspace(0, -3, x.shape[1], dtype=torch.float64)
    return (x * weights) @ torch.randn(x.shape[1], m, generator=generator, dtype=torch.float64)


SIZES = [(PARTIAL_FROM - 1, 90), (PARTIAL_FROM, PARTIAL_FROM), (PARTIAL_FROM + 1, 300), (2 * PARTIAL_FROM, 130)]


@pytest.mark.parametrize(("k", "m"), SIZES)
def test_values_and_vectors(k: int, m: int) -> None:
    a = matrix(k, m)
    u, s, _ = torch.linalg.svd(a, full_matrices=False)
    spectrum, indices = spectrum_of(a), np.array([0, 1, 5, k // 2])
    torch.testing.assert_close(spectrum.values, s, rtol=1e-9, atol=1e-8 * float(s[0]))
    vectors = spectrum.vectors(indices)
    expected = u.T[indices]
    signs = (vectors * expected).sum(1, keepdim=True).sign()  # of a pair of vectors they are anyone's choice
    torch.testing.assert_close(vectors, signs * expected, rtol=0, atol=1e-9)
    assert spectrum.vectors(indices[:0]).shape == (0, k)


@pytest.mark.parametrize("rank", [1, 9, PARTIAL_FROM])
def test_what_is_zero_but_for_rounding_is_zero(rank: int) -> None:
    a = matrix(2 * PARTIAL_FROM, 300, rank)
    values = spectrum_of(a).values
    assert int((values > 0).sum()) == rank
    assert not spectrum_of(torch.zeros(PARTIAL_FROM, 80, dtype=torch.float64)).values.any()


@pytest.mark.parametrize("k", [PARTIAL_FROM - 1, 2 * PARTIAL_FROM])
def test_of_equal_values_every_vector_is_one_of_the_same_basis(k: int) -> None:
    """Else the mean over which of them are sent would not be the matrix."""
    q = torch.linalg.qr(matrix(k, k)).Q
    a = q * torch.cat([torch.full((k // 2,), 2.0), torch.full((k - k // 2,), 1.0)]).double()
    spectrum = spectrum_of(a)
    one_by_one = torch.cat([spectrum.vectors(np.array([i])) for i in range(k)])
    assert torch.equal(one_by_one, spectrum.vectors(np.arange(k)))
    torch.testing.assert_close(one_by_one @ one_by_one.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(80, 200), (200, 80)])
def test_a_step_of_large_matrices_is_the_formula_s(shape: tuple[int, int]) -> None:
    """The triples that the coins keep, s / p, u and v, of numpy's own coins and torch's own decomposition."""
    x = matrix(min(shape), max(shape)).float()
    x = x if shape[0] < shape[1] else x.T.contiguous()
    tap = Tap(LocalChannel(), keep=True)
    mean, own = Atomo(AtomoConfig(rank=3), Layout([x.shape]), seed=5).reduce([x], tap)
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    p = torch.zeros_like(s)
    certain = 0
    while (3 - certain) * s[certain] >= s[certain:].sum():
        certain += 1
    p[:certain], p[certain:] = 1.0, (3 - certain) * s[certain:] / s[certain:].sum()
    kept = torch.from_numpy(np.random.default_rng([5, 0, 0]).random(len(s))) < p
    assert tap.messages[0].sent[0].tolist() == [int(kept.sum())]
    expected = (u[:, kept] * (s / p)[kept]) @ vh[kept]
    torch.testing.assert_close(mean[0].double(), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert torch.equal(mean[0], own[0])
