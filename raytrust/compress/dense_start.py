"""Whole gradients in the first steps of a training, and then a compressor, which begins only there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytrust.compress.dense import Dense
from raytrust.compress.interface import Compressor, Layout, Reduced, Vantage
from raytrust.compress.state import State, expect_tensors, metadata_of
from raytrust.config import DenseConfig
from raytrust.wire.channel import Channel, Message

_LEFT = "dense_steps_left"


class DenseStart:
    """Sends the first `steps` gradients whole; the compressor inside, with all its state, starts after them.

    left: how many such steps are to come, which everyone knows. Error feedback goes around it: a whole gradient leaves
    no residual.
    """

    def __init__(self, inner: Compressor, steps: int):
        self.inner, self.steps, self.left = inner, steps, steps
        self._dense = Dense(DenseConfig(), inner.layout)

    @property
    def layout(self) -> Layout:
        return self.inner.layout

    @property
    def now(self) -> Compressor:
        """What makes the next step."""
        return self._dense if self.left else self.inner

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        reduced = self.now.reduce(grads, channel)
        self.left = max(0, self.left - 1)
        return reduced

    def decode(self, messages: Sequence[Message], vantage: Vantage) -> list[list[Tensor]]:
        return self.now.decode(messages, vantage)

    def public_state(self) -> dict[str, Tensor]:
        return self.inner.public_state() | {_LEFT: torch.tensor(self.left)}

    def load_public_state(self, state: dict[str, Tensor]) -> None:
        left = _left(state, "public state")
        self.inner.load_public_state({key: x for key, x in state.items() if key != _LEFT})
        self.left = left

    def state_dict(self) -> State:
        state = self.inner.state_dict()
        config = state["metadata"]["config"] | {"start_step": self.steps}
        return state | {"metadata": state["metadata"] | {"config": config}, _LEFT: torch.tensor(self.left)}

    def load_state_dict(self, state: State) -> None:
        held, left = metadata_of(state), _left(state, "state")
        config = dict(held.get("config") or {})
        if (other := config.pop("start_step", 0)) != self.steps:
            raise ValueError(f"Expected state of start_step={self.steps}, got one of start_step={other}.")
        inner = {key: x for key, x in state.items() if key != _LEFT}
        self.inner.load_state_dict(inner | {"metadata": held | {"config": config}})
        self.left = left


def was_dense(state: dict[str, Tensor]) -> bool:
    """Whether the step that this public state was before sent the whole gradient."""
    return bool(state.get(_LEFT, 0))


def _left(state: State, name: str) -> int:
    expect_tensors({key: x for key, x in state.items() if key == _LEFT}, {_LEFT: torch.tensor(0)}, name)
    return int(state[_LEFT])
