"""A sweep's answer in words."""

from __future__ import annotations

import pytest
from frontier_rows import audited, control, failed, finished, sweep

from raytrust.config import LocalConfig
from raytrust.reports.summary import (
    answer,
    control_sentence,
    headline,
    remarks_of,
    seeming,
    summary_lines,
    threat_sentence,
)
from raytrust.studies.frontier.verdicts import control_of_rows, judge_rows, only_looks_private, starkest


@pytest.mark.parametrize(
    "plain", [[], [control(works=False)], [failed("none") | {"compressor": "none"}], [control(excess_interval=None)]]
)
def test_nothing_is_private_where_the_attack_fails(plain):
    rows = judge_rows([*plain, finished("private", leakage=0.05), finished("leaky", leakage=0.7)])
    found = {row["name"]: row for row in rows}
    assert found["private"]["verdict"] == "undecided"
    assert found["leaky"]["verdict"] == "leaks"  # evidence of a leak is evidence
    assert not any(row["pareto"] or row["control"] for row in rows)
    assert "nothing can be said about any defence, but that 1 leaks" in control_sentence(rows)


def test_an_attack_that_leaks_but_does_not_work_is_called_weak():
    """Six of eight are identified, but the SSIM isn't surely above the floor: it fails as a control, yet it leaks."""
    weak = control(works=False, identified=6)
    rows = judge_rows([weak, finished("private", leakage=0.05), finished("leaky", leakage=0.7)])
    assert [row["verdict"] for row in rows] == ["leaks", "undecided", "leaks"]
    assert not rows[0]["control"]
    sentence = control_sentence(rows)
    assert sentence.startswith(
        "The attack is too weak here: nothing can be called private, and 2 leak; give it more (--"
    )
    assert headline(rows) == "Of 2 defences, 1 leaks; of the other 1 nothing can be said."
    assert headline(judge_rows([weak])) == "No defence was audited beside the control."


def test_a_defence_that_only_looks_private_is_named():
    rows = judge_rows(audited())
    assert starkest(rows)["name"] == "PowerSGD rank 1"
    assert seeming(rows) == (
        "PowerSGD rank 1 looks private to an attacker who ignores the compressor (SSIM 0.12), and leaks to one who "
        "knows it (0.72; floor 0.20)."
    )
    by_name = {row["name"]: row for row in rows}
    works = control_of_rows(rows)
    assert not only_looks_private(by_name["PowerSGD rank 30"], works)  # the naive attack shows it, too
    assert not only_looks_private(by_name["ATOMO 1"], works)
    assert not only_looks_private(by_name["none"], works)
    assert seeming(judge_rows([control()])) is None


def test_without_such_a_defence_the_greatest_certain_gain_is_named():
    def gain(name, aware, interval):  # the naive attack identifies all of its images
        return finished(name, leakage=aware, naive_ssim=0.35) | {"aware_gain_interval": interval}

    rows = [control(), gain("certain", 0.6, [0.1, 0.4]), gain("uncertain", 0.8, [-0.1, 0.9])]
    assert starkest(judge_rows(rows))["name"] == "certain"
    said = "certain shows SSIM 0.35 to an attacker who ignores the compressor, and 0.60 to one who knows it."
    assert seeming(judge_rows(rows)) == said
    assert seeming(judge_rows([rows[0], rows[2]])) is None


def test_an_accuracy_that_is_worth_little_is_remarked():
    none, ruined = control(), finished("ruined", accuracy=0.6)
    assert remarks_of(ruined, [none, ruined]) == ["accuracy 34 points below training without compression"]
    chance = finished("chance", accuracy=0.11)
    assert remarks_of(chance, [none, chance], classes=10) == ["accuracy near chance (10 %)"]
    assert remarks_of(finished(), [none, finished()], classes=10) == []
    assert remarks_of(none, [none], classes=10) == []
    assert remarks_of(failed() | {"remarks": ["kept"]}, [none]) == ["kept"]


def test_the_answer_is_three_lines():
    lines = summary_lines(audited(), "results/report.html")
    assert len(lines) == 3
    assert all("\n" not in line for line in lines)
    assert lines[0].startswith("Leaks: 8 of 10, Top-K level 1 (91.4 %, 12.3 kB a step), ")
    assert "resists the attacks tried: 1 of 10, ATOMO 1 (60.0 %, 9.0 kB a step)" in lines[0]
    assert "undecided: 1 of 10, signSGD" in lines[0]
    assert lines[0].endswith("; failed: 1.")
    assert lines[1].startswith("Control: the attack works without compression: SSIM 0.80 (n = 8), +0.60 [")
    assert lines[2].endswith("results/report.html")


def test_the_answer_calls_nothing_private_where_the_attack_fails():
    rows = [control(works=False), *sweep(6)]
    words = " ".join(summary_lines(rows, "p"))
    assert "resists" not in words
    assert "The attack fails here: nothing can be said about any defence" in words
    judged = judge_rows(rows)
    assert headline(judged) == "Of 6 defences, 2 leak; of the other 4 nothing can be said."
    working = "Of 10 defences, 8 leak, 1 resists the attacks tried, 1 undecided; 1 failed."
    assert headline(judge_rows(audited())) == working


def test_the_answer_of_nothing():
    assert answer(judge_rows([failed()])) == "Failed: 1."
    assert answer([]) == "No defence finished."


def test_a_threat_in_words():
    words = threat_sentence({"vantage": "link", "batch_size": 1, "batch_norm": "eval", "labels": "known", "history": 0})
    assert words == (
        "The attacker sees what one worker sends in one training step, made from one private image, knows the model "
        "and its weights, knows the labels, and batch norm is in evaluation mode."
    )
    other = {"vantage": "peer", "batch_size": 4, "batch_norm": "train", "labels": "unknown", "history": 2, "noise": 0.1}
    words = threat_sentence(other)
    parts = ("collective returns", "4 private images", "does not know the labels", "training mode", "2 steps before")
    for part in parts:
        assert part in words
    assert words.endswith(" noise: 0.1.")
    proxy = threat_sentence({"batch_norm": "train", "batch_statistics": "proxy", "auxiliary": 64})
    assert proxy.endswith("with 64 other images of the kind at hand, from which it estimates the batch's statistics.")
    assert "with statistics unknown to the attacker" in proxy
    local = threat_sentence({"local": LocalConfig(4, 0.1, 2).title})
    assert "in one training step of 4 local steps of 2 images, learning rate 0.1, made from" in local
