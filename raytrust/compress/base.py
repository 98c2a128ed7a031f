"""What most methods share: a layout, buffers, and a state that names the method, its options and the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raytrust.compress.interface import Layout, Scratch, Vantage
from raytrust.compress.state import Memory, State, expect_metadata, expect_tensors, metadata
from raytrust.compress.views import View, identity_view
from raytrust.wire.channel import Message


class Base:
    """A method with options `config`; by itself without state.

    seed: of what is random in the method, the same on all workers. memory: kinds of vectors that a worker keeps to
    itself, `self._memory`. A method with more state overrides
    `public_state` and `_take_public`, or, of what is not public, `_tensors` and `_take`: they get what fits.
    """

    def __init__(self, config: Any, layout: Layout, seed: int = 0, memory: Sequence[str] = ()):
        self.layout = layout
        self._config = config
        self._memory = Memory(layout, *memory)
        self._scratch = Scratch()

    def public_state(self) -> dict[str, Tensor]:
        return {}

    def load_public_state(self, state: dict[str, Tensor]) -> None:
        expect_tensors(state, self.public_state(), "public state")
        self._take_public(state)

    def view(self, messages: Sequence[Message], vantage: Vantage, victim: int = 0) -> View:
        """What the messages decode to, as if it were the whole gradient: the least that an attacker knows."""
        decoded = self.decode(messages, vantage)
        return identity_view(decoded[victim] if len(decoded) > 1 else decoded[0])

    def decode(self, messages: Sequence[Message], vantage: Vantage) -> list[list[Tensor]]:
        raise NotImplementedError

    def state_dict(self) -> State:
        return {
            "metadata": metadata(self._config, self.layout, self._memory),
            **self._tensors(),
            **self._memory.tensors(),
        }

    def load_state_dict(self, state: State) -> None:
        expect_metadata(state, metadata(self._config, self.layout, self._memory))
        expect_tensors(state, self._tensors() | self._memory.expected(state))
        self._take(state)
        self._memory.load(state)

    def _take_public(self, state: State) -> None:
        """Take over tensors like those of `public_state`."""

    def _tensors(self) -> dict[str, Tensor]:
        """All state but the memory: equal on all workers."""
        return self.public_state()

    def _take(self, state: State) -> None:
        """Take over tensors like those of `_tensors`."""
        self._take_public(state)

    def _input(self, grads: Sequence[Tensor]) -> Tensor:
        """The gradients as one vector; not to be written to."""
        device = grads[0] if grads else torch.empty(0)
        return self.layout.flatten(grads, self._scratch("input", self.layout.entries, device))


class Counting(Base):
    """Methods that roll dice: a function of the seed, the step and, where they are a worker's own, its rank.

    Dice of one's own are private: an attacker who could roll them again would see through the rounding. Where all
    workers share them they are public (`RandK`).
    """

    def __init__(self, config: Any, layout: Layout, seed: int):
        super().__init__(config, layout)
        self._seed = seed
        self._step = 0

    def _tensors(self) -> dict[str, Tensor]:
        return {"seed": torch.tensor(self._seed), "step": torch.tensor(self._step)}

    def _take(self, state: State) -> None:
        self._seed, self._step = int(state["seed"]), int(state["step"])
