"""Anybody's communication hook as a compressor, so that what it sends can be counted and attacked: `HookCompressor`."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from raytrust.compress.interface import Layout, Reduced, Vantage
from raytrust.compress.torch_hooks import PowerSGDFactors, factors, load_public, public, recognised
from raytrust.wire.channel import Channel, Message, overheard
from raytrust.wire.processes import copied, default_group
from raytrust.wire.recording import record

AnyHook: TypeAlias = Callable[[Any, Any], Any]

MIB = 2**20
_lock = threading.RLock()


class HookCompressor:
    """Averages gradients as `DistributedDataParallel` would with a communication hook, whatever the hook does inside.

        compressor = HookCompressor(powerSGD_hook, PowerSGDState(None, 4, start_powerSGD_iter=2), model)
        compressor.start_compressing()
        tap = Tap(LocalChannel(), keep=True)
        mean = compressor.reduce(grads, tap).mean

    The hook is called with buckets as DDP has them from its second pass on, in float32: the gradients of `model` in
    reverse order (DDP's is that in which they come, which differs within a layer), 1 MiB in the first bucket and 25 MiB
    in each other, or `bucket_cap_mb` in each if that is given. It talks through
    the default process group where there is one, whose number of workers the channel must have, else through a group
    of this process alone, which is made for the step. What it sends goes past the channel, but taps on that are told:
    their messages are those of `raytrust.record`, and at last one, "result", that says without a byte what the hook
    made of them.

    state: the hook's, which steps change. A deep copy of the compressor has one of its own, which shares process groups
    and modules; what a hook keeps elsewhere, such as in a closure, is shared as well. model: of which the gradients
    are, or their `Layout`; then `bucket.parameters()` are without values.
    """

    def __init__(self, hook: AnyHook, state: Any, model: nn.Module | Layout, *, bucket_cap_mb: float | None = None):
        if not isinstance(model, nn.Module | Layout):
            raise ValueError(
                f"Expected model={model!r} to be the model whose gradients the hook gets, or their Layout."
            )
        self.hook, self.state = hook, state
        self.torch_hook = recognised(hook)
        self.layout = Layout.of(model) if isinstance(model, nn.Module) else model
        if self._is_powersgd and not hasattr(state, "start_powerSGD_iter"):
            raise ValueError(f"Expected state={state!r} to be a PowerSGDState, as hook={self.name} takes.")
        self._parameters = (
            [p for p in model.parameters() if p.requires_grad]
            if isinstance(model, nn.Module)
            else [nn.Parameter(torch.empty(s, device="meta")) for s in self.layout.shapes]
        )
        self.buckets = _buckets(self.layout, bucket_cap_mb)

    @property
    def compresses(self) -> bool:
        """Whether the next step compresses: torch's PowerSGD sends whole gradients until `start_powerSGD_iter`."""
        return not self._is_powersgd or self.state.iter >= self.state.start_powerSGD_iter

    def start_compressing(self) -> None:
        """Go to the first step that compresses: of torch's PowerSGD, whose steps before leave no other trace in it."""
        if not self.compresses:
            self.state.iter = self.state.start_powerSGD_iter

    @property
    def holds_residual(self) -> bool:
        """Whether what it sends is known to hold what earlier steps did not send: of torch's PowerSGD alone."""
        return self._is_powersgd and bool(self.state.use_error_feedback)

    def as_seen(self) -> HookCompressor:
        """A copy with what everyone on the wire knows: without residuals, and of an unknown hook without its state."""
        if not self._is_powersgd:
            return self._with_state(None)
        twin = copy.deepcopy(self)
        twin.state.error_dict = {}
        return twin

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        self.layout.check(grads)
        # One after the other, as all threads share one default group.
        with _lock, default_group() as workers, torch.no_grad():
            if workers != channel.world_size:
                raise ValueError(
                    f"Expected channel of the {workers} workers of the default process group, got one of "
                    f"{channel.world_size}."
                )
            with record() as recorded:
                mean = self._called(grads)
        messages = recorded.messages
        # Bytes that nobody heard would be reported as no bytes.
        if not messages:
            raise ValueError(f"Expected hook={self.name} to send through torch.distributed, but nothing was heard.")
        overheard(channel, [*messages, Message("result", (), (mean, torch.tensor(workers)))])

        def decoded_own() -> list[Tensor]:
            return self.decode([*messages, Message("result", (), (mean, torch.tensor(workers)))], "link")[0]

        return Reduced(self.layout.unflatten(mean.clone()), decoded_own)

    def decode(self, messages: Sequence[Message], vantage: Vantage) -> list[list[Tensor]]:
        """Of one worker, what the hook returned; of several, their mean for a peer, and what the tapped worker sent for
        the link: ValueError for a hook of which raytrust does not know what its messages mean."""
        mean, workers = messages[-1].received
        if vantage == "peer" or int(workers) == 1:
            return [self.layout.unflatten(mean)]
        if self.torch_hook is None:
            raise ValueError(
                f"Expected one worker, or vantage='peer', to decode hook={self.name}: which part of a mean one of "
                f"{int(workers)} workers sent is known of torch's own hooks alone."
            )
        if (known := self.factors(messages, vantage)) is not None:
            return [known.decoded(self.layout)]
        # Divided by their number before it was sent.
        return [self._in_order([m.sent[0].float() * int(workers) for m in messages[:-1]])]

    def factors(self, messages: Sequence[Message], vantage: Vantage) -> PowerSGDFactors | None:
        """What a step of torch's PowerSGD sent, with the Q of this state before it; None of other hooks and steps."""
        if not self._is_powersgd or not self.compresses:
            return None
        assert self.torch_hook is not None
        return factors(self.state, self.torch_hook.dtype, self.layout, self.buckets, messages, vantage)

    def public_state(self) -> dict[str, Tensor]:
        """Of torch's PowerSGD its step, its warm start and what it draws from; of others nothing is known."""
        return public(self.state) if self._is_powersgd else {}

    def load_public_state(self, state: dict[str, Tensor]) -> None:
        if self._is_powersgd:
            load_public(self.state, state, self.layout, self.buckets)

    def state_dict(self) -> dict[str, Any]:
        raise ValueError(f"Expected the state of hook={self.name} to be saved as the hook's author says.")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise ValueError(f"Expected the state of hook={self.name} to be loaded as the hook's author says.")

    def __deepcopy__(self, memo: dict[int, Any]) -> HookCompressor:
        twin = self._with_state(copied(self.state, memo))
        # A hook that is an object, or an object's method, keeps its state in itself.
        if not isinstance(self.hook, FunctionType | partial):
            twin.hook = copied(self.hook, memo)
        return twin

    def _with_state(self, state: Any) -> HookCompressor:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, state=state)
        return twin

    @property
    def _is_powersgd(self) -> bool:
        return self.torch_hook is not None and self.torch_hook.method == "powersgd"

    @property
    def name(self) -> str:
        return getattr(self.hook, "__name__", repr(self.hook))

    def _called(self, grads: Sequence[Tensor]) -> Tensor:
        """The mean as the hook has it, (entries,) float32."""
        futures = []
        for number, indices in enumerate(self.buckets):
            buffer = torch.cat([grads[i].detach().float().reshape(-1) for i in indices])
            held = [self._parameters[i] for i in indices]
            future = self.hook(self.state, Bucket(number, number == len(self.buckets) - 1, buffer, held))
            if not hasattr(future, "wait"):
                raise ValueError(f"Expected hook={self.name} to return a torch.futures.Future, got {future!r}.")
            futures.append(future)
        # Only now: a hook may do all its work when the last bucket is full.
        means = [future.wait() for future in futures]
        return torch.cat([x.reshape(-1) for x in self._in_order([m.float() for m in means])])

    def _in_order(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """The gradients in the buffers of all buckets, in the order of the layout, of which they are views."""
        places = [torch.empty(0)] * len(self.layout.shapes)
        for indices, buffer in zip(self.buckets, buffers, strict=True):
            for i, part in zip(indices, buffer.split([self.layout.sizes[i] for i in indices]), strict=True):
                places[i] = part.view(self.layout.shapes[i])
        return places


class Bucket:
    """What a hook is called with, like `torch.distributed.GradBucket`, which can't be made: some gradients, one after
    the other in one vector."""

    def __init__(self, index: int, last: bool, buffer: Tensor, parameters: Sequence[Tensor]):
        self._index, self._last, self._buffer, self._parameters = index, last, buffer, list(parameters)

    def index(self) -> int:
        return self._index

    def is_last(self) -> bool:
        return self._last

    def buffer(self) -> Tensor:
        return self._buffer

    def set_buffer(self, buffer: Tensor) -> None:
        self._buffer = buffer

    def parameters(self) -> list[Tensor]:
        return self._parameters

    def gradients(self) -> list[Tensor]:
        """Views into the buffer."""
        parts = self._buffer.split([p.numel() for p in self._parameters])
        return [part.view(p.shape) for part, p in zip(parts, self._parameters, strict=True)]


def _buckets(layout: Layout, cap_mb: float | None) -> list[list[int]]:
    """The parameters in each bucket: in reverse, and as many as it takes to reach the limit."""
    first, other = (MIB, 25 * MIB) if cap_mb is None else (int(cap_mb * MIB),) * 2
    buckets: list[list[int]] = []
    filled, limit = 0, -1
    for i in reversed(range(len(layout.shapes))):
        if not buckets or filled >= limit:
            limit = other if buckets else first
            filled = 0
            buckets.append([])
        buckets[-1].append(i)
        filled += 4 * layout.sizes[i]
    return buckets
