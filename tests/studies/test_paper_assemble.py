"""What a report says of a run of which only some is done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from paper_fixtures import MICRO, digits, fill, table

from raytrust.jobs.store import JobStore
from raytrust.reports.html import render
from raytrust.reports.outbox import Outbox
from raytrust.reports.paper.answer import first_screen, means
from raytrust.reports.paper.write import page
from raytrust.studies.membership.row import Rule
from raytrust.studies.paper.assemble import Report, assemble
from raytrust.studies.paper.rows import membership_rows
from raytrust.studies.paper.selection import AWARE, NAIVE, WORST, Plan, chosen, plan_for, worst_attacks
from raytrust.studies.paper.study import PaperConfig, PaperStudy
from raytrust.studies.published import CELLS, TABLE_1

OPEN = CELLS[1]  # of which the naive attack is missing


@pytest.fixture
def partial(tmp_path: Path) -> tuple[Path, Plan, JobStore]:
    """All of table 1 but the naive attack on one cell."""
    data = digits()
    plan, store = plan_for("mnist", data, MICRO, None, 0), JobStore(tmp_path, data.fingerprint())
    for units in plan.search().values():
        fill(store, units, TABLE_1["mnist"]["none", None].mean)
    settings = chosen(store, plan)
    assert not isinstance(settings, str)
    for (cell, kind), units in plan.table(settings[0]).items():
        if (cell, kind) != (OPEN, NAIVE):
            fill(store, units, 0.3)
    for cell in CELLS:
        for units in plan.portfolio(settings[1], cell).values():
            fill(store, units, 0.9)
        worst = worst_attacks(store, plan, settings, cell)
        assert not isinstance(worst, str)
        fill(store, worst, 0.6)
    return tmp_path, plan, store


def report_of(root: Path) -> Report:
    return assemble(MICRO, (1,), None, 0, {"mnist": digits()}, root)


def test_the_worst_of_three_waits_for_the_three(partial: tuple[Path, Plan, JobStore]) -> None:
    root, plan, store = partial
    found = {(r["rank_or_level"], r["attack"]): r for r in report_of(root).table_1 if r["compressor"] == OPEN[0]}
    assert [found[OPEN[1], kind]["status"] for kind in (NAIVE, AWARE)] == ["not finished", "finished"]
    assert (found[OPEN[1], WORST]["status"], found[OPEN[1], WORST]["ours"]) == ("not finished", None)
    assert found[2, WORST]["ours"] == pytest.approx(0.6)
    settings = chosen(store, plan)
    assert not isinstance(settings, str)
    fill(store, plan.table(settings[0])[OPEN, NAIVE], 0.7)
    row = report_of(root).row("mnist", OPEN, WORST)
    assert row is not None
    assert row["ours"] == pytest.approx(0.7)  # the naive one is the greatest


def test_only_whole_cells_are_logged(partial: tuple[Path, Plan, JobStore]) -> None:
    from raytrust.cli.paper import _log

    logged: dict[str, dict[str, float]] = {}

    class Tracker:
        errors = (OSError,)

        def expect_server(self) -> None:
            pass

        def measured(self, key: str, name: str, parameters: Any, metrics: dict[str, float], reason: str) -> None:
            assert reason == ""
            logged[name] = metrics

    tracker: Any = Tracker()
    report = report_of(partial[0])
    _log(tracker, Outbox(tracker, print), report)
    assert len(logged) == len(CELLS) - 1
    assert f"MNIST {OPEN[0]} {OPEN[1]}" not in logged
    for cell in CELLS:
        if cell != OPEN:  # each with its own figures
            assert logged.pop(" ".join(str(part) for part in ("MNIST", *cell) if part)) == report.metrics("mnist", cell)
    assert logged == {}


def test_what_failed_is_not_left_to_do(partial: tuple[Path, Plan, JobStore]) -> None:
    root, plan, store = partial
    settings = chosen(store, plan)
    assert not isinstance(settings, str)
    study = PaperStudy(PaperConfig(MICRO, datasets=("mnist",)), {"mnist": digits()}, root, print)
    naive = store.missing(plan.table(settings[0])[OPEN, NAIVE])
    models = [job for job in study.left() if job.kind == "models"]
    assert set(study.left()) == {*naive, *plan.theory().values(), *models}
    for attacks in plan.portfolio(settings[1], OPEN).values():
        for attack in attacks:
            store.folder(attack).with_suffix(".json").unlink(missing_ok=True)
            store.fail(attack, "it diverged")
    store.fail(models[0], "it diverged")
    assert set(study.left()) == {*store.missing(naive), *plan.theory().values(), *models[1:]}


def test_failures_are_forgotten_together(tmp_path: Path) -> None:
    """Those of models, too, before any job is done: what is left is known at once."""
    study = PaperStudy(PaperConfig(MICRO, datasets=("mnist",)), {"mnist": digits()}, tmp_path, print)
    (store,) = study.stores
    left = study.left()
    for job in (left[0], left[-1]):
        store.fail(job, "it diverged")
    assert len(study.left()) == len(left) - 2
    store.clear_failures()
    assert study.left() == left


def test_table_1_alone_needs_no_images_for_an_audit(tmp_path: Path) -> None:
    few = replace(digits(), train_images=digits().train_images[:3], train_labels=digits().train_labels[:3])
    config = PaperConfig(MICRO, datasets=("mnist",))
    with pytest.raises(ValueError, match="Expected"):
        PaperStudy(config, {"mnist": few}, tmp_path, print)
    run = PaperStudy(replace(config, tables=(1,)), {"mnist": few}, tmp_path, print)
    assert run.left()
    assert not (tmp_path / "membership-mnist").exists()


def test_means_are_over_the_same_cells() -> None:
    rows = table(0.1, 0.2, noise=0.0)
    report = Report(MICRO, 0, ("cifar10",), (1,), table_1=rows)
    assert "mean SSIM over cells: 0.10 to the attack as in the paper, 0.20 to one" in means(report)
    for row in rows:
        if (row["compressor"], row["rank_or_level"]) == OPEN:
            row |= {"ours": 0.9} if row["attack"] != WORST else {"ours": None, "ssim": None, "status": "not finished"}
    begun = Report(MICRO, 0, ("cifar10",), (1,), table_1=[r for r in rows if r["attack"] != WORST])
    assert "CIFAR-10, in no cell are all three attacks finished; without compression 0.50" in means(begun)
    text = "mean SSIM over the 9 of 10 cells with all three: 0.10 to the attack as in the paper, 0.20 to one"
    assert text in means(report)


def first(report: Report) -> str:
    return render("paper_first", first=first_screen(report), citation="")


def test_the_first_screen_says_where_the_attack_fails_without_compression() -> None:
    rows = table(0.05, 0.45)
    said = "nothing can be said about any defence there"
    assert said not in first(Report(MICRO, 0, ("cifar10",), (1,), table_1=with_n(rows)))
    blind = [r | {"identified": [False] * len(r["ssim"])} for r in rows]
    screen = first(Report(MICRO, 0, ("cifar10",), (1,), table_1=with_n(blind)))
    assert said in screen
    assert "0 of 10 identified among 100" in screen
    assert "10 cells" in screen  # none of which is decided
    assert "Of 10 defences, 0 protect" in screen


def test_a_reason_is_text_and_no_markup(partial: tuple[Path, Plan, JobStore]) -> None:
    """Whatever an attack, a file or a class is called."""
    report = report_of(partial[0])
    for row in report.table_1:
        if row["attack"] == WORST:
            row.update(status="failed", reason="<script>alert('&')</script>")
    text = page(report, partial[0])
    assert "<script" not in text
    assert text.count("failed: &lt;script&gt;alert(&#39;&amp;&#39;)&lt;/script&gt;") == len(CELLS)


def with_n(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r | {"n": len(r["ssim"]), "bytes_per_step": None} for r in rows]


def test_no_rule_is_the_nearest_until_the_audit_is_finished() -> None:
    def line(cell: Any, status: str) -> dict[str, Any]:
        compressor = {"method": cell[0], "rank": cell[1]} if cell[0] != "topk" else None
        if cell[0] == "topk":
            compressor = {"method": "topk", "equal_to_rank": cell[1]}
        signals = ("confidence", "loss", "entropy")
        grid = [Rule(0.6, 0.5, 0.7, signal=s, per_class=False, origin="shadow") for s in signals]
        return {"name": str(cell), "arm": {"compressor": compressor}, "status": status, "models": 4, "grid": grid}

    whole = [line(cell, "finished") for cell in CELLS]
    assert sum(bool(r["nearest"]) for r in membership_rows("mnist", whole, CELLS, "")) == 3 * len(CELLS)
    begun = [*whole[:-1], line(CELLS[-1], "not finished")]
    rows = membership_rows("mnist", begun, CELLS, "")
    assert not any(r.get("nearest") for r in rows)
