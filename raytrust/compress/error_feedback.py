"""Error feedback (Seide et al. 2014; Karimireddy et al. 2019) around any compressor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytrust.channel import Channel, Message
from raytrust.compress.interface import Compressor, FlatGradients, Layout, Reduced, Vantage
from raytrust.compress.views import View


class ErrorFeedback:
    """What a step does not send is added to the gradient of the next: residual = input - own, input = grads + residual.

    The residual subtracts what *this* worker's messages decode to, not the mean. Messages then reveal gradient +
    residual, and the view is that of the inner compressor on this sum. The residual is private, hence not part of the
    public state.
    """

    def __init__(self, inner: Compressor):
        self.inner = inner
        self._residual: FlatGradients | None = None  # zero before the first step

    @property
    def layout(self) -> Layout:
        return self.inner.layout

    @property
    def residual(self) -> list[Tensor] | None:
        """Like the gradients, in float32; None before the first step. The next step writes over it."""
        return self._residual

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        self.layout.check(grads)
        if self._residual is None:
            device = grads[0].device if grads else None
            self._residual = FlatGradients(torch.zeros(self.layout.entries, device=device), self.layout)
        inputs = self._residual  # the sum is made in place
        if grads:
            torch._foreach_add_(list(inputs), [g.detach() for g in grads])
        reduced = self.inner.reduce(inputs, channel)
        reduced.subtract_own(inputs)
        return reduced

    def decode(self, messages: Sequence[Message], vantage: Vantage) -> list[list[Tensor]]:
        return self.inner.decode(messages, vantage)

    def view(self, messages: Sequence[Message], vantage: Vantage, victim: int = 0) -> View:
        return self.inner.view(messages, vantage, victim)

    def public_state(self) -> dict[str, Tensor]:
        return self.inner.public_state()

    def load_public_state(self, state: dict[str, Tensor]) -> None:
        self.inner.load_public_state(state)

    def state_dict(self) -> dict[str, Tensor]:
        residual = {} if self._residual is None else dict(zip(self.layout.names, self._residual, strict=True))
        return {f"residual.{name}": e.clone() for name, e in residual.items()} | self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        parts = [state.get(f"residual.{name}") for name in self.layout.names]
        found = [p.reshape(-1) for p in parts if p is not None]
        self._residual = FlatGradients(torch.cat(found), self.layout) if found else None
        self.inner.load_state_dict(state)
