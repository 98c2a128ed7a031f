"""Signals, the attack model and the likelihood ratio: against definitions, closed forms and limits."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import log_expit
from scipy.stats import norm, rankdata

from raytrust.attacks.membership.likelihood import (
    LIRA_OFFLINE,
    LIRA_ONLINE,
    RMIA_OFFLINE,
    RMIA_ONLINE,
    RULES,
    Rule,
    leave_one_out,
    log_ratio,
    rank_in_population,
    vulnerability,
)
from raytrust.attacks.membership.scores import AttackModel
from raytrust.attacks.membership.signals import SIGNALS, signals
from raytrust.metrics.roc import auc

Array = NDArray[np.float64]


def test_signals_are_what_they_are_called() -> None:
    p = np.array([0.5, 0.3, 0.2])
    found = {name: float(value[0]) for name, value in signals(np.log(p)[None] + 7, [1]).items()}
    assert found == {
        "max confidence": pytest.approx(0.5),
        "confidence": pytest.approx(0.3),
        "loss": pytest.approx(math.log(0.3)),
        "entropy": pytest.approx(sum(x * math.log(x) for x in p)),
        "modified entropy": pytest.approx(0.7 * math.log(0.3) + 0.5 * math.log(0.5) + 0.2 * math.log(0.8)),
        "logit": pytest.approx(math.log(0.3 / 0.7)),
    }
    assert set(SIGNALS) | {"logit"} == set(found)


@pytest.mark.parametrize("name", [*SIGNALS, "logit"])
def test_higher_means_member(name: str) -> None:
    """A point that the model is sure of, and right, scores above one that it is unsure of."""
    found = signals([[4.0, 0.0, 0.0], [0.3, 0.0, 0.0]], [0, 0])[name]
    assert found[0] > found[1]
    wrong = signals([[4.0, 0.0, 0.0], [0.3, 0.0, 0.0]], [1, 1])[name]
    assert (wrong[0] > wrong[1]) == (name in ("max confidence", "entropy"))  # those that don't see the label


def test_a_confident_network_is_no_tie() -> None:
    for label in (0, 1):
        found = signals([[60.0, 0.0], [80.0, 0.0]], [label, label])
        for name in ("loss", "modified entropy", "logit"):
            assert np.isfinite(found[name]).all()
            assert (found[name][1] > found[name][0]) == (label == 0)


def test_the_attack_model_finds_members_by_their_posteriors() -> None:
    generator = np.random.default_rng(0)
    member = generator.random(2000) < 0.5
    logits = generator.normal(size=(2000, 5))
    logits[:, 0] += np.where(member, 4.0, 1.5)
    attack = AttackModel().fit(logits[:1000], member[:1000])
    assert auc(attack.score(logits[1000:]), member[1000:]) > 0.8
    shuffled = logits[1000:][:, generator.permutation(5)]
    np.testing.assert_allclose(attack.score(shuffled), attack.score(logits[1000:]))  # it does not see the label


def shadows(models: int, points: int, seed: int = 0) -> tuple[Array, NDArray[np.bool_]]:
    """Signals of point j: N(j, 1) out and N(j + 2, 1) in; each point in each model by a fair coin."""
    generator = np.random.default_rng(seed)
    keep = generator.random((models, points)) < 0.5
    keep[-1], keep[-2] = ~keep[0], keep[0]  # so that leaving one out leaves a model with the point and one without
    return generator.normal(size=(models, points)) + np.arange(points) + 2.0 * keep, keep


def test_two_gaussians_give_their_analytic_likelihood_ratio() -> None:
    generator = np.random.default_rng(0)
    keep = np.arange(20000)[:, None] < 10000
    keep = np.broadcast_to(keep, (20000, 3)).copy()
    means, deviations = np.array([1.0, -2.0, 3.0]), np.array([2.0, 0.5, 1.0])
    reference = np.where(keep, generator.normal(means, deviations, (20000, 3)), generator.normal(0.5, 1.5, (20000, 3)))
    target = np.array([0.0, -1.0, 2.0])
    expected = norm.logpdf(target, means, deviations) - norm.logpdf(target, 0.5, 1.5)
    rule = replace(LIRA_ONLINE, separate=True, shrinkage=0.0)
    np.testing.assert_allclose(log_ratio(target, reference, keep, rule), expected, atol=0.15)

    reference = np.where(keep, generator.normal(means, 1.5, (20000, 3)), generator.normal(0.5, 1.5, (20000, 3)))
    tilt = (means - 0.5) / 1.5**2  # log f1/f0 = eta s - K(eta), K the normal cumulant
    expected = tilt * target - (0.5 * tilt + 1.5**2 * tilt**2 / 2)
    rule = replace(LIRA_ONLINE, shrinkage=0.0)
    np.testing.assert_allclose(log_ratio(target, reference, keep, rule), expected, atol=0.15)


def test_shrinkage_has_both_limits() -> None:
    signal, keep = shadows(12, 400)
    enough = (~keep[1:]).sum(axis=0) >= 2  # a variance of its own needs two
    signal, keep = signal[:, enough], keep[:, enough]
    target = signal[0]
    none, little, infinite = (
        log_ratio(target, signal[1:], keep[1:], replace(LIRA_OFFLINE, shrinkage=s)) for s in (0.0, 1e-9, math.inf)
    )
    np.testing.assert_allclose(none, little, rtol=1e-5, atol=1e-6)
    out = np.where(keep[1:], np.nan, signal[1:])
    by_hand = (target - np.nanmean(out, axis=0)) / np.nanstd(out, axis=0, ddof=1)
    np.testing.assert_allclose(none, by_hand - 0.5)
    order = rankdata(target - np.nanmean(out, axis=0))  # one variance for all: the difference to the mean
    np.testing.assert_array_equal(rankdata(infinite), order)


def test_offline_is_one_sided() -> None:
    """A signal far below the shadows' is no evidence of membership."""
    signal, _ = shadows(9, 3)
    keep = np.zeros((9, 3), dtype=bool)
    for rule in (LIRA_OFFLINE, RMIA_OFFLINE):
        found = [log_ratio(np.arange(3.0) + shift, signal, keep, rule) for shift in (-9.0, 0.0, 9.0)]
        assert (found[0] < found[1]).all()
        assert (found[1] < found[2]).all()


def test_rmia_is_its_definition() -> None:
    generator = np.random.default_rng(0)
    log_p, keep = np.log(generator.random((6, 5))), shadows(6, 5)[1]
    target, population = np.log(generator.random(5)), np.log(generator.random((7, 40)))
    p = np.exp(log_p)
    with_it, without = ((p * part).sum(0) / part.sum(0) for part in (keep, ~keep))
    online = np.exp(target) / ((with_it + without) / 2)
    np.testing.assert_allclose(np.exp(log_ratio(target, log_p, keep, RMIA_ONLINE)), online)
    offline = np.exp(target) / ((1.3 * without + 0.7) / 2)
    np.testing.assert_allclose(np.exp(log_ratio(target, log_p, keep, RMIA_OFFLINE)), offline)

    ratios = np.exp(population[0]) / ((1.3 * np.exp(population[1:]).mean(0) + 0.7) / 2)
    share = [np.mean(x / ratios >= 1.5) for x in offline]
    reference = log_ratio(population[0], population[1:], np.zeros((6, 40), dtype=bool), RMIA_OFFLINE)
    np.testing.assert_allclose(rank_in_population(np.log(offline), reference, 1.5), share)
    rule = replace(RMIA_OFFLINE, gamma=1.5)
    first = leave_one_out(np.vstack([target, log_p]), np.vstack([keep[:1], keep]), rule, population)[0]
    np.testing.assert_allclose(first, share)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_leave_one_out_finds_members_and_only_by_the_model_attacked(rule: Rule) -> None:
    signal, keep = shadows(8, 300)
    level = np.linspace(-6, 6, 300) - np.arange(300)  # the points differ by more than membership shifts them
    signal = signal + level
    population = signal - 2.0 * keep
    if rule.family == "empirical":
        signal, population = log_expit(signal), log_expit(population)
    blind = np.mean([auc(s, k) for s, k in zip(signal, keep, strict=True)])
    scores = leave_one_out(signal, keep, rule, population)
    found = np.mean([auc(s, k) for s, k in zip(scores, keep, strict=True)])
    assert blind < 0.66
    assert found > 0.72
    assert np.mean([auc(s, k) for s, k in zip(scores, np.roll(keep, 1, axis=0), strict=True)]) < 0.55
    other = signal.copy()
    other[0] = -1  # changes what is said of model 0, and the others by one shadow only
    assert not np.allclose(leave_one_out(other, keep, rule, population)[0], scores[0])


def test_points_and_population_are_measured_alike() -> None:
    """Also where all probabilities are small, as with many classes or little training, ranks are no ties."""
    generator = np.random.default_rng(0)
    log_p, keep = generator.normal(-4, 0.5, (6, 200)), generator.random((6, 200)) < 0.5
    for rule in (RMIA_ONLINE, RMIA_OFFLINE):
        scores = leave_one_out(log_p, keep, rule, generator.normal(-4, 0.5, (6, 400)))
        assert 0.35 < scores.mean() < 0.65
        assert len(np.unique(scores[0])) > 100


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_shadows_alone_tell_nothing(rule: Rule) -> None:
    """Signals that no membership shifts give an area of one half, although the shadows' members are known."""
    generator = np.random.default_rng(0)
    areas = []
    for _ in range(10):
        keep = generator.random((6, 500)) < 0.5  # some points are in all or no shadows
        signal, population = (-generator.random((6, n)) - 0.1 for n in (500, 100))
        scores = leave_one_out(signal, keep, rule, population)
        areas += [auc(s, k) for s, k in zip(scores, keep, strict=True)]
    assert np.mean(areas) == pytest.approx(0.5, abs=4 * 0.026 / math.sqrt(60))


def test_a_balanced_design_would_give_members_away() -> None:
    """Why coins are independent: with each point in exactly half of the models, noise looks like a leak."""
    generator = np.random.default_rng(0)
    keep = np.argsort(generator.random((6, 3000)), axis=0) < 3
    scores = leave_one_out(generator.normal(size=(6, 3000)), keep, replace(LIRA_ONLINE, shrinkage=0.5))
    assert abs(np.mean([auc(s, k) for s, k in zip(scores, keep, strict=True)]) - 0.5) > 0.01


def test_calibration_beats_a_global_threshold_with_few_shadows_only_with_shrinkage() -> None:
    signal, keep = shadows(6, 500)
    areas = []
    for shrinkage in (0.0, 4.0):
        scores = leave_one_out(signal, keep, replace(LIRA_ONLINE, separate=True, shrinkage=shrinkage))
        areas.append(np.mean([auc(s, k) for s, k in zip(scores, keep, strict=True)]))
    assert areas[1] > areas[0] + 0.02


def test_vulnerability_leaves_the_model_itself_out() -> None:
    signal, keep = shadows(10, 50)
    signal[:, :5] += 6.0 * keep[:, :5]  # five points that are far more exposed
    found = vulnerability(signal, keep)
    assert (found[:, :5].mean(axis=1) > found[:, 5:].mean(axis=1) + 1).all()
    other = signal.copy()
    other[3] += 100 * np.random.default_rng(0).random(50)
    np.testing.assert_array_equal(vulnerability(other, keep)[3], found[3])
    assert not np.allclose(vulnerability(other, keep)[4], found[4])


def test_bad_shadows_are_refused() -> None:
    signal, keep = shadows(4, 3)
    with pytest.raises(ValueError, match="Expected shadows with and without every point for LiRA online"):
        log_ratio(signal[0], signal, np.zeros_like(keep), LIRA_ONLINE)
    with pytest.raises(ValueError, match="Expected shadows with and without every point for LiRA offline"):
        log_ratio(signal[0], signal, np.ones_like(keep), LIRA_OFFLINE)
    with pytest.raises(ValueError, match=r"Expected target \(n,\), shadows \(m, n\)"):
        log_ratio(signal[0, :2], signal, keep, LIRA_ONLINE)
    with pytest.raises(ValueError, match="Expected population points for RMIA online, got none"):
        leave_one_out(signal, keep, RMIA_ONLINE)
    with pytest.raises(ValueError, match="Expected shrinkage=-1 to be at least 0"):
        replace(LIRA_ONLINE, shrinkage=-1)
