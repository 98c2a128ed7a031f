"""The interface that training, attacks and tests share: `Compressor`, and what its messages reveal: `View`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from raytrust.channel import Channel, Message

Vantage: TypeAlias = Literal["link", "peer"]


class Reduced(NamedTuple):
    """What one step of compressed averaging returns.

    mean: like the gradients, bitwise equal on every worker: the step that the optimiser takes.
    own: like the gradients: what this worker's messages decode to. The mean of `own` over workers is `mean`.
    """

    mean: list[Tensor]
    own: list[Tensor]


class View(Protocol):
    """What an attacker who knows the compressor learns about the gradient that went in."""

    def distance(self, grads: Sequence[Tensor]) -> Tensor:
        """How far candidate gradients are from what was observed.

        grads: one tensor a parameter, (batch, *shape of the parameter). Returns (batch,), differentiable, and minimal
        at the true gradient.
        """
        ...


class Compressor(Protocol):
    """A method that averages gradients over workers with few bytes. One object a worker; it may hold state."""

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        """Average `grads` over the workers of `channel`; a collective call. Does not change `grads`."""
        ...

    def decode(self, messages: Sequence[Message], vantage: Vantage) -> list[list[Tensor]]:
        """The gradients that one step's messages decode to, from this vantage, without any state of the sender.

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


@dataclass(frozen=True)
class LinearView:
    """The observed values of known linear functions of the gradient.

    observed: the measurements, one tensor each.
    measure: (batch, *shape) a parameter -> (batch, *measurement) a measurement; measure(true gradient) == observed.
    adjoint: (batch, *measurement) a measurement -> (batch, *shape) a parameter;
        <measure(g), m> == <g, adjoint(m)>.
    """

    observed: Sequence[Tensor]
    measure: Callable[[Sequence[Tensor]], list[Tensor]]
    adjoint: Callable[[Sequence[Tensor]], list[Tensor]]

    def distance(self, grads: Sequence[Tensor]) -> Tensor:
        """1 - cosine of the candidate's measurements with the observed ones, in [0, 2] (Geiping et al. 2020, eq. 4).

        A candidate or an observation that is zero throughout is at distance 1.
        """
        measured = self.measure(grads)
        inner = _sum(m.flatten(1) @ o.flatten() for m, o in zip(measured, self.observed, strict=True))
        squared = _sum(m.flatten(1).square().sum(1) for m in measured)
        norm = torch.sqrt(_sum(o.square().sum() for o in self.observed))
        tiny = torch.finfo(squared.dtype).tiny
        return 1 - inner / (squared.clamp_min(tiny).sqrt() * norm.clamp_min(tiny**0.5))


def identity_view(observed: Sequence[Tensor]) -> LinearView:
    """The view of a whole gradient. Of a decoded one, it is the view of an attacker who ignores the compressor."""
    return LinearView(observed, measure=list, adjoint=list)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum(0)


def flatten(xs: Sequence[Tensor]) -> Tensor:
    """All entries, as one new float32 vector."""
    return torch.cat([x.detach().reshape(-1).float() for x in xs])


def unflatten(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Inverse of `flatten`: views into `flat`."""
    return [part.view(shape) for part, shape in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]
