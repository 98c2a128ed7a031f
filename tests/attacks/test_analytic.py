"""The input of a linear first layer, exactly."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_inversion import seen
from torch import Tensor, nn

from raytrust.attacks.inversion import invert
from raytrust.attacks.inversion.analytic import conjugate_gradient
from raytrust.compress import Compressor, build
from raytrust.config import (
    CompressorConfig,
    Defence,
    DenseConfig,
    InversionConfig,
    PowerSGDConfig,
    Threat,
    TopKConfig,
)
from raytrust.config.attacks import ANALYTIC
from raytrust.leak.observation import Observation, seen_messages
from raytrust.wire.channel import LocalChannel, Tap

PIXELS = 3 * 8 * 8


class LinearObservation(Observation):
    """Of a model whose first layer is linear on the image."""

    def build_model(self) -> nn.Module:
        model = network()
        model.load_state_dict(self.weights)
        return model

    def build_compressor(self) -> Compressor:
        compressor = build(self.defence, [w.shape for w in self.weights.values()])
        compressor.load_public_state(self.compressor_state)
        return compressor


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 12), nn.Sigmoid(), nn.Linear(12, 4))


def observe(
    compressor: CompressorConfig, image: Tensor, label: int = 1, threat: Threat | None = None
) -> LinearObservation:
    model, like = network(), seen()[0]
    x = (image - like.mean.view(-1, 1, 1)) / like.std.view(-1, 1, 1)
    loss = F.cross_entropy(model(x[None]), torch.tensor([label]))
    grads = torch.autograd.grad(loss, list(model.parameters()))
    threat = threat or Threat(labels="unknown")
    tap = Tap(LocalChannel(), keep=True)
    defence = Defence(compressor)
    built = build(defence, [g.shape for g in grads])
    state = built.public_state()
    built.reduce(grads, tap)
    values = {f.name: getattr(like, f.name) for f in fields(like)} | {
        "weights": {name: p.detach() for name, p in model.named_parameters()},
        "buffers": {},
        "defence": defence,
        "threat": threat,
        "labels": None,
        "messages": seen_messages(tap.messages, threat),
        "compressor_state": state,
    }
    return LinearObservation(**values)


def images(n: int) -> Tensor:
    return torch.rand((n, 3, 8, 8), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("vantage", ["link", "peer"])
@pytest.mark.parametrize("objective", ["naive", "aware"])
@pytest.mark.parametrize(
    "compressor",
    [DenseConfig(), TopKConfig(level=1.0), PowerSGDConfig(1), PowerSGDConfig(4)],
    ids=repr,
)
def test_it_is_exact(compressor: CompressorConfig, objective: str, vantage: str) -> None:
    """Also through rank 1: the gradient of a linear layer for one image is of rank 1. No label is needed."""
    for image in images(3):
        attack = replace(ANALYTIC, objective=objective)  # type: ignore[arg-type]
        observation = observe(compressor, image, threat=Threat(vantage, labels="unknown"))  # type: ignore[arg-type]
        (found,) = invert([(observation, attack)])
        assert found.images.shape == (1, 1, 3, 8, 8)
        torch.testing.assert_close(found.images[0, 0], image, rtol=0, atol=2e-4)
        assert found.labels is None
        assert float(found.objective) < 1e-5


def test_part_of_the_entries_is_enough_for_who_knows_which() -> None:
    """Top-K sends some rows' share of each pixel: the decoded gradient's zeros mislead, what was sent is exact."""
    image = images(1)[0]
    observation = observe(TopKConfig(level=0.5), image)
    naive, aware = (invert([(observation, replace(ANALYTIC, objective=o))])[0].images[0, 0] for o in ("naive", "aware"))
    sent = observation.build_compressor().decode(observation.messages, "link")[0][0] != 0
    signal = observation.build_compressor().decode(observation.messages, "link")[0][1] != 0
    covered = (sent & signal[:, None]).any(0).view(3, 8, 8)
    assert 0.5 < float(covered.float().mean()) <= 1
    torch.testing.assert_close(aware[covered], image[covered], rtol=0, atol=1e-3)
    assert float((naive - image)[covered].abs().max()) > 0.01
    grey = observation.mean.view(-1, 1, 1).expand(3, 8, 8)
    torch.testing.assert_close(aware[~covered], grey[~covered])


def test_without_the_bias_there_is_no_image() -> None:
    observation = observe(DenseConfig(), images(1)[0])
    (message,) = observation.messages
    payload = message.sent[0].clone()
    payload[12 * PIXELS : 12 * PIXELS + 12] = 0
    silent = replace(observation, messages=(replace(message, sent=(payload,)),))
    (found,) = invert([(silent, ANALYTIC)])
    assert found.diverged == 1
    with pytest.raises(FloatingPointError):
        found.pick()


def test_where_it_does_not_apply() -> None:
    with pytest.raises(ValueError, match=r"^Expected a model whose first layer is linear, with bias"):
        invert([(seen()[0], ANALYTIC)])
    with pytest.raises(ValueError, match=r"^Expected batch_size=2 to be 1 for method='analytic', or one step"):
        invert([(seen(threat=Threat(batch_size=2))[0], ANALYTIC)])


def test_conjugate_gradient_solves_what_can_be_solved() -> None:
    a = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    a[:, 5] = 0  # nothing is known of this one
    right = a.T @ torch.randn(20, generator=torch.Generator().manual_seed(1))
    x, residual = conjugate_gradient(lambda v: a.T @ (a @ v), right)
    np.testing.assert_allclose(x, np.linalg.lstsq(a.T @ a, right, rcond=1e-5)[0], atol=1e-4)
    assert float(x[5]) == 0
    assert residual < 1e-6
    assert math.isnan(conjugate_gradient(lambda v: v, torch.zeros(3))[1])


def test_an_analytic_attack_runs_beside_others() -> None:
    image = images(1)[0]
    observation = observe(DenseConfig(), image)
    other = InversionConfig("naive", iterations=2, label_recovery="idlg")
    first, second, third = invert([(observation, other), (observation, ANALYTIC), (observation, other)])
    torch.testing.assert_close(second.images[0, 0], image, rtol=0, atol=2e-4)
    torch.testing.assert_close(first.images, third.images, rtol=0, atol=1e-5)  # rows of a batch, not bitwise on AVX2
