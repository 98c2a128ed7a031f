"""A compressor in parts, one for each bucket of gradients, for methods that treat every parameter by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytrust.compress.base import Base
from raytrust.compress.dense_start import DenseStart
from raytrust.compress.error_feedback import ErrorFeedback
from raytrust.compress.interface import Compressor, Layout, Reduced, Vantage
from raytrust.compress.state import State, parameters
from raytrust.wire.channel import Channel, Message


class InParts:
    """A compressor whose step may be made of some of the parameters at a time, as `ddp_comm_hook` then does.

    To everyone else, with its state and its messages, it is the compressor that it was made of. Raises ValueError for a
    method whose step of one parameter depends on the others.
    """

    def __init__(self, whole: Compressor):
        part_of(whole, range(len(whole.layout.names)))
        self._whole = whole
        # The state is in the parts, and where they don't make up the whole, else in the base.
        self._parts: dict[tuple[int, ...], Compressor] = {}
        self._base: State | None = None

    @property
    def layout(self) -> Layout:
        return self._whole.layout

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        return self.whole.reduce(grads, channel)

    def reduce_part(self, indices: tuple[int, ...], grads: Sequence[Tensor], channel: Channel) -> Reduced:
        """The step of these parameters alone; the same ones go together in each step, until others do."""
        part = self._parts.get(indices)
        if part is None:
            # The first step, or another partition: the state is the whole's again.
            if self._base is None or any(set(indices) & set(held) for held in self._parts):
                self._base = self.whole.state_dict()
            part = part_of(self._whole, indices)
            part.load_state_dict(restricted(self._base, self.layout, indices))
            self._parts[indices] = part
        reduced = part.reduce(grads, channel)
        # What is copied at every change of the partition only, and not in every step, is not held twice either.
        if self._base is not None and sum(map(len, self._parts)) == len(self.layout.names):
            self._base = None
        return reduced

    def decode(self, messages: Sequence[Message], vantage: Vantage) -> list[list[Tensor]]:
        return self.whole.decode(messages, vantage)

    def public_state(self) -> dict[str, Tensor]:
        return self.whole.public_state()

    def load_public_state(self, state: dict[str, Tensor]) -> None:
        self.whole.load_public_state(state)

    def state_dict(self) -> State:
        if not self._parts:
            return self._whole.state_dict()
        base = [] if self._base is None else [self._base]
        return merged([*base, *(part.state_dict() for part in self._parts.values())], self.layout)

    def load_state_dict(self, state: State) -> None:
        self._whole.load_state_dict(state)
        self._parts, self._base = {}, None

    @property
    def whole(self) -> Compressor:
        """The compressor that it is made of, with the state that it has now."""
        if self._parts:
            self.load_state_dict(self.state_dict())
        return self._whole


def part_of(compressor: Compressor, indices: Sequence[int]) -> Compressor:
    """The same method for some of the parameters, in its first state.

    Raises ValueError for a method whose step of one parameter depends on the others.
    """
    if isinstance(compressor, ErrorFeedback):
        return ErrorFeedback(part_of(compressor.inner, indices))
    if isinstance(compressor, DenseStart):
        return DenseStart(part_of(compressor.inner, indices), compressor.steps)
    if not (isinstance(compressor, Base) and compressor.per_parameter):
        raise ValueError(
            f"Expected overlap=False with {type(compressor).__name__}, whose step of one parameter depends on others."
        )
    return compressor.of(_sublayout(compressor.layout, indices))


def restricted(state: State, layout: Layout, indices: Sequence[int]) -> State:
    """The state of `part_of`, out of that of the whole."""
    others = set(layout.names) - {layout.names[i] for i in indices}
    kept = {key: x for key, x in state.items() if key.partition(".")[2] not in others}
    return kept | {"metadata": state["metadata"] | {"parameters": parameters(_sublayout(layout, indices))}}


def merged(states: Sequence[State], layout: Layout) -> State:
    """The state of the whole, out of those of all its parts."""
    result: State = {}
    for state in states:
        result |= state
    return result | {"metadata": states[0]["metadata"] | {"parameters": parameters(layout)}}


def _sublayout(layout: Layout, indices: Sequence[int]) -> Layout:
    return Layout([torch.Size(layout.shapes[i]) for i in indices], [layout.names[i] for i in indices])
