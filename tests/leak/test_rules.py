"""Which view a compressor's messages are, by its type: the rules, and what holds without one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from threads import on_workers
from torch import Tensor
from toys import DEFENCES, SHAPES, batch, gradients, is_estimate

from raytrust.compress import ErrorFeedback, Layout, Reduced, Vantage, build
from raytrust.compress.base import Base, Payload
from raytrust.compress.interface import payloads_by_worker
from raytrust.compress.powersgd import PowerSGD
from raytrust.config import DenseConfig, PowerSGDConfig
from raytrust.leak import LinearView, View, identity_view, view_of
from raytrust.leak.history import pure_view
from raytrust.leak.rules import Messages
from raytrust.leak.sparse import entries_view
from raytrust.wire.channel import Channel, LocalChannel, Tap

every_defence = pytest.mark.parametrize("name", DEFENCES)


class Doubled(Base):
    """A compressor from elsewhere: it sends half of the gradient, which everyone doubles."""

    def __init__(self) -> None:
        super().__init__(DenseConfig(), Layout(SHAPES))

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        gathered = channel.all_gather((self._input(grads) / 2,))
        return self._reduced(self._sum(gathered, share=1 / channel.world_size), gathered[channel.rank])

    def _add(self, x: Tensor, payload: Payload, share: float = 1.0) -> Tensor:
        return x.add_(payload[0], alpha=2 * share)


class Known(Doubled):
    """One of its own with a rule."""


class Derived(Known):
    """One that inherits it."""


@view_of.register(Known)
def known_view(compressor: Known, messages: Messages, vantage: Vantage, victim: int = 0) -> View:
    (half,) = payloads_by_worker(messages, vantage)[0]
    return identity_view([half])


def sent(channel: Channel, compressor: Doubled) -> Messages:
    tap = Tap(channel, keep=True)
    compressor.reduce(gradients(channel.rank), tap)
    return tap.messages


@pytest.mark.parametrize("wrap", [lambda c: c, ErrorFeedback])
def test_without_a_rule_a_message_is_an_estimate(wrap: type[ErrorFeedback]) -> None:
    """Of the victim's gradient, by either vantage; what wraps a compressor hands the question on."""
    messages = on_workers(lambda channel: sent(channel, Doubled()), 2)
    for victim in range(2):
        at_link = view_of(wrap(Doubled()), messages[victim], "link", victim)
        at_peer = view_of(wrap(Doubled()), messages[0], "peer", victim)
        for view in (at_link, at_peer):
            assert isinstance(view, LinearView)
            assert all(map(torch.equal, view.observed, gradients(victim)))
            assert float(view.distance(batch(gradients(1 - victim)))) > 0.5


@pytest.mark.parametrize("kind", [Known, Derived])
def test_a_rule_from_elsewhere_holds_for_what_is_derived(kind: type[Known]) -> None:
    messages = sent(LocalChannel(), kind())
    for compressor in (kind(), ErrorFeedback(kind())):
        view = view_of(compressor, messages, "link")
        assert isinstance(view, LinearView)
        assert torch.equal(2 * view.observed[0], torch.cat([g.flatten() for g in gradients(0)]))


def test_without_a_rule_nothing_is_free_of_a_residual() -> None:
    messages = sent(LocalChannel(), Doubled())
    assert isinstance(pure_view(Doubled(), messages, "link"), LinearView)  # there is none
    with pytest.raises(ValueError, match=r"^Expected a method whose residual has zeros, got Doubled\.$"):
        pure_view(ErrorFeedback(Doubled()), messages, "link")


@every_defence
def test_a_view_of_scalars_and_of_what_has_no_entries(name: str) -> None:
    shapes = [torch.Size(s) for s in [(), (0,), (3, 4), (2, 0), (5,)]]
    compressor, tap = build(DEFENCES[name], shapes), Tap(LocalChannel(), keep=True)
    generator = torch.Generator().manual_seed(0)
    state, grads = compressor.public_state(), [torch.randn(s, generator=generator) for s in shapes]
    own = compressor.reduce(grads, tap).decoded_own
    compressor.load_public_state(state)
    view = view_of(compressor, tap.messages, "link")
    true, other = float(view.distance([g[None] for g in grads])), float(view.distance([-g[None] for g in grads]))
    assert math.isfinite(true)
    assert true < other
    exact = own if is_estimate(DEFENCES[name].compressor) else grads
    assert float(view.distance([g[None] for g in exact])) < 1e-3


def test_the_view_weighs_directions_by_the_gradient_not_by_q() -> None:
    """A warm start's columns differ a thousandfold in length; what is measured along each counts alike."""
    compressor = PowerSGD(PowerSGDConfig(2), Layout([torch.Size((4, 6))]))
    q = torch.zeros(2, 6)
    q[0, 0], q[1, 1] = 1000.0, 1.0
    compressor.load_public_state({"q.0": q})
    tap, matrix = Tap(LocalChannel(), keep=True), torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    compressor.reduce([matrix], tap)
    compressor.load_public_state({"q.0": q})
    view = view_of(compressor, tap.messages, "link")
    assert isinstance(view, LinearView)
    first, _ = view.observed
    torch.testing.assert_close(first.norm(), matrix[:, :2].norm())


def test_a_view_knows_where_parameters_begin() -> None:
    layout = Layout([torch.Size((2, 2)), torch.Size((0,)), torch.Size((3,)), torch.Size(())])
    view = entries_view(layout, torch.tensor([5.0, -7.0, 6.0]), torch.tensor([3, 4, 7]))
    assert [x.tolist() for x in view.observed] == [[5], [], [-7], [6]]
    assert [x.tolist() for x in view.positions] == [[3], [], [0], [0]]
    grads = [torch.tensor([[[1.0, 2], [3, 4]]]), torch.empty(1, 0), torch.tensor([[8.0, 9, 10]]), torch.tensor([11.0])]
    assert [m.tolist() for m in view.measure(grads)] == [[[4]], [[]], [[8]], [[11]]]
