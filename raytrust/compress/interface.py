"""What training and every method share: the `Compressor` protocol, what a step returns, and how a gradient lies in one
vector.

Of attackers nothing is known here; what a message reveals is `raytrust.leak`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from raytrust.wire.channel import Channel, Message

Vantage: TypeAlias = Literal["link", "peer"]

# Entries that are worked on at a time: 1 MiB of float32, which the second pass still finds in a core's own cache. Over
# a whole gradient, each pass of a method would wait for memory.
CHUNK = 2**18


class Reduced:
    """What one step of compressed averaging returns. Unpacks as `mean, decoded_own = ...`.

    mean: like the gradients, bitwise equal on every worker: the step that the optimiser takes. It may be written to.
    decoded_own: like the gradients: what this worker's messages decode to. The mean of it over workers is `mean` (but
        for a majority vote, which says so). Not to be written to.

    Valid until the next `reduce`; clone to keep.
    """

    # Functions, because most steps need neither: error feedback only takes what was sent off its input, which most
    # methods do without laying it out as a whole.
    def __init__(
        self,
        mean: list[Tensor],
        decoded_own: Callable[[], list[Tensor]],
        subtract: Callable[[Tensor], object] | None = None,
    ):
        self.mean = mean
        self._decoded_own = decoded_own
        self._subtract = subtract

    @property
    def decoded_own(self) -> list[Tensor]:
        return self._decoded_own()

    def subtract_decoded(self, x: FlatGradients) -> None:
        """x -= decoded_own, in place. x: the input of the step."""
        if self._subtract is not None:
            self._subtract(x.flat)
        elif x:
            torch._foreach_sub_(list(x), self.decoded_own)

    def __iter__(self) -> Iterator[list[Tensor]]:
        return iter((self.mean, self.decoded_own))


class Compressor(Protocol):
    """A method that averages gradients over workers with few bytes. One object a worker; it may hold state.

    `reduce` is what a worker does, `decode` what a receiver does, and the rest is for whoever keeps a checkpoint.
    """

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

    def public_state(self) -> dict[str, Tensor]:
        """What everyone on the wire knows of the state before a step, such as PowerSGD's warm start. No residual."""
        ...

    def load_public_state(self, state: dict[str, Tensor]) -> None:
        """Take over the public state of another compressor of the same config and shapes.

        Raises ValueError, and changes nothing, for other keys, shapes or dtypes.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """All state of this worker, private state included: what a checkpoint keeps.

        Tensors by kind and parameter name ("residual.conv.weight"), and "metadata", builtins that name the method, its
        options, the parameters with their shapes and, where there is a residual or momentum, the worker.
        """
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the compressor that gave `state` stood, to the bit; the tensors may lie on any device.

        Raises ValueError, and changes nothing, for a state of another method, other options or other parameters, with
        error feedback where this is without, or one that lacks something. A residual or a momentum is of one worker:
        the next `reduce` raises ValueError, before anything is sent, if it is of another rank or another number of
        workers, see `redistribute`.
        """
        ...


class FlatGradients(list[Tensor]):
    """Gradients that are views, in their order and without gaps, of one float32 vector `flat`.

    Whoever makes them has checked that they are finite, and lets them be written to once they have been reduced.
    """

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

        Raises ValueError if a gradient is not finite.
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
        # One pass without a copy: a sum is finite only if all its terms are. The converse fails where it overflows, so
        # the entries are looked at where a sum is not finite.
        sums = torch.stack([g.detach().sum(dtype=torch.float32) for g in grads])
        for i in (~sums.isfinite()).nonzero().flatten().tolist():
            bad = grads[i].detach()[~grads[i].float().isfinite()]
            if bad.numel():
                raise ValueError(
                    f"Expected the gradient of {self.names[i]} to be finite, got {bad[0].item()} in {bad.numel()} of "
                    f"{grads[i].numel()} entries."
                )


class Scratch:
    """Buffers that a compressor uses again in each step. They are no state: a copy of a compressor starts with none."""

    # Fresh memory of a gradient's size costs more than the arithmetic on it: the kernel hands it out page by page, at
    # the first touch of each.
    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, size: int, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """A (size,) on the device of `like`, with whatever was last written there; one for each name and size."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() != size or buffer.dtype != dtype or buffer.device != like.device:
            # Zeros, not whatever the process last held in that memory: should a method ever send entries that it did
            # not write, nothing of its host goes with them.
            buffer = self._buffers[name] = torch.zeros(size, dtype=dtype, device=like.device)
        return buffer

    def __deepcopy__(self, memo: dict[int, object]) -> Scratch:
        return Scratch()


def payloads_by_worker(messages: Sequence[Message], vantage: Vantage) -> list[tuple[Tensor, ...]]:
    """The payloads of the last collective that the vantage shows.

    "link": the tapped worker's. "peer": each worker's, by rank, after an all-gather; after an all-mean their mean.
    """
    message = messages[-1]
    if vantage == "link":
        return [message.sent]
    return [message.received_from(rank) for rank in range(len(message.received) // len(message.sent))]


def chunks(size: int, multiple: int = 8, device: torch.device | None = None) -> Iterator[slice]:
    """Slices of 0..size, each a multiple of `multiple` long but the last, and of about `CHUNK` entries.

    device: of what is sliced, where the result does not depend on the slices: but for the CPU, all entries are one.
    """
    length = max(1, CHUNK // multiple) * multiple
    # A GPU has no cache to stay in, and each slice is a launch more.
    if device is not None and device.type != "cpu":
        length = max(length, size)
    for start in range(0, size, length):
        yield slice(start, min(start + length, size))
