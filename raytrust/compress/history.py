"""What messages reveal of the gradient alone, where what earlier steps left unsent is in them too.

Under error feedback a step sends x = g + e, with the residual e of the step before: its input less what was sent. An
attacker who holds the messages of the step before knows where e is zero:

- Top-K, threshold, Rand-K: at the entries that were sent. Of those sent now, the ones that were sent just before are
  entries of the gradient, to the bit.
- DGC: v is zero there, and with masking u, too. Without masking u is still momentum x what v was when it was sent, if
  the entry had been sent in the step before that as well, or had no past: then that much is taken off.
- PowerSGD: everywhere along the P^ of the step before, see `PowerSGD.pure_view`. ATOMO and PowerSGD send tensors of one
  dimension whole, so these have no residual, for which no history is needed.

The other methods round every entry, and so leave a residual everywhere.

More history tells how old the residual of an entry is that is not zero: it is the sum of the gradients since the entry
was last sent. `weighed_view` keeps all that was sent, and trusts it the less the older it is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from raytrust.compress.atomo import Atomo
from raytrust.compress.dense import Dense
from raytrust.compress.dgc import DGC
from raytrust.compress.error_feedback import ErrorFeedback
from raytrust.compress.interface import Compressor, Vantage
from raytrust.compress.powersgd import PowerSGD
from raytrust.compress.randk import RandK
from raytrust.compress.sparse import Sparse
from raytrust.compress.views import LinearView, SparseView, View
from raytrust.wire.channel import Message


class Past(NamedTuple):
    """An earlier step of one worker: its messages, as the vantage shows them, and the public state before them."""

    messages: tuple[Message, ...]
    compressor_state: dict[str, Tensor]

    def to(self, device: str) -> Past:
        return Past(tuple(m.to(device) for m in self.messages), self.compressor_state)


def pure_view(
    compressor: Compressor,
    messages: Sequence[Message],
    vantage: Vantage,
    victim: int = 0,
    history: Sequence[Past] = (),
) -> View:
    """Like `compressor.view`, but of the gradient alone: what also measures the residual is left out.

    history: the steps before, of the same worker, the last one just before. Of linear views, measure(gradient without
    residual) == observed, at every number of workers; a peer measures the mean gradient after an all-mean. Of DGC with
    clipping it is the clipped gradient. Raises ValueError where nothing is known to be free of a residual.
    """
    if not isinstance(compressor, (ErrorFeedback, DGC)):
        return compressor.view(messages, vantage, victim)
    match method := _method(compressor):
        case Dense():
            return method.view(messages, vantage, victim)
        case PowerSGD():
            return method.pure_view(messages, vantage, history[-1].messages if history else None)
        case Atomo():
            return replace(method.view(messages, vantage, victim), triples={})
        case Sparse() | RandK():
            return _sent_again(method, messages, vantage, victim, history)
        case _:
            raise ValueError(f"Expected a method whose residual has zeros, got {type(method).__name__}.")


def weighed_view(
    compressor: Compressor,
    messages: Sequence[Message],
    vantage: Vantage,
    victim: int = 0,
    history: Sequence[Past] = (),
) -> LinearView:
    """Like `compressor.view` of a sparse method, with each entry divided by the square root of its age.

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
    _expect(history)
    now = method.view(messages, vantage, victim)
    ages = [torch.full_like(at, len(history) + 1) for at in now.positions]
    for i, past in enumerate(history):  # the oldest first: what was sent again is younger
        for age, at, sent in zip(ages, now.positions, _earlier(method, past, vantage, victim).positions, strict=True):
            age[torch.isin(at, sent, assume_unique=True)] = len(history) - i
    weights = [age.to(o).rsqrt() for age, o in zip(ages, now.observed, strict=True)]

    def weighed(measured: Sequence[Tensor]) -> list[Tensor]:
        return [m * w for m, w in zip(measured, weights, strict=True)]

    return LinearView(
        weighed(now.observed),
        lambda grads: weighed(now.measure(grads)),
        lambda measured: now.adjoint(weighed(measured)),
    )


def _method(compressor: Compressor) -> Compressor:
    return compressor.inner if isinstance(compressor, ErrorFeedback) else compressor


def _expect(history: Sequence[Past]) -> None:
    if not history:
        raise ValueError("Expected a history of at least 1 step, to tell the gradient from the residual.")


def _sent_again(
    method: Sparse | RandK, messages: Sequence[Message], vantage: Vantage, victim: int, history: Sequence[Past]
) -> SparseView:
    """The entries that were sent in the step before, too, and, where momentum goes on, in that before it."""
    _expect(history)
    now = method.view(messages, vantage, victim)
    before = [_earlier(method, past, vantage, victim) for past in history]
    carried = method.carried if isinstance(method, DGC) else 0.0
    needed = [before[-1].positions]
    if carried and int(history[-1].compressor_state["step"]) > 0:
        if len(history) < 2:
            raise ValueError("Expected a history of at least 2 steps, to tell the gradient from the momentum.")
        needed.append(before[-2].positions)
    observed, positions = [], []
    for i, (values, at) in enumerate(zip(now.observed, now.positions, strict=True)):
        again = torch.ones_like(at, dtype=torch.bool)
        for earlier in needed:
            again &= torch.isin(at, earlier[i], assume_unique=True)
        values, at = values[again], at[again]
        if carried:  # u, as it was sent: v had been zero
            values = values - carried * before[-1].observed[i][torch.searchsorted(before[-1].positions[i], at)]
        observed.append(values)
        positions.append(at)
    if not sum(map(len, positions)):
        total = sum(map(len, now.positions))
        raise ValueError(f"Expected entries that were sent in the step before, too, got none among {total}.")
    return SparseView(observed, positions, method.layout.shapes)


def _earlier(method: Sparse | RandK, past: Past, vantage: Vantage, victim: int) -> SparseView:
    earlier = copy.deepcopy(method)
    earlier.load_public_state(past.compressor_state)
    return earlier.view(past.messages, vantage, victim)
