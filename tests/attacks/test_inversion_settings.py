"""The attacks of the field as settings of the engine: distances, priors, optimisers, schedules and the presets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from test_inversion import SHORT, captures, seen
from torch import Tensor, nn

from raytrust.attacks.inversion import GradientInversion, engine, invert, search
from raytrust.attacks.inversion.objectives import l1, l2, matching_distance, target_view
from raytrust.attacks.inversion.optimisers import LBFGS, Adam, signs, step_sizes
from raytrust.attacks.inversion.priors import (
    BatchNormPrior,
    group_spread,
    known_statistics,
    mean_square,
    total_colour,
    total_variation,
)
from raytrust.config import (
    AtomoConfig,
    CompressorConfig,
    DenseConfig,
    InversionConfig,
    PowerSGDConfig,
    QSGDConfig,
    ScaledSignConfig,
    SignSGDConfig,
    Threat,
    TopKConfig,
    VqSGDConfig,
)
from raytrust.config.attacks import DLG, GEIPING, GRAD_INVERSION, IDLG, MODERN
from raytrust.leak import LinearView, SparseView, identity_view
from raytrust.leak.observation import decoded
from raytrust.leak.views import SignView, TensorwiseView
from raytrust.studies.evaluate import evaluate_inversion

UNKNOWN = Threat(labels="unknown")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- distances


@pytest.mark.parametrize("power", [1, 2])
def test_relative_distances_by_the_book(power: int) -> None:
    observed, grads = [noise(3, 2, seed=1), noise(5, seed=2)], [noise(4, 3, 2, seed=3), noise(4, 5, seed=4)]
    distance = {1: l1, 2: l2}[power]
    found = distance(grads, observed)
    norm = sum(float(o.abs().pow(power).sum()) for o in observed)
    for i in range(4):
        apart = sum(float((g[i] - o).abs().pow(power).sum()) for g, o in zip(grads, observed, strict=True))
        assert float(found[i]) == pytest.approx(apart / norm, rel=1e-5)
    assert float(distance([o[None] for o in observed], observed)) == 0
    blank = [torch.zeros_like(o) for o in observed]
    assert torch.isfinite(distance(grads, blank)).all()


@pytest.mark.parametrize("matching", ["cosine", "tensors", "l2", "l1"])
@pytest.mark.parametrize("compressor", [TopKConfig(level=0.05), PowerSGDConfig(1)], ids=repr)
def test_an_aware_distance_is_least_at_the_true_gradient(
    compressor: CompressorConfig, matching: Literal["cosine", "tensors", "l2", "l1"]
) -> None:
    observation = seen(compressor)[0]
    true = [g[None] for g in decoded(seen()[0]).gradient]  # the same batch, uncompressed
    for objective in ("aware", "naive"):
        config = replace(SHORT, objective=objective, matching=matching)
        value = float(matching_distance(target_view(observation, config), config)(true))
        assert value == pytest.approx(0, abs=1e-5) if objective == "aware" else value > 0.01


def test_each_tensor_s_cosine_weighs_as_many_as_it_has_entries() -> None:
    view = identity_view([torch.tensor([3.0, 0.0]), torch.zeros(0), torch.tensor([1.0, 1.0, 1.0])])
    distance = matching_distance(view, replace(SHORT, matching="tensors"))
    g = [torch.tensor([[9.0, 0.0], [3.0, 4.0]]), torch.zeros(2, 0), torch.tensor([[1.0, 1.0, 1.0], [-1.0, 0.0, 1.0]])]
    torch.testing.assert_close(distance(g), torch.tensor([0.0, 2 / 5 * (1 - 3 / 5) + 3 / 5]))


@pytest.mark.parametrize(
    ("compressor", "kind"),
    [
        (TopKConfig(level=0.05), SparseView),
        (PowerSGDConfig(2), LinearView),
        (SignSGDConfig(), SignView),
        (ScaledSignConfig(), SignView),
        (QSGDConfig(2), TensorwiseView),
        (VqSGDConfig(500), TensorwiseView),
        (AtomoConfig(2), LinearView),
    ],
    ids=str,
)
def test_what_an_aware_attacker_compares_with(compressor: CompressorConfig, kind: type) -> None:
    """Steps along the true gradient come nearer, from a gradient that has little to do with it."""
    observation, truth = seen(compressor)[0], seen()[0]
    true = decoded(truth).gradient
    generator = torch.Generator().manual_seed(0)
    other = [t.abs().mean() * torch.randn(t.shape, generator=generator) for t in true]
    config = replace(SHORT, objective="aware")
    view = target_view(observation, config)
    assert isinstance(view, kind)
    path = [torch.stack([o + step * t for step in (0, 0.3, 1, 3)]) for o, t in zip(other, true, strict=True)]
    distances = matching_distance(view, config)(path).tolist()
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < distances[0] - 0.01


def test_a_bound_adds_the_excess_to_the_distance() -> None:
    observation = seen(TopKConfig(level=0.05))[0]
    config = replace(SHORT, objective="aware")
    view = target_view(observation, config)
    assert isinstance(view, SparseView)
    generator = torch.Generator().manual_seed(0)
    g = [d + 0.05 * torch.randn(2, *d.shape, generator=generator) for d in decoded(observation).gradient]
    weighed = matching_distance(view, replace(config, bound=0.5))(g)
    torch.testing.assert_close(weighed, view.distance(g) + view.excess(g) / 2)
    assert float(view.excess(g).min()) > 0
    free, bound = (invert([(observation, replace(config, bound=b, iterations=4))])[0] for b in (0.0, 100.0))
    assert float(bound.matching[0]) > float(free.matching[0])  # in an attack, too


def test_l1_and_l2_need_a_linear_view(monkeypatch: pytest.MonkeyPatch) -> None:
    class Opaque:
        def distance(self, grads: list[Tensor]) -> Tensor:
            return torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0)

    monkeypatch.setattr(engine, "target_view", lambda *_: Opaque())
    GradientInversion(replace(SHORT, iterations=1)).reconstruct(seen()[0])
    with pytest.raises(ValueError) as error:  # noqa: PT011
        GradientInversion(replace(SHORT, matching="l2")).reconstruct(seen()[0])
    assert str(error.value) == "Expected matching='l2' to be 'cosine': what was sent is no linear view."


@pytest.mark.parametrize("objective", ["naive", "aware"])
def test_messages_must_be_finite(objective: Literal["naive", "aware"]) -> None:
    observation = seen(TopKConfig(level=0.05))[0]
    (message,) = observation.messages
    values = message.sent[0].clone()
    values[3] = torch.nan
    bad = replace(observation, messages=(replace(message, sent=(values, *message.sent[1:])),))
    with pytest.raises(ValueError, match=r"^Expected finite messages, got NaN or infinity in them\.$"):
        GradientInversion(replace(SHORT, objective=objective)).reconstruct(bad)


def test_labels_must_be_classes() -> None:
    bad = replace(seen()[0], labels=torch.tensor([4]))
    with pytest.raises(ValueError, match=r"^Expected labels=\[4\] in \[0, 4\)\.$"):
        GradientInversion(SHORT).reconstruct(bad)


# ---------------------------------------------------------------------------------------------------- priors


def test_total_colour_is_zero_for_grey_and_sees_coloured_edges() -> None:
    grey = noise(2, 1, 1, 6, 6).expand(2, 1, 3, 6, 6)
    assert total_colour(grey).tolist() == [0, 0]
    assert total_colour(grey + torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1)).tolist() == pytest.approx([0, 0], abs=1e-6)
    x = torch.zeros(1, 1, 3, 2, 2)
    x[0, 0, 0, :, 1] = 1.0  # red differs from green and from blue by an edge in 2 of 3 pairs, along rows
    assert float(total_colour(x)) == pytest.approx(2 / 3)
    assert total_colour(noise(2, 1, 1, 6, 6)).tolist() == [0, 0]


def test_mean_square_and_group_spread() -> None:
    x = noise(5, 2, 3, 4, 4)
    assert mean_square(x).tolist() == pytest.approx([float((x[i] ** 2).mean()) for i in range(5)])
    found = group_spread(x, [2, 3])
    expected = [float(((x[i] - (x[:2] if i < 2 else x[2:]).mean(0)) ** 2).mean()) for i in range(5)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert group_spread(x[:1], [1]).tolist() == [0]
    x[3] = torch.nan  # one that diverged pulls no other along
    rest = group_spread(x, [2, 3])[[2, 4]].tolist()
    centre = x[[2, 4]].mean(0)
    assert rest == pytest.approx([float(((x[i] - centre) ** 2).mean()) for i in (2, 4)], rel=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_statistics_are_those_of_each_candidate_batch(training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))
    model.train()(noise(8, 3, 6, 6))
    model.train(training)
    before = model[1].running_mean.clone()
    x = noise(3, 2, 3, 6, 6, seed=5)
    prior = BatchNormPrior(model)
    found = prior.statistics(x)
    for i in range(3):  # by the book: one batch at a time
        first = model[0](x[i])
        second = model[3](torch.relu(model[1].train(training)(first)))
        model[1].running_mean.copy_(before)
        model[1].running_var.copy_(prior._model[1].running_var)
        for (mean, variance), layer in zip(found, (first, second), strict=True):
            torch.testing.assert_close(mean[i], layer.mean((0, 2, 3)))
            torch.testing.assert_close(variance[i], layer.var((0, 2, 3), correction=0))
    assert float(prior(x, found).abs().max()) == 0
    shifted = [(mean + 1, variance) for mean, variance in found]
    assert prior(x, shifted).tolist() == pytest.approx([2 + 2**0.5] * 3, rel=1e-5)  # norms of 4 and of 2 ones


def test_what_is_known_of_batch_statistics() -> None:
    untrained, trained = (seen(model="resnet18", steps=(0, 2))[i] for i in (0, 4))
    assert len(known_statistics(trained)) == 20
    mean, variance = known_statistics(trained)[0]
    assert torch.equal(mean, trained.buffers["bn1.running_mean"])
    assert torch.equal(variance, trained.buffers["bn1.running_var"])
    attack = replace(SHORT, bn=0.1)
    with pytest.raises(ValueError, match="Expected batch norms that have seen data for a prior on their statistics"):
        invert([(untrained, attack)])
    with pytest.raises(ValueError, match=r"^Expected a model with batch norm for a prior on its statistics"):
        invert([(seen()[0], attack)])


def test_statistics_of_the_private_batch_only_where_the_threat_grants_them() -> None:
    granted, withheld, evaluation = (
        captures(threat=threat, model="resnet18")[1]
        for threat in (
            Threat(batch_size=3, batch_norm="train", batch_statistics="known"),
            Threat(batch_size=3, batch_norm="train"),
            Threat(batch_size=3, batch_statistics="known"),
        )
    )
    assert withheld.seen.buffers_after is evaluation.seen.buffers_after is None
    for capture in (withheld, evaluation):  # of an untrained model nothing else is known
        with pytest.raises(ValueError, match="Expected batch norms that have seen data"):
            known_statistics(capture.seen)
    x = (granted.truth.images - granted.seen.mean.view(-1, 1, 1)) / granted.seen.std.view(-1, 1, 1)
    expected = BatchNormPrior(granted.seen.build_model()).statistics(x[None])
    for found, true in zip(known_statistics(granted.seen), expected, strict=True):
        for a, b in zip(found, true, strict=True):
            torch.testing.assert_close(a, b[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_statistics_by_proxy_are_those_of_the_auxiliary_batches(mode: Literal["eval", "train"]) -> None:
    threat = Threat(batch_size=3, batch_norm=mode, batch_statistics="proxy", auxiliary=8)
    observation = seen(threat=threat, model="resnet18", steps=(0, 1))[4]
    assert observation.auxiliary is not None
    mean, std = (s.view(-1, 1, 1) for s in (observation.mean, observation.std))
    prior = BatchNormPrior(observation.build_model())
    # By the book: two batches of three, and two images that fill none.
    batches = ((observation.auxiliary[:6] - mean) / std).unflatten(0, (2, 3))
    for found, each in zip(known_statistics(observation), prior.statistics(batches), strict=True):
        for a, b in zip(found, each, strict=True):
            torch.testing.assert_close(a, b.mean(0))
    with pytest.raises(ValueError, match=r"^Expected at least 3 auxiliary images"):
        known_statistics(replace(observation, auxiliary=None))
    without = seen(threat=threat, model="convnet")[0]
    with pytest.raises(ValueError, match=r"^Expected a model with batch norm"):
        known_statistics(without)


def test_the_nearer_the_granted_statistics_the_less_the_prior_at_the_truth() -> None:
    """Of an untrained model in training mode: exact ones, by proxy, and the initial values that it runs with."""
    known, by_proxy = (
        captures(threat=threat, model="resnet18")[1]
        for threat in (
            Threat(batch_size=4, batch_norm="train", batch_statistics="known"),
            Threat(batch_size=4, batch_norm="train", batch_statistics="proxy", auxiliary=40),
        )
    )
    x = (known.truth.images - known.seen.mean.view(-1, 1, 1)) / known.seen.std.view(-1, 1, 1)
    prior = BatchNormPrior(known.seen.build_model())

    def at_truth(statistics: Any) -> float:
        return float(prior(x[None], [(m[None], v[None]) for m, v in statistics]))

    # Of a proxy that is the private batch itself nothing is left but rounding.
    same = known_statistics(replace(by_proxy.seen, auxiliary=known.truth.images))
    for found, true in zip(same, known_statistics(known.seen), strict=True):
        for a, b in zip(found, true, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    running = [
        (known.seen.buffers[name], known.seen.buffers[name.replace("mean", "var")])
        for name in known.seen.buffers
        if name.endswith("running_mean")
    ]
    exact, proxy = at_truth(known_statistics(known.seen)), at_truth(known_statistics(by_proxy.seen))
    assert exact < 0.05 * proxy
    assert proxy < 0.5 * at_truth(running)


def test_priors_pull_where_they_should() -> None:
    """Each prior, given a large weight, makes its own term smaller than the attack without it does."""
    observation = seen(model="resnet18", threat=Threat(batch_size=2), steps=(0, 2))[4]
    plain = replace(SHORT, tv=0.0, iterations=16, restarts=3, signed="none")
    scale = [s.view(-1, 1, 1) for s in (observation.mean, observation.std)]
    prior, target = BatchNormPrior(observation.build_model()), known_statistics(observation)
    terms: dict[str, Any] = {
        "tv": total_variation,
        "colour": total_colour,
        "l2": mean_square,
        "group": lambda x: group_spread(x, [3]),
        "bn": lambda x: prior(x, [(m.expand(3, -1), v.expand(3, -1)) for m, v in target]),
    }
    (without,) = invert([(observation, plain)])
    for name, term in terms.items():
        (with_it,) = invert([(observation, replace(plain, **{name: 3.0}))])
        values = [float(term((c.images - scale[0]) / scale[1]).mean()) for c in (without, with_it)]
        assert values[1] < 0.8 * values[0], name


def test_a_prior_of_one_job_is_not_another_s() -> None:
    observation = seen(model="resnet18", steps=(0, 2))[4]
    attacks = [replace(SHORT, signed="none", **change) for change in ({}, {"bn": 0.3}, {"group": 1.0, "restarts": 2})]
    together = invert([(observation, attack) for attack in attacks])
    for attack, found in zip(attacks, together, strict=True):
        torch.testing.assert_close(found.objective, invert([(observation, attack)])[0].objective, rtol=0, atol=1e-4)
    assert float(together[1].objective) > float(together[0].objective) + 0.1


# ------------------------------------------------------------------------------------- optimisers, schedules


def rosenbrock(z: Tensor) -> Tensor:
    return ((1 - z[:, :-1]) ** 2 + 2 * (z[:, 1:] - z[:, :-1] ** 2) ** 2).sum(1)


def run(optimiser: Any, z: Tensor, steps: int, rate: float) -> Tensor:
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(rosenbrock(z.requires_grad_()).sum(), z)
        z = (z + rate * optimiser.direction(z.detach(), gradient)).detach()
    return z


@pytest.mark.parametrize("name", ["adam", "lbfgs"])
def test_each_row_is_optimised_as_torch_would_alone(name: str) -> None:
    start, rate, steps = 0.5 * noise(4, 6).double(), {"adam": 0.02, "lbfgs": 0.3}[name], 12
    found = run(Adam(start) if name == "adam" else LBFGS(), start.clone(), steps, rate)
    for row, expected_start in zip(found, start, strict=True):
        z = expected_start[None].clone().requires_grad_()
        theirs: torch.optim.Optimizer
        if name == "adam":
            theirs = torch.optim.Adam([z], lr=rate)
        else:
            theirs = torch.optim.LBFGS([z], lr=rate, max_iter=1, history_size=100, tolerance_grad=0, tolerance_change=0)

        def closure(z: Tensor = z, theirs: torch.optim.Optimizer = theirs) -> Tensor:
            theirs.zero_grad()
            rosenbrock(z).sum().backward()
            return rosenbrock(z).sum()

        for _ in range(steps):
            theirs.step(closure)
        torch.testing.assert_close(row, z.detach()[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("make", [Adam, lambda like: LBFGS()], ids=["adam", "lbfgs"])
def test_rows_can_be_dropped(make: Any) -> None:
    start, rows = 0.5 * noise(4, 6), torch.tensor([True, False, True, False])
    whole, fewer = make(start), make(start)
    z = run(fewer, start.clone(), 4, 0.02)
    fewer.keep(rows)
    torch.testing.assert_close(run(fewer, z[rows], 4, 0.02), run(whole, start.clone(), 8, 0.02)[rows])


def test_schedules() -> None:
    base = replace(GEIPING, step_size=0.2, iterations=16)
    assert step_sizes(base).tolist() == pytest.approx([0.2] * 6 + [0.02] * 4 + [0.002] * 4 + [0.0002] * 2)
    assert step_sizes(replace(base, schedule="constant")).tolist() == pytest.approx([0.2] * 16)
    cosine = step_sizes(InversionConfig(step_size=0.2, iterations=16))  # by default
    assert torch.equal(cosine, step_sizes(replace(base, schedule="cosine")))
    assert cosine[[0, 8]].tolist() == pytest.approx([0.2, 0.1])
    assert float(cosine[-1]) == pytest.approx(0.1 * (1 - np.cos(np.pi / 16)), rel=1e-4)
    warm = step_sizes(replace(base, schedule="constant", warmup=4))
    assert warm.tolist() == pytest.approx([0.05, 0.1, 0.15] + [0.2] * 13)


def test_signs() -> None:
    gradient = noise(3, 8) * torch.tensor([[1e-6], [1e-6], [1e-6]])
    hard, soft = torch.tensor([[True], [False], [False]]), torch.tensor([[False], [True], [False]])
    early, late = (signs(gradient, hard, soft, progress) for progress in (0.0, 0.999))
    assert torch.equal(early[0], gradient[0].sign())
    assert torch.equal(early[2], gradient[2])
    unit = gradient[1] / gradient[1].abs().mean()
    torch.testing.assert_close(early[1], torch.tanh(unit))  # at whatever scale
    torch.testing.assert_close(late[1], unit, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("signed", ["hard", "soft", "none"])
def test_a_slope_that_is_not_a_number_is_no_standstill(
    signed: Literal["hard", "soft", "none"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sign of NaN is 0: a restart that met it would seem to have converged."""
    calls: list[int] = []
    matcher = search.GradientMatcher

    class Spoilt(matcher):  # type: ignore[misc, valid-type]
        def __call__(self, x: Tensor, labels: Tensor, distance: Any) -> tuple[Tensor, Tensor]:
            value, dx = super().__call__(x, labels, distance)
            calls.append(len(x))
            if len(calls) == 2:
                dx[1, 0, 0, 0, 0] = torch.nan
            return value, dx

    monkeypatch.setattr(search, "GradientMatcher", Spoilt)
    (found,) = invert([(seen()[0], replace(SHORT, signed=signed, restarts=3))])
    assert found.diverged == 1
    assert found.broken is not None
    assert found.broken.tolist() == [False, True, False]
    assert found.objective.isfinite().all()  # its best until then
    assert (calls[0], calls[-1]) == (3, 2)


# ------------------------------------------------------------------------------------------------- restarts


def test_the_worse_half_is_retired(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    matcher = search.GradientMatcher

    class Counted(matcher):  # type: ignore[misc, valid-type]
        def __call__(self, x: Tensor, labels: Tensor, distance: Any) -> tuple[Tensor, Tensor]:
            sizes.append(len(x))
            return super().__call__(x, labels, distance)

    monkeypatch.setattr(search, "GradientMatcher", Counted)
    attack = replace(SHORT, restarts=9, iterations=16, halving=True, signed="none")
    jobs = [(seen()[0], attack), (seen()[1], replace(attack, halving=False, restarts=2))]
    found, other = invert(jobs)
    assert sizes == [11] * 2 + [7] * 2 + [5] * 4 + [4] * 9
    assert found.images.shape[0] == 9
    assert found.objective.isfinite().all()  # a retired restart keeps its best
    assert found.diverged == 0
    (whole,) = invert([(seen()[0], replace(attack, halving=False))])
    best = int(found.objective.argmin())
    assert float(found.objective[best]) == pytest.approx(float(whole.objective[best]), abs=1e-4)
    assert float(found.objective.mean()) > float(whole.objective.mean())
    torch.testing.assert_close(other.objective, invert(jobs[1:])[0].objective, rtol=0, atol=1e-4)
    assert torch.equal(invert(jobs)[0].images, found.images)


@pytest.mark.parametrize("change", [{"group": 0.1}, {"halving": True}], ids=str)
def test_restarts_that_know_of_each_other_stay_together(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    observation, attack = seen()[0], replace(SHORT, restarts=3, signed="none", **change)
    (whole,) = invert([(observation, attack)])
    monkeypatch.setattr(engine, "MAX_GRADIENT_ENTRIES", 1)
    (again,) = invert([(observation, attack)])
    assert torch.equal(whole.objective, again.objective)


# --------------------------------------------------------------------------------------------------- presets


def test_the_default_is_geiping_with_another_optimiser() -> None:
    """GEIPING keeps what was published; the defaults are long steps by soft signs along a cosine."""
    assert (GEIPING.objective, GEIPING.matching, GEIPING.optimiser) == ("naive", "cosine", "adam")
    assert (GEIPING.step_size, GEIPING.signed, GEIPING.schedule) == (0.1, "hard", "steps")
    assert InversionConfig("naive") == replace(GEIPING, step_size=1.0, signed="soft", schedule="cosine")


@pytest.mark.parametrize(
    ("attack", "threat", "least"),
    [
        (replace(MODERN, iterations=120, tv=0.01, colour=0.01), Threat(), 0.8),
        (replace(DLG, iterations=80, restarts=4), UNKNOWN, 0.9),
        (replace(IDLG, iterations=80, restarts=4), UNKNOWN, 0.9),
        (replace(GRAD_INVERSION, bn=0.0, iterations=120, restarts=2), replace(UNKNOWN, batch_size=2), 0.4),
        (replace(GEIPING, iterations=150, matching="l1"), Threat(), 0.8),
    ],
    ids=["modern", "DLG", "iDLG", "GradInversion", "L1"],
)
def test_the_attacks_of_the_field_reconstruct(attack: InversionConfig, threat: Threat, least: float) -> None:
    result = evaluate_inversion(captures(threat=threat), attack)
    assert np.mean(result.ssim) > least
    assert result.label_accuracy is None if threat.labels == "known" else np.mean(result.label_accuracy or [0]) == 1


def test_grad_inversion_uses_the_statistics() -> None:
    """On a batch of a trained model with batch norm, all of its terms together."""
    private = captures(threat=Threat(batch_size=2), model="resnet18", steps=(0, 2))[4:6]
    result = evaluate_inversion(private, replace(GRAD_INVERSION, iterations=20, restarts=2))
    assert len(result.ssim) == 4
    assert result.diverged == 0


def test_soft_labels_are_optimised() -> None:
    observation = seen(threat=UNKNOWN)[1]
    (found,) = invert([(observation, replace(DLG, iterations=60, restarts=3))])
    assert found.labels is not None
    assert found.labels.shape == (3, 1)
    (start,) = invert([(observation, replace(DLG, iterations=1, restarts=3, step_size=1e-9))])
    assert not torch.equal(found.labels, start.labels)
    granted = seen()[1]
    assert granted.labels is not None
    (given,) = invert([(granted, replace(DLG, iterations=2, restarts=2))])
    assert given.labels is not None
    assert given.labels.tolist() == [granted.labels.tolist()] * 2  # granted labels are used as they are


@pytest.mark.parametrize("compressor", [DenseConfig(), PowerSGDConfig(2)], ids=repr)
def test_an_attack_that_knows_no_labels_goes_on_with_those_it_recovers(compressor: CompressorConfig) -> None:
    known, unknown = (seen(compressor, Threat(labels=labels, batch_size=2)) for labels in ("known", "unknown"))
    for a, b in zip(known, unknown, strict=True):
        assert b.labels is None
        (with_them,), (without,) = invert([(a, SHORT)]), invert([(b, SHORT)])
        assert a.labels is not None
        assert without.labels is not None
        assert without.labels[0].tolist() == sorted(a.labels.tolist())
        if a.labels.tolist() == without.labels[0].tolist():
            torch.testing.assert_close(with_them.objective, without.objective, rtol=0, atol=1e-4)


def test_bfloat16_goes_nearly_the_same_way() -> None:
    attack = replace(SHORT, iterations=60)
    exact, rough = (evaluate_inversion(captures(), replace(attack, precision=p)) for p in ("float32", "bfloat16"))
    assert rough.objective != exact.objective
    assert np.mean(rough.ssim) == pytest.approx(np.mean(exact.ssim), abs=0.05)
    assert np.mean(rough.objective) == pytest.approx(np.mean(exact.objective), abs=0.01)
    together = invert([(seen()[0], attack), (seen()[0], replace(attack, precision="bfloat16"))])
    assert together[0].objective.dtype == together[1].objective.dtype == torch.float32
