"""Verdicts follow from the figures: each rule is met from both sides."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from paper_fixtures import row, table

from raytrust.metrics.statistics import Figure
from raytrust.studies.membership.row import MessageFigure
from raytrust.studies.paper.claims import COMPRESSED, inversion_claims, theory_claims
from raytrust.studies.paper.membership_claims import membership_claims
from raytrust.studies.paper.selection import AWARE, NAIVE, WORST
from raytrust.studies.paper.verdicts import Table, above_zero, protection, share
from raytrust.studies.published import CELLS, TABLE_1


def verdicts(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {claim.quote.split(":")[0][:40] + str(i): claim.verdict for i, claim in enumerate(inversion_claims(rows))}


def test_a_sign_is_decided_by_all_intervals_or_by_one_that_allows_for_their_number() -> None:
    up, down, open_ = np.array([1.0, 1.1, 0.9, 1.0]), np.array([-1.0, -1.1, -0.9, -1.0]), np.array([-1.0, 1, -1, 1.2])
    assert above_zero([up, up]) == "reproduced"
    assert above_zero([up, open_]) == "not decided at this sample size"
    assert above_zero([up, down]) == "overturned"
    assert above_zero([]) == "not tested"
    weak = np.array([-1.0, -0.3, -0.6, -0.2, -0.9])  # below 0 by itself, but not among a thousand
    assert above_zero([weak]) == "overturned"
    assert above_zero([weak] + [up] * 999) == "not decided at this sample size"


def test_noise_is_hardly_ever_decided() -> None:
    generator = np.random.default_rng(1)
    found = [above_zero([generator.standard_normal(5) for _ in range(10)]) for _ in range(400)]
    assert found.count("reproduced") == 0
    assert found.count("overturned") / len(found) < 0.06  # 2.5 % in truth


def test_a_share_covers_the_truth() -> None:
    generator, hits = np.random.default_rng(2), 0
    for _ in range(400):
        whole = 0.5 + 0.1 * generator.standard_normal(6)
        found = share(0.4 * whole + 0.02 * generator.standard_normal(6), whole)
        assert found is not None
        hits += found[1] <= 0.4 <= found[2]
    assert hits / 400 == pytest.approx(0.95, abs=0.04)
    assert share(np.ones(1), np.ones(1)) is None


def test_protection_that_holds_that_only_seems_and_that_is_none() -> None:
    held, seeming, none = (Table(table(*means)) for means in ((0.05, 0.1), (0.05, 0.4), (0.45, 0.45)))
    cell = ("powersgd", 1)
    assert protection(held, "cifar10", cell)[0] == "protects"
    assert protection(seeming, "cifar10", cell)[0] == "only seems to"
    assert protection(none, "cifar10", cell)[0] == "does not protect"
    assert protection(Table(table(0.05, 0.4, n=3, noise=0.3)), "cifar10", cell)[0] == "not decided"


def test_a_leakier_victim_does_not_hide_what_is_left_at_the_paper_s() -> None:
    """40 % at worst, of another victim's SSIM, is no protection where 90 % are left at the paper's."""
    leakier = {"none": 1.0, "powersgd": 0.4, "topk": 0.4}
    rows = [
        r | row("cifar10", cell, WORST, 10 * [leakier[cell[0]]]) if r["attack"] == WORST else r
        for r in table(0.05, 0.45)
        for cell in [(r["compressor"], r["rank_or_level"])]
    ]
    verdict, text = protection(Table(rows), "cifar10", ("powersgd", 1))
    assert verdict == "only seems to"
    assert "91 % [90, 92] at worst: 0.45 of 0.50" in text


def test_resistance_and_its_size() -> None:
    strong = inversion_claims(table(0.05, 0.45))
    assert strong[0].verdict == "reproduced"
    assert strong[1].verdict == "overturned"  # the paper leaves at most 39 % on CIFAR-10, the aware attack 90 %
    assert inversion_claims(table(0.6, 0.6))[0].verdict == "overturned"
    assert inversion_claims(table(0.05, 0.45, n=2, noise=0.2))[0].verdict != "reproduced"


def test_figures_like_the_paper_s_are_reproduced() -> None:
    rows, generator = [], np.random.default_rng(3)
    for cell in CELLS:
        mean = TABLE_1["cifar10"][cell].mean
        for attack in (NAIVE, AWARE):
            rows.append(row("cifar10", cell, attack, (mean * (1 + 0.1 * generator.standard_normal(10))).tolist()))
    found = [claim.verdict for claim in inversion_claims(rows)]
    assert found[:3] == ["reproduced", "reproduced", "reproduced"]
    assert found[4] == "reproduced"
    assert found[6] == "not tested"  # MNIST is missing


def test_an_attack_that_fails_without_compression_decides_nothing() -> None:
    """It must beat the floor and identify half of the images, as everywhere (`raytrust.metrics.verdict`)."""
    rows = [r | {"identified": 4 * [True] + 6 * [False]} for r in table(0.05, 0.45)]
    assert {claim.verdict for claim in inversion_claims(rows)} == {"not tested"}
    assert "left out" in inversion_claims(rows)[0].evidence
    assert protection(Table(rows), "cifar10", ("topk", 1))[0] == "not decided"
    note = "the attack fails on uncompressed images (without compression: SSIM 0.50 (n = 10), +0.40 ["
    assert note in inversion_claims(rows)[0].evidence
    assert Table([r | {"identified": 5 * [True] + 5 * [False]} for r in rows]).datasets == ["cifar10"]
    assert Table([r | {"floor": [0.6] * 10} for r in table(0.05, 0.45)]).datasets == []


def test_what_is_not_finished_decides_nothing() -> None:
    rows = table(0.05, 0.45)
    left = [r | {"status": "not finished"} if r["compressor"] == "topk" else r for r in rows]
    assert {claim.verdict for claim in inversion_claims(left)} == {"not tested"}
    assert "CIFAR-10 left out: not finished" in inversion_claims(left)[0].evidence
    assert protection(Table(left), "cifar10", ("topk", 1))[0] == "not finished"
    assert protection(Table(left), "cifar10", ("powersgd", 1)) == protection(Table(rows), "cifar10", ("powersgd", 1))


def test_a_claim_about_every_data_set_waits_for_all_of_them() -> None:
    rows = table(0.05, 0.45, dataset="mnist", plain=0.9) + table(0.05, 0.45)
    assert [c.verdict for c in inversion_claims(rows)][:2] == ["reproduced", "overturned"]
    begun = [
        r | {"status": "not finished"} if r["dataset"] == "cifar10" and r["rank_or_level"] == 50 else r for r in rows
    ]
    for claim in inversion_claims(begun):
        assert claim.verdict in ("not decided at this sample size", "not tested")
        assert "CIFAR-10 left out: not finished" in claim.evidence
    assert inversion_claims(begun)[0].verdict == "not decided at this sample size"


def test_a_comparison_of_data_sets_needs_attacks_that_work_on_both() -> None:
    cifar, mnist = table(0.05, 0.45), table(0.3, 0.5, dataset="mnist", plain=0.9)
    assert inversion_claims(cifar + mnist)[6].verdict == "reproduced"
    blind = [r | {"identified": 10 * [False]} for r in mnist]
    assert inversion_claims(cifar + blind)[6].verdict == "not tested"
    assert "MNIST left out" in inversion_claims(cifar + blind)[6].evidence


def test_an_uncompressed_attack_that_failed_is_not_called_one_that_finds_nothing() -> None:
    rows = [
        r | {"status": "failed", "reason": "it diverged", "ssim": None, "identified": None}
        if (r["compressor"], r["attack"]) == ("none", NAIVE)
        else r
        for r in table(0.05, 0.45)
    ]
    assert Table(rows).notes == ["CIFAR-10 left out: the uncompressed attack failed (it diverged)"]


def test_failed_cells_count_for_nothing() -> None:
    rows = [r if r["compressor"] == "none" else r | {"status": "failed", "ssim": None} for r in table(0.05, 0.45)]
    assert inversion_claims(rows)[0].verdict == "not tested"


def theory_row(cell: Any, dataset: str = "cifar10", **changes: float) -> dict[str, Any]:
    figures = {"cosine": 0.6, "attainable": 0.6, "error": 0.64, "from_error": 0.6, "discarded": 0.64, "svd": 0.64}
    figures |= {"naive_at_truth": 0.4, "aware_at_truth": 1e-7, "naive_reached": 0.7, "aware_reached": 0.9}
    if cell[0] == "none":
        figures = dict.fromkeys(figures, 0.0) | {"cosine": 1.0, "attainable": 1.0, "from_error": 1.0}
    return {"cell": cell, "dataset": dataset} | {name: [value] for name, value in (figures | changes).items()}


def test_theory() -> None:
    rows = [theory_row(cell) for cell in CELLS]
    assert [c.verdict for c in theory_claims(rows, {})] == ["reproduced", "overturned"]
    assert "the naive one in 10 of 10" in theory_claims(rows, {})[1].evidence
    broken = [*rows, theory_row(("topk", 1), discarded=0.5)]
    assert theory_claims(broken, {})[0].verdict == "not reproduced"
    below = [*rows, theory_row(("powersgd", 1), discarded=0.7, svd=0.7)]  # better than the best of its rank
    assert theory_claims(below, {})[0].verdict == "not reproduced"
    bound = [theory_row(CELLS[0]), *(theory_row(cell, aware_at_truth=0.1) for cell in COMPRESSED)]
    assert theory_claims(bound, {})[1].verdict == "not decided at this sample size"
    assert theory_claims([], {}) == []  # nothing was asked for


def test_section_3_is_decided_on_data_sets_that_are_whole() -> None:
    rows = [theory_row(cell) for cell in CELLS]
    for claim in theory_claims(rows, {"cifar10": ["not finished"]}):  # each method was met, but not every step
        assert claim.verdict == "not tested"
        assert claim.evidence == "CIFAR-10 left out: of its tests, 1 not finished"
    broken = [theory_row(cell, "mnist", discarded=0.5, aware_at_truth=0.5) for cell in CELLS]
    found = theory_claims([*rows, *broken], {"cifar10": [], "mnist": ["not finished", "it broke", "it broke"]})
    assert [claim.verdict for claim in found] == ["reproduced", "overturned"]
    assert all("MNIST left out: of its tests, 1 not finished, 2 failed (it broke)" in c.evidence for c in found)


def audit_row(name: str, loss: float, messages: float, half: float = 0.01) -> dict[str, Any]:
    interval = {"low": loss - half, "high": loss + half}
    of_step = {"step": 0, "control": "held-out points", "score": "gradient difference"}
    message = MessageFigure(messages, messages - half, messages + half, **of_step)
    final = {"loss": SimpleNamespace(auc=Figure(loss, **interval))}
    return {"name": name, "status": "finished", "final": final, "messages": [message]}


def test_membership() -> None:
    names = [
        "none",
        *(f"PowerSGD rank {r} + EF" for r in (1, 2)),
        *(f"Top-K (bytes of rank {r}) + EF" for r in (1, 2, 4, 30, 50)),
    ]
    alike = [audit_row(n, 0.6, 0.8) for n in names]
    assert [c.verdict for c in membership_claims({"cifar10": alike})] == ["reproduced", "overturned", "not tested"]
    lower = [audit_row(n, 0.6 if n == "none" else 0.5, 0.6) for n in names]
    assert membership_claims({"cifar10": lower})[0].verdict == "overturned"
    wide = [audit_row(n, 0.6, 0.6, half=0.2) for n in names]
    assert [c.verdict for c in membership_claims({"cifar10": wide})[:2]] == ["not decided at this sample size"] * 2
    high = [audit_row(n, 0.5 if n in names[-2:] else 0.6, 0.8) for n in names]
    assert membership_claims({"cifar100": high})[2].verdict == "reproduced"
    low = [audit_row(n, 0.5 if n in names[-5:-2] else 0.6, 0.8) for n in names]
    assert membership_claims({"cifar100": low})[2].verdict == "overturned"
    assert membership_claims({}) == []
    begun = membership_claims({"cifar10": alike, "cifar100": [low[0], low[1] | {"status": "not finished"}]})
    assert [c.verdict for c in begun] == ["not decided at this sample size"] * 2 + ["not tested"]
    assert all("CIFAR-100 left out: not finished" in c.evidence for c in begun[:2])
    assert "CIFAR-100: not finished." in begun[2].evidence
    broken = membership_claims({"cifar10": alike, "mnist": [alike[0] | {"status": "failed"}, *alike[1:]]})
    assert broken[0].verdict == "reproduced"
    assert "MNIST left out: uncompressed SGD failed" in broken[0].evidence
