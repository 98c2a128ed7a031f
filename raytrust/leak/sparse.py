"""What sparse messages reveal (Top-K, threshold, DGC, Rand-K): entries of the gradient, and a bound on the others."""

from __future__ import annotations

import torch
from torch import Tensor

from raytrust.compress import Layout, Vantage
from raytrust.compress.randk import RandK
from raytrust.compress.sparse import Sparse
from raytrust.compress.topk import TopK
from raytrust.leak.rules import Messages, payload_of, view_of
from raytrust.leak.views import SparseView


@view_of.register(Sparse)
@view_of.register(RandK)
def sparse_view(compressor: Sparse | RandK, messages: Messages, vantage: Vantage, victim: int = 0) -> SparseView:
    values, positions = sent_entries(compressor, messages, vantage, victim)
    # The largest were sent, so that the least of them bounds all others. What was drawn bounds nothing.
    bound = values.abs().min() if len(values) and isinstance(compressor, Sparse) else None
    return entries_view(compressor.layout, values, positions, bound)


@view_of.register(TopK)
def topk_view(compressor: TopK, messages: Messages, vantage: Vantage, victim: int = 0) -> SparseView:
    view = sparse_view(compressor, messages, vantage, victim)
    if compressor.scope == "layer" and view.observed:
        # Each layer sent its own largest. One that sent nothing has no entries.
        view.bound = torch.stack([v.abs().min() if len(v) else v.new_zeros(()) for v in view.observed])
    return view


def sent_entries(
    compressor: Sparse | RandK, messages: Messages, vantage: Vantage, victim: int
) -> tuple[Tensor, Tensor]:
    """(k,) values, and their positions in the flat gradient, int64, increasing."""
    payload = payload_of(messages, vantage, victim)
    if isinstance(compressor, RandK):
        return payload[0], compressor.positions(payload[0].device)
    values, positions = payload
    return values, positions.long()


def entries_view(layout: Layout, values: Tensor, positions: Tensor, bound: Tensor | None = None) -> SparseView:
    """The view of entries of the flat gradient, in increasing order of their positions, one part a parameter."""
    starts = torch.tensor([0, *layout.sizes], device=positions.device).cumsum(0)
    cuts = torch.searchsorted(positions.contiguous(), starts).tolist()
    within = [positions[a:b] - start for a, b, start in zip(cuts[:-1], cuts[1:], starts.tolist(), strict=False)]
    return SparseView(list(values.split([len(p) for p in within])), within, layout.shapes, bound)
