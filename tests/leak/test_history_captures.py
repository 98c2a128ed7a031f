"""A history of messages from training through the capture to the attack."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from threads import on_workers
from torch import Tensor
from toys import is_gathered, mean_over_workers, synthetic

from raytrust.attacks.inversion import GradientInversion
from raytrust.attacks.inversion.objectives import target_view
from raytrust.compress import Vantage
from raytrust.config import (
    CaptureConfig,
    Defence,
    DGCConfig,
    InversionConfig,
    ModelConfig,
    PowerSGDConfig,
    RandKConfig,
    Threat,
    TopKConfig,
    TrainConfig,
)
from raytrust.leak import LinearView
from raytrust.leak.observation import Capture
from raytrust.train.loop import Step, train
from raytrust.wire.channel import Channel, LocalChannel, Tap

every_vantage = pytest.mark.parametrize("vantage", ["link", "peer"])

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
        if not isinstance(defence.compressor, PowerSGDConfig):
            weighed = float(target_view(seen, replace(AVOID, residual="weigh")).distance(gradient))
            assert weighed < ignored if seen.residual else weighed == ignored
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
    kept: list[Any] = []
    module = sys.modules["raytrust.train.loop"]

    class Spy(Tap):
        def __init__(self, channel: Channel, keep: bool = False):
            super().__init__(channel, keep)
            self.keeps = keep
            kept.append(self)

    monkeypatch.setattr(module, "Tap", Spy)
    records = list(train(TRAINING, DATA, LocalChannel()))
    # two captures each before steps 0, 1 and 4; of the training steps 0, 2 and 3 come within two steps of one
    assert [tap.keeps and len(tap.messages) > 0 for tap in kept] == [True] * 2 + [True] + [True] * 2 + [
        False,
        True,
        True,
    ] + [True] * 2 + [False]
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
    naive = target_view(seen, replace(AVOID, objective="naive"))  # takes all of it for the gradient, as published
    assert isinstance(naive, LinearView)
    assert sum(o.numel() for o in naive.observed) == sum(w.numel() for w in seen.weights.values())


def test_a_history_that_is_not_finite() -> None:
    seen = captures(TRAINING)[-1].seen
    message = seen.history[0].messages[0]
    broken = replace(message, sent=(message.sent[0] * torch.nan, message.sent[1]))
    history = (seen.history[0]._replace(messages=(broken,)), *seen.history[1:])
    with pytest.raises(ValueError, match=r"^Expected finite messages"):
        target_view(replace(seen, history=history), AVOID)
