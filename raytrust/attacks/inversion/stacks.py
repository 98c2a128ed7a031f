"""Many observations compared at once: candidate i with the observation that is its own.

A small network pays for calls, not for arithmetic: with one distance an observation, each of some 60 tensors costs a
handful of calls a piece and iteration, several times what the passes through the network cost
(`benchmarks/inversion.py --width 16 --size 16 --images 1 8 32`). Views of one kind differ in their numbers alone, so
their numbers are stacked, and each tensor is one call for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from raytrust.config import InversionConfig
from raytrust.leak.views import (
    LinearView,
    ProductView,
    SignView,
    SparseView,
    TensorwiseView,
    View,
    orthant_distance,
    rows,
)
from raytrust.persample.ghost import GhostGradient

Weights: TypeAlias = Sequence[Sequence[float]] | None

# Entries of a gradient up to which calls cost more than what stacking copies.
LARGEST = 2**21


class Stack(Protocol):
    """The views of several observations."""

    def distance(self, grads: Sequence[Tensor], owner: Tensor) -> Tensor:
        """`View.distance` (n,) of the gradients (n, *shape) of n candidates from the views owner (n,) of the stack.

        The tensor `owner` must not be written to: what belongs to it is kept for as long as it is handed in.
        """
        ...


def stack_key(view: View, config: InversionConfig) -> tuple[object, ...] | None:
    """Equal for views whose distances can be stacked, None for one that stands alone."""
    if config.bound > 0 or config.matching not in ("cosine", "tensors"):
        return None
    tensorwise = config.matching == "tensors" or isinstance(view, TensorwiseView)
    linear = view.view if isinstance(view, TensorwiseView) else view
    if isinstance(linear, SignView) and _entries(linear.signs) <= LARGEST:
        return "signs", linear.scales is None
    if not isinstance(linear, LinearView) or _entries(linear.observed) > LARGEST:
        return None
    match linear:
        # Of one factor each: those of two, where a residual is avoided, are too few to be worth it.
        case ProductView() if all(p.left is None or p.right is None for p in linear.products):
            shapes = [(p.parameter, *(None if f is None else f.shape for f in p[1:])) for p in linear.products]
            return "products", tensorwise, tuple(shapes)
        case SparseView():
            return "sparse", tensorwise
        case _:
            return None


def stack(views: Sequence[View], config: InversionConfig) -> Stack:
    """The stack of views of one `stack_key`; config: of any of their attacks."""
    if isinstance(views[0], SignView):
        return SignStack(views)  # type: ignore[arg-type]
    weights: Weights = None
    if config.matching == "tensors" or isinstance(views[0], TensorwiseView):
        by_tensor = [v if isinstance(v, TensorwiseView) else TensorwiseView(v) for v in views]  # type: ignore[arg-type]
        views, weights = [v.view for v in by_tensor], [v.weights for v in by_tensor]
    kinds = {ProductView: ProductStack, SparseView: SparseStack}
    return kinds[type(views[0])](views, weights)


class LinearStack:
    """Linear views whose measurements are of equal shapes, compared by 1 - cosine: of all measurements together, or of
    each by itself.

    weights: of each view's measurements, as in `TensorwiseView`; None to compare them together.
    """

    def __init__(self, views: Sequence[LinearView], weights: Weights):
        self._tensorwise = weights is not None
        squares = [torch.stack([o.square().sum() for o in v.observed]) for v in views]
        self._squares = torch.stack(squares)  # (views, measurements)
        if weights is not None:
            self._weights = self._squares.new_tensor(weights)
        self._owner: Tensor | None = None

    def distance(self, grads: Sequence[Tensor], owner: Tensor) -> Tensor:
        # By identity: to compare the tensors would wait for the device in every iteration.
        if owner is not self._owner:
            self._owner = owner
            self._select(owner)
        inner, squared = self._products(grads)
        known = self._squares[owner]
        if not self._tensorwise:
            inner, squared, known = inner.sum(1, keepdim=True), squared.sum(1, keepdim=True), known.sum(1, keepdim=True)
        tiny = torch.finfo(squared.dtype).tiny
        # Clamped before the root, whose slope at 0 is infinite: a gradient of zeros would turn into NaN on the way
        # back.
        apart = 1 - inner / (squared.clamp_min(tiny).sqrt() * known.sqrt().clamp_min(tiny**0.5))
        return (apart * self._weights[owner]).sum(1) if self._tensorwise else apart[:, 0]

    def _select(self, owner: Tensor) -> None:
        """Lay out what belongs to these candidates; called once for as long as they are the same."""
        raise NotImplementedError

    def _products(self, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Inner products with what was observed, and squared norms, measurement by measurement: (n, measurements), or
        summed over some of them where they are only needed in sum."""
        raise NotImplementedError

    def _vectors(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        """Of plain measurements, (n, *shape) each, with what was observed, alike."""
        flat = [(rows(measured), rows(observed)) for measured, observed in pairs]
        # As one vector: two thirds of a network's tensors are short, and cost their calls.
        if not self._tensorwise and flat:
            flat = [(torch.cat([m for m, _ in flat], 1), torch.cat([o for _, o in flat], 1))]
        return [(m * o).sum(1) for m, o in flat], [m.square().sum(1) for m, _ in flat]


class ProductStack(LinearStack):
    """Whole tensors, and products of the same parameters with factors of equal shapes."""

    def __init__(self, views: Sequence[ProductView], weights: Weights):
        super().__init__(views, weights)
        self._parameters = [product.parameter for product in views[0].products]
        columns = zip(*(v.products for v in views), strict=True)
        self._factors = [(_stacked([p.left for p in c]), _stacked([p.right for p in c])) for c in columns]
        self._observed = [torch.stack(column) for column in zip(*(v.observed for v in views), strict=True)]

    def _select(self, owner: Tensor) -> None:
        self._mine = [[None if f is None else f[owner].mT for f in factors] for factors in self._factors]
        # A ghost gradient takes one matrix a candidate from the right alone, so that products come out transposed: what
        # they are compared with is laid out so, once.
        self._targets = [
            o[owner] if factors == [None, None] else o[owner].mT.contiguous()
            for o, factors in zip(self._observed, self._mine, strict=True)
        ]
        self._matrices: dict[int, Tensor] = {}

    def _products(self, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        ghosts: dict[int, tuple[Tensor, Tensor]] = {}
        plain: dict[int, tuple[Tensor, Tensor]] = {}
        for k, (i, (left, right), target) in enumerate(zip(self._parameters, self._mine, self._targets, strict=True)):
            g = grads[i]
            if left is not None:
                plain[k] = g.flatten(2).mT @ left, target
            elif right is not None:
                plain[k] = g.flatten(2) @ right, target
            elif isinstance(g, GhostGradient):
                ghosts[k] = g.product.inner_each(self._matrix(k, g)), g.product.squared_norm()
            else:
                plain[k] = g, target
        vectors = list(zip(*self._vectors(list(plain.values())), strict=True))
        # Measurement by measurement their order matters, in sum it does not.
        both = ghosts | dict(zip(plain, vectors, strict=True)) if self._tensorwise else {}
        pairs = [both[k] for k in sorted(both)] or [*ghosts.values(), *vectors]
        inner, squared = zip(*pairs, strict=True)
        return torch.stack(inner, 1), torch.stack(squared, 1)

    def _matrix(self, k: int, g: GhostGradient) -> Tensor:
        """What is compared with a ghost gradient, in its own order of entries."""
        if k not in self._matrices:
            target = g.product.as_matrix(self._targets[k])
            # Rounded to the dtype of the passes only where products of their factors want it.
            self._matrices[k] = target.to(g.product.inputs.dtype if g.product.low_rank else target).contiguous()
        return self._matrices[k]


class SparseStack(LinearStack):
    """Some entries of each gradient, at places and in numbers of its own."""

    def __init__(self, views: Sequence[SparseView], weights: Weights):
        super().__init__(views, weights)
        columns = list(zip(*(v.positions for v in views), strict=True))
        # Views have entries in numbers of their own: the shorter ones are padded with position 0, and whatever a
        # gradient has there is replaced by 0, as was padded to what was observed. A weight of 0 would not do: an
        # infinite entry would turn into NaN, and break a candidate by what it isn't compared in.
        self._positions = [pad_sequence(list(p), batch_first=True) for p in columns]
        self._padding = [~pad_sequence([torch.ones_like(x, dtype=torch.bool) for x in p], True) for p in columns]
        self._observed = [pad_sequence(list(o), True) for o in zip(*(v.observed for v in views), strict=True)]

    def _select(self, owner: Tensor) -> None:
        self._at, self._padded, self._targets = (
            [t[owner] for t in tensors] for tensors in (self._positions, self._padding, self._observed)
        )
        self._places: dict[int, tuple[Tensor, Tensor]] = {}

    def _products(self, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        measured = [self._entries(i, g) for i, g in enumerate(grads)]
        inner, squared = self._vectors(list(zip(measured, self._targets, strict=True)))
        return torch.stack(inner, 1), torch.stack(squared, 1)

    def _entries(self, i: int, g: Tensor) -> Tensor:
        if not isinstance(g, GhostGradient):
            return rows(g).gather(1, self._at[i]).masked_fill(self._padded[i], 0)
        if i not in self._places:
            columns, kernel = g.product.shape[1:].numel(), g.product.shape[2:].numel()
            # A ghost gradient's columns have the kernel's position outermost, where those of the weight have the
            # channel.
            row, column = self._at[i] // columns, self._at[i] % columns
            self._places[i] = row, column % kernel * g.product.shape[1] + column // kernel
        return g.product.entries_each(*self._places[i]).masked_fill(self._padded[i], 0)


class SignStack:
    """Orthants of whole gradients, as `SignView` compares them."""

    def __init__(self, views: Sequence[SignView]):
        self._signs = [torch.stack(column) for column in zip(*(v.signs for v in views), strict=True)]
        self._balance = torch.stack([v.balance for v in views])
        known = [v.scales for v in views if v.scales is not None]
        self._scales = torch.stack(known) if known else None
        self._sizes = self._balance.new_tensor([s[0].numel() for s in self._signs])
        self._owner: Tensor | None = None

    def distance(self, grads: Sequence[Tensor], owner: Tensor) -> Tensor:
        if owner is not self._owner:
            self._owner = owner
            self._targets = [s[owner] for s in self._signs]
            self._matrices: dict[int, Tensor] = {}
        sums, inside = [], []
        for i, g in enumerate(grads):
            flat, signs = self._like(i, g)
            sums.append(flat.abs().sum(1))
            inside.append((flat * signs).sum(1))
        scales = None if self._scales is None else self._scales[owner]
        return orthant_distance(torch.stack(sums, 1), torch.stack(inside, 1), self._sizes, self._balance[owner], scales)

    def _like(self, i: int, g: Tensor) -> tuple[Tensor, Tensor]:
        """A gradient and its signs as rows, in whichever order is at hand."""
        # The signs are laid out as the gradient is, once: to bring each gradient into their order would copy it.
        if not isinstance(g, GhostGradient):
            return rows(g), rows(self._targets[i])
        if i not in self._matrices:
            self._matrices[i] = g.product.as_matrix(self._targets[i]).flatten(1)
        return g.product.matrix.flatten(1), self._matrices[i]


def _stacked(factors: Sequence[Tensor | None]) -> Tensor | None:
    present = [f for f in factors if f is not None]
    return torch.stack(present) if present else None


def _entries(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() for t in tensors)
