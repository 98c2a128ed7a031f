"""What an attacker compares candidate gradients with: `View` and its kinds.

Which of them the messages of a compressor are, its rule says (`raytrust.leak.rules`). Of quantised gradients the sets
that hold them (intervals, vertices) and of ATOMO the singular directions were tried as views, too: measured, no
attack was better with them than with what the messages decode to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

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


@dataclass(eq=False)
class LinearView:
    """The observed values of known linear functions of the gradient.

    observed: the measurements, one tensor each.
    measure: (batch, *shape) a parameter -> (batch, *measurement) a measurement; measure(true gradient) == observed.
    adjoint: (batch, *measurement) a measurement -> (batch, *shape) a parameter;
        <measure(g), m> == <g, adjoint(m)>.
    noise: the variance of the noise that is known to be in each entry of the measurements.
    """

    observed: Sequence[Tensor]
    measure: Callable[[Sequence[Tensor]], list[Tensor]]
    adjoint: Callable[[Sequence[Tensor]], list[Tensor]]
    noise: float = 0.0

    def distance(self, grads: Sequence[Tensor]) -> Tensor:
        """1 - cosine of the candidate's measurements with the observed ones, in [0, 2] (Geiping et al. 2020, eq. 4).

        A candidate or an observation that is zero throughout is at distance 1.
        """
        measured = self.measure(grads)
        inner = total(rows(m) @ o.flatten() for m, o in zip(measured, self.observed, strict=True))
        squared = total(rows(m).square().sum(1) for m in measured)
        # Clamped before the root: at zero the slope of a root is infinite, and the candidate would never come back.
        tiny = torch.finfo(squared.dtype).tiny
        return 1 - inner / (squared.clamp_min(tiny).sqrt() * self._norm.clamp_min(tiny**0.5))

    # Cached, as an attack asks for it in every iteration.
    @cached_property
    def _norm(self) -> Tensor:
        return torch.sqrt(total(o.square().sum() for o in self.observed))


class Product(NamedTuple):
    """A known product of one parameter M, taken as a matrix: left M right^T, (s, r).

    left: (s, n). right: (r, m). Without a left factor it is measured as right M^T, (r, n), without a right one as
    left M, (s, m), and without either M is measured as it is, in its own shape.
    """

    parameter: int
    left: Tensor | None = None
    right: Tensor | None = None


class ProductView(LinearView):
    """Products of the gradient's matrices with known factors (PowerSGD), and whole tensors.

    A matrix is the parameter with all dimensions but the first as one. observed: one tensor a product.
    """

    # The factors are kept besides the functions that use them: factors of equal shapes can be stacked, functions can't.
    def __init__(self, observed: Sequence[Tensor], products: Sequence[Product], shapes: Sequence[torch.Size]):
        self.products, self.shapes = products, shapes

        def measured(m: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
            if left is None:
                return m if right is None else right @ m.flatten(2).mT
            product = left @ m.flatten(2)
            return product if right is None else product @ right.T

        def returned(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
            if left is None:
                return x if right is None else x.mT @ right
            return left.T @ (x if right is None else x @ right)

        def measure(grads: Sequence[Tensor]) -> list[Tensor]:
            return [measured(grads[i], left, right) for i, left, right in products]

        def adjoint(measurements: Sequence[Tensor]) -> list[Tensor]:
            grads = [measurements[0].new_zeros(len(measurements[0]), *shape) for shape in shapes]
            for x, (i, left, right) in zip(measurements, products, strict=True):
                grads[i] += returned(x, left, right).view(grads[i].shape)
            return grads

        super().__init__(observed, measure, adjoint)


def identity_view(observed: Sequence[Tensor]) -> ProductView:
    """The view of a whole gradient. Of a decoded one, it is the view of an attacker who ignores the compressor."""
    return ProductView(observed, [Product(i) for i in range(len(observed))], [o.shape for o in observed])


class SparseView(LinearView):
    """Some entries of the gradient, and that all others are of magnitude at most `bound`, if one is given.

    observed, positions: one tensor a parameter, (k,): the values, and where in the flattened parameter they are.
    bound: of all parameters (), or one for each (parameters,).
    """

    def __init__(
        self,
        observed: Sequence[Tensor],
        positions: Sequence[Tensor],
        shapes: Sequence[torch.Size],
        bound: Tensor | None = None,
    ):
        self.positions, self.shapes, self.bound = positions, shapes, bound

        def measure(grads: Sequence[Tensor]) -> list[Tensor]:
            return [rows(g)[:, p] for g, p in zip(grads, positions, strict=True)]

        def adjoint(measured: Sequence[Tensor]) -> list[Tensor]:
            return [
                m.new_zeros(len(m), shape.numel()).index_copy(1, p, m).view(len(m), *shape)
                for m, p, shape in zip(measured, positions, shapes, strict=True)
            ]

        super().__init__(observed, measure, adjoint)

    def excess(self, grads: Sequence[Tensor]) -> Tensor:
        """By how much entries that were not sent exceed the bound: the sum of squares, relative to that of what was
        sent, (batch,), at the scale at which a candidate fits best what was sent. Zero at the true gradient, and
        without a bound."""
        measured = self.measure(grads)
        inner = total(rows(m) @ o.flatten() for m, o in zip(measured, self.observed, strict=True))
        if self.bound is None:
            return torch.zeros_like(inner)
        # The distance is a cosine, which leaves a candidate's scale open, and the bound is a length: so the scale is
        # fitted first, and not below zero, where the bound would favour the negative.
        squared = total(rows(m).square().sum(1) for m in measured)
        scale = (inner / squared.clamp_min(torch.finfo(squared.dtype).tiny)).clamp_min(0)
        bounds = self.bound.expand(len(self.positions))
        beyond = total(
            (scale[:, None] * rows(g).abs() - b).clamp_min(0).index_fill(1, p, 0.0).square().sum(1)
            for g, p, b in zip(grads, self.positions, bounds, strict=True)
        )
        return beyond / total(o.square().sum() for o in self.observed).clamp_min(torch.finfo(beyond.dtype).tiny)


class TensorwiseView:
    """A linear view whose measurements are compared one by one, for gradients that were quantised.

    weights: of each measurement, of which their shares are kept; by default the number of its entries, where there is
        noise times the share of its square that is not noise.
    """

    # A cosine over the whole gradient is dominated by the few tensors of large gradients. Noise of quantisation is as
    # large in every entry, and a sign is one bit whatever the magnitude: there the other tensors tell as much.
    def __init__(self, view: LinearView, weights: Sequence[float] | None = None):
        self.view = view
        self._parts = [identity_view([o]) for o in view.observed]
        self.weights = _shares([_signal(o, view.noise) for o in view.observed] if weights is None else weights)

    def distance(self, grads: Sequence[Tensor]) -> Tensor:
        """1 - cosine of each measurement, weighted; in [0, 2], 0 at the observed ones, 1 where nothing was observed."""
        terms = zip(self.weights, self._parts, self.view.measure(grads), strict=True)
        return total(weight * part.distance([m]) for weight, part, m in terms if weight)


@dataclass(eq=False)
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
        """
        sizes = grads[0].new_tensor([s.numel() for s in self.signs])
        sums = torch.stack([rows(g).abs().sum(1) for g in grads], 1)
        inside = torch.stack([rows(g) @ s.flatten() for g, s in zip(grads, self.signs, strict=True)], 1)
        return orthant_distance(sums, inside, sizes, self.balance, self.scales)

    @cached_property
    def balance(self) -> Tensor:
        """The mean of each tensor's signs, (parameters,); of a tensor without entries 0."""
        return torch.stack([s.sum() / max(s.numel(), 1) for s in self.signs])


def orthant_distance(
    sums: Tensor, inside: Tensor, sizes: Tensor, balance: Tensor, scales: Tensor | None = None
) -> Tensor:
    """`SignView.distance` from each tensor's L1 norm and inner product with the signs, (batch, parameters) each.

    sizes: (parameters,), entries. balance, scales: of each tensor's signs, (parameters,) or (batch, parameters).
    """
    # By tensor, for the reason of `TensorwiseView`: over all at once, the few of large gradients would be all.
    inside = torch.where(sums > 0, inside / sums.clamp_min(torch.finfo(sums.dtype).tiny), balance)
    outside = (1 - inside) @ (sizes / sizes.sum().clamp_min(1) / 2)
    return outside if scales is None else outside + 1 - _cosine(sums, scales * sizes)


def rows(x: Tensor) -> Tensor:
    """(batch, *shape) -> (batch, entries), for any shape: without entries, or a scalar's."""
    return x.flatten(1) if x.ndim > 1 else x[:, None]


def _signal(observed: Tensor, noise: float) -> float:
    """How many entries of a measurement are signal, and not noise of this variance, as far as its square says."""
    n, square = observed.numel(), float(observed.square().sum())
    return float(n) if not noise or not square else n * max(0.0, 1 - n * noise / square)


def total(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum(0)


def _shares(weights: Sequence[float]) -> list[float]:
    """Of their sum; equal ones where all are 0, as where nothing was observed."""
    whole = sum(weights)
    return [weight / whole if whole else 1 / len(weights) for weight in weights]


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    """Along the last dimension; 0 where one of them is zero."""
    tiny = torch.finfo(x.dtype).tiny
    norms = x.square().sum(-1).clamp_min(tiny).sqrt() * y.square().sum(-1).clamp_min(tiny).sqrt()
    return (x * y).sum(-1) / norms.clamp_min(tiny)
