"""What a measured leakage allows one to say: each rule is met from both sides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from raytrust.metrics.statistics import bootstrap_interval
from raytrust.metrics.verdict import (
    LEAKS,
    NO_CONTROL,
    RESISTS,
    UNDECIDED,
    Control,
    Evidence,
    beyond_chance,
    control_of,
    floor_of_images,
    image_evidence,
    judge,
)

WORKS = Control(True, "")
LEAK = Evidence(0.8, floor=0.4, interval=(0.2, 0.6), n=8, identified=8, candidates=100)
NO_LEAK = replace(LEAK, value=0.3, interval=(-0.2, -0.05), identified=0)


def test_the_evidence_of_images_is_paired_with_the_greater_floor() -> None:
    ssim, mean_image, other = [0.5, 0.7, 0.6], [0.1, 0.6, 0.2], [0.3, 0.1, 0.2]
    found = image_evidence(ssim, mean_image, other, [True, True, False], 100)
    assert (found.value, found.floor, found.n) == pytest.approx((0.6, 0.3, 3))
    assert (found.identified, found.candidates) == (2, 100)
    assert found.interval == bootstrap_interval(np.subtract(ssim, mean_image))
    assert found.excess == pytest.approx(0.3)
    assert image_evidence(ssim, other, mean_image, None, 1).floor == found.floor  # which of the two is no matter


def test_evidence_without_floors_or_of_one_image_has_no_interval() -> None:
    bare = image_evidence([0.5, 0.6], None, None, None, 1)
    assert (bare.floor, bare.excess, bare.interval) == (None, None, None)
    single = image_evidence([0.9], [0.1], [0.1], [True], 100)
    assert single.interval is None
    for evidence in (bare, single):
        assert judge(evidence, WORKS).verdict == UNDECIDED
        assert not control_of(evidence).works
    assert floor_of_images(None, [0.2]) == [0.2]


@pytest.mark.parametrize("lists", [([], [], [], []), ([0.1, 0.2], [0.1], [0.1], [True])])
def test_evidence_of_lists_that_do_not_fit_is_refused(lists: tuple[list[float], ...]) -> None:
    with pytest.raises(ValueError, match="Expected figures of at least one image and of equal length"):
        image_evidence(*lists, candidates=100)  # type: ignore[arg-type]


def test_identification_is_beyond_chance_by_a_binomial_test() -> None:
    assert beyond_chance(1, 1, 100)  # p = 0.01
    assert not beyond_chance(1, 4, 100)  # p = 0.039
    assert beyond_chance(2, 8, 100)  # p = 0.0027
    assert not beyond_chance(0, 8, 100)
    assert not beyond_chance(8, 8, 1)


@pytest.mark.parametrize(
    ("change", "works"),
    [
        ({}, True),
        ({"identified": 4}, True),  # half
        ({"identified": 3}, False),  # beyond chance, but too few to call the attack one that works
        ({"identified": 4, "candidates": 3}, False),  # half, but not beyond chance
        ({"interval": (-0.01, 0.6)}, False),
        ({"interval": (0.0, 0.6)}, False),
        ({"interval": None, "n": 1, "identified": 1}, False),
        ({"floor": None, "interval": None}, False),
        ({"identified": None}, True),  # of a measure without identification
    ],
)
def test_a_control_works_if_it_beats_the_floor_and_identifies_half(change: dict, works: bool) -> None:
    control = control_of(replace(LEAK, **change))
    assert control.works == works
    assert control.reason.startswith("without compression: SSIM 0.80 (n = ")


def test_no_control_is_one_that_fails() -> None:
    assert control_of(None) == NO_CONTROL
    assert not NO_CONTROL.works


@pytest.mark.parametrize(
    ("change", "works", "verdict"),
    [
        ({}, True, RESISTS),
        ({"interval": (-0.2, 0.0)}, True, RESISTS),
        ({"interval": (-0.2, 0.01)}, True, UNDECIDED),
        ({"interval": (0.01, 0.2)}, True, LEAKS),
        ({"identified": 2}, True, LEAKS),  # though the SSIM lies below the floor
        ({"identified": None}, True, RESISTS),
        ({}, False, UNDECIDED),  # nothing is private by an attack that fails
        ({"interval": (0.01, 0.2)}, False, LEAKS),  # evidence of a leak is evidence
        ({"identified": 2}, False, LEAKS),
        ({"floor": None, "identified": 8}, True, UNDECIDED),
        ({"n": 1, "identified": 1, "interval": None}, True, UNDECIDED),
    ],
)
def test_a_verdict_follows_from_the_evidence_and_the_control(change: dict, works: bool, verdict: str) -> None:
    judgement = judge(replace(NO_LEAK, **change), Control(works, "why"))
    assert judgement.verdict == verdict
    assert "\n" not in judgement.reason
    assert "SSIM 0.30 (n = " in judgement.reason


def test_the_rule_serves_other_measures() -> None:
    """Membership: an AUC above 0.5, over models, without identification."""
    auc = Evidence(0.61, floor=0.5, interval=(0.06, 0.16), n=8, measure="AUC")
    assert control_of(auc).works
    assert str(auc) == "AUC 0.61 (n = 8), +0.11 [+0.06, +0.16] over the floor 0.50"
    assert judge(replace(auc, value=0.49, interval=(-0.03, -0.001)), control_of(auc)).verdict == RESISTS
    assert judge(replace(auc, interval=(-0.01, 0.2)), control_of(auc)).verdict == UNDECIDED


def test_chance_rarely_leaks() -> None:
    """Reconstructions that know nothing of the images: their SSIM is that of other images."""
    generator, verdicts = np.random.default_rng(0), []
    for _ in range(400):
        floor = generator.uniform(0.1, 0.5, 8)
        identified = generator.random(8) < 0.01
        ssim = floor + 0.1 * generator.standard_normal(8)
        verdicts.append(judge(image_evidence(ssim, floor, floor - 0.2, identified, 100), WORKS).verdict)
    assert verdicts.count(LEAKS) / 400 < 0.06  # 2.5 % by the interval, 0.3 % by identification
