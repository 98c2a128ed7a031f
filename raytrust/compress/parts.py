"""A compressor in parts, one for each bucket of gradients, for methods that treat every parameter by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raytrust.compress.base import Base
from raytrust.compress.dense_start import DenseStart
from raytrust.compress.error_feedback import ErrorFeedback
from raytrust.compress.interface import Compressor, Layout
from raytrust.compress.state import State, parameters


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
