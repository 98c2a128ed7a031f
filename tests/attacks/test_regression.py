from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from toys import synthetic

from raytrust.attacks.inversion import GradientInversion, engine, invert
from raytrust.attacks.inversion.denoiser import Denoiser, denoised, train_denoiser
from raytrust.attacks.inversion.further import DENOISED, further_attacks, with_auxiliary
from raytrust.attacks.inversion.regression import _features_sent, _Fit, _fitted, fit_regression, regressed_images
from raytrust.attacks.inversion.search import Found, Piece
from raytrust.config import (
    CaptureConfig,
    Defence,
    InversionConfig,
    LocalConfig,
    ModelConfig,
    Threat,
    TrainConfig,
    parse_defence,
)
from raytrust.config.attacks import ANALYTIC, REGRESSION, published_attacks
from raytrust.data import load
from raytrust.leak.observation import Capture, Observation
from raytrust.networks.build import build_model
from raytrust.networks.classifier import final_linear
from raytrust.networks.task import Sample, Task
from raytrust.studies.evaluate import InversionResult, evaluate_inversions
from raytrust.train.loop import train
from raytrust.wire.channel import LocalChannel

GRANTED = Threat(auxiliary=40)
SHORT = InversionConfig(iterations=3)


@cache
def captures(defence: str = "none", threat: Threat = GRANTED, steps: tuple[int, ...] = (0,)) -> tuple[Capture, ...]:
    """Two private batches at each step, of 64 images of 8x8 in 4 classes."""
    config = TrainConfig(
        defence=parse_defence(defence),
        model=ModelConfig("convnet", width=8),
        threat=threat,
        capture=CaptureConfig(steps, tuning=1, evaluation=1),
        workers=1,
        batch_size=8,
        steps=steps[-1] + 1,
    )
    found = train(config, synthetic(vivid=True), LocalChannel())
    return tuple(record for record in found if isinstance(record, Capture))


def features(capture: Capture) -> Tensor:
    """What the private batch puts into the last linear layer, by a hook on the true images."""
    model, seen = capture.seen.build_model(), capture.seen
    _, layer = final_linear(model, seen.image_shape, seen.classes)
    caught: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].detach()))
    model((capture.truth.images - seen.mean.view(-1, 1, 1)) / seen.std.view(-1, 1, 1))
    return caught[0]


def sent(seen: Observation) -> Tensor:
    return _features_sent(seen, torch.zeros(len(features(Capture(0, seen, captures()[0].truth))[0])), "cpu")


@pytest.mark.parametrize("defence", ["none", "powersgd:1", "powersgd:4:ef"])
def test_one_image_gives_its_features_away_exactly(defence: str) -> None:
    capture = captures(defence)[0]
    torch.testing.assert_close(sent(capture.seen), features(capture), rtol=1e-3, atol=1e-5)


def test_most_of_the_features_pass_topk() -> None:
    capture = captures("topk:0.1")[0]
    assert float(torch.cosine_similarity(sent(capture.seen), features(capture))[0]) > 0.9


@pytest.mark.parametrize("step", [0, 3])
def test_features_of_a_batch_with_different_labels_are_found_with_their_probabilities(step: int) -> None:
    captured = captures("none", Threat(auxiliary=20, batch_size=3), (0, 3))
    batch = next(
        c for c in captured
        if c.seen.step == step and c.seen.labels is not None and len(c.seen.labels.unique()) == 3
    )  # fmt: skip
    truth = features(batch)
    typical = truth.mean(0) * 0
    torch.testing.assert_close(_features_sent(batch.seen, typical, "cpu"), truth, rtol=1e-2, atol=1e-3)


def test_the_regression_is_a_ridge_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 10, generator=generator) * torch.arange(1, 11) + 3
    y = (x @ torch.randn(10, 5, generator=generator) / 50 + 0.5 + 0.2 * torch.randn(60, 5, generator=generator)).clamp(
        0, 1
    )
    fitted = fit_regression(x, y)
    a = (x - x.mean(0)) / x.std(0)
    mean_square = float(a.double().square().sum()) / 10
    candidates = [Ridge(alpha=10.0**k * mean_square).fit(a, y).coef_.T for k in range(-6, 3)]
    nearest = min(float((fitted.weight - torch.tensor(c)).abs().max()) for c in candidates)
    assert nearest < 1e-5
    assert float(fitted.weight.abs().max()) > 0.01


def test_what_the_regression_leaves_unexplained_is_what_it_leaves_on_others() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2000, 20, generator=generator)
    y = 0.5 + 0.05 * x @ torch.randn(20, 8, generator=generator) / 20**0.5
    y = (y + 0.05 * torch.randn(y.shape, generator=generator)).clamp(0, 1)
    fitted = fit_regression(x[:100], y[:100])
    left = float((fitted(x[100:]) - y[100:]).square().mean() / y[:100].var(0).mean())
    assert fitted.unexplained == pytest.approx(left, rel=0.15)


def test_images_that_are_linear_in_the_features_come_out() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(50, 6, generator=generator)
    y = x @ torch.rand(6, 12, generator=generator) / 6
    torch.testing.assert_close(fit_regression(x[:40], y[:40])(x[40:]), y[40:], rtol=1e-3, atol=1e-4)


def test_it_beats_the_mean_image_and_needs_no_iterations() -> None:
    references = torch.rand(3, 3, 8, 8)
    (result,) = evaluate_inversions(captures(), [REGRESSION], references=references)
    mean = captures()[0].seen.auxiliary.mean(0)  # type: ignore[union-attr]
    by_mean = [float((mean - image).square().mean()) for capture in captures() for image in capture.truth.images]
    assert isinstance(result, InversionResult)
    assert sum(result.mse) < 0.95 * sum(by_mean)
    assert 0 < result.objective[0] < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auxiliary": None}, "Expected auxiliary=40 to be at least 2 images for a regression"),
        ({"local": LocalConfig(3)}, "Expected local_steps=3 to be 1 for a regression"),
        ({"task": Task(nn.functional.mse_loss)}, "Expected the loss to be the cross-entropy"),
        ({"targets": Sample(torch.zeros(1), {"age": torch.zeros(1)})}, "Expected the loss to be the cross-entropy"),
        ({"threat": Threat(batch_size=4, auxiliary=40)}, "Expected batch_size=4 to be less than classes=4"),
    ],
)
def test_it_refuses_what_the_gradient_does_not_determine(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        regressed_images(replace(captures()[0].seen, **change))


def test_the_first_restart_begins_where_the_regression_ends() -> None:
    seen = captures()[0].seen
    standing = InversionConfig(iterations=1, step_size=1e-9, restarts=2, tv=0.0, start="regression")
    (found,) = invert([(seen, standing)])
    images, _ = regressed_images(seen)
    torch.testing.assert_close(found.images[0], images, rtol=0, atol=1e-5)
    # The other restart keeps its noise, which is that of an attack without a start.
    (noise,) = invert([(seen, replace(standing, start="noise"))])
    torch.testing.assert_close(found.images[1], noise.images[1])
    assert not torch.allclose(found.images[0], noise.images[0], atol=1e-2)


def test_what_differs_in_the_end_alone_is_searched_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run, pieces = engine.search, []

    def counted(batch: Sequence[Piece], device: str) -> list[Found]:
        pieces.extend(batch)
        return run(batch, device)

    monkeypatch.setattr(engine, "search", counted)
    seen = [c.seen for c in captures()]
    plain, cleaned, again = invert([(seen[0], SHORT), (seen[0], replace(SHORT, denoise=0.3)), (seen[1], SHORT)])
    assert len(pieces) == 2
    assert not torch.allclose(plain.images, cleaned.images, atol=1e-3)
    torch.testing.assert_close(plain.objective, cleaned.objective)
    assert seen[0].auxiliary is not None
    expected = denoised(plain.images.flatten(0, 1), seen[0].auxiliary, 0.3).view(plain.images.shape)
    torch.testing.assert_close(cleaned.images, expected)
    torch.testing.assert_close(again.images, invert([(seen[1], SHORT)])[0].images)


def test_without_images_of_its_own_an_attacker_can_t_denoise() -> None:
    seen = replace(captures()[0].seen, auxiliary=None)
    with pytest.raises(ValueError, match=r"^Expected denoise=0\.1 to be 0: the threat grants no auxiliary images\.$"):
        GradientInversion(replace(SHORT, denoise=0.1)).reconstruct(seen)


def test_denoising_brings_images_nearer_to_what_they_were() -> None:
    data = load("digits")
    own, others = data.train_images[:400].float() / 255, data.test_images[:50].float() / 255
    state = torch.random.get_rng_state()
    network = train_denoiser(own, steps=150)
    assert torch.equal(state, torch.random.get_rng_state())
    noise = torch.randn(others.shape, generator=torch.Generator().manual_seed(0))
    for deviation in (0.1, 0.3):
        noisy = others + deviation * noise
        cleaned = network(noisy, torch.full((50,), deviation))
        assert float((cleaned - others).square().mean()) < 0.6 * float((noisy - others).square().mean())
    odd = network(torch.rand(2, 1, 9, 7), torch.full((2,), 0.1))
    assert odd.shape == (2, 1, 9, 7)
    again = train_denoiser(own, steps=3)(others, torch.full((50,), 0.1))
    torch.testing.assert_close(again, train_denoiser(own, steps=3)(others, torch.full((50,), 0.1)), rtol=0, atol=0)


def test_a_denoiser_of_large_images_is_trained_on_parts_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    forward = Denoiser.forward

    def recorded(self: Denoiser, x: Tensor, deviation: Tensor) -> Tensor:
        shapes.append(tuple(x.shape[1:]))
        return forward(self, x, deviation)

    monkeypatch.setattr(Denoiser, "forward", recorded)
    for size in ((200, 20), (48, 48)):
        train_denoiser(torch.rand(4, 1, *size), steps=1)
    assert shapes == [(1, 48, 20), (1, 48, 48)]


def test_attacks_from_auxiliary_images_are_tried_where_the_threat_grants_them() -> None:
    network = build_model(ModelConfig("convnet", width=4), 3, 4, seed=0)
    attacks = [InversionConfig(o, matching=m) for o in ("naive", "aware") for m in ("cosine", "tensors")]  # type: ignore[arg-type]
    shape = (3, 8, 8)
    assert further_attacks(attacks, Threat(), network, shape) == ()
    found = further_attacks(attacks, GRANTED, network, shape)
    assert found[0].method == "regression"
    assert [(a.objective, a.matching, a.start, a.denoise) for a in found[1:]] == [
        ("naive", "cosine", "regression", 0.0), ("aware", "cosine", "regression", 0.0),
        ("naive", "cosine", "regression", DENOISED), ("aware", "cosine", "regression", DENOISED),
    ]  # fmt: skip
    assert further_attacks(attacks, replace(GRANTED, batch_size=4), network, shape) == ()
    assert further_attacks(attacks, replace(GRANTED, batch_size=3), network, shape) != ()
    assert further_attacks(attacks, GRANTED, network, shape, LocalConfig(2)) == ()
    assert further_attacks(attacks, GRANTED, network, shape, task=Task(nn.functional.mse_loss)) == ()
    assert further_attacks([*attacks, *found], GRANTED, network, shape) == ()
    solvable = nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.ReLU(), nn.Linear(12, 4))
    solving = further_attacks(attacks, Threat(), solvable, shape)
    assert [(a.method, a.objective) for a in solving] == [("analytic", "naive"), ("analytic", "aware")]


def test_a_regression_is_one_attack_under_every_defence() -> None:
    asked = [replace(REGRESSION, tv=0.3, objective=o) for o in ("naive", "aware")]  # type: ignore[arg-type]
    for defence in (Defence(), parse_defence("topk:0.1:ef"), parse_defence("signsgd")):
        assert {attack.against(defence) for attack in asked} == {REGRESSION}
    assert "start=regression" in with_auxiliary([SHORT])[1].name
    assert ANALYTIC.against(Defence()) == ANALYTIC


@pytest.mark.parametrize("images", [30, 60, 65])
def test_with_fewer_images_than_features_it_neither_memorises_nor_claims_to_know(images: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images + 500, 64, generator=generator)
    y = 0.5 + 0.05 * x @ torch.randn(64, 8, generator=generator) / 8 + 0.1 * torch.randn(len(x), 8, generator=generator)
    fitted = fit_regression(x[:images], y[:images])
    left = float((fitted(x[images:]) - y[images:]).square().mean() / y[images:].var(0).mean())
    assert left < 1.15
    assert fitted.unexplained == pytest.approx(left, rel=0.2)


def test_features_that_never_vary_explain_nothing() -> None:
    fitted = fit_regression(torch.zeros(20, 5), torch.rand(20, 6, generator=torch.Generator().manual_seed(0)))
    assert fitted.unexplained >= 1
    assert not bool(fitted.weight.any())


def in_memory(*layers: nn.Module) -> Observation:
    """An observation of a module that no config describes."""
    network = nn.Sequential(*layers).eval()
    weights = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
    return replace(captures()[0].seen, network=network, model=None, weights=weights, buffers={})


def test_equal_weights_of_another_network_or_normalisation_have_a_regression_of_their_own() -> None:
    hidden, classifier = nn.Linear(192, 30), nn.Linear(30, 4)
    seen = in_memory(nn.Flatten(), hidden, nn.ReLU(), classifier)
    others = [in_memory(nn.Flatten(), hidden, nn.Tanh(), classifier), replace(seen, std=3 * seen.std)]
    fitted = _fitted(_Fit(seen, "cpu"))
    assert _fitted(_Fit(replace(seen), "cpu")) is fitted
    for other in others:
        assert not torch.allclose(_fitted(_Fit(other, "cpu")).centre, fitted.centre)


@pytest.mark.parametrize("defence", ["none", "mixup:2"])
@pytest.mark.parametrize("known", ["known", "unknown"])
def test_it_begins_attacks_on_mixed_images_and_those_that_look_for_labels_themselves(defence: str, known: str) -> None:
    captured = captures(defence, Threat(auxiliary=40, batch_size=2, labels=known))  # type: ignore[arg-type]
    begun = replace(SHORT, start="regression")
    attacks = [REGRESSION, begun, replace(begun, label_recovery="joint", objective="naive")]
    for attack in attacks:
        assert all(isinstance(result, InversionResult) for result in evaluate_inversions(captured, [attack]))


class PerPlace(nn.Module):
    """Its classifier is applied at each place of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.classifier = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.patches(x).flatten(2).transpose(1, 2).tanh()).mean(1)


def test_networks_whose_features_are_not_sent_are_refused_and_meet_no_regression() -> None:
    frozen = in_memory(nn.Flatten(), nn.Linear(192, 30), nn.ReLU(), nn.Linear(30, 4).requires_grad_(False))
    for seen, message in ((frozen, "it is frozen or derived"), (in_memory(PerPlace()), "one vector an image")):
        with pytest.raises(ValueError, match=message):
            regressed_images(seen)
        assert seen.network is not None
        found = further_attacks([SHORT], GRANTED, seen.network, seen.image_shape)
        assert not any(attack.learns for attack in found)


def test_to_look_for_further_attacks_leaves_the_network_and_the_random_numbers_as_they_are() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 4))
    buffers, state = [b.clone() for b in network.train().buffers()], torch.random.get_rng_state()
    assert len(further_attacks([SHORT], GRANTED, network, (3, 8, 8))) > 0
    assert all(torch.equal(a, b) for a, b in zip(buffers, network.buffers(), strict=True))
    assert torch.equal(state, torch.random.get_rng_state())


def test_published_attacks_run_together_where_labels_are_unknown() -> None:
    """DLG finds the label with the image, the others before it."""
    seen = captures("none", Threat(labels="unknown"))[0].seen
    attacks = [replace(a, iterations=2) for a in published_attacks(seen.threat)]
    assert [a.label_recovery for a in attacks] == ["counts", "counts", "joint", "bias_sign", "idlg"]
    for found, attack in zip(invert([(seen, a) for a in attacks]), attacks, strict=True):
        assert found.images.shape == (attack.restarts, 1, 3, 8, 8)
        assert bool(found.objective.isfinite().all())
