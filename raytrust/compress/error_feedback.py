"""Error feedback (Seide et al. 2014; Karimireddy et al. 2019) around any compressor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytrust.compress.interface import Compressor, FlatGradients, Layout, Reduced, Vantage
from raytrust.compress.state import (
    Memory,
    State,
    expect_error_feedback,
    expect_parameters,
    expect_tensors,
    metadata_of,
    parameters,
)
from raytrust.wire.channel import Channel, Message


class ErrorFeedback:
    """Adds what a step does not send to the gradient of the next: residual = input - decoded_own, input = grads + it.

    The residual subtracts what *this* worker's messages decode to, not the mean. It is private, hence not part of the
    public state.
    """

    def __init__(self, inner: Compressor):
        self.inner = inner
        self._memory = Memory(inner.layout, "residual")
        self._parts: FlatGradients | None = None  # the memory's vector, as one tensor a parameter

    @property
    def layout(self) -> Layout:
        return self.inner.layout

    @property
    def residual(self) -> list[Tensor] | None:
        """Like the gradients, in float32; None before the first step. The next step writes over it."""
        return next(map(self._view, self._memory.held), None)

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        # Checked before the sum is made in place: a gradient that is refused must leave no trace in the residual.
        self.layout.check(grads)
        inputs = self._view(*self._memory.vectors(channel, grads[0].device if grads else torch.device("cpu")))
        if grads:
            # The residual's own memory becomes the input, and then the next residual: one vector, no copy.
            torch._foreach_add_(list(inputs), [g.detach() for g in grads])
        reduced = self.inner.reduce(inputs, channel)
        reduced.subtract_decoded(inputs)
        return reduced

    def decode(self, messages: Sequence[Message], vantage: Vantage) -> list[list[Tensor]]:
        return self.inner.decode(messages, vantage)

    def public_state(self) -> dict[str, Tensor]:
        return self.inner.public_state()

    def load_public_state(self, state: dict[str, Tensor]) -> None:
        self.inner.load_public_state(state)

    def state_dict(self) -> State:
        state = self.inner.state_dict()
        held = state["metadata"]
        changed = {
            "error_feedback": True,
            "memory": [*held["memory"], *self._memory.kinds],
            "worker": None if self._memory.worker is None else list(self._memory.worker),
        }
        return state | {"metadata": held | changed} | self._memory.tensors()

    def load_state_dict(self, state: State) -> None:
        held = metadata_of(state)
        expect_error_feedback(held, True)
        residual = self._memory.expected(state)
        expect_parameters(held, parameters(self.layout))
        expect_tensors({key: x for key, x in state.items() if key.startswith("residual.")}, residual)
        changed = {"error_feedback": False, "memory": [kind for kind in held["memory"] if kind != "residual"]}
        inner = {key: x for key, x in state.items() if not key.startswith("residual.")}
        # Last of what may refuse, so that a state that is refused changes nothing.
        self.inner.load_state_dict(inner | {"metadata": held | changed})
        self._memory.load(state)

    def _view(self, residual: Tensor) -> FlatGradients:
        # The same object for the same vector: to cut it up takes longer than to add to it, where layers are many.
        if self._parts is None or self._parts.flat is not residual:
            self._parts = FlatGradients(residual, self.layout)
        return self._parts
