"""The audit's statistics: against scikit-learn, against closed forms, and on scores that know nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom
from sklearn.metrics import roc_auc_score, roc_curve

from raytrust.metrics.epsilon import one_run_epsilon, p_value
from raytrust.metrics.membership import audit, pooled_audit
from raytrust.metrics.roc import auc, auc_interval, roc, tpr_at_fpr
from raytrust.metrics.thresholds import (
    balanced_accuracy,
    best_thresholds,
    clopper_pearson,
    decide,
    null_floor,
    yeom_thresholds,
)

Scores = NDArray[np.float64]


def gaussians(n: int, shift: float, seed: int = 0) -> tuple[Scores, NDArray[np.bool_]]:
    """n members around `shift`, n others around 0, of unit variance."""
    scores = np.random.default_rng(seed).normal(size=2 * n)
    member = np.arange(2 * n) < n
    return scores + shift * member, member


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_ties_match_scikit_learn(points: list[tuple[int, bool]]) -> None:
    scores, member = np.array([s for s, _ in points], dtype=float), np.array([m for _, m in points])
    if member.all() or not member.any():
        with pytest.raises(ValueError, match="Expected members and non-members"):
            auc(scores, member)
        return
    assert auc(scores, member) == pytest.approx(roc_auc_score(member, scores))
    curve = roc(scores, member)
    fpr, tpr, thresholds = roc_curve(member, scores, drop_intermediate=False)
    np.testing.assert_allclose(curve.fpr, fpr)
    np.testing.assert_allclose(curve.tpr, tpr)
    np.testing.assert_array_equal(curve.thresholds, thresholds)


def test_a_coin_that_is_the_score_itself_is_a_tie() -> None:
    assert auc(np.zeros(10), np.arange(10) < 4) == 0.5


def test_the_area_of_two_gaussians_is_the_analytic_one_and_lies_in_its_interval() -> None:
    scores, member = gaussians(4000, 1.0)
    analytic = 0.7602499389  # Phi(1 / sqrt 2)
    assert auc(scores, member) == pytest.approx(analytic, abs=0.012)
    low, high = auc_interval(scores, member)
    assert low < analytic < high
    # Its width is that of Hanley & McNeil 1982.
    a, n = analytic, 4000
    variance = (a * (1 - a) + (n - 1) * (a / (2 - a) + 2 * a**2 / (1 + a) - 2 * a**2)) / n**2
    assert (high - low) / (2 * 1.96) == pytest.approx(math.sqrt(variance), rel=0.15)


def test_noise_has_an_area_of_one_half() -> None:
    covered, areas = 0, []
    for seed in range(200):
        scores, member = gaussians(100, 0.0, seed)
        areas.append(auc(scores, member))
        low, high = auc_interval(scores, member, resamples=200, seed=seed)
        covered += low <= 0.5 <= high
    assert np.mean(areas) == pytest.approx(0.5, abs=4 * 0.041 / math.sqrt(200))
    assert covered >= 180  # of 200, at a nominal 190


def test_tpr_at_a_low_fpr() -> None:
    scores = np.concatenate([np.arange(1000.0), [5.0, 995.0, 989.5, 2000.0]])
    member = np.arange(1004) >= 1000
    found = tpr_at_fpr(scores, member, 0.01)
    assert found.value == 0.75  # above the ten highest others lie three of four
    assert found.n == 1004
    assert tpr_at_fpr(scores[4:], member[4:], 0.01).value is None  # 996 non-members
    assert tpr_at_fpr(scores, member, 0.001).value is None
    assert tpr_at_fpr(np.zeros(1004), member, 0.01).value == 0.0  # one tie: all or nothing
    with pytest.raises(ValueError, match=r"Expected fpr=0 in \(0, 1\)"):
        tpr_at_fpr(scores, member, 0)


def test_tpr_interval_covers() -> None:
    # P(N(1, 1) > z with P(N(0, 1) > z) = 0.01) = Phi(1 - 2.3263)
    covered = 0
    for seed in range(40):
        scores, member = gaussians(1000, 1.0, seed)
        found = tpr_at_fpr(scores, member, 0.01, resamples=200)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.0924 <= found.high
    assert covered >= 33


def test_best_and_mean_thresholds() -> None:
    scores = np.array([3.0, 2.0, 1.0, 0.0, 13.0, 12.0, 11.0, 10.0])
    member = np.array([True, True, False, False, True, False, True, False])
    groups = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    assert best_thresholds(scores, member, groups).tolist() == [2.0, 13.0]
    assert yeom_thresholds(scores, member).tolist() == [29 / 4]
    assert yeom_thresholds(scores, member, groups).tolist() == [2.5, 12.0]
    decided = decide(scores, [2.0, 13.0], groups)
    assert decided.tolist() == [True, True, False, False, True, False, False, False]
    assert balanced_accuracy(decided, member, "shadow", groups=2).value == 0.875


def test_a_group_without_members_takes_the_overall_threshold() -> None:
    scores, member = np.array([1.0, 0.0, 5.0, 4.0]), np.array([True, False, False, False])
    assert best_thresholds(scores, member, [0, 0, 1, 1]).tolist() == [1.0, 1.0]
    assert yeom_thresholds(scores, member, [0, 0, 1, 1]).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("groups", "tolerance"), [(1, 0.004), (10, 0.01)])  # a limit: 40 points a group fall short
def test_the_floor_is_what_noise_reaches_in_sample(groups: int, tolerance: float) -> None:
    generator = np.random.default_rng(0)
    n, values = 400, []
    member = np.arange(2 * n) < n
    labels = np.arange(2 * n) % groups
    for _ in range(60):
        scores = generator.normal(size=2 * n)
        decided = decide(scores, best_thresholds(scores, member, labels), labels)
        values.append(balanced_accuracy(decided, member, "in-sample", groups).value)
    floor = null_floor(n, n, groups)
    assert np.mean(values) == pytest.approx(floor, abs=tolerance)
    assert balanced_accuracy(decided, member, "in-sample", groups).floor == floor
    assert balanced_accuracy(decided, member, "shadow", groups).floor == 0.5


def test_the_floors_of_the_reference() -> None:
    assert [round(100 * null_floor(10_000, 10_000, k), 1) for k in (1, 10, 100)] == [50.4, 51.4, 54.4]


def test_clopper_pearson_is_exact() -> None:
    assert clopper_pearson(0, 10) == pytest.approx((0.0, 0.30849710781876083))
    assert clopper_pearson(5, 10) == pytest.approx((0.18708602844739855, 0.8129139715526014))
    for p in (0.02, 0.3):
        k = np.arange(31)
        inside = [low <= p <= high for low, high in (clopper_pearson(int(i), 30) for i in k)]
        assert binom.pmf(k, 30, p)[inside].sum() >= 0.95


def test_balanced_accuracy_covers() -> None:
    generator = np.random.default_rng(0)
    member = np.arange(300) < 100
    covered = 0
    for _ in range(300):
        found = balanced_accuracy(generator.random(300) < np.where(member, 0.6, 0.1), member, "shadow")
        covered += found.low <= 0.75 <= found.high
    assert covered >= 285


def test_noise_gives_epsilon_zero() -> None:
    positive = 0
    for seed in range(400):
        generator = np.random.default_rng(seed)
        positive += one_run_epsilon(generator.normal(size=200), generator.random(200) < 0.5, 100).epsilon > 0
    assert positive <= 0.05 * 400 + 3 * math.sqrt(400 * 0.05 * 0.95)
    assert positive > 0  # it is a test of level 5 %, and not one that never speaks


def test_epsilon_of_randomised_response() -> None:
    """Each point's coin is told truly with probability e/(1+e): epsilon 1, exactly, and the bound comes near."""
    bounds = []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        member = generator.random(4000) < 0.5
        told = np.where(generator.random(4000) < 1 / (1 + math.exp(-1)), member, ~member)
        bounds.append(one_run_epsilon(told + 0.0, member, 2000).epsilon)
    assert sum(b > 1 for b in bounds) <= 3
    assert np.median(bounds) > 0.75


def test_epsilon_counts_guesses_at_both_ends() -> None:
    member = np.array([True, True, False, True, False, False])
    found = one_run_epsilon(np.array([6.0, 5, 4, 3, 2, 1]), member, 4)
    assert (found.guesses, found.correct) == (4, 4)
    assert one_run_epsilon(np.array([6.0, 5, 4, 3, 2, 1]), member, 6).correct == 4
    assert one_run_epsilon(np.arange(1000.0), np.arange(1000) >= 500, 1000).epsilon == pytest.approx(
        math.log(0.05 ** (1 / 1000) / (1 - 0.05 ** (1 / 1000))), rel=1e-6
    )
    with pytest.raises(ValueError, match=r"Expected guesses=7 in \[2, 6\]"):
        one_run_epsilon(np.arange(6.0), member, 7)


def test_delta_only_weakens_the_bound() -> None:
    member = np.arange(1000) >= 500
    bounds = [one_run_epsilon(np.arange(1000.0), member, 500, delta).epsilon for delta in (0.0, 1e-6, 1e-5, 1e-4)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > bounds[-1]
    # Against the definition, term by term: P[correct > Binomial >= correct - i] / i, doubled, for all points.
    terms = [sum(binom.pmf(v, 20, 0.5) for v in range(15 - i, 15)) / i for i in range(1, 16)]
    expected = binom.sf(14, 20, 0.5) + 2 * 50 * 1e-3 * max(terms)
    assert p_value(50, 20, 15, 0.0, 1e-3) == pytest.approx(expected)


def test_a_report_of_one_model() -> None:
    scores, member = gaussians(1000, 1.0)
    first = np.arange(2000) % 2 == 0
    found = audit(scores, member, {"even": first, "members alone": member}, guesses=200)
    assert found.auc.value == auc(scores, member)
    assert found.slices["even"].value == auc(scores[first], member[first])
    assert found.slices["members alone"].value is None
    assert (found.tpr[0.01].value is not None, found.tpr[0.001].value) == (True, None)
    assert found.epsilon is not None
    assert found.unit == "point"


def test_a_report_of_several_models() -> None:
    rows = [gaussians(500, shift, seed) for seed, shift in enumerate((0.5, 1.0, 1.5, 1.0))]
    scores, member = np.stack([s for s, _ in rows]), np.stack([m for _, m in rows])
    found = pooled_audit(scores, member, {"first": np.arange(1000) % 10 == 0}, guesses=100)
    areas = [auc(s, m) for s, m in rows]
    assert found.auc.value == pytest.approx(np.mean(areas))
    assert found.auc.low is not None
    half = 3.182446305 * np.std(areas, ddof=1) / 2  # Student's t with 3 degrees of freedom
    assert found.auc.value - found.auc.low == pytest.approx(half)
    pooled = tpr_at_fpr(scores.ravel(), member.ravel(), 0.01)
    assert found.tpr[0.01].value == pooled.value
    assert found.tpr[0.01].low is not None
    assert pooled.low is not None
    assert found.tpr[0.01].low < pooled.low  # models differ by more than points
    assert found.tpr[0.001].value is None
    assert (found.slices["first"].n, found.auc.n) == (4, 4)  # models, of which the interval speaks
    assert found.unit == "model"
    single = pooled_audit(scores[:1], member[:1])
    assert (single.auc.low, single.epsilon) == (None, None)


def test_bad_scores_are_refused() -> None:
    member = np.arange(4) < 2
    with pytest.raises(ValueError, match="Expected scores without NaN, got 1 of 4"):
        auc([0.0, 1.0, np.nan, 2.0], member)
    with pytest.raises(ValueError, match=r"Expected scores \(n,\) and member \(n,\) of booleans"):
        auc([0.0, 1.0], member)
    with pytest.raises(ValueError, match="of booleans"):
        auc([0.0, 1.0], [0, 1])
    with pytest.raises(ValueError, match="Expected scores and member of one shape"):
        pooled_audit(np.zeros(4), member)
