"""What an attacker who knows the compressor learns about the gradient that went in: `View` and its kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


class View(Protocol):
    """What an attacker who knows the compressor learns about the gradient that went in."""

    def distance(self, grads: Sequence[Tensor]) -> Tensor:
        """How far candidate gradients are from what was observed.

        grads: one tensor a parameter, (batch, *shape of the parameter). Returns (batch,), differentiable, and minimal
        at the true gradient.
        """
        ...


@dataclass(frozen=True)
class LinearView:
    """The observed values of known linear functions of the gradient.

    observed: the measurements, one tensor each.
    measure: (batch, *shape) a parameter -> (batch, *measurement) a measurement; measure(true gradient) == observed.
    adjoint: (batch, *measurement) a measurement -> (batch, *shape) a parameter;
        <measure(g), m> == <g, adjoint(m)>.
    """

    observed: Sequence[Tensor]
    measure: Callable[[Sequence[Tensor]], list[Tensor]]
    adjoint: Callable[[Sequence[Tensor]], list[Tensor]]

    def distance(self, grads: Sequence[Tensor]) -> Tensor:
        """1 - cosine of the candidate's measurements with the observed ones, in [0, 2] (Geiping et al. 2020, eq. 4).

        A candidate or an observation that is zero throughout is at distance 1.
        """
        measured = self.measure(grads)
        inner = total(_rows(m) @ o.flatten() for m, o in zip(measured, self.observed, strict=True))
        squared = total(_rows(m).square().sum(1) for m in measured)
        tiny = torch.finfo(squared.dtype).tiny
        return 1 - inner / (squared.clamp_min(tiny).sqrt() * self._norm.clamp_min(tiny**0.5))

    @cached_property
    def _norm(self) -> Tensor:
        """Of what was observed; it is asked for in every iteration of an attack."""
        return torch.sqrt(total(o.square().sum() for o in self.observed))


class WholeView(LinearView):
    """All entries of the gradient."""

    def __init__(self, observed: Sequence[Tensor]):
        super().__init__(observed, measure=list, adjoint=list)


def identity_view(observed: Sequence[Tensor]) -> LinearView:
    """The view of a whole gradient. Of a decoded one, it is the view of an attacker who ignores the compressor."""
    return WholeView(observed)


class FactorView(LinearView):
    """Products of the gradient's matrices with known factors, and its other tensors as they are (PowerSGD).

    matrices: by parameter, the size (n, m) as which it is multiplied. rights: (r, m) each, for right M^T, lefts: (s, n)
    each, for left M; in the order of `matrices`. vectors: the parameters that are measured as they are.
    observed: all right M^T, then all left M, then the vectors.
    """

    matrices: dict[int, tuple[int, int]]
    rights: Sequence[Tensor]
    lefts: Sequence[Tensor]
    vectors: Sequence[int]

    def __init__(
        self,
        observed: Sequence[Tensor],
        matrices: dict[int, tuple[int, int]],
        rights: Sequence[Tensor],
        lefts: Sequence[Tensor],
        vectors: Sequence[int],
        shapes: Sequence[torch.Size],
    ):
        def measure(grads: Sequence[Tensor]) -> list[Tensor]:
            reshaped = [grads[i].reshape(len(grads[i]), *size) for i, size in matrices.items()]
            return [
                *(right @ m.mT for m, right in zip(reshaped, rights, strict=True)),
                *(left @ m for m, left in zip(reshaped, lefts, strict=True)),
                *(grads[i] for i in vectors),
            ]

        def adjoint(measured: Sequence[Tensor]) -> list[Tensor]:
            k = len(matrices)
            grads: list[Tensor] = [torch.empty(0)] * len(shapes)
            for j, i in enumerate(matrices):
                matrix = measured[j].mT @ rights[j] + lefts[j].T @ measured[k + j]
                grads[i] = matrix.reshape(len(matrix), *shapes[i])
            for i, vector in zip(vectors, measured[2 * k :], strict=True):
                grads[i] = vector
            return grads

        super().__init__(observed, measure, adjoint)
        for name, value in (("matrices", matrices), ("rights", rights), ("lefts", lefts), ("vectors", vectors)):
            object.__setattr__(self, name, value)


def _rows(x: Tensor) -> Tensor:
    """(batch, *shape) -> (batch, entries), for any shape: without entries, or a scalar's."""
    return x.flatten(1) if x.ndim > 1 else x[:, None]


def total(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum(0)


@dataclass(frozen=True)
class TensorwiseView:
    """A linear view whose measurements are compared one by one, for gradients that were quantised.

    Where the noise is as large in each entry, or each has one bit, the cosine of the whole listens to the few tensors
    of large gradients alone.
    """

    view: LinearView

    def distance(self, grads: Sequence[Tensor]) -> Tensor:
        """1 - cosine of each measurement, averaged by their entries; in [0, 2], 0 at the observed ones."""
        sizes = [o.numel() for o in self.view.observed]
        terms = zip(sizes, self._parts, self.view.measure(grads), strict=True)
        return total(size / sum(sizes) * part.distance([m]) for size, part, m in terms if size)

    @cached_property
    def _parts(self) -> list[LinearView]:
        return [identity_view([o]) for o in self.view.observed]


class SparseView(LinearView):
    """Some entries of the gradient, and that all others are of magnitude at most `bound`, if one is given.

    observed, positions: one tensor a parameter, (k,): the values, and where in the flattened parameter they are.
    bound: of all parameters (), or one for each (parameters,).
    """

    positions: Sequence[Tensor]
    bound: Tensor | None

    def __init__(
        self,
        observed: Sequence[Tensor],
        positions: Sequence[Tensor],
        shapes: Sequence[torch.Size],
        bound: Tensor | None = None,
    ):
        def measure(grads: Sequence[Tensor]) -> list[Tensor]:
            return [_rows(g)[:, p] for g, p in zip(grads, positions, strict=True)]

        def adjoint(measured: Sequence[Tensor]) -> list[Tensor]:
            return [
                m.new_zeros(len(m), shape.numel()).index_copy(1, p, m).view(len(m), *shape)
                for m, p, shape in zip(measured, positions, shapes, strict=True)
            ]

        super().__init__(observed, measure, adjoint)
        object.__setattr__(self, "positions", positions)
        object.__setattr__(self, "bound", bound)

    def excess(self, grads: Sequence[Tensor]) -> Tensor:
        """By how much entries that were not sent exceed the bound: the sum of squares, relative to that of what was
        sent, (batch,), at the scale at which a candidate fits best what was sent. Zero at the true gradient, and
        without a bound."""
        measured = self.measure(grads)
        inner = total(_rows(m) @ o.flatten() for m, o in zip(measured, self.observed, strict=True))
        if self.bound is None:
            return torch.zeros_like(inner)
        squared = total(_rows(m).square().sum(1) for m in measured)
        scale = (inner / squared.clamp_min(torch.finfo(squared.dtype).tiny)).clamp_min(0)
        bounds = self.bound.expand(len(self.positions))
        beyond = total(
            (scale[:, None] * _rows(g).abs() - b).clamp_min(0).index_fill(1, p, 0.0).square().sum(1)
            for g, p, b in zip(grads, self.positions, bounds, strict=True)
        )
        return beyond / total(o.square().sum() for o in self.observed).clamp_min(torch.finfo(beyond.dtype).tiny)


@dataclass(frozen=True)
class SignView:
    """The orthant of the gradient and, for each tensor, its mean magnitude if that was sent (signSGD, EF-signSGD).

    signs: one tensor a parameter, like it, of -1 and 1; a 1 also stands for a zero. scales: (parameters,) or None.
    """

    signs: Sequence[Tensor]
    scales: Tensor | None = None

    def distance(self, grads: Sequence[Tensor]) -> Tensor:
        """The share of each tensor's L1 norm that lies outside the orthant, in [0, 1], averaged over tensors by their
        entries; of a tensor of zeros, which are sent as 1, the share of other signs. Plus, where scales are known, 1 -
        cosine of the tensors' L1 norms with the known ones. Zero at the true gradient; a candidate's scale, which says
        little far from it, is not part of it.

        By tensor, because every sign is one bit, whatever the magnitude: over all tensors at once, the few of large
        gradients would be all that counts.
        """
        sizes = grads[0].new_tensor([s.numel() for s in self.signs])
        sums = torch.stack([_rows(g).abs().sum(1) for g in grads], 1)
        inside = torch.stack([_rows(g) @ s.flatten() for g, s in zip(grads, self.signs, strict=True)], 1)
        return orthant_distance(sums, inside, sizes, self._balance, self.scales)

    @cached_property
    def _balance(self) -> Tensor:
        """The mean of each tensor's signs, (parameters,); of a tensor without entries 0."""
        return torch.stack([s.sum() / max(s.numel(), 1) for s in self.signs])


def orthant_distance(
    sums: Tensor, inside: Tensor, sizes: Tensor, balance: Tensor, scales: Tensor | None = None
) -> Tensor:
    """`SignView.distance` from each tensor's L1 norm and inner product with the signs, (batch, parameters) each.

    sizes: (parameters,), entries. balance, scales: of each tensor's signs, (parameters,) or (batch, parameters).
    """
    inside = torch.where(sums > 0, inside / sums.clamp_min(torch.finfo(sums.dtype).tiny), balance)
    outside = (1 - inside) @ (sizes / sizes.sum().clamp_min(1) / 2)
    return outside if scales is None else outside + 1 - _cosine(sums, scales * sizes)


@dataclass(frozen=True)
class IntervalView:
    """An interval for every entry of the gradient. middle, radius: one tensor a parameter, like it."""

    middle: Sequence[Tensor]
    radius: Sequence[Tensor]

    def distance(self, grads: Sequence[Tensor]) -> Tensor:
        """The squared distance to the box, relative to its centre's squared norm; zero at the true gradient."""
        beyond = total(
            _rows(((g - m).abs() - r).clamp_min(0)).square().sum(1)
            for g, m, r in zip(grads, self.middle, self.radius, strict=True)
        )
        norm = total(m.square().sum() for m in self.middle)
        return beyond / norm.clamp_min(torch.finfo(norm.dtype).tiny)


@dataclass(frozen=True)
class VertexView:
    """Vertices of the cross-polytope drawn with probabilities that the gradient sets (vqSGD).

    indices, signs: (samples,): the axis of each vertex, and its side. norm: of the gradient. shapes: of the parameters.
    """

    indices: Tensor
    signs: Tensor
    norm: Tensor
    shapes: Sequence[torch.Size]

    def distance(self, grads: Sequence[Tensor]) -> Tensor:
        """The mean negative log-likelihood of the vertices (nats) in excess of that under a gradient all along them.

        Not zero at the true gradient, but least there in the mean over draws. It does not depend on the candidate's
        scale, as the norm is known.
        """
        d = sum(s.numel() for s in self.shapes)
        tiny = torch.finfo(torch.float32).tiny
        length = total(_rows(g).square().sum(1) for g in grads).clamp_min(tiny).sqrt()
        mass = total(_rows(g).abs().sum(1) for g in grads) / length / d**0.5
        even = (1 - mass).clamp_min(1e-6) / (2 * d)
        starts = torch.tensor([0, *[s.numel() for s in self.shapes]], device=self.indices.device).cumsum(0)
        order = self.indices.argsort()
        indices, signs = self.indices[order], self.signs[order]
        cuts = torch.searchsorted(indices, starts).tolist()
        chosen = torch.cat(
            [_rows(g)[:, indices[a:b] - s] for g, a, b, s in zip(grads, cuts, cuts[1:], starts.tolist(), strict=False)],
            dim=1,
        )
        along = (chosen * signs).clamp_min(0) / length[:, None] / d**0.5
        return -(along + even[:, None]).log().mean(1) - 0.5 * torch.log(torch.tensor(float(d)))


@dataclass(frozen=True)
class SpectralView:
    """Singular vectors of some of the gradient's matrices, and other tensors as they are (ATOMO).

    triples: by parameter, weights (r,), u (r, n), v (r, m): M v_i points along u_i and M^T u_i along v_i, how far is
    not known. vectors: by parameter, the tensor.
    """

    triples: dict[int, tuple[Tensor, Tensor, Tensor]]
    vectors: dict[int, Tensor]

    def distance(self, grads: Sequence[Tensor]) -> Tensor:
        """The mean of 1 - cosine over all directions and tensors, weighted by their squares; in [0, 2], zero at the
        true gradient, 1 for zeros."""
        terms, weights = [], []
        for i, (weight, u, v) in self.triples.items():
            if not len(weight):
                continue
            matrix = grads[i].reshape(len(grads[i]), u.shape[1], v.shape[1])
            square = weight.square()
            for found, expected in ((v @ matrix.mT, u), (u @ matrix, v)):  # (batch, r, n) and (batch, r, m)
                terms.append(((1 - _cosine(found, expected)) * square).sum(1))
                weights.append(square.sum())
        for i, vector in self.vectors.items():
            square = vector.square().sum()
            terms.append((1 - _cosine(_rows(grads[i]), vector.flatten())) * square)
            weights.append(square)
        return total(terms) / total(weights).clamp_min(torch.finfo(torch.float32).tiny)


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    """Along the last dimension; 0 where one of them is zero."""
    tiny = torch.finfo(x.dtype).tiny
    norms = x.square().sum(-1).clamp_min(tiny).sqrt() * y.square().sum(-1).clamp_min(tiny).sqrt()
    return (x * y).sum(-1) / norms.clamp_min(tiny)
