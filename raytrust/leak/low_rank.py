"""What low-rank messages reveal: of PowerSGD, products with known factors; of ATOMO, an estimate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytrust.compress import Vantage
from raytrust.compress.atomo import Atomo
from raytrust.compress.powersgd import PowerSGD
from raytrust.leak.rules import EarlierStep, Messages, decoded_of, expect_history, pure_view_of, view_of
from raytrust.leak.views import Product, ProductView, TensorwiseView


@view_of.register(PowerSGD)
def powersgd_view(compressor: PowerSGD, messages: Messages, vantage: Vantage, victim: int = 0) -> ProductView:
    """Two linear measurements of every matrix: M Q, for the public Q of this step, and M^T P^."""
    factors = compressor.factors(messages, vantage)
    # Q enters as an orthonormal basis of its columns (M Q^ follows from M Q), so that no direction counts for more than
    # it weighs in M; a warm start's columns differ a thousandfold in length.
    whitened = [_whiten(q.to(p)) for q, p in zip(compressor.q, factors.ps, strict=True)]
    ps = [mix @ p for p, (_, mix) in zip(factors.ps, whitened, strict=True)]
    products = [
        *(Product(i, right=basis) for i, (basis, _) in zip(compressor.matrices, whitened, strict=True)),
        *(Product(i, left=basis) for i, basis in zip(compressor.matrices, factors.bases, strict=True)),
        *map(Product, compressor.vectors),
    ]
    return ProductView([*ps, *factors.qs, *factors.vectors], products, compressor.layout.shapes)


@pure_view_of.register(PowerSGD)
def pure_powersgd_view(
    compressor: PowerSGD, messages: Messages, vantage: Vantage, victim: int, history: Sequence[EarlierStep]
) -> ProductView:
    """The residual E is what the projection on the P^ of the step before left over, so P^^T E = 0, for each worker, as
    all have the same P^, and for their mean.

    So the part P^^T M Q of M Q is the gradient's, and so is that of M^T times the new P^ whose directions lie in the
    span of the former one. Tensors of one dimension have no residual.
    """
    factors = compressor.factors(messages, vantage)
    former = compressor.factors(history[-1].messages, vantage).bases if history else []
    observed, products = [], []
    for j, left in enumerate(former):
        i = compressor.matrices[j]
        right, mix = _whiten(compressor.q[j].to(left))
        inside = _within(factors.bases[j], left)
        observed += [left @ (mix @ factors.ps[j]).T, inside @ factors.qs[j]]
        products += [Product(i, left, right), Product(i, left=inside @ factors.bases[j])]
    kept = [k for k, o in enumerate(observed) if o.numel()]
    # Tensors of one dimension need no history: where there are some, a view without one is theirs.
    expect_history([*kept, *factors.vectors])
    return ProductView(
        [*(observed[k] for k in kept), *factors.vectors],
        [*(products[k] for k in kept), *map(Product, compressor.vectors)],
        compressor.layout.shapes,
    )


@pure_view_of.register(Atomo)
def pure_atomo_view(
    compressor: Atomo, messages: Messages, vantage: Vantage, victim: int, history: Sequence[EarlierStep]
) -> TensorwiseView:
    """Tensors of one dimension are sent whole, and have no residual; each weighs as its square."""
    if not compressor.vectors:
        raise ValueError("Expected tensors of one dimension, which alone have no residual under ATOMO.")
    decoded = decoded_of(compressor, messages, vantage, victim)
    observed = [decoded[i] for i in compressor.vectors]
    view = ProductView(observed, [Product(i) for i in compressor.vectors], compressor.layout.shapes)
    return TensorwiseView(view, [float(x.square().sum()) for x in observed])


def _whiten(q: Tensor) -> tuple[Tensor, Tensor]:
    """(r, m) -> an orthonormal basis (s, m) of the rows of `q`, of numerical rank s; mix (s, r): basis = mix q."""
    u, s, vh = torch.linalg.svd(q, full_matrices=False)
    # Directions on which a degenerate Q sheds no light would enter as rounding, divided by next to nothing.
    keep = s > s[0] * 1e-4 if s.numel() and s[0] > 0 else torch.zeros_like(s, dtype=torch.bool)
    return vh[keep], u.T[keep] / s[keep, None]


def _within(rows: Tensor, others: Tensor) -> Tensor:
    """(k, r): coefficients of the directions in the span of orthonormal rows (r, n) that lie in that of others, too."""
    # In float64, because what is asked is whether sines of angles are zero.
    rows, others = rows.double(), others.double()
    # Its singular values are the sines of the angles between the spans.
    outside = rows - (rows @ others.T) @ others
    u, s, _ = torch.linalg.svd(outside, full_matrices=False)
    return u.T[s < 1e-5].float()
