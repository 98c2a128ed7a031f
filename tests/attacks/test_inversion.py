from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toys import ssim, synthetic

from raytrust.attacks.inversion import (
    Candidates,
    GradientInversion,
    GradientMatcher,
    engine,
    invert,
    search,
    total_variation,
)
from raytrust.attacks.inversion.search import Found, Piece
from raytrust.config import (
    CaptureConfig,
    CompressorConfig,
    Defence,
    DenseConfig,
    InversionConfig,
    ModelConfig,
    PowerSGDConfig,
    Threat,
    TopKConfig,
    TrainConfig,
)
from raytrust.config.attacks import GEIPING
from raytrust.data import Dataset, load
from raytrust.leak import identity_view, view_of
from raytrust.leak.observation import Capture, Observation
from raytrust.networks.build import build_model
from raytrust.persample.matcher import Distance
from raytrust.persample.products import Product
from raytrust.studies.evaluate import evaluate_inversion
from raytrust.train.loop import train
from raytrust.train.private import private_batches
from raytrust.wire.channel import LocalChannel

VIVID = synthetic(vivid=True)
SHORT = InversionConfig("naive", tv=1e-2, iterations=12)
LONG = InversionConfig("naive", tv=1e-2, iterations=200)


@cache
def captures(
    compressor: CompressorConfig | None = None,
    threat: Threat | None = None,
    model: Literal["convnet", "resnet18"] = "convnet",
    error_feedback: bool = False,
    steps: tuple[int, ...] = (0,),
) -> tuple[Capture, ...]:
    """Four private batches of 8x8 images at each of the steps."""
    config = TrainConfig(
        defence=Defence(compressor or DenseConfig(), error_feedback),
        model=ModelConfig(model, width=16 if model == "convnet" else 2),
        threat=threat or Threat(),
        capture=CaptureConfig(steps, tuning=1, evaluation=3),
        workers=1,
        batch_size=8,
        steps=steps[-1] + 1,
    )
    return tuple(r for r in train(config, VIVID, LocalChannel()) if isinstance(r, Capture))


def seen(*args: Any, **kwargs: Any) -> list[Observation]:
    return [capture.seen for capture in captures(*args, **kwargs)]


def recompute(observation: Observation, attack: InversionConfig, images: Tensor) -> float:
    """The objective at one candidate batch, by the book: with autograd on a plain model."""
    mean, std = observation.mean.view(-1, 1, 1), observation.std.view(-1, 1, 1)
    x, model = (images - mean) / std, observation.build_model()
    assert observation.labels is not None
    loss = F.cross_entropy(model(x), observation.labels)
    grads = [g[None] for g in torch.autograd.grad(loss, list(model.parameters()))]
    compressor, vantage = observation.build_compressor(), observation.threat.vantage
    view = (
        view_of(compressor, observation.messages, vantage, observation.victim)
        if attack.objective == "aware"
        else identity_view(compressor.decode(observation.messages, vantage)[0])
    )
    return float(view.distance(grads)) + attack.tv * float(total_variation(x[None]))


# ---------------------------------------------------------------------------------------------------- engine


def watch(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Each point at which the engine asks for a gradient, as the model sees it."""
    visited: list[Tensor] = []

    class Watched(GradientMatcher):
        def __call__(self, x: Tensor, labels: Tensor, distance: Distance) -> tuple[Tensor, Tensor]:
            visited.append(x.detach().clone())
            return super().__call__(x, labels, distance)

    monkeypatch.setattr(search, "GradientMatcher", Watched)
    return visited


@pytest.mark.usefixtures("global_rng_untouched")
@pytest.mark.parametrize("objective", ["naive", "aware"])
def test_a_result_is_a_function_of_observation_and_config(objective: Literal["naive", "aware"]) -> None:
    attack = replace(SHORT, objective=objective, restarts=2)
    observation = seen(TopKConfig(level=0.05))[0]
    (first,), (again,) = (GradientInversion(attack).candidates([observation]) for _ in range(2))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.objective, again.objective)
    (other,) = GradientInversion(replace(attack, seed=1)).candidates([observation])
    assert not torch.equal(first.images, other.images)


def test_an_attack_leaves_the_observation_as_it_was() -> None:
    observation = seen(PowerSGDConfig(2), model="resnet18", threat=Threat(batch_norm="train", batch_size=2))[0]
    before = copy.deepcopy(observation)
    GradientInversion(SHORT).reconstruct(observation)
    for a, b in [
        (observation.weights, before.weights),
        (observation.buffers, before.buffers),
        (observation.compressor_state, before.compressor_state),
    ]:
        assert all(torch.equal(a[key], b[key]) for key in a)
    for m, n in zip(observation.messages, before.messages, strict=True):
        assert all(map(torch.equal, (*m.sent, *m.received), (*n.sent, *n.received)))


@pytest.mark.parametrize(("room", "batches"), [(100, [4]), (4, [1, 1, 2]), (2, [1, 1, 1, 1, 1, 1]), (1, [1] * 10)])
def test_batching_makes_no_difference(room: int, batches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Observations with settings of their own; the batches hold at most `room` restarts, of a job cut if need be."""
    settings = InversionConfig("naive", tv=1e-2, iterations=12, signed="none")  # the sign would magnify rounding
    attacks = [
        replace(settings, objective="aware", tv=0.3, restarts=3, seed=5),
        replace(settings, step_size=0.03, restarts=4),
        settings,
        replace(settings, signed="hard", iterations=12, step_size=0.01, restarts=2),
    ]
    jobs = list(zip(seen(TopKConfig(level=0.05)), attacks, strict=True))
    alone = [GradientInversion(attack).candidates([observation])[0] for observation, attack in jobs]
    sizes = []

    def counted(some: list[Piece], device: str) -> list[Found]:
        sizes.append(len(some))
        assert sum(len(piece.restarts) for piece in some) <= room
        return search.search(some, device)

    monkeypatch.setattr(engine, "search", counted)
    monkeypatch.setattr(engine, "MAX_GRADIENT_ENTRIES", room * sum(w.numel() for w in jobs[0][0].weights.values()))
    together = invert(jobs)
    assert sizes == batches
    for a, b, attack in zip(together, alone, attacks, strict=True):
        assert a.images.shape == (attack.restarts, 1, 3, 8, 8)
        torch.testing.assert_close(a.images, b.images, rtol=0, atol=2e-2 if attack.signed == "hard" else 1e-3)
        torch.testing.assert_close(a.objective, b.objective, rtol=0, atol=1e-3 if attack.signed == "hard" else 1e-4)


@pytest.mark.parametrize("size", [(3, 8, 8), (1, 9, 11)], ids=str)
def test_more_restarts_never_make_it_worse(size: tuple[int, int, int]) -> None:
    channels = size[0]
    observation = seen()[0]
    if size != observation.image_shape:  # an odd number of pixels
        model = build_model(ModelConfig("convnet", width=4), channels, 4, seed=0)
        grads = [torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) for p in model.parameters()]
        message = replace(observation.messages[0], sent=(torch.cat([g.flatten() for g in grads]),))
        observation = replace(
            observation,
            weights={name: p.detach() for name, p in model.named_parameters()},
            model=ModelConfig("convnet", width=4),
            image_shape=size,
            mean=torch.zeros(channels),
            std=torch.ones(channels),
            messages=(message,),
        )
    attack = replace(SHORT, signed="none")
    results = [GradientInversion(replace(attack, restarts=n)).candidates([observation])[0] for n in (1, 2, 4)]
    for fewer, more in pairwise(results):
        n = len(fewer.objective)
        torch.testing.assert_close(more.objective[:n], fewer.objective, rtol=0, atol=1e-4)  # the same starts, and more
        torch.testing.assert_close(more.images[:n], fewer.images, rtol=0, atol=1e-3)
        assert more.objective.min() <= fewer.objective.min() + 1e-4
    assert len({round(o, 6) for o in results[-1].objective.tolist()}) == 4


@pytest.mark.parametrize("signed", ["hard", "none", "soft"])
def test_candidates_stay_in_the_box_of_valid_pixels(
    signed: Literal["hard", "none", "soft"], monkeypatch: pytest.MonkeyPatch
) -> None:
    observation = seen()[0]
    visited = watch(monkeypatch)
    attack = replace(SHORT, step_size=3.0, restarts=2, signed=signed)
    (found,) = GradientInversion(attack).candidates([observation])
    assert len(visited) == attack.iterations + 1
    everything = torch.stack(visited) * observation.std.view(-1, 1, 1) + observation.mean.view(-1, 1, 1)
    assert -1e-5 < float(everything.min()) < 1e-5  # the steps are large enough to reach both ends
    assert 1 - 1e-5 < float(everything.max()) < 1 + 1e-5
    assert 0 <= float(found.images.min()) <= float(found.images.max()) <= 1


@pytest.mark.parametrize("batch_norm", ["eval", "train"])
@pytest.mark.parametrize("objective", ["naive", "aware"])
@pytest.mark.parametrize("compressor", [DenseConfig(), TopKConfig(level=0.05), PowerSGDConfig(1)], ids=repr)
def test_the_objective_is_that_of_the_images(
    compressor: CompressorConfig, objective: Literal["naive", "aware"], batch_norm: Literal["eval", "train"]
) -> None:
    attack = replace(SHORT, objective=objective, restarts=2)
    threat = Threat(batch_size=2, batch_norm=batch_norm)
    observations = seen(compressor, threat, "resnet18", error_feedback=True, steps=(0, 2))[4:6]
    for observation, found in zip(observations, GradientInversion(attack).candidates(observations), strict=True):
        assert found.images.shape == (2, 2, 3, 8, 8)
        for images, value in zip(found.images, found.objective.tolist(), strict=True):
            assert value == pytest.approx(recompute(observation, attack, images), abs=1e-4)
        assert found.matching is not None
        for images, value in zip(found.images, found.matching.tolist(), strict=True):
            assert value == pytest.approx(recompute(observation, replace(attack, tv=0.0), images), abs=1e-4)


def test_a_peer_attacks_what_the_collective_returned() -> None:
    for compressor in (DenseConfig(), TopKConfig(level=0.05), PowerSGDConfig(2)):
        for objective in ("naive", "aware"):
            attack = replace(SHORT, objective=objective)
            link, peer = (seen(compressor, Threat(v))[0] for v in ("link", "peer"))
            torch.testing.assert_close(
                GradientInversion(attack).reconstruct(peer), GradientInversion(attack).reconstruct(link)
            )


def test_the_naive_attack_of_a_peer_is_on_the_victim() -> None:
    """After an all-gather a peer can tell the workers apart."""
    own, other = seen(TopKConfig(level=0.05), Threat("peer"))[:2]
    attack = GradientInversion(SHORT)
    expected = attack.reconstruct(own)
    (a,), (b,) = own.messages, other.messages
    for victim, received in [(0, a.received + b.received), (1, b.received + a.received)]:
        both = replace(own, messages=(replace(a, received=received),), victim=victim, world_size=2)
        for objective in ("naive", "aware"):
            attack = GradientInversion(replace(SHORT, objective=objective))
            assert torch.equal(attack.reconstruct(both), attack.reconstruct(own))
    assert not torch.equal(attack.reconstruct(other), expected)


def test_the_best_iterate_is_kept_and_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    observation = seen()[0]
    mean, std = observation.mean.view(-1, 1, 1), observation.std.view(-1, 1, 1)
    visited = watch(monkeypatch)
    attack = replace(SHORT, step_size=3.0, iterations=4, schedule="constant")  # overshoots
    (found,) = GradientInversion(attack).candidates([observation])
    values = [recompute(observation, attack, (x[0] * std + mean).clamp(0, 1)) for x in visited]
    assert float(found.objective) == pytest.approx(min(values), abs=1e-4)
    assert min(values) < min(values[0], values[-1]) - 1e-3


def trajectory(attack: InversionConfig, force: float, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """How far the pixels that met no end of the box moved in each iteration, under a constant force down."""
    visited: list[Tensor] = []

    def slope(x: Tensor, labels: Tensor, distance: Distance) -> tuple[Tensor, Tensor]:
        visited.append(x.detach().clone())
        return force * x.detach().flatten(1).sum(1), torch.full_like(x, force)

    monkeypatch.setattr(search, "GradientMatcher", lambda *_: slope)
    GradientInversion(attack).reconstruct(seen()[0])
    x = torch.stack(visited).double()
    inside = (x[0] < visited[0].amax((0, 1, 3, 4), keepdim=True)) & (x[-1] > x[-1].amin((0, 1, 3, 4), keepdim=True))
    return (x[:-1] - x[1:])[:, inside]


def test_the_step_size_falls_by_ten_thrice(monkeypatch: pytest.MonkeyPatch) -> None:
    attack = replace(GEIPING, tv=0.0, step_size=0.01, iterations=16)  # the published schedule
    moved = trajectory(attack, 1.0, monkeypatch)
    expected = [0.01] * 6 + [0.001] * 4 + [0.0001] * 4 + [0.00001] * 2
    assert moved.median(1).values.tolist() == pytest.approx(expected, rel=0.02)


def test_signed_steps_do_not_depend_on_the_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    attack = InversionConfig("naive", tv=0.0, step_size=0.01, iterations=8)
    assert float(trajectory(attack, 1e-12, monkeypatch)[0].median()) == pytest.approx(0.01, rel=1e-3)
    assert float(trajectory(replace(attack, signed="none"), 1e-12, monkeypatch)[0].median()) < 1e-4


# ---------------------------------------------------------------------------------------- how well it works


def test_it_reconstructs_what_was_sent_whole() -> None:
    found = evaluate_inversion(captures(), LONG)
    start = evaluate_inversion(captures(), replace(LONG, step_size=1e-30, iterations=1))
    assert np.mean(start.ssim) < 0.1
    assert min(found.ssim) > 0.8
    assert np.mean(found.ssim) > 0.9
    assert max(np.divide(found.objective, start.objective)) < 0.15


def test_it_reconstructs_a_batch() -> None:
    found = evaluate_inversion(captures(threat=Threat(batch_size=2)), replace(LONG, iterations=300))
    assert len(found.ssim) == 8
    assert np.mean(found.ssim) > 0.5


@pytest.mark.parametrize("compressor", [TopKConfig(level=0.03), PowerSGDConfig(1)], ids=repr)
def test_knowing_the_compressor_helps(compressor: CompressorConfig) -> None:
    naive, aware = (evaluate_inversion(captures(compressor), replace(LONG, objective=o)) for o in ("naive", "aware"))
    assert np.mean(aware.ssim) > np.mean(naive.ssim) + 0.15


def test_without_a_compressor_the_two_objectives_are_one() -> None:
    naive, aware = (
        GradientInversion(replace(SHORT, objective=o, restarts=2)).candidates(seen()) for o in ("naive", "aware")
    )
    for a, b in zip(naive, aware, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.objective, b.objective)


def test_total_variation_smoothes() -> None:
    rough, smooth = (
        GradientInversion(replace(SHORT, iterations=60, tv=tv)).reconstruct(seen()[0]) for tv in (0.0, 1.0)
    )
    assert float(total_variation(smooth[None])) < 0.5 * float(total_variation(rough[None]))


# ----------------------------------------------------------------------------------------- what goes wrong


class Diverging:
    """A view whose distance, with its slope, is `value` times what it should be for some restarts."""

    def __init__(self, inner: Any, restarts: tuple[int, ...], value: float):
        self.inner, self.restarts, self.value = inner, restarts, value

    def distance(self, grads: list[Tensor]) -> Tensor:
        d = self.inner.distance(grads)
        self.all = max(len(d), getattr(self, "all", 0))
        factor = torch.ones_like(d)
        if len(d) == self.all:  # those that broke are not asked for ever
            factor[list(self.restarts)] = self.value
        return factor * d


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_restarts_that_diverge_are_dropped_and_counted(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    attack = replace(SHORT, restarts=4)
    (whole,) = GradientInversion(attack).candidates(seen()[:1])
    view = engine.target_view
    best = whole.pick()
    dropped = (best, (best + 2) % 4)
    monkeypatch.setattr(engine, "target_view", lambda *job: Diverging(view(*job), dropped, value))
    (found,) = GradientInversion(attack).candidates(seen()[:1])
    assert whole.diverged == 0
    assert found.diverged == 2
    assert [i for i in range(4) if torch.isinf(found.objective[i])] == sorted(dropped)
    assert found.pick() not in dropped
    assert torch.isfinite(found.images).all()
    rest = [i for i in range(4) if i not in dropped]
    torch.testing.assert_close(found.objective[rest], whole.objective[rest], rtol=0, atol=1e-3)
    result = evaluate_inversion(captures()[:1], attack)
    assert result.diverged == 2
    assert result.objective == [float(found.objective.min())]


def test_an_attack_that_diverged_altogether_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    view = engine.target_view
    monkeypatch.setattr(engine, "target_view", lambda *job: Diverging(view(*job), (0, 1), float("nan")))
    attack = replace(SHORT, restarts=2)
    for failing in (
        lambda: GradientInversion(attack).reconstruct(seen()[0]),
        lambda: evaluate_inversion(captures(), attack),
    ):
        with pytest.raises(FloatingPointError, match=r"^All 2 restarts of the attack diverged\.$"):
            failing()


def test_what_was_best_before_a_restart_diverged_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    visited, attack = watch(monkeypatch), replace(SHORT, signed="none")
    view = engine.target_view

    class Breaking(Diverging):
        def distance(self, grads: list[Tensor]) -> Tensor:
            return super().distance(grads) if len(visited) > 5 else self.inner.distance(grads)

    monkeypatch.setattr(engine, "target_view", lambda *job: Breaking(view(*job), (0,), float("nan")))
    (found,) = GradientInversion(attack).candidates(seen()[:1])
    assert 6 <= len(visited) < attack.iterations  # it ends once nothing is left
    assert (found.diverged, found.pick()) == (1, 0)
    assert torch.isfinite(found.images).all()
    assert float(found.objective) == pytest.approx(recompute(seen()[0], attack, found.images[0]), abs=1e-4)


@pytest.mark.parametrize("compressor", [None, PowerSGDConfig(rank=2), TopKConfig(level=0.01)], ids=str)
@pytest.mark.parametrize("objective", ["naive", "aware"])
def test_no_gradient_is_formed_where_its_factors_are_cheaper(
    objective: Literal["naive", "aware"], compressor: CompressorConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    formed: list[Product] = []
    form = Product.__dict__["dense"].func

    def watched(product: Product) -> Tensor:
        formed.append(product)
        gradients: Tensor = form(product)
        return gradients

    dense = cached_property(watched)
    dense.__set_name__(Product, "dense")
    monkeypatch.setattr(Product, "dense", dense)
    attack = replace(SHORT, objective=objective, iterations=2)
    invert([(s, attack) for s in seen(compressor, model="resnet18")[:3]])
    assert formed
    # The check of a first call forms those of its two candidates, to compare them with autograd's.
    assert not any(product.low_rank for product in formed if product.n > 2)


def test_observations_must_be_of_one_model() -> None:
    observation = seen(model="resnet18", threat=Threat(batch_size=2))[0]
    for other in (
        seen(model="resnet18", threat=Threat(batch_size=2), steps=(0, 1))[4],
        seen(threat=Threat(batch_size=2))[0],
        replace(observation, buffers={name: b + 1 for name, b in observation.buffers.items()}),
        replace(observation, threat=Threat(batch_size=2, batch_norm="train")),
        replace(observation, std=2 * observation.std),
    ):
        with pytest.raises(ValueError, match=r"^Expected all observations to be of one model at one step\.$"):
            GradientInversion(SHORT).candidates([observation, observation, other])


def test_jobs_of_unequal_programs_are_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    attacks = [
        SHORT,
        replace(SHORT, iterations=4),
        replace(SHORT, optimiser="lbfgs", step_size=1.0, signed="none"),
        replace(SHORT, tv=0.5),
    ]
    jobs = list(zip(seen(), attacks, strict=True))
    alone = [invert([job])[0] for job in jobs]
    batches = []

    def counted(some: list[Piece], device: str) -> list[Found]:
        batches.append([piece.job for piece in some])
        return search.search(some, device)

    monkeypatch.setattr(engine, "search", counted)
    together = invert(jobs)
    assert batches == [[0, 3], [1], [2]]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.objective, b.objective, rtol=0, atol=1e-3)


def test_the_pick_is_the_least_objective() -> None:
    found = Candidates(torch.zeros(4, 1, 1, 2, 2), torch.tensor([0.5, float("inf"), 0.1, 0.2]))
    assert (found.pick(), found.diverged) == (2, 1)
    broken = torch.tensor([False, True, True, False])  # the best of one that broke later is still the attacker's
    assert (replace(found, broken=broken).pick(), replace(found, broken=broken).diverged) == (2, 2)


def test_nothing_to_do() -> None:
    assert invert([]) == []


# ------------------------------------------------------------------------------------------- the real thing


def captures_of(images: Tensor, labels: Tensor, data: Dataset, model: ModelConfig) -> list[Capture]:
    """Of the untrained network, uncompressed, one image each; in the order of `images` (uint8)."""
    private = Dataset(data.name, images, labels, data.test_images[:1], data.test_labels[:1], data.classes)
    object.__setattr__(private, "_moments", (data.mean, data.std))  # normalised as the data set is
    config = TrainConfig(
        model=model, capture=CaptureConfig(tuning=1, evaluation=len(images) - 1), workers=1, batch_size=1, steps=1
    )
    records = train(config, private, LocalChannel())
    found = [next(records) for _ in images]
    order = private_batches(config, len(images)).flatten().argsort()
    return [capture for i in order if isinstance(capture := found[i], Capture)]


def test_captures_of_given_images_come_in_their_order() -> None:
    found = captures_of(VIVID.test_images[:5], VIVID.test_labels[:5], VIVID, ModelConfig("convnet", width=2))
    truth = torch.cat([c.truth.images for c in found])
    assert torch.equal(truth, VIVID.test_images[:5].float() / 255)
    assert torch.equal(torch.cat([c.truth.labels for c in found]), VIVID.test_labels[:5])
    assert torch.equal(found[0].seen.mean, VIVID.mean)
    assert torch.equal(found[0].seen.std, VIVID.std)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_resnet18_on_cifar10(shared_data: Path) -> None:
    """The published attack on the full network gives the published figure: 0.74 over ten images, by another program."""
    data = load(str(shared_data / "cifar10.npz"))
    found = captures_of(data.test_images[:5], data.test_labels[:5], data, ModelConfig("resnet18", width=64))
    attack = InversionConfig("naive", tv=1e-2, step_size=0.1, iterations=400, restarts=1)
    result = evaluate_inversion(found, attack)
    assert [ssim(a.numpy(), b.numpy()) for a, b in zip(result.reconstructions, result.originals, strict=True)] == (
        pytest.approx(result.ssim)
    )
    assert np.mean(result.ssim) >= 0.65
