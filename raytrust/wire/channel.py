"""What workers say to each other. No room but this one uses torch.distributed.

A `Channel` averages or gathers tensors over all workers. `LocalChannel` is the case of one worker, `GroupChannel` a
torch.distributed process group, and `Tap` wraps either of them and keeps what crossed the wire: the tensors that are
counted are the tensors that are attacked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Channel(Protocol):
    """Collectives over `world_size` workers, of which this one is number `rank`.

    Both calls are collective: every worker makes them in the same order, with tensors of the same shapes and dtypes.
    What they return is bitwise equal on all workers; their arguments stay as they are.
    """

    @property
    def world_size(self) -> int: ...

    @property
    def rank(self) -> int: ...

    def all_mean(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The mean of `x` over all workers: in a new tensor, or in `out`, which is contiguous and not `x`."""
        ...

    def all_gather(self, xs: Sequence[Tensor], counts: Sequence[int] | None = None) -> list[tuple[Tensor, ...]]:
        """The tensors of every worker, in the order of ranks, in new tensors.

        counts: the length of each worker's tensors, by rank, where these differ.
        """
        ...


class LocalChannel:
    """One worker that talks to itself."""

    world_size = 1
    rank = 0

    def all_mean(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return x.detach().clone() if out is None else out.copy_(x.detach())

    def all_gather(self, xs: Sequence[Tensor], counts: Sequence[int] | None = None) -> list[tuple[Tensor, ...]]:
        return [tuple(x.detach().clone() for x in xs)]


class GroupChannel:
    """The workers of a torch.distributed process group, the default group if none is given."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        self._group = group
        self.world_size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    @classmethod
    def apart(cls) -> GroupChannel:
        """All workers of the default group, in a group of its own; a collective call.

        What is sent there may cross with what other code sends at the same time.
        """
        return cls(dist.new_group())  # type: ignore[arg-type]

    def all_mean(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        # Sum and divide: gloo has no average.
        if out is None:
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
        total = out.copy_(x.detach())
        dist.all_reduce(total, group=self._group)
        return total.div_(self.world_size)

    def all_gather(self, xs: Sequence[Tensor], counts: Sequence[int] | None = None) -> list[tuple[Tensor, ...]]:
        packed = pack(xs)
        if counts is not None:
            return [self._broadcast(packed, xs, rank, count) for rank, count in enumerate(counts)]
        buffers = [torch.empty_like(packed) for _ in range(self.world_size)]
        dist.all_gather(buffers, packed, group=self._group)
        return [unpack(buffer, xs) for buffer in buffers]

    def _broadcast(self, packed: Tensor, xs: Sequence[Tensor], source: int, count: int) -> tuple[Tensor, ...]:
        """The tensors of worker `source`, of length `count`: a gather without padding is a broadcast from each."""
        like = [x.new_empty(count, *x.shape[1:]) for x in xs]
        if count == 0:
            return tuple(like)
        buffer = packed if source == self.rank else packed.new_empty(sum(x.numel() * x.element_size() for x in like))
        dist.broadcast(
            buffer, src=source if self._group is None else dist.get_global_rank(self._group, source), group=self._group
        )
        return unpack(buffer, like)


def pack(xs: Sequence[Tensor]) -> Tensor:
    """The bytes of all tensors, one after the other, as one uint8 tensor: (sum of numel x itemsize,)."""
    return torch.cat([x.detach().contiguous().view(-1).view(torch.uint8) for x in xs])


def unpack(packed: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Inverse of `pack`, for tensors of the shapes and dtypes of `like`."""
    parts = packed.split([x.numel() * x.element_size() for x in like])
    # The clone aligns a part that does not start at a multiple of its item size.
    return tuple(part.clone().view(x.dtype).view(x.shape) for part, x in zip(parts, like, strict=True))


@dataclass(frozen=True)
class Message:
    """One collective, as one worker took part in it.

    op: "all_mean" or "all_gather" of a `Channel`; of other code, that `record` listened to, torch.distributed's name,
        where "all_reduce" is a sum and other reductions are named ("all_reduce max").
    sent: the payload that the worker handed to the collective, packed as it was handed over.
    received: what the collective returned; for an all-gather the tensors of rank 0, then those of rank 1, and so on.
    """

    op: str
    sent: tuple[Tensor, ...]
    received: tuple[Tensor, ...]

    @property
    def sent_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.sent)

    @property
    def received_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.received)

    def to(self, device: str) -> Message:
        """The message with its payloads on `device`; payloads that the vantage hides stay hidden."""
        sent, received = (tuple(x if x.is_meta else x.to(device) for x in xs) for xs in (self.sent, self.received))
        return Message(self.op, sent, received)

    def received_from(self, rank: int) -> tuple[Tensor, ...]:
        """What worker `rank` contributed to this all-gather."""
        return self.received[rank * len(self.sent) : (rank + 1) * len(self.sent)]


class Record:
    """Counts the bytes that this worker sent and, if asked, keeps the messages.

    keep: whether to keep a copy of each message, sent and received, for as long as the record lives: of a training that
    is several times the gradient at every step. messages: those that crossed so far; ValueError without `keep`.
    sent_bytes: payload bytes handed to collectives so far, a worker; headers and the collective's own algorithm
    (a ring moves each byte 2 (W-1)/W times) are not in it, so that the figure does not depend on the network.
    received_bytes: what the collectives returned: one payload of a mean, that of each worker of a gather.
    """

    def __init__(self, keep: bool = False):
        self._keep = keep
        self.sent_bytes = self.received_bytes = 0
        self._messages: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        if not self._keep:
            raise ValueError(
                f"Expected keep={self._keep} to be True for a {type(self).__name__.lower()} whose messages are read."
            )
        return self._messages

    def note(self, message: Message) -> None:
        """Count a message, and keep a copy of it if asked."""
        self.sent_bytes += message.sent_bytes
        self.received_bytes += message.received_bytes
        # A compressor may use its buffers again in the next step; what crossed the wire must stay as it was.
        if self._keep:
            sent, received = (tuple(x.detach().clone() for x in xs) for xs in (message.sent, message.received))
            self._messages.append(Message(message.op, sent, received))


class Tap(Record):
    """A channel that counts the bytes this worker sends over another channel and, if asked, keeps the messages."""

    def __init__(self, channel: Channel, keep: bool = False):
        super().__init__(keep)
        self._channel = channel
        self.world_size = channel.world_size
        self.rank = channel.rank

    def all_mean(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        received = self._channel.all_mean(x, out)
        self.note(Message("all_mean", (x,), (received,)))
        return received

    def all_gather(self, xs: Sequence[Tensor], counts: Sequence[int] | None = None) -> list[tuple[Tensor, ...]]:
        received = self._channel.all_gather(xs, counts)
        self.note(Message("all_gather", tuple(xs), tuple(x for worker in received for x in worker)))
        return received


def overheard(channel: Channel, messages: Sequence[Message]) -> None:
    """Tell every tap on this channel of messages that went past it, straight to torch.distributed."""
    while isinstance(channel, Tap):
        for message in messages:
            channel.note(message)
        channel = channel._channel
