"""Singular values of a matrix, and only those singular vectors that are asked for.

Of a 512 x 4608 gradient ATOMO sends about three triples of 512, but needs all values for their probabilities. A whole
eigendecomposition of the Gram matrix takes four times as long as its values and a few of its vectors
(`benchmarks/compressors.py --method atomo`).
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

# Rows from which the vectors are computed one by one; below, the whole decomposition is as fast.
PARTIAL_FROM = 64

# Two eigenvalues nearer than this many roundings of the largest count as one.
_ROUNDINGS = 1e4
_EPS = torch.finfo(torch.float64).eps


class Spectrum(Protocol):
    """values: singular values (k,), the largest first; those that rounding can't tell from zero are zero."""

    values: Tensor

    def vectors(self, indices: np.ndarray) -> Tensor:
        """The left singular vectors of these values, as rows (len(indices), k). indices: increasing."""
        ...


def spectrum_of(a: Tensor) -> Spectrum:
    """a: (k, m), float64, k <= m; not to be written to before the last vector was asked for."""
    # By the smaller Gram matrix, a convolution's 512 x 512 instead of 512 x 4608. In float64, as it squares the
    # condition number: in float32 all but the largest values would be noise.
    return _Partial(a) if a.device.type == "cpu" and len(a) >= PARTIAL_FROM else _Whole(a)


class _Whole:
    """By a whole eigendecomposition."""

    def __init__(self, a: Tensor):
        values, vectors = torch.linalg.eigh(a @ a.T)
        self.values, self._vectors = _roots(values), vectors

    def vectors(self, indices: np.ndarray) -> Tensor:
        rows = torch.from_numpy(len(self._vectors) - 1 - indices).to(self._vectors.device)
        return self._vectors.T[rows]


class _Partial:
    """By a tridiagonal matrix T = Q^T (a a^T) Q, whose eigenvectors are found one by one, by inverse iteration."""

    def __init__(self, a: Tensor):
        # Imported where it is used: who doesn't use it doesn't wait for it.
        from scipy.linalg import blas, lapack

        self._lapack: Any = lapack
        self._a = a
        # One triangle, half of the products: LAPACK reads no more. The transpose is the order that Fortran has.
        gram = blas.dsyrk(1.0, a.numpy().T, trans=1, lower=1)
        work, info = lapack.dsytrd_lwork(len(a), lower=1)
        self._reflectors, self._diagonal, self._beside, self._tau, info = lapack.dsytrd(
            gram, lower=1, lwork=int(work), overwrite_a=1
        )
        values, info = lapack.dsterf(self._diagonal, self._beside)
        if info != 0 or not np.isfinite(values).all():
            raise ValueError(f"Expected a gradient whose singular values converge, got info={info} of LAPACK's dsterf.")
        self._values = values
        self.values = _roots(torch.from_numpy(values))

    def vectors(self, indices: np.ndarray) -> Tensor:
        k = len(self._a)
        if len(indices) == 0:
            return self._a.new_empty(0, k)
        wanted = k - 1 - indices[::-1]  # LAPACK's order: increasing
        if self._near(wanted):
            # Of equal values inverse iteration finds some vectors of their space, and the same ones for each choice of
            # values: their mean over choices would not be the matrix.
            return _Whole(self._a).vectors(indices)
        block, ends = np.ones(k, dtype=np.int32), np.full(k, k, dtype=np.int32)  # all in one block
        z, info = self._lapack.dstein(self._diagonal, self._beside, self._values[wanted], block, ends)
        if info != 0:
            return _Whole(self._a).vectors(indices)
        # Q is the product of k - 1 reflections that leave the first coordinate as it is, held as a QR has them.
        work = np.asfortranarray(z[1:, : len(wanted)])
        turned, _, info = self._lapack.dormqr(
            "L", "N", np.asfortranarray(self._reflectors[1:, :-1]), self._tau, work, 64 * k, overwrite_c=1
        )
        rows = np.vstack([z[:1, : len(wanted)], turned]).T[::-1]
        return torch.from_numpy(rows.copy())

    def _near(self, wanted: np.ndarray) -> bool:
        """Whether any of these eigenvalues is too near another to have a vector of its own."""
        gaps = np.diff(self._values, prepend=-np.inf, append=np.inf)
        return bool((np.minimum(gaps[wanted], gaps[wanted + 1]) < _ROUNDINGS * _EPS * self._values[-1]).any())


def _roots(values: Tensor) -> Tensor:
    """Eigenvalues of a Gram matrix, increasing -> singular values, decreasing."""
    least = _EPS * len(values) * values[-1]
    values = values.flip(0)
    return torch.where(values > least, values, 0).sqrt()
