"""What Soteria leaves to compare: the gradient without the columns that it pruned (Balunovic et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from raytrust.compress import Transformed
from raytrust.config import SoteriaConfig
from raytrust.leak.observation import Observation, decoded
from raytrust.leak.views import LinearView, Product, ProductView, SparseView, TensorwiseView, View
from raytrust.networks.classifier import final_linear

# Of a column's spread, relative to the largest entry of its tensor: what float32 leaves of a product with zeros.
ZERO = 1e-6


class Pruned(NamedTuple):
    """The final layer's weight after Soteria. parameter: its place among what was sent. stayed: (features,), 1 for a
    column that stayed and else 0; zeros where the messages don't tell, so that the whole tensor is left out."""

    parameter: int
    stayed: Tensor


def pruned_by_soteria(seen: Observation, device: str = "cpu") -> Pruned | None:
    """Which columns Soteria took away, as the messages show it; None without Soteria.

    A column is a sum over images of (p - y) r, whose entries sum to 0 as those of p - y do: one of equal entries is
    zero, also by its signs alone. As many as were pruned have to be found: behind noise, a residual or other workers'
    gradients they are not.
    """
    compressor = seen.build_compressor()
    configs = compressor.configs if isinstance(compressor, Transformed) else ()
    config = next((c for c in configs if isinstance(c, SoteriaConfig)), None)
    if config is None:
        return None
    layer, _ = final_linear(seen.build_model(), seen.image_shape, seen.classes)
    parameter = [*seen.weights].index(f"{layer}.weight".removeprefix("."))
    received = decoded(seen, device)
    weight = received.gradient[parameter]
    stayed = weight.amax(0) - weight.amin(0) > ZERO * weight.abs().max()
    pruned = config.pruned(len(stayed))
    alone = received.images == seen.threat.batch_size and not seen.residual
    if not alone or int((~stayed).sum()) < pruned:
        stayed = torch.zeros_like(stayed)
    return Pruned(parameter, stayed.to(weight.dtype))


def without_pruned(view: View, pruned: Pruned) -> View:
    """The view of a gradient that went through Soteria as one of the gradient before it."""
    i, stayed = pruned
    match view:
        case TensorwiseView():
            inner = without_pruned(view.view, pruned)
            return TensorwiseView(inner) if isinstance(inner, LinearView) and inner is not view.view else view
        case ProductView():
            return _of_products(view, pruned)
        case SparseView():
            kept = [stayed[p % len(stayed)] > 0 if k == i else p >= 0 for k, p in enumerate(view.positions)]
            observed, positions = (
                [x[k] for x, k in zip(xs, kept, strict=True)] for xs in (view.observed, view.positions)
            )
            bound = None if view.bound is None else view.bound.expand(len(kept)).clone()
            if bound is not None:
                bound[i] = torch.inf  # what was pruned may be of any size
            return SparseView(observed, positions, view.shapes, bound)
        case LinearView():
            masked = _Masked(view, pruned)
            adjoint = view.adjoint
            return LinearView(
                view.observed, lambda g: view.measure(masked(g)), lambda m: masked(adjoint(m)), view.noise
            )
    return _Masked(view, pruned)


def _of_products(view: ProductView, pruned: Pruned) -> View:
    i, stayed = pruned
    if all(p.parameter != i for p in view.products):
        return view
    observed, products = [], []
    for seen, product in zip(view.observed, view.products, strict=True):
        if product.parameter == i:
            if not bool(stayed.any()):
                continue
            # By a factor of one shape, whichever columns they are: views of several images can then be stacked.
            right = stayed.diag() if product.right is None else product.right * stayed
            if product.left is None and product.right is None:
                seen = (seen * stayed).T.contiguous()
            product = Product(i, product.left, right)
        observed.append(seen)
        products.append(product)
    return ProductView(observed, products, view.shapes)


@dataclass(eq=False)
class _Masked:
    """Candidates lose what the private gradient lost, and then meet any view."""

    view: View
    pruned: Pruned

    def __call__(self, grads: Sequence[Tensor]) -> list[Tensor]:
        return [g * self.pruned.stayed if k == self.pruned.parameter else g for k, g in enumerate(grads)]

    def distance(self, grads: Sequence[Tensor]) -> Tensor:
        return self.view.distance(self(grads))
