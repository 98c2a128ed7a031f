"""What a history of messages tells of the gradient alone, under error feedback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from threads import on_workers
from torch import Tensor
from toys import ENTRIES, SHAPES, batch, distance, gradients, is_gathered, mean_over_workers

from raytrust.compress import Vantage, build
from raytrust.config import (
    AtomoConfig,
    CompressorConfig,
    Defence,
    DenseConfig,
    DGCConfig,
    HalfConfig,
    PowerSGDConfig,
    QSGDConfig,
    RandKConfig,
    ScaledSignConfig,
    SignSGDConfig,
    Threat,
    ThresholdConfig,
    TopKConfig,
    VqSGDConfig,
)
from raytrust.leak import EarlierStep, LinearView, SparseView, View, view_of
from raytrust.leak.history import pure_view, weighed_view
from raytrust.leak.observation import seen_messages
from raytrust.leak.views import TensorwiseView
from raytrust.wire.channel import Channel, Tap

STEPS = 4
DEFENCES = {
    "topk": Defence(TopKConfig(level=0.2), True),
    "topk-layer": Defence(TopKConfig(level=0.2, scope="layer"), True),
    "threshold": Defence(ThresholdConfig(level=0.2, sample=1.0), True),
    "randk": Defence(RandKConfig(level=0.4), True),
    "dgc": Defence(DGCConfig(level=0.4)),
    "dgc-without-momentum": Defence(DGCConfig(level=0.4, momentum=0.0, masking=False)),
    "dgc-unmasked": Defence(DGCConfig(level=0.4, masking=False)),
    "powersgd-1": Defence(PowerSGDConfig(1), True),
    "powersgd-3": Defence(PowerSGDConfig(3), True),
    "powersgd-3-cold": Defence(PowerSGDConfig(3, warm_start=False), True),
}
EXACT = ("topk", "topk-layer", "threshold", "randk", "dgc", "dgc-without-momentum")  # nothing is computed

every_defence = pytest.mark.parametrize("name", DEFENCES)
every_vantage = pytest.mark.parametrize("vantage", ["link", "peer"])
every_number_of_workers = pytest.mark.parametrize("workers", [1, 2])


@dataclass(frozen=True)
class Sent:
    gradient: list[Tensor]
    past: EarlierStep  # messages with all payloads


def sent(defence: Defence, workers: int, steps: int = STEPS) -> list[list[Sent]]:
    """The steps of each worker, of other gradients each, in which every third entry is large more often than others."""

    def run(channel: Channel) -> list[Sent]:
        compressor, found = build(defence, SHAPES, seed=5), []
        for step in range(steps):
            grads = [
                g * (1 + 3 * (torch.arange(g.numel()) % 3 == 0).view(g.shape))
                for g in gradients(10 * step + channel.rank)
            ]
            tap, state = Tap(channel, keep=True), compressor.public_state()
            compressor.reduce(grads, tap)
            found.append(Sent(grads, EarlierStep(tuple(tap.messages), state)))
        return found

    return on_workers(run, workers)


def look(
    defence: Defence,
    steps: Sequence[Sent],
    vantage: Vantage,
    victim: int,
    history: int,
    view: Callable[..., View] | None = pure_view,
) -> Any:
    """What an attacker sees of the last of some steps: a fresh compressor and no payload that the vantage hides."""
    visible = [
        EarlierStep(seen_messages(list(s.past.messages), Threat(vantage)), s.past.compressor_state) for s in steps
    ]
    compressor = build(defence, SHAPES, seed=99)
    compressor.load_public_state(visible[-1].compressor_state)
    if view is None:
        return view_of(compressor, visible[-1].messages, vantage, victim)
    before = visible[max(0, len(visible) - 1 - history) : -1]
    return view(compressor, visible[-1].messages, vantage, victim, before)


def true_gradient(
    defence: Defence, steps: Sequence[Sequence[Sent]], step: int, vantage: Vantage, rank: int
) -> list[Tensor]:
    if vantage == "link" or is_gathered(defence.compressor):
        return steps[rank][step].gradient
    return mean_over_workers([worker[step].gradient for worker in steps])


@every_defence
@every_vantage
@every_number_of_workers
def test_a_pure_view_measures_the_gradient_without_the_residual(name: str, vantage: Vantage, workers: int) -> None:
    defence, history = DEFENCES[name], 2 if name == "dgc-unmasked" else 1
    steps = sent(defence, workers)
    for victim in range(workers):
        for step in range(1, STEPS):
            listener = steps[victim if vantage == "link" else -1][: step + 1]
            gradient = batch(true_gradient(defence, steps, step, vantage, victim))
            view = look(defence, listener, vantage, victim, history)
            assert isinstance(view, LinearView)
            measured = [m[0] for m in view.measure(gradient)]
            assert distance(measured, view.observed) <= (0 if name in EXACT else 1e-5)
            whole = look(defence, listener, vantage, victim, 0, None)
            numbers, of_all = (sum(o.numel() for o in v.observed) for v in (view, whole))
            assert 3 <= numbers < of_all
            assert float(whole.distance(gradient)) > 1e-3  # the residual hides the gradient


@pytest.mark.parametrize(
    ("kind", "name"), [*((pure_view, name) for name in DEFENCES), *((weighed_view, name) for name in EXACT)]
)
@every_vantage
def test_adjoint_of_a_view_with_history(name: str, vantage: Vantage, kind: Callable[..., View]) -> None:
    (steps,) = sent(DEFENCES[name], 1)
    view = look(DEFENCES[name], steps, vantage, 0, 2, kind)
    g = batch(gradients(7), gradients(8))
    generator = torch.Generator().manual_seed(0)
    measured = view.measure(g)
    assert [m.shape[1:] for m in measured] == [o.shape for o in view.observed]
    m = [torch.randn(x.shape, generator=generator) for x in measured]
    back = view.adjoint(m)
    assert [b.shape for b in back] == [x.shape for x in g]
    for i in range(2):
        there = sum(float((a[i] * b[i]).sum()) for a, b in zip(measured, m, strict=True))
        here = sum(float((a[i] * b[i]).sum()) for a, b in zip(g, back, strict=True))
        assert there == pytest.approx(here, abs=1e-3)


@pytest.mark.parametrize("name", ["topk", "topk-layer", "threshold", "randk"])
def test_pure_are_the_entries_that_were_sent_in_both_steps(name: str) -> None:
    (steps,) = sent(DEFENCES[name], 1)
    now, before = (look(DEFENCES[name], steps[:n], "link", 0, 0, None) for n in (4, 3))
    view = look(DEFENCES[name], steps, "link", 0, 1)
    assert isinstance(view, SparseView)
    assert view.bound is None  # of the others nothing is known: their residual may be large
    for found, a, b in zip(view.positions, now.positions, before.positions, strict=True):
        assert set(found.tolist()) == set(a.tolist()) & set(b.tolist())


@pytest.mark.parametrize("name", EXACT)
@every_vantage
@every_number_of_workers
def test_a_weighed_view_divides_by_the_root_of_the_age(name: str, vantage: Vantage, workers: int) -> None:
    """Of every entry, by the book; and so the true gradient comes nearer to what was observed."""
    defence, history = DEFENCES[name], 2
    steps = sent(defence, workers)
    for victim in range(workers):
        listener = steps[victim if vantage == "link" else -1]
        before, now = ([look(defence, listener[:n], vantage, victim, 0, None) for n in ns] for ns in ((2, 3), (4,)))
        view = look(defence, listener, vantage, victim, history, weighed_view)
        ages = []
        for i, (found, values, positions) in enumerate(
            zip(view.observed, now[0].observed, now[0].positions, strict=True)
        ):
            for x, value, position in zip(found.tolist(), values.tolist(), positions.tolist(), strict=True):
                sent_in = [position in earlier.positions[i].tolist() for earlier in before]
                ages.append(1 if sent_in[1] else 2 if sent_in[0] else 3)
                assert x == pytest.approx(value / ages[-1] ** 0.5)
        assert set(ages) == {1, 2, 3}
        gradient = batch(true_gradient(defence, steps, STEPS - 1, vantage, victim))
        assert float(view.distance(gradient)) < float(now[0].distance(gradient))


def test_what_a_low_rank_projection_leaves_pure() -> None:
    """Of rank 3: 3 x 3 products P^^T M Q^ (fewer where the matrix is thin), and those of the new directions that the
    former 3 span, too: in 4 dimensions 2 at least, in 5 dimensions 1, in 1 dimension all."""
    (steps,) = sent(DEFENCES["powersgd-3"], 1)
    shapes = [tuple(o.shape) for o in look(DEFENCES["powersgd-3"], steps, "link", 0, 1).observed]
    assert shapes == [(3, 3), (3, 3), (2, 10), (1, 1), (1, 1), (1, 7), (3, 3), (1, 4), (6,), (1,)]


@pytest.mark.parametrize("config", [TopKConfig(level=1.0), DenseConfig()])
def test_a_lossless_method_leaves_no_residual(config: CompressorConfig) -> None:
    defence = Defence(config, True)
    (steps,) = sent(defence, 1)
    view = look(defence, steps, "link", 0, 1)
    assert sum(o.numel() for o in view.observed) == ENTRIES
    assert distance([m[0] for m in view.measure(batch(steps[-1].gradient))], view.observed) == 0


@pytest.mark.parametrize("config", [PowerSGDConfig(2), AtomoConfig(2)])
def test_tensors_of_one_dimension_need_no_history(config: CompressorConfig) -> None:
    defence = Defence(config, True)
    (steps,) = sent(defence, 1)
    view, gradient = look(defence, steps, "link", 0, 0), steps[-1].gradient
    assert isinstance(view, TensorwiseView | LinearView)
    elsewhere = [g if g.ndim < 2 else torch.zeros_like(g) for g in gradient]
    for candidate in (gradient, elsewhere):
        assert float(view.distance(batch(candidate))) == pytest.approx(0, abs=1e-6)
    assert float(view.distance(batch(gradients(7)))) > 0.1


def test_without_a_residual_the_view_is_whole() -> None:
    defence = Defence(TopKConfig(level=0.2))
    (steps,) = sent(defence, 1)
    pure, whole = (look(defence, steps, "link", 0, 0, view) for view in (pure_view, None))
    assert all(map(torch.equal, pure.observed, whole.observed))
    assert all(map(torch.equal, pure.positions, whole.positions))


def refuse(defence: Defence, history: int, message: str, view: Callable[..., View] = pure_view) -> None:
    (steps,) = sent(defence, 1)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        look(defence, steps, "link", 0, history, view)
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["topk", "topk-layer", "threshold", "randk", "dgc"])
@pytest.mark.parametrize("view", [pure_view, weighed_view])
def test_a_missing_history(name: str, view: Callable[..., View]) -> None:
    message = "Expected a history of at least 1 step, to tell the gradient from the residual."
    refuse(DEFENCES[name], 0, message, view)


@pytest.mark.parametrize(("name", "method"), [("powersgd-3", "PowerSGD"), ("dgc-unmasked", "DGC")])
def test_what_has_no_age(name: str, method: str) -> None:
    message = f"Expected a method that sends entries and then forgets them, to weigh them by age, got {method}."
    refuse(DEFENCES[name], 1, message, weighed_view)


def test_momentum_without_masking_takes_two_steps_but_at_the_start() -> None:
    defence = DEFENCES["dgc-unmasked"]
    refuse(defence, 1, "Expected a history of at least 2 steps, to tell the gradient from the momentum.")
    (steps,) = sent(defence, 1, 2)
    view = look(defence, steps, "link", 0, 1)
    assert distance([m[0] for m in view.measure(batch(steps[1].gradient))], view.observed) < 1e-5


def test_nothing_that_was_sent_before() -> None:
    """One entry of 245 at a time: another one each step, as the residual of the first is gone."""
    message = "Expected entries that were sent in the step before, too, got none among 1."
    refuse(Defence(TopKConfig(level=1 / ENTRIES), True), 1, message)


@pytest.mark.parametrize("config", [HalfConfig(), SignSGDConfig(), ScaledSignConfig(), QSGDConfig(), VqSGDConfig()])
def test_methods_that_round_every_entry(config: CompressorConfig) -> None:
    method = type(build(Defence(config), SHAPES)).__name__
    refuse(Defence(config, True), 1, f"Expected a method whose residual has zeros, got {method}.")
