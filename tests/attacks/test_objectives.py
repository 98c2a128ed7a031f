"""What an attacker compares candidates with, for each kind of view."""

from __future__ import annotations

import pytest
import torch
from toys import synthetic

from raytrust.attacks.inversion.objectives import target_view
from raytrust.config import CaptureConfig, InversionConfig, ModelConfig, TrainConfig, parse_defence
from raytrust.leak import LinearView, identity_view, view_of
from raytrust.leak.observation import Capture, Observation, decoded
from raytrust.leak.views import SignView
from raytrust.train.loop import train
from raytrust.wire.channel import LocalChannel


def observation(defence: str) -> Observation:
    config = TrainConfig(
        defence=parse_defence(defence),
        model=ModelConfig("convnet", width=4),
        capture=CaptureConfig(steps=(0,), tuning=1, evaluation=1),
        workers=1,
        batch_size=4,
        steps=1,
    )
    records = train(config, synthetic(), LocalChannel())
    return next(record.seen for record in records if isinstance(record, Capture))


@pytest.mark.parametrize("defence", ["signsgd", "scaledsign", "qsgd:4:bucket=16", "vqsgd:50", "atomo:1"])
def test_a_set_is_compared_with_by_its_kind(defence: str) -> None:
    """Signs by themselves; quantised gradients by each tensor's direction; of ATOMO what is decoded."""
    seen = observation(defence)
    estimate = decoded(seen).gradient
    own = view_of(seen.build_compressor(), seen.messages, "link")
    entries = sum(x.numel() for x in estimate)
    near, far = [x[None] for x in estimate], [-x[None] for x in estimate]
    for grads in (near, far):
        if isinstance(own, SignView):
            expected = own.distance(grads)
        elif defence.startswith("atomo"):
            expected = identity_view(estimate).distance(grads)
        else:
            pairs = zip(grads, estimate, strict=True)
            expected = sum(x.numel() / entries * identity_view([x]).distance([g]) for g, x in pairs)
        torch.testing.assert_close(target_view(seen, InversionConfig("aware")).distance(grads), expected)
    naive = target_view(seen, InversionConfig("naive"))
    assert float(naive.distance(near)) == pytest.approx(0, abs=1e-5)
    assert float(naive.distance(far)) == pytest.approx(2, abs=1e-5)


@pytest.mark.parametrize("defence", ["fp16", "powersgd:1", "topk:0.1", "threshold:0.1", "randk:0.1", "dgc:0.1"])
def test_a_linear_view_stands_alone(defence: str) -> None:
    assert isinstance(target_view(observation(defence), InversionConfig("aware")), LinearView)
