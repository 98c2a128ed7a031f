"""Error feedback (Seide et al. 2014; Karimireddy et al. 2019) around any compressor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from raytrust.channel import Channel, Message
from raytrust.compress.interface import Compressor, Reduced, Vantage, View


class ErrorFeedback:
    """What a step does not send is added to the gradient of the next: residual = input - own, input = grads + residual.

    The residual subtracts what *this* worker's messages decode to, not the mean. Messages then reveal gradient +
    residual, and the view is that of the inner compressor on this sum. The residual is private, hence not part of the
    public state.
    """

    def __init__(self, inner: Compressor):
        self.inner = inner
        self.residual: list[Tensor] | None = None  # zero before the first step

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        inputs = [g.detach().float() for g in grads]
        if self.residual is not None:
            inputs = [g + e for g, e in zip(inputs, self.residual, strict=True)]
        reduced = self.inner.reduce(inputs, channel)
        self.residual = [x - own for x, own in zip(inputs, reduced.own, strict=True)]
        return reduced

    def decode(self, messages: Sequence[Message], vantage: Vantage) -> list[list[Tensor]]:
        return self.inner.decode(messages, vantage)

    def view(self, messages: Sequence[Message], vantage: Vantage, victim: int = 0) -> View:
        return self.inner.view(messages, vantage, victim)

    def public_state(self) -> dict[str, Tensor]:
        return self.inner.public_state()

    def load_public_state(self, state: dict[str, Tensor]) -> None:
        self.inner.load_public_state(state)
