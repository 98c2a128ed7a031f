"""What the messages of a compressor reveal, by its type: `view_of`, and `pure_view_of` where residuals are in them.

A rule is a function that is registered for a type, and holds for its subclasses. So it enters from anywhere:

    @view_of.register(MyCompressor)
    def my_view(compressor: MyCompressor, messages: Messages, vantage: Vantage, victim: int = 0) -> View: ...

Without a rule, what a message decodes to is taken for an estimate of the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import NamedTuple, TypeAlias, TypeVar

from torch import Tensor

from raytrust.compress import Compressor, DenseStart, ErrorFeedback, Vantage
from raytrust.compress.dense_start import was_dense
from raytrust.compress.interface import payloads_by_worker
from raytrust.compress.parts import InParts
from raytrust.leak.views import View, identity_view
from raytrust.wire.channel import Message

Messages: TypeAlias = Sequence[Message]
T = TypeVar("T")


class EarlierStep(NamedTuple):
    """An earlier step of one worker: its messages, as the vantage shows them, and the public state before them."""

    messages: tuple[Message, ...]
    compressor_state: dict[str, Tensor]

    def to(self, device: str) -> EarlierStep:
        return EarlierStep(tuple(m.to(device) for m in self.messages), self.compressor_state)


@singledispatch
def view_of(compressor: Compressor, messages: Messages, vantage: Vantage, victim: int = 0) -> View:
    """What one step's messages reveal of a gradient, to an attacker who holds this compressor with its public state.

    victim: the rank under attack, where the vantage can tell the workers apart. Where error feedback added a residual
    to the gradient, it is of the sum.
    """
    return identity_view(decoded_of(compressor, messages, vantage, victim))


def is_understood(kind: type) -> bool:
    """Whether attacks know what messages of this type of compressor reveal: by a rule, or because it is one of ours.

    Of others what they decode to is all that is compared, and a stronger attack may exist.
    """
    return view_of.dispatch(kind) is not view_of.dispatch(object) or kind.__module__.startswith("raytrust.compress.")


@view_of.register(ErrorFeedback)
def error_feedback_view(compressor: ErrorFeedback, messages: Messages, vantage: Vantage, victim: int = 0) -> View:
    return view_of(compressor.inner, messages, vantage, victim)


@view_of.register(DenseStart)
def dense_start_view(compressor: DenseStart, messages: Messages, vantage: Vantage, victim: int = 0) -> View:
    return view_of(compressor.now, messages, vantage, victim)


@view_of.register(InParts)
def in_parts_view(compressor: InParts, messages: Messages, vantage: Vantage, victim: int = 0) -> View:
    return view_of(compressor.whole, messages, vantage, victim)


@singledispatch
def pure_view_of(
    compressor: Compressor, messages: Messages, vantage: Vantage, victim: int, history: Sequence[EarlierStep]
) -> View:
    """What one step's messages reveal of the gradient alone, where error feedback, or DGC, added a residual to it.

    history: see `raytrust.leak.history.pure_view`, which knows whether there is a residual. Without a rule there is
    nothing to tell: ValueError.
    """
    raise ValueError(f"Expected a method whose residual has zeros, got {type(compressor).__name__}.")


@pure_view_of.register(DenseStart)
def pure_dense_start_view(
    compressor: DenseStart, messages: Messages, vantage: Vantage, victim: int, history: Sequence[EarlierStep]
) -> View:
    """A whole gradient leaves no residual, so that the step after it has none either."""
    if compressor.left or (history and was_dense(history[-1].compressor_state)):
        return view_of(compressor, messages, vantage, victim)
    later = [step for step in history if not was_dense(step.compressor_state)]
    return pure_view_of(compressor.inner, messages, vantage, victim, later)


def expect_history(history: Sequence[object]) -> None:
    if not history:
        raise ValueError("Expected a history of at least 1 step, to tell the gradient from the residual.")


def decoded_of(compressor: Compressor, messages: Messages, vantage: Vantage, victim: int) -> list[Tensor]:
    """What the messages decode to, one tensor a parameter: the victim's gradient, or the mean in which it is hidden."""
    return _of_victim(compressor.decode(messages, vantage), victim)


def payload_of(messages: Messages, vantage: Vantage, victim: int) -> tuple[Tensor, ...]:
    """What the victim put into the last collective, or the mean in which it is hidden."""
    return _of_victim(payloads_by_worker(messages, vantage), victim)


def _of_victim(parts: Sequence[T], victim: int) -> T:
    # From the link only one worker is seen, and after an all-mean a peer sees one mean: both stand for the victim.
    return parts[victim] if len(parts) > 1 else parts[0]
