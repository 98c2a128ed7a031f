"""What messages reveal of the gradient alone, where what earlier steps left unsent is in them too.

Under error feedback a step sends x = g + e, with the residual e of the step before: its input less what was sent. An
attacker who holds the messages of the step before knows where e is zero:

- Top-K, threshold, Rand-K: at the entries that were sent. Of those sent now, the ones that were sent just before are
  entries of the gradient, to the bit.
- DGC: v is zero there, and with masking u, too. Without masking u is still momentum x what v was when it was sent, if
  the entry had been sent in the step before that as well, or had no past: then that much is taken off.
- PowerSGD: everywhere along the P^ of the step before, see `low_rank.pure_powersgd_view`. ATOMO and PowerSGD send
  tensors of one dimension whole, so these have no residual, for which no history is needed.

The other methods round every entry, and so leave a residual everywhere.

More history tells how old the residual of an entry is that is not zero: it is the sum of the gradients since the entry
was last sent. `weighed_view` keeps all that was sent, and trusts it the less the older it is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from raytrust.compress import Compressor, ErrorFeedback, HookCompressor, Transformed, Vantage
from raytrust.compress.dense import Dense
from raytrust.compress.dgc import DGC
from raytrust.compress.parts import InParts
from raytrust.compress.randk import RandK
from raytrust.compress.sparse import Sparse
from raytrust.leak.rules import EarlierStep, Messages, expect_history, pure_view_of, view_of
from raytrust.leak.sparse import entries_view, sent_entries, sparse_view
from raytrust.leak.views import LinearView, SparseView, View


def holds_residual(compressor: Compressor) -> bool:
    """Whether, after its first step, its messages hold what earlier ones did not send."""
    compressor = _sent_by(compressor)
    return isinstance(compressor, (ErrorFeedback, DGC)) or (
        isinstance(compressor, HookCompressor) and compressor.holds_residual
    )


def pure_view(
    compressor: Compressor,
    messages: Messages,
    vantage: Vantage,
    victim: int = 0,
    history: Sequence[EarlierStep] = (),
) -> View:
    """Like `view_of`, but of the gradient alone: what also measures the residual is left out.

    history: the steps before, of the same worker, the last one just before. Of linear views, measure(gradient without
    residual) == observed, at every number of workers; a peer measures the mean gradient after an all-mean. Of DGC with
    clipping it is the clipped gradient. Raises ValueError where nothing is known to be free of a residual.
    """
    if not holds_residual(compressor):
        return view_of(compressor, messages, vantage, victim)
    return pure_view_of(_method(compressor), messages, vantage, victim, history)


@pure_view_of.register(Dense)
def pure_dense_view(
    compressor: Dense, messages: Messages, vantage: Vantage, victim: int, history: Sequence[EarlierStep]
) -> View:
    """All is sent, and no residual is left."""
    return view_of(compressor, messages, vantage, victim)


@pure_view_of.register(Sparse)
@pure_view_of.register(RandK)
def pure_sparse_view(
    compressor: Sparse | RandK, messages: Messages, vantage: Vantage, victim: int, history: Sequence[EarlierStep]
) -> SparseView:
    """The entries that were sent in the step before, too, and, where momentum goes on, in that before it."""
    expect_history(history)
    values, positions = sent_entries(compressor, messages, vantage, victim)
    before = [_sent_earlier(compressor, step, vantage, victim) for step in history]
    carried = compressor.carried if isinstance(compressor, DGC) else 0.0
    needed = before[-1:]
    if carried and int(history[-1].compressor_state["step"]) > 0:
        if len(history) < 2:
            raise ValueError("Expected a history of at least 2 steps, to tell the gradient from the momentum.")
        needed = before[-2:]
    again = torch.ones_like(positions, dtype=torch.bool)
    for _, earlier in needed:
        again &= torch.isin(positions, earlier, assume_unique=True)
    if not bool(again.any()):
        raise ValueError(f"Expected entries that were sent in the step before, too, got none among {len(positions)}.")
    values, positions = values[again], positions[again]
    if carried:
        # What was sent was u itself, as v had been zero; the share of it that stays is in the next.
        past, earlier = before[-1]
        values = values - carried * past[torch.searchsorted(earlier, positions)]
    return entries_view(compressor.layout, values, positions)


def weighed_view(
    compressor: Compressor,
    messages: Messages,
    vantage: Vantage,
    victim: int = 0,
    history: Sequence[EarlierStep] = (),
) -> LinearView:
    """Like `view_of` of a sparse method, with each entry divided by the square root of its age.

    The age is 1 for an entry that was sent in the step before, and else 1 + the number of gradients in its residual;
    if it was not sent in all the history, as if it had been just before that. Were the gradients of all steps alike and
    independent, so the variance of all measurements would be the same. Raises ValueError for other methods, for DGC
    whose momentum outlives the sending, and without a history.
    """
    method = _method(compressor)
    if not isinstance(method, (Sparse, RandK)) or (isinstance(method, DGC) and method.carried):
        name = type(method).__name__
        raise ValueError(
            f"Expected a method that sends entries and then forgets them, to weigh them by age, got {name}."
        )
    expect_history(history)
    now = sparse_view(method, messages, vantage, victim)
    _, positions = sent_entries(method, messages, vantage, victim)
    ages = torch.full_like(positions, len(history) + 1)
    # The oldest first, so that what was sent again is younger.
    for i, step in enumerate(history):
        _, earlier = _sent_earlier(method, step, vantage, victim)
        ages[torch.isin(positions, earlier, assume_unique=True)] = len(history) - i
    weights = ages.to(torch.float32).rsqrt().split([len(o) for o in now.observed])

    def weighed(measured: Sequence[Tensor]) -> list[Tensor]:
        return [m * w for m, w in zip(measured, weights, strict=True)]

    return LinearView(
        weighed(now.observed),
        lambda grads: weighed(now.measure(grads)),
        lambda measured: now.adjoint(weighed(measured)),
    )


def _sent_by(compressor: Compressor) -> Compressor:
    """What makes the messages, with its error feedback."""
    if isinstance(compressor, InParts):
        compressor = compressor.whole
    # What transforms take away is gone: the residual is of what was left, and so are views of the gradient alone.
    return compressor.inner if isinstance(compressor, Transformed) else compressor


def _method(compressor: Compressor) -> Compressor:
    compressor = _sent_by(compressor)
    return compressor.inner if isinstance(compressor, ErrorFeedback) else compressor


def _sent_earlier(method: Sparse | RandK, step: EarlierStep, vantage: Vantage, victim: int) -> tuple[Tensor, Tensor]:
    # Rand-K's positions follow from the state before that step.
    earlier = copy.deepcopy(method)
    earlier.load_public_state(step.compressor_state)
    return sent_entries(earlier, step.messages, vantage, victim)
