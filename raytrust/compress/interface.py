"""The interface that training, attacks and tests share: `Compressor`, what it returns, and the layout of a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from raytrust.channel import Channel, Message
from raytrust.compress.views import View

Vantage: TypeAlias = Literal["link", "peer"]
CHUNK = 2**18  # entries that are worked on at a time, so that passes over them stay within a cache


class Reduced:
    """What one step of compressed averaging returns. Unpacks as `mean, own = ...`.

    mean: like the gradients, bitwise equal on every worker: the step that the optimiser takes. It may be written to.
    own: like the gradients: what this worker's messages decode to, computed when it is asked for. The mean of `own`
        over workers is `mean` (but for a majority vote, which says so). Not to be written to.

    Both lie in buffers that the compressor's next step uses again: clone what has to last.
    """

    def __init__(
        self, mean: list[Tensor], own: Callable[[], list[Tensor]], subtract: Callable[[Tensor], object] | None = None
    ):
        self.mean = mean
        self._own = own
        self._subtract = subtract

    @property
    def own(self) -> list[Tensor]:
        return self._own()

    def subtract_own(self, x: FlatGradients) -> None:
        """x -= own, in place and without `own` as a whole where the method can. x: the input of the step."""
        if self._subtract is not None:
            self._subtract(x.flat)
        elif x:
            torch._foreach_sub_(list(x), self.own)

    def __iter__(self) -> Iterator[list[Tensor]]:
        return iter((self.mean, self.own))


class Compressor(Protocol):
    """A method that averages gradients over workers with few bytes. One object a worker; it may hold state."""

    @property
    def layout(self) -> Layout: ...

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        """Average `grads` over the workers of `channel`; a collective call. Does not change `grads`.

        Raises ValueError, before anything is sent, if a gradient is not finite.
        """
        ...

    def decode(self, messages: Sequence[Message], vantage: Vantage) -> list[list[Tensor]]:
        """The gradients that one step's messages decode to, from this vantage: the public state and the wire suffice.

        "link": a list of one, the tapped worker's. "peer": one for each worker after an all-gather; after an all-mean a
        list of one, the mean.
        """
        ...

    def view(self, messages: Sequence[Message], vantage: Vantage, victim: int = 0) -> View:
        """What one step's messages reveal, to an attacker who holds this compressor with its public state.

        victim: the rank under attack, where the vantage can tell the workers apart.
        """
        ...

    def public_state(self) -> dict[str, Tensor]:
        """What everyone on the wire knows of the state before a step, such as PowerSGD's warm start. No residual."""
        ...

    def load_public_state(self, state: dict[str, Tensor]) -> None:
        """Take over the public state of another compressor of the same config and shapes."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """All state of this worker, private state included, by parameter name: what a checkpoint keeps."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where the compressor that gave `state` stood, to the bit."""
        ...


class FlatGradients(list[Tensor]):
    """Gradients that are views, in their order and without gaps, of one float32 vector `flat`."""

    def __init__(self, flat: Tensor, layout: Layout):
        super().__init__(layout.unflatten(flat))
        self.flat = flat


class Layout:
    """Shapes and names of the parameters, and how their gradients lie in one vector."""

    def __init__(self, shapes: Sequence[torch.Size], names: Sequence[str] | None = None):
        self.shapes = [torch.Size(s) for s in shapes]
        self.names = [str(i) for i in range(len(shapes))] if names is None else list(names)
        if len(self.names) != len(self.shapes):
            raise ValueError(f"Expected {len(self.shapes)} names={self.names!r}, one for each shape.")
        self.sizes = [s.numel() for s in self.shapes]
        self.entries = sum(self.sizes)

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """Of the parameters that are trained."""
        named = [(name, p.shape) for name, p in model.named_parameters() if p.requires_grad]
        return cls([shape for _, shape in named], [name for name, _ in named])

    def unflatten(self, flat: Tensor) -> list[Tensor]:
        """(entries,) -> views into it, one a parameter."""
        return [part.view(shape) for part, shape in zip(flat.split(self.sizes), self.shapes, strict=True)]

    def flatten(self, grads: Sequence[Tensor], out: Tensor) -> Tensor:
        """All entries in `out`, float32 (entries,); or, of `FlatGradients`, the vector that they already lie in.

        Raises ValueError if a gradient is not finite; `FlatGradients` have been checked by whoever made them.
        """
        if isinstance(grads, FlatGradients):
            return grads.flat
        self.check(grads)
        parts = [g.detach().reshape(-1) for g in grads]
        return torch.cat(parts, out=out) if parts else out

    def check(self, grads: Sequence[Tensor]) -> None:
        """Raises ValueError for a gradient of another shape, or one that holds NaN or infinity, by parameter name."""
        if [g.shape for g in grads] != self.shapes:
            raise ValueError(f"Expected gradients of shapes {self.shapes}, got {[g.shape for g in grads]}.")
        if not grads:
            return
        # One pass: a sum is finite only if all its terms are. The converse fails where it overflows.
        sums = torch.stack([g.detach().sum(dtype=torch.float32) for g in grads])
        for i in (~sums.isfinite()).nonzero().flatten().tolist():
            bad = grads[i].detach()[~grads[i].float().isfinite()]
            if bad.numel():
                raise ValueError(
                    f"Expected the gradient of {self.names[i]} to be finite, got {bad[0].item()} in {bad.numel()} of "
                    f"{grads[i].numel()} entries."
                )


class Scratch:
    """Buffers that a compressor uses again in each step: fresh memory costs more than the arithmetic on it.

    They are no state: a copy of a compressor starts with none.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, size: int, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised (size,) on the device of `like`; the same one for the same name and size."""
        found = self._buffers.get(name)
        if found is None or found.numel() != size or found.dtype != dtype or found.device != like.device:
            found = self._buffers[name] = torch.empty(size, dtype=dtype, device=like.device)
        return found

    def __deepcopy__(self, memo: dict[int, object]) -> Scratch:
        return Scratch()


class Base:
    """What most methods share: no state. Methods with one override these."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self._scratch = Scratch()

    def public_state(self) -> dict[str, Tensor]:
        return {}

    def load_public_state(self, state: dict[str, Tensor]) -> None:
        pass

    def state_dict(self) -> dict[str, Tensor]:
        return self.public_state()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.load_public_state(state)

    def _input(self, grads: Sequence[Tensor]) -> Tensor:
        """The gradients as one vector; not to be written to."""
        device = grads[0] if grads else torch.empty(0)
        return self.layout.flatten(grads, self._scratch("input", self.layout.entries, device))


class Counting(Base):
    """Methods that roll dice: a function of the seed, the step and, where they are a worker's own, its rank.

    Dice of one's own are private: an attacker who could roll them again would see through the rounding. Where all
    workers share them they are public (`RandK`).
    """

    def __init__(self, layout: Layout, seed: int):
        super().__init__(layout)
        self._seed = seed
        self._step = 0

    def state_dict(self) -> dict[str, Tensor]:
        return {"seed": torch.tensor(self._seed), "step": torch.tensor(self._step)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._seed, self._step = int(state["seed"]), int(state["step"])


def senders(messages: Sequence[Message], vantage: Vantage) -> list[tuple[Tensor, ...]]:
    """What each visible worker put into the last all-gather: from the link the tapped one's, from a peer all."""
    message = messages[-1]
    if vantage == "link":
        return [message.sent]
    return [message.received_from(rank) for rank in range(len(message.received) // len(message.sent))]


def sent_by(messages: Sequence[Message], vantage: Vantage, victim: int) -> tuple[Tensor, ...]:
    """What the victim put into the last all-gather."""
    return messages[-1].sent if vantage == "link" else messages[-1].received_from(victim)


def chunks(size: int, multiple: int = 8) -> Iterator[slice]:
    """Slices of 0..size, each a multiple of `multiple` long but the last, and of about `CHUNK` entries."""
    length = max(1, CHUNK // multiple) * multiple
    for start in range(0, size, length):
        yield slice(start, min(start + length, size))
