"""DP-SGD: each image's gradient clipped, noise of the right size, and what that guarantees."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrust.config import CaptureConfig, DPSGDConfig, LocalConfig, ModelConfig, Threat, TrainConfig, parse_defence
from raytrust.data import Dataset
from raytrust.leak.transformed import noise_variance
from raytrust.metrics.accountant import epsilon
from raytrust.networks.build import build_model
from raytrust.studies.frontier.jobs import guarantee
from raytrust.train.clipped import ClippedGradients
from raytrust.train.loop import Evaluation, Step, _batches, train
from raytrust.wire.channel import LocalChannel

MODELS = [
    ModelConfig("convnet", width=4),
    ModelConfig(width=4, norm="group"),
    ModelConfig("resnet20", width=8, norm="group"),
]


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((n, 3, 8, 8), generator=generator), torch.randint(4, (n,), generator=generator)


def one_by_one(model: nn.Module, x: Tensor, y: Tensor, clip: float) -> list[Tensor]:
    """The sum of clipped gradients, by plain autograd."""
    total = [torch.zeros_like(p) for p in model.parameters()]
    for i in range(len(x)):
        grads = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        norm = torch.cat([g.flatten() for g in grads]).norm()
        for t, g in zip(total, grads, strict=True):
            t += g * min(1.0, clip / float(norm))
    return total


@pytest.mark.parametrize("config", MODELS, ids=lambda c: c.title)
@pytest.mark.parametrize("clip", [0.05, 1.0, 1e3])
def test_it_is_the_sum_of_the_images_clipped_gradients(config: ModelConfig, clip: float) -> None:
    model = build_model(config, 3, 4, seed=0).train()
    x, y = batch()
    gradient = ClippedGradients(model, DPSGDConfig(noise=1e-12, clip=clip), seed=0)
    for step in range(2):
        loss, found = gradient(x, y, step, expected=3)
        assert float(loss) == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-5)
        for a, b in zip(found, one_by_one(model, x, y, clip), strict=True):
            torch.testing.assert_close(a, b / 3, rtol=1e-3, atol=1e-6)
        # Training goes on with other weights, which the norms must be of.
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.3)


def test_one_image_changes_the_sum_by_no_more_than_the_clip() -> None:
    model, (x, y), clip = build_model(MODELS[0], 3, 4, seed=0), batch(), 0.1
    gradient = ClippedGradients(model, DPSGDConfig(noise=1e-12, clip=clip), seed=0)
    whole, without = (torch.cat([g.flatten() for g in gradient(x[k:], y[k:], 0, expected=1)[1]]) for k in (0, 1))
    assert 0.99 * clip < float((whole - without).norm()) < 1.001 * clip


def test_noise_is_of_the_sum_and_divided_with_it() -> None:
    """By a z-test that would fail once in a thousand times; of no image, too, as a Poisson sample may have none."""
    model = build_model(ModelConfig("convnet", width=32), 3, 4, seed=0)
    x, y = batch()
    noise, clip, expected = 0.7, 0.3, 8
    gradient = ClippedGradients(model, DPSGDConfig(noise, clip), seed=0)
    exact = ClippedGradients(model, DPSGDConfig(1e-12, clip), seed=0)
    clean = torch.cat([g.flatten() for g in exact(x, y, 0, expected=expected)[1]])
    for images, sent in ((x, clean), (x[:0], 0 * clean)):
        loss, grads = gradient(images, y[: len(images)], 0, expected=expected)
        drawn = torch.cat([g.flatten() for g in grads]) - sent
        n = len(drawn)
        assert n > 10_000
        assert abs(float(drawn.mean())) < 3.3 * noise * clip / expected / math.sqrt(n)
        assert abs(float(drawn.var()) / (noise * clip / expected) ** 2 - 1) < 3.3 * math.sqrt(2 / n)
    assert float(loss) == 0
    draws = [gradient(x, y, *key)[1][0].flatten()[0].item() for key in ((0, 0), (1, 0), (0, 1), (0, 0, 0), (0, 0, 1))]
    assert len(set(draws)) == len(draws)


def test_local_steps_are_clipped_image_by_image_with_noise_in_each() -> None:
    """Steps by hand; then a z-test of the noise, at a rate at which steps don't move, that fails once in a thousand."""
    model, (x, y), clip, rate = build_model(MODELS[0], 3, 4, seed=0), batch(), 0.1, 0.5
    for local in (LocalConfig(3, rate), LocalConfig(3, rate, batch_size=2)):
        gradient = ClippedGradients(model, DPSGDConfig(1e-12, clip), seed=0, local=local)
        _, found = gradient(x, y, 0)
        by_hand = copy.deepcopy(model)
        for rows in local.rows(len(x)):
            some = x[rows]
            slopes = one_by_one(by_hand, some, y[rows], clip)
            with torch.no_grad():
                for p, g in zip(by_hand.parameters(), slopes, strict=True):
                    p.sub_(rate * g / len(some))
        for a, before, after in zip(found, model.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(a, (before - after).detach() / (3 * rate), rtol=1e-3, atol=1e-6)
    noise, still = 0.7, LocalConfig(4, 1e-12)
    sent, clean = (
        torch.cat([g.flatten() for g in ClippedGradients(model, DPSGDConfig(n, clip), 0, local=still)(x, y, 0)[1]])
        for n in (noise, 1e-12)
    )
    variance, n = (noise * clip / len(x)) ** 2 / 4, len(sent)
    assert abs(float((sent - clean).var()) / variance - 1) < 3.3 * math.sqrt(2 / n)
    assert noise_variance([DPSGDConfig(noise, clip)], len(x), local=still) == pytest.approx(variance)


def test_local_steps_spend_what_less_noise_would(data: Dataset) -> None:
    one, four = (
        replace(
            TrainConfig(parse_defence(f"dp-sgd:{noise}"), MODELS[0], workers=1, batch_size=16, steps=2),
            local=LocalConfig(steps),
        )
        for noise, steps in ((1, 1), (2, 4))
    )
    assert guarantee(four, 200) == guarantee(one, 200)
    assert any(isinstance(r, Step) for r in train(four, data, LocalChannel()))
    with pytest.raises(ValueError, match="local_batch_size=4 to be left out with dp-sgd"):
        replace(four, local=LocalConfig(4, batch_size=4))


def test_batches_are_poisson_samples() -> None:
    config = TrainConfig(parse_defence("dp-sgd:1"), MODELS[0], workers=1, batch_size=10, steps=1)
    batches = _batches(config, 200, LocalChannel())
    drawn = [next(batches) for _ in range(400)]
    sizes = torch.tensor([len(b) for b in drawn], dtype=torch.float64)
    rate = 10 / 200
    assert abs(float(sizes.mean()) - 10) < 3.3 * math.sqrt(200 * rate * (1 - rate) / 400)
    assert 0.7 < float(sizes.var()) / (200 * rate * (1 - rate)) < 1.3
    counts = torch.bincount(torch.cat(drawn), minlength=200).double()
    assert float((counts - 400 * rate).abs().max()) < 5 * math.sqrt(400 * rate)
    assert all(len(set(b.tolist())) == len(b) for b in drawn)


def test_training_learns_and_captures_what_it_sends(data: Dataset) -> None:
    defence = parse_defence("dp-sgd:0.01:clip=1+powersgd:2:ef")
    config = TrainConfig(
        defence, MODELS[0], Threat(batch_size=2), CaptureConfig((0,), 1, 1), workers=1, batch_size=16, steps=30
    )
    records = list(train(config, data, LocalChannel()))
    steps = [r.loss for r in records if isinstance(r, Step)]
    assert sum(steps[-5:]) < sum(steps[:5])
    assert any(isinstance(r, Evaluation) for r in records)
    again = [r.loss for r in train(config, data, LocalChannel()) if isinstance(r, Step)]
    assert again == steps


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 4)),
            "batch norm",
        ),
        (nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(192, 4)), "dropout"),
        (
            nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True), nn.Flatten(), nn.Linear(192, 4)),
            "running statistics",
        ),
    ],
)
def test_what_has_no_gradient_of_an_image_is_refused(model: nn.Module, message: str) -> None:
    gradient = ClippedGradients(model.train(), DPSGDConfig(), seed=0)
    with pytest.raises(ValueError, match=f"^Expected a model without {message}.* for dp-sgd"):
        gradient(*batch(), 0)
    model.eval()
    gradient(*batch(), 0)


class Centred(nn.Module):
    """Takes the mean over the batch away, which no type of a module tells."""

    def __init__(self, drops: bool = False) -> None:
        super().__init__()
        self.inner, self.outer, self.drops = nn.Linear(192, 16), nn.Linear(16, 4), drops

    def forward(self, x: Tensor) -> Tensor:
        features = self.inner(x.flatten(1))
        features = F.dropout(features, 0.5) if self.drops else features - features.mean(0)
        return self.outer(features.relu())


@pytest.mark.parametrize("drops", [False, True])
def test_a_model_that_mixes_images_is_refused_whatever_it_is_made_of(drops: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gradient = ClippedGradients(Centred(drops), DPSGDConfig(), seed=0)
    message = "that draws nothing" if drops else "in which no image has a part in the loss of another"
    before = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=f"^Expected a model for dp-sgd {message}"):
        gradient(*batch(), 0)
    assert torch.equal(torch.random.get_rng_state(), before)


class Added(nn.Module):
    """Two parameters whose gradients are one tensor to autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = (nn.Parameter(torch.full((4, 192), 0.01)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ (self.one + self.other).T


def test_parameters_that_share_a_gradient_have_noise_of_their_own() -> None:
    x, y = batch()
    one, other = ClippedGradients(Added(), DPSGDConfig(1e-12, 1e3), seed=0)(x, y, 0)[1]
    expected = torch.autograd.grad(F.cross_entropy((model := Added())(x), y), list(model.parameters()))
    torch.testing.assert_close(one, expected[0])
    torch.testing.assert_close(other, expected[1])
    one, other = ClippedGradients(Added(), DPSGDConfig(1.0, 1e3), seed=0)(x, y, 0)[1]
    assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.15


@pytest.mark.parametrize(
    ("noise", "rate", "releases"),
    [(1.0, 0.02, 200), (0.5, 0.1, 100), (2.0, 0.5, 300), (1.1, 0.01, 5000), (4.0, 1.0, 7)],
)
def test_epsilon_is_opacus_s(noise: float, rate: float, releases: int) -> None:
    accountants = pytest.importorskip("opacus.accountants")
    accountant = accountants.RDPAccountant()
    accountant.history = [(noise, rate, releases)]
    assert epsilon(noise, rate, releases, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-6)


@pytest.mark.parametrize(
    ("noise", "rate", "releases", "expected"),
    [(1.0, 0.02, 200, 2.229833), (0.5, 0.1, 100, 35.225384), (4.0, 1.0, 0, 0)],
)
def test_epsilon(noise: float, rate: float, releases: int, expected: float) -> None:
    """The values of Opacus 1.5, where it is not installed."""
    assert epsilon(noise, rate, releases, 1e-5) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("noise", [1e-6, 1e-3, 0.099, 1e7, 1e200])
def test_epsilon_of_any_noise_takes_no_time_and_is_no_less_than_that_of_more(noise: float) -> None:
    assert 0 < epsilon(noise * 1.1, 0.01, 100) <= epsilon(noise, 0.01, 100) < math.inf


def test_epsilon_refuses() -> None:
    arguments: dict[str, Any] = {"noise": 1.0, "rate": 0.1, "releases": 3}
    for name, value in (("noise", 0.0), ("rate", 1.5), ("releases", -1), ("delta", 1.0)):
        with pytest.raises(ValueError, match=f"^Expected {name}="):
            epsilon(**arguments | {name: value})
