"""What a history of messages tells of the gradient alone, under error feedback."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toys import ENTRIES, SHAPES, batch, distance, gradients, is_gathered, mean_over_workers, synthetic

from raytrust.attacks.inversion import GradientInversion
from raytrust.attacks.inversion.objectives import target_view
from raytrust.capture import Capture, seen_messages
from raytrust.channel import Channel, LocalChannel, Tap
from raytrust.compress import LinearView, Vantage, build
from raytrust.compress.history import Past, pure_view
from raytrust.compress.views import SparseView, SpectralView
from raytrust.config import (
    AtomoConfig,
    CaptureConfig,
    CompressorConfig,
    Defence,
    DenseConfig,
    DGCConfig,
    HalfConfig,
    InversionConfig,
    ModelConfig,
    PowerSGDConfig,
    QSGDConfig,
    RandKConfig,
    ScaledSignConfig,
    SignSGDConfig,
    Threat,
    ThresholdConfig,
    TopKConfig,
    TrainConfig,
    VqSGDConfig,
)
from raytrust.train import Step, train

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


class Threads:
    """One of several workers, each in a thread of its own."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier):
        self.world_size, self.rank = len(slots), rank
        self._slots, self._barrier = slots, barrier

    def all_mean(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        mean = torch.stack([t for (t,) in self.all_gather([x])]).mean(0)
        return mean if out is None else out.copy_(mean)

    def all_gather(self, xs: Sequence[Tensor], counts: Sequence[int] | None = None) -> list[tuple[Tensor, ...]]:
        self._slots[self.rank] = tuple(x.detach().clone() for x in xs)
        self._barrier.wait(60)
        found = [tuple(x.clone() for x in slot) for slot in self._slots]
        self._barrier.wait(60)
        return found


def on_workers(function: Callable[[Channel], Any], workers: int) -> list[Any]:
    """What the function returns on each worker, by rank."""
    slots: list[Any] = [None] * workers
    barrier, found = threading.Barrier(workers), [None] * workers

    def run(rank: int) -> None:
        try:
            found[rank] = function(Threads(rank, slots, barrier))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in found
    return found


@dataclass(frozen=True)
class Sent:
    gradient: list[Tensor]
    past: Past  # messages with all payloads


def sent(defence: Defence, workers: int, steps: int = STEPS) -> list[list[Sent]]:
    """The steps of each worker, of other gradients each, in which every third entry is large more often than others."""

    def run(channel: Channel) -> list[Sent]:
        compressor, found = build(defence, SHAPES, seed=5), []
        for step in range(steps):
            grads = [
                g * (1 + 3 * (torch.arange(g.numel()) % 3 == 0).view(g.shape))
                for g in gradients(10 * step + channel.rank)
            ]
            tap, state = Tap(channel), compressor.public_state()
            compressor.reduce(grads, tap)
            found.append(Sent(grads, Past(tuple(tap.messages), state)))
        return found

    return on_workers(run, workers)


def look(
    defence: Defence, steps: Sequence[Sent], vantage: Vantage, victim: int, history: int, pure: bool = True
) -> Any:
    """What an attacker sees of the last of some steps: a fresh compressor and no payload that the vantage hides."""
    visible = [Past(seen_messages(list(s.past.messages), Threat(vantage)), s.past.compressor_state) for s in steps]
    compressor = build(defence, SHAPES, seed=99)
    compressor.load_public_state(visible[-1].compressor_state)
    if not pure:
        return compressor.view(visible[-1].messages, vantage, victim)
    before = visible[max(0, len(visible) - 1 - history) : -1]
    return pure_view(compressor, visible[-1].messages, vantage, victim, before)


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
            whole = look(defence, listener, vantage, victim, 0, pure=False)
            numbers, of_all = (sum(o.numel() for o in v.observed) for v in (view, whole))
            assert 3 <= numbers < of_all
            assert float(whole.distance(gradient)) > 1e-3  # the residual hides the gradient


@every_defence
@every_vantage
def test_adjoint_of_a_pure_view(name: str, vantage: Vantage) -> None:
    (steps,) = sent(DEFENCES[name], 1)
    view = look(DEFENCES[name], steps, vantage, 0, 2)
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
    view, now, before = (look(DEFENCES[name], steps[:n], "link", 0, 1, pure=p) for n, p in [(4, 1), (4, 0), (3, 0)])
    assert isinstance(view, SparseView)
    assert view.bound is None  # of the others nothing is known: their residual may be large
    for found, a, b in zip(view.positions, now.positions, before.positions, strict=True):
        assert set(found.tolist()) == set(a.tolist()) & set(b.tolist())


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
    assert isinstance(view, SpectralView | LinearView)
    elsewhere = [g if g.ndim < 2 else torch.zeros_like(g) for g in gradient]
    for candidate in (gradient, elsewhere):
        assert float(view.distance(batch(candidate))) == pytest.approx(0, abs=1e-6)
    assert float(view.distance(batch(gradients(7)))) > 0.1


def test_without_a_residual_the_view_is_whole() -> None:
    defence = Defence(TopKConfig(level=0.2))
    (steps,) = sent(defence, 1)
    pure, whole = (look(defence, steps, "link", 0, 0, pure) for pure in (True, False))
    assert all(map(torch.equal, pure.observed, whole.observed))
    assert all(map(torch.equal, pure.positions, whole.positions))


def refuse(defence: Defence, history: int, message: str, steps: int = STEPS) -> None:
    (taken,) = sent(defence, 1, steps)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        look(defence, taken, "link", 0, history)
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["topk", "topk-layer", "threshold", "randk", "dgc"])
def test_a_missing_history(name: str) -> None:
    refuse(DEFENCES[name], 0, "Expected a history of at least 1 step, to tell the gradient from the residual.")


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


# ------------------------------------------------------------------------------------------- from training to attack

DATA = synthetic(vivid=True)
TRAINING = TrainConfig(
    defence=Defence(TopKConfig(level=0.2), error_feedback=True),
    model=ModelConfig("convnet", width=8),
    threat=Threat(history=2),
    capture=CaptureConfig((0, 1, 4), tuning=1, evaluation=1),
    workers=1,
    batch_size=8,
    steps=5,
    learning_rate=0.02,
)
AVOID = InversionConfig(residual="avoid", iterations=4)


def captures(config: TrainConfig) -> list[Capture]:
    return [r for r in train(config, DATA, LocalChannel()) if isinstance(r, Capture)]


def private_gradient(capture: Capture) -> list[Tensor]:
    seen, model = capture.seen, capture.seen.build_model()
    x = (capture.truth.images - seen.mean.view(-1, 1, 1)) / seen.std.view(-1, 1, 1)
    return list(torch.autograd.grad(F.cross_entropy(model(x), capture.truth.labels), list(model.parameters())))


@pytest.mark.parametrize(
    "defence", [TRAINING.defence, Defence(DGCConfig(level=0.2)), Defence(PowerSGDConfig(2), error_feedback=True)]
)
@every_vantage
def test_a_history_makes_captures_pure(defence: Defence, vantage: Vantage) -> None:
    config = replace(TRAINING, defence=defence, threat=Threat(vantage, history=2))
    for capture in captures(config):
        seen, gradient = capture.seen, [g[None] for g in private_gradient(capture)]
        assert len(seen.history) == min(2, seen.step)
        assert seen.residual == (seen.step > 0)
        avoided, ignored = (float(target_view(seen, a).distance(gradient)) for a in (AVOID, InversionConfig()))
        assert avoided == pytest.approx(0, abs=1e-6)
        assert ignored > 1e-4 if seen.residual else ignored == avoided


@every_vantage
@pytest.mark.parametrize("defence", [TRAINING.defence, Defence(PowerSGDConfig(2), error_feedback=True)])
def test_the_history_of_two_workers(defence: Defence, vantage: Vantage) -> None:
    """Each victim's own; and after an all-mean a peer measures the mean gradient of the round."""
    config = replace(
        TRAINING, defence=defence, threat=Threat(vantage, history=1), workers=2, capture=CaptureConfig((3,), 1, 1)
    )
    found = on_workers(lambda channel: [r for r in train(config, DATA, channel) if isinstance(r, Capture)], 2)
    first, second = (capture for (capture,) in found)
    assert [first.seen.victim, second.seen.victim] == [0, 1]
    own = [private_gradient(c) for c in (first, second)]
    for capture, gradient in zip((first, second), own, strict=True):
        if vantage == "peer" and not is_gathered(defence.compressor):
            gradient = mean_over_workers(own)
        for attack, near in [(AVOID, True), (InversionConfig(), False)]:
            assert (float(target_view(capture.seen, attack).distance([g[None] for g in gradient])) < 1e-6) == near


def test_a_history_is_the_messages_of_the_training_steps_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other step's messages are kept, and training and captures are the same without."""
    kept: list[Tap] = []
    module = __import__("sys").modules["raytrust.train"]

    class Spy(Tap):
        def __init__(self, channel: Channel, keep: bool = True):
            super().__init__(channel, keep)
            kept.append(self)

    monkeypatch.setattr(module, "Tap", Spy)
    records = list(train(TRAINING, DATA, LocalChannel()))
    # two captures each before steps 0, 1 and 4; of the training steps 0, 2 and 3 come within two steps of one
    assert [bool(tap.messages) for tap in kept] == [True] * 2 + [True] + [True] * 2 + [False, True, True] + [
        True
    ] * 2 + [False]
    last = [r for r in records if isinstance(r, Capture)][-1].seen
    for past, tap in zip(last.history, kept[6:8], strict=True):
        assert [m.op for m in past.messages] == [m.op for m in tap.messages]
        assert all(
            torch.equal(a, b)
            for m, n in zip(past.messages, tap.messages, strict=True)
            for a, b in zip(m.sent, n.sent, strict=True)
        )
    without = list(train(replace(TRAINING, threat=Threat()), DATA, LocalChannel()))
    assert [r.loss for r in records if isinstance(r, Step)] == [r.loss for r in without if isinstance(r, Step)]
    for a, b in zip(records, without, strict=True):
        if isinstance(a, Capture) and isinstance(b, Capture):
            assert b.seen.history == ()
            assert all(
                torch.equal(x, y)
                for m, n in zip(a.seen.messages, b.seen.messages, strict=True)
                for x, y in zip(m.sent, n.sent, strict=True)
            )


def test_a_peer_s_history_hides_what_was_handed_over() -> None:
    seen = captures(replace(TRAINING, threat=Threat("peer", history=1)))[-1].seen
    (past,) = seen.history
    assert all(x.is_meta for m in past.messages for x in m.sent)
    assert not any(x.is_meta for m in past.messages for x in m.received)


def test_the_history_holds_the_state_before_each_step() -> None:
    """PowerSGD's warm start, and the step of which Rand-K's positions are a function."""
    threat = Threat(history=3)
    powersgd = captures(replace(TRAINING, threat=threat, defence=Defence(PowerSGDConfig(2), True)))
    (earlier,) = (c.seen for c in powersgd if c.seen.step == 1 and c.index == 0)
    later = powersgd[-1].seen
    assert len(later.history) == 3
    assert all(map(torch.equal, later.history[0].compressor_state.values(), earlier.compressor_state.values()))
    randk = captures(replace(TRAINING, threat=threat, defence=Defence(RandKConfig(level=0.2), True)))[-1].seen
    assert [int(past.compressor_state["step"]) for past in randk.history] == [1, 2, 3]


def test_an_attack_runs_on_what_is_pure() -> None:
    for defence in (TRAINING.defence, Defence(PowerSGDConfig(2), error_feedback=True)):
        seen = captures(replace(TRAINING, defence=defence))[-1].seen
        (avoided,), (ignored,) = (
            GradientInversion(attack).candidates([seen]) for attack in (AVOID, replace(AVOID, residual="ignore"))
        )
        assert avoided.diverged == 0
        assert not torch.equal(avoided.images, ignored.images)


def test_what_cannot_be_avoided() -> None:
    seen = captures(replace(TRAINING, threat=Threat()))[-1].seen
    with pytest.raises(ValueError, match=r"^Expected a history of at least 1 step"):
        target_view(seen, AVOID)
    naive = replace(AVOID, objective="naive")  # takes the whole for the gradient, as published attacks do
    assert float(target_view(seen, naive).distance([o[None] for o in target_view(seen, naive).observed])) < 1e-6  # type: ignore[attr-defined]


def test_a_history_that_is_not_finite() -> None:
    seen = captures(TRAINING)[-1].seen
    message = seen.history[0].messages[0]
    broken = replace(message, sent=(message.sent[0] * torch.nan, message.sent[1]))
    history = (seen.history[0]._replace(messages=(broken,)), *seen.history[1:])
    with pytest.raises(ValueError, match=r"^Expected finite messages"):
        target_view(replace(seen, history=history), AVOID)
