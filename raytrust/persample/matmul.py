"""Products of matrices on CPUs, in float32 by oneDNN: MKL, which torch calls there, is half as fast where the CPU is
not Intel's (`benchmarks/inversion.py`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# What torch.compile calls for a linear layer. Absent from builds without oneDNN, which multiply as torch does.
_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
# Measured: with fewer multiplications, starting oneDNN costs more than it saves.
_SMALL = 2**22


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for (p, q) and (q, r), without derivatives."""
    return _product(a, b) if _by_onednn(a, a.numel() * b.shape[1]) else a @ b


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """torch.bmm for (n, p, q) and (n, q, r), without derivatives."""
    if len(a) == 0 or not _by_onednn(a, a[0].numel() * b.shape[2]):
        return torch.bmm(a, b)
    # Into one tensor that is there before: a stack would hold all products twice, and pay for fresh pages twice.
    products = a.new_empty(len(a), a.shape[1], b.shape[2])
    for i in range(len(a)):
        products[i] = _product(a[i], b[i])
    return products


class Bmm(torch.autograd.Function):
    """`bmm`, differentiable once; a second derivative is refused."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return bmm(a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return bmm(slopes[0], b.mT), bmm(a.mT, slopes[0])


def _by_onednn(a: Tensor, multiplications: int) -> bool:
    fits = a.dtype == torch.float32 and a.device.type == "cpu" and _LINEAR is not None
    return fits and multiplications >= _SMALL and bool(torch.backends.mkldnn.enabled)


def _product(a: Tensor, b: Tensor) -> Tensor:
    assert _LINEAR is not None
    product: Tensor = _LINEAR(a, b.mT, None, "none", [], "")
    return product
