"""Verdicts of a sweep's rows, and its Pareto set."""

from __future__ import annotations

import json

from frontier_rows import audited, control, failed, finished

from raytrust.studies.frontier.verdicts import control_of_rows, judge_rows


def verdicts(rows):
    return {row["name"]: row["verdict"] for row in judge_rows(rows)}


def test_verdicts_of_a_sweep_whose_attack_works():
    found = verdicts(audited())
    assert found["none"] == found["PowerSGD rank 1"] == "leaks"
    assert found["ATOMO 1"] == "resists"
    assert found["signSGD"] == "undecided"
    assert found["Top-K 0.01 %"] is None
    rows = judge_rows(audited())
    assert all(row["control"] is True for row in rows)
    json.dumps(rows, allow_nan=False)


def test_verdicts_are_computed_anew():
    stale = finished("private", leakage=0.05) | {"verdict": "resists", "control": True, "pareto": True}
    assert judge_rows([stale, control(works=False)])[0]["verdict"] == "undecided"


def test_rows_without_evidence_are_undecided():
    evidence = ("floor_ssim", "excess", "excess_interval", "identified", "candidates")
    old = [{k: v for k, v in row.items() if k not in evidence} for row in (control(), finished(leakage=0.05))]
    assert set(verdicts(old).values()) == {"undecided"}
    assert not control_of_rows(old).works


def test_the_control_of_several_is_the_one_that_leaks_most():
    rows = [control(works=False) | {"name": "none + EF"}, control()]
    assert control_of_rows(rows).works


def point(name, accuracy, leakage, wide=0.01):
    return finished(
        name,
        accuracy,
        leakage,
        accuracy_interval=[accuracy - wide, accuracy + wide],
        leakage_interval=[leakage - wide, leakage + wide],
    )


def members(rows):
    return {row["name"] for row in judge_rows([control(accuracy_interval=[0.0, 1.0]), *rows]) if row["pareto"]}


def test_a_row_is_out_if_another_is_surely_better_and_in_nothing_worse():
    rows = [
        point("private", 0.80, 0.1),
        point("accurate", 0.95, 0.6),
        point("surely worse in both", 0.70, 0.3),
        point("no more accurate, surely leakier", 0.80, 0.3),
        failed(),
    ]
    assert members(rows) - {"none"} == {"private", "accurate"}


def test_a_row_stays_as_long_as_the_intervals_overlap():
    rows = [point("better", 0.80, 0.1, wide=0.05), point("worse", 0.75, 0.15, wide=0.05)]
    assert members(rows) - {"none"} == {"better", "worse"}
    assert members([rows[0], point("worse", 0.75, 0.15, wide=0.001)]) - {"none"} == {"better", "worse"}
    assert members([point("better", 0.80, 0.1), rows[1] | {"leakage_interval": None, "accuracy_interval": None}]) >= {
        "worse"
    }


def test_a_better_value_in_one_does_not_make_up_for_the_other():
    assert members([point("a", 0.80, 0.1), point("b", 0.9, 0.11)]) >= {"a", "b"}
