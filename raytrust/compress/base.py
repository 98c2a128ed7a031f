"""What most methods share: buffers, sums of decoded payloads, and a state that names the method and its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from raytrust.compress.interface import Layout, Reduced, Scratch, Vantage, payloads_by_worker
from raytrust.compress.state import Memory, State, expect_metadata, expect_tensors, metadata
from raytrust.wire.channel import Channel, Message

Payload: TypeAlias = Sequence[Tensor]  # what a worker handed to a collective, or what is needed to decode it


class Base:
    """A method with options `config`; by itself without state.

    A method defines `reduce` and `_add`, which decodes a payload; with these it has `decode`, `_sum` of what all
    workers sent, and `_reduced`. It may override `_write` where that is faster than adding to zeros.

    seed: of what is random in the method, the same on all workers. memory: kinds of vectors that a worker keeps to
    itself, `self._memory`. A method with more state overrides
    `public_state` and `_take_public`, or, of what is not public, `_tensors` and `_take`: they get what fits.
    """

    # Whether its step of one parameter is the same whatever other parameters there are.
    per_parameter = False

    def __init__(self, config: Any, layout: Layout, seed: int = 0, memory: Sequence[str] = ()):
        self.layout = layout
        self._config = config
        self._memory = Memory(layout, *memory)
        self._scratch = Scratch()

    def of(self, layout: Layout) -> Base:
        """The same method, in its first state, of other parameters."""
        return type(self)(self._config, layout)

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        raise NotImplementedError

    def decode(self, messages: Sequence[Message], vantage: Vantage) -> list[list[Tensor]]:
        return [self._decoded(payload) for payload in payloads_by_worker(messages, vantage)]

    def _add(self, x: Tensor, payload: Payload, share: float = 1.0) -> Tensor:
        """x += share x what the payload decodes to, (entries,) float32. Returns x."""
        raise NotImplementedError

    def _write(self, out: Tensor, payload: Payload, share: float = 1.0) -> Tensor:
        """out = share x what the payload decodes to. Returns out."""
        return self._add(out.zero_(), payload, share)

    def _decoded(self, payload: Payload) -> list[Tensor]:
        out = torch.empty(self.layout.entries, dtype=torch.float32, device=payload[0].device)
        return self.layout.unflatten(self._write(out, payload))

    def _sum(self, payloads: Sequence[Payload], share: float = 1.0) -> Tensor:
        """share x the sum of what all workers' payloads decode to, (entries,), in the buffer of the mean."""
        # In the order of ranks, on every worker: in another order sums round otherwise, and replicas drift apart.
        first, *rest = payloads
        total = self._write(self._scratch("mean", self.layout.entries, first[0]), first, share)
        for payload in rest:
            self._add(total, payload, share)
        return total

    def _reduced(self, mean: Tensor, payload: Payload) -> Reduced:
        """mean: (entries,). payload: what this worker sent."""

        def decoded_own() -> list[Tensor]:
            return self.layout.unflatten(self._write(self._scratch("own", len(mean), mean), payload))

        return Reduced(self.layout.unflatten(mean), decoded_own, lambda x: self._add(x, payload, -1.0))

    def public_state(self) -> dict[str, Tensor]:
        return {}

    def load_public_state(self, state: dict[str, Tensor]) -> None:
        expect_tensors(state, self.public_state(), "public state")
        self._take_public(state)

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


class Stochastic(Base):
    """Methods that draw at random: a function of the seed, the step and, where draws are a worker's own, its rank.

    Draws of one's own are private, and so is the step counter: an attacker who could draw again would see through the
    rounding. Where all workers share them they are public (`RandK`).
    """

    # A counter instead of a generator's state: two integers are all that a checkpoint has to hold, every step has
    # draws of its own however many the one before took, and the global generator stays as it was.

    def __init__(self, config: Any, layout: Layout, seed: int):
        super().__init__(config, layout)
        self._seed = seed
        self._step = 0

    def _tensors(self) -> dict[str, Tensor]:
        return {"seed": torch.tensor(self._seed), "step": torch.tensor(self._step)}

    def _take(self, state: State) -> None:
        self._seed, self._step = int(state["seed"]), int(state["step"])
