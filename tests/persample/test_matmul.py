"""Products by oneDNN are those of torch, there and back, whatever the layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raytrust.persample import matmul
from raytrust.persample.matmul import Bmm, bmm, mm

LARGE = (3, 200, 150, 180)  # beyond what is left to torch
SMALL = (3, 4, 5, 6)


def matrices(n: int, p: int, q: int, r: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(n, *s, generator=generator).to(dtype) for s in ((p, q), (q, r)))  # type: ignore[return-value]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each product that oneDNN does."""
    found: list[int] = []
    product = matmul._product

    def counted(a: Tensor, b: Tensor) -> Tensor:
        found.append(1)
        return product(a, b)

    monkeypatch.setattr(matmul, "_product", counted)
    return found


@pytest.mark.skipif(matmul._LINEAR is None, reason="torch was built without oneDNN")
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
def test_large_float32_is_onednn_and_equals_torch(transposed: tuple[bool, bool], calls: list[int]) -> None:
    a, b = matrices(*LARGE)
    a = a.mT.contiguous().mT if transposed[0] else a
    b = b.mT.contiguous().mT if transposed[1] else b
    torch.testing.assert_close(bmm(a, b), torch.bmm(a, b), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mm(a[0], b[0]), a[0] @ b[0], rtol=1e-4, atol=1e-4)
    assert len(calls) == len(a) + 1


@pytest.mark.parametrize(("sizes", "dtype"), [(SMALL, torch.float32), (LARGE, torch.float64), (LARGE, torch.bfloat16)])
def test_the_rest_is_torch(sizes: tuple[int, int, int, int], dtype: torch.dtype, calls: list[int]) -> None:
    a, b = matrices(*sizes, dtype)
    assert torch.equal(bmm(a, b), torch.bmm(a, b))
    assert torch.equal(mm(a[0], b[0]), a[0] @ b[0])
    assert not calls


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_LINEAR", None)
    a, b = matrices(*LARGE)
    assert torch.equal(bmm(a, b), torch.bmm(a, b))


def test_no_matrices_at_all() -> None:
    assert bmm(torch.zeros(0, 200, 150), torch.zeros(0, 150, 180)).shape == (0, 200, 180)


@pytest.mark.parametrize("sizes", [SMALL, LARGE])
def test_derivatives(sizes: tuple[int, int, int, int]) -> None:
    a, b = matrices(*sizes)
    weights = torch.randn(len(a), a.shape[1], b.shape[2], generator=torch.Generator().manual_seed(1))
    slopes = []
    for product in (Bmm.apply, torch.bmm):
        leaves = [t.clone().requires_grad_() for t in (a, b)]
        slopes.append(torch.autograd.grad((product(*leaves) * weights).sum(), leaves))
    for ours, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_second_derivative_is_refused() -> None:
    a, b = (t.requires_grad_() for t in matrices(*SMALL))
    (slope,) = torch.autograd.grad(Bmm.apply(a, b).square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
