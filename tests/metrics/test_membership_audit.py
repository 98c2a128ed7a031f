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

from raytrust.metrics.membership import one_run_epsilon, pooled_audit
from raytrust.metrics.roc import auc, roc
from raytrust.metrics.statistics import Figure
from raytrust.metrics.thresholds import balanced_accuracy, best_thresholds, decide, null_floor, yeom_thresholds

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


def test_the_area_of_two_gaussians_is_the_analytic_one() -> None:
    scores, member = gaussians(4000, 1.0)
    analytic = 0.7602499389  # Phi(1 / sqrt 2)
    assert auc(scores, member) == pytest.approx(analytic, abs=0.012)


def test_noise_has_an_area_of_one_half() -> None:
    areas = [auc(*gaussians(100, 0.0, seed)) for seed in range(200)]
    assert np.mean(areas) == pytest.approx(0.5, abs=4 * 0.041 / math.sqrt(200))


def tpr(scores: Scores, member: NDArray[np.bool_]) -> dict[float, Figure]:
    """Of one model."""
    return pooled_audit(scores[None], member[None]).tpr


def test_tpr_at_a_low_fpr() -> None:
    scores = np.concatenate([np.arange(1000.0), [5.0, 995.0, 989.5, 2000.0]])
    member = np.arange(1004) >= 1000
    found = tpr(scores, member)
    assert found[0.01].value == 0.75  # above the ten highest others lie three of four
    assert tpr(scores[4:], member[4:])[0.01].value is None  # 996 non-members
    assert found[0.001].value is None
    assert tpr(np.zeros(1004), member)[0.01].value == 0.0  # one tie: all or nothing


def test_best_and_mean_thresholds() -> None:
    scores = np.array([3.0, 2.0, 1.0, 0.0, 13.0, 12.0, 11.0, 10.0])
    member = np.array([True, True, False, False, True, False, True, False])
    groups = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    assert best_thresholds(scores, member, groups).tolist() == [2.0, 13.0]
    assert yeom_thresholds(scores, member, np.zeros(8, dtype=int)).tolist() == [29 / 4]
    assert yeom_thresholds(scores, member, groups).tolist() == [2.5, 12.0]
    decided = decide(scores, [2.0, 13.0], groups)
    assert decided.tolist() == [True, True, False, False, True, False, False, False]
    assert balanced_accuracy(decided, member) == 0.875


def test_a_group_without_members_takes_the_overall_threshold() -> None:
    scores, member = np.array([1.0, 0.0, 5.0, 4.0]), np.array([True, False, False, False])
    groups = np.array([0, 0, 1, 1])
    assert best_thresholds(scores, member, groups).tolist() == [1.0, 1.0]
    assert yeom_thresholds(scores, member, groups).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("groups", "tolerance"), [(1, 0.004), (10, 0.01)])  # a limit: 40 points a group fall short
def test_the_floor_is_what_noise_reaches_in_sample(groups: int, tolerance: float) -> None:
    generator = np.random.default_rng(0)
    n, values = 400, []
    member = np.arange(2 * n) < n
    labels = np.arange(2 * n) % groups
    for _ in range(60):
        scores = generator.normal(size=2 * n)
        decided = decide(scores, best_thresholds(scores, member, labels), labels)
        values.append(balanced_accuracy(decided, member))
    assert np.mean(values) == pytest.approx(null_floor(n, n, groups), abs=tolerance)


def test_the_floors_of_the_reference() -> None:
    assert [round(100 * null_floor(10_000, 10_000, k), 1) for k in (1, 10, 100)] == [50.4, 51.4, 54.4]


def test_noise_gives_epsilon_zero() -> None:
    positive = 0
    for seed in range(400):
        generator = np.random.default_rng(seed)
        positive += one_run_epsilon(generator.normal(size=200), generator.random(200) < 0.5, 100) > 0
    assert positive <= 0.05 * 400 + 3 * math.sqrt(400 * 0.05 * 0.95)
    assert positive > 0  # it is a test of level 5 %, and not one that never speaks


def test_epsilon_of_randomised_response() -> None:
    """Each point's coin is told truly with probability e/(1+e): epsilon 1, exactly, and the bound comes near."""
    bounds = []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        member = generator.random(4000) < 0.5
        told = np.where(generator.random(4000) < 1 / (1 + math.exp(-1)), member, ~member)
        bounds.append(one_run_epsilon(told + 0.0, member, 2000))
    assert sum(b > 1 for b in bounds) <= 3
    assert np.median(bounds) > 0.75


def test_epsilon_counts_guesses_at_both_ends() -> None:
    member = np.arange(1000) >= 500
    scores = np.arange(1000.0)
    assert one_run_epsilon(scores, member, 1000) == pytest.approx(
        math.log(0.05 ** (1 / 1000) / (1 - 0.05 ** (1 / 1000)))
    )
    # Wrong: three of the highest 50 and four of the lowest; between them nobody is guessed.
    member[[0, 10, 20, 49]] = True
    member[[950, 960, 999]] = False
    member[400:600] = ~member[400:600]
    bound = one_run_epsilon(scores, member, 100)
    # Theorem 5.2 of Steinke et al.: there the probability of as many right guesses is 5 %.
    assert binom.sf(92, 100, 1 / (1 + math.exp(-bound))) == pytest.approx(0.05)
    assert one_run_epsilon(-scores, member, 100) == 0.0
    with pytest.raises(ValueError, match=r"Expected guesses=1001 in \[2, 1000\]"):
        one_run_epsilon(scores, member, 1001)


def test_a_report_of_several_models() -> None:
    rows = [gaussians(500, shift, seed) for seed, shift in enumerate((0.5, 1.0, 1.5, 1.0))]
    scores, member = np.stack([s for s, _ in rows]), np.stack([m for _, m in rows])
    found = pooled_audit(scores, member, {"first": np.arange(1000) % 10 == 0}, guesses=100)
    areas = [auc(s, m) for s, m in rows]
    assert found.auc.value == pytest.approx(np.mean(areas))
    assert found.auc.low is not None
    half = 3.182446305 * np.std(areas, ddof=1) / 2  # Student's t with 3 degrees of freedom
    assert found.auc.value - found.auc.low == pytest.approx(half)
    assert found.tpr[0.01].value == tpr(scores.ravel(), member.ravel())[0.01].value
    # Whole models are resampled, each with its points: with a generator of our own, to the error of a thousand samples.
    drawn = np.random.default_rng(1).integers(0, 4, (1000, 4))
    resampled = [tpr(scores[rows].ravel(), member[rows].ravel())[0.01].value for rows in drawn]
    ends = np.quantile(resampled, [0.025, 0.975])
    assert [found.tpr[0.01].low, found.tpr[0.01].high] == pytest.approx(ends, abs=0.03)
    assert found.tpr[0.001].value is None
    assert (found.slices["first"].n, found.auc.n) == (4, 4)  # models, of which the interval speaks
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
