"""A whole run at a tiny budget, without Ray: its files, that two runs agree, and what the command refuses."""

from __future__ import annotations

import csv
import importlib.util
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from paper_fixtures import MICRO, digits

from raytrust.config import Defence, InversionConfig, PowerSGDConfig, to_dict
from raytrust.jobs import runner
from raytrust.jobs.files import read_json
from raytrust.jobs.job import Job, Place, Result
from raytrust.jobs.store import JobStore
from raytrust.studies.paper.jobs import Attack
from raytrust.studies.paper.plan import Setting, Victim
from raytrust.studies.paper.rows import TABLE_1_COLUMNS, TABLE_2_COLUMNS, similarity_row, to_csv, with_percent
from raytrust.studies.paper.selection import NAIVE, WORST, Found
from raytrust.studies.paper.study import PaperConfig, PaperStudy, open_run
from raytrust.studies.published import CELLS

PROGRAM = Path(__file__).resolve().parents[2] / "sweeps" / "paper_tables.py"


@pytest.fixture(scope="module")
def program() -> ModuleType:
    specification = importlib.util.spec_from_file_location("paper_tables_program", PROGRAM)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def run(root: Path, **changes: Any) -> Any:
    from raytrust.cli.paper import run_paper

    hours = changes.pop("hours", None)
    config = replace(PaperConfig(MICRO, datasets=("mnist",)), **changes)
    data = {"mnist": digits()}
    open_run(root, config, data, {})
    return run_paper(config, data, root, spread=False, hours=hours)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("paper")
    run(root)
    return root


def hand_over(finished: Path, root: Path, keeps: Callable[[dict[str, Any]], bool] = lambda _: True) -> None:
    """Results of a finished run, of which others then make the rest."""
    dropped = 0
    for path in (p for kind in PaperStudy.kinds for p in (finished / kind).glob("*.json")):
        if not keeps(read_json(path)["job"]):
            dropped += 1
            continue
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        for file in path.parent.glob(f"{path.stem}.*"):
            shutil.copy2(file, root / path.parent.name)
    assert dropped


def test_every_cell_has_its_rows(finished: Path) -> None:
    rows = list(csv.DictReader(StringIO((finished / "table1.csv").read_text())))
    assert list(rows[0]) == list(TABLE_1_COLUMNS)
    assert list(rows[0])[:6] == [
        "dataset", "compressor", "rank_or_level", "ssim_mean", "ssim_std", "percent_of_original",
    ]  # fmt: skip
    assert len(rows) == 3 * len(CELLS)
    assert {r["status"] for r in rows} == {"finished"}
    assert {r["n"] for r in rows} == {"2"}
    assert rows[0]["ssim_mean"] == "0.8685"
    for row in rows:
        assert float(row["interval_low"]) <= float(row["ours"]) <= float(row["interval_high"])
    for naive, aware, worst in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert float(worst["ours"]) >= max(float(naive["ours"]), float(aware["ours"]))
    rules = list(csv.DictReader(StringIO((finished / "table2.csv").read_text())))
    assert list(rules[0]) == list(TABLE_2_COLUMNS)
    assert len(rules) == len(CELLS) * 6 * 2 * 3  # signals, thresholds, origins
    assert {r["nearest"] for r in rules} >= {"", "loss"}


def test_the_page_is_whole_and_needs_no_network(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert not re.search(r"(src|href)=.?https?:|@import|<script", page)
    for name in ("frontier", "theory", "figure1_mnist"):
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert page.count("data:image/png;base64,") == 3
    for heading in ("Table 1, MNIST", "Table 2, MNIST", "Section 3", "The paper's claims", "Only seems to"):
        assert heading in page.replace("&#x27;", "'")
    claims = read_json(finished / "results.json")["claims"]
    assert len(claims) == 12
    assert page.count('class="badge') == 12


def test_mlflow_holds_the_same(finished: Path) -> None:
    from raytrust.reports.mlflow import MlflowClient, default_uri

    client = MlflowClient(default_uri(finished))
    experiment = client.get_experiment_by_name("raytrust paper tables")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1 + len(CELLS)
    assert {r.info.status for r in runs} == {"FINISHED"}
    cell = next(r for r in runs if r.info.run_name == "MNIST powersgd 4")
    rows = read_json(finished / "results.json")["table_1"]
    ours = next(r for r in rows if (r["compressor"], r["rank_or_level"], r["attack"]) == ("powersgd", 4, NAIVE))
    assert cell.data.metrics["naive_ssim"] == pytest.approx(ours["ours"])


@pytest.mark.parametrize("refused", [True, False], ids=["refused", "away"])
def test_a_tracking_store_that_fails_at_the_end_leaves_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refused: bool
) -> None:
    from mlflow.protos.databricks_pb2 import PERMISSION_DENIED, TEMPORARILY_UNAVAILABLE

    from raytrust.reports import outbox
    from raytrust.reports.mlflow import MlflowClient, MlflowException

    def fail(*_: Any, **__: Any) -> None:
        raise MlflowException("no place for it", PERMISSION_DENIED if refused else TEMPORARILY_UNAVAILABLE)

    monkeypatch.setattr(MlflowClient, "log_artifact", fail)
    monkeypatch.setattr(outbox, "PATIENCE", 0.0)
    run(tmp_path, hours=1e-9)
    assert (tmp_path / "report.html").exists()
    said = [line for line in capsys.readouterr().out.splitlines() if "MLflow" in line]
    assert len(said) == 2
    assert said[0].endswith(": no place for it")
    assert said[1].endswith("--resume tries it again" if refused else "--resume sends it")


def test_a_resumed_run_does_nothing_twice(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ("attack", "theory", "models")
    before = {p: p.stat().st_mtime_ns for kind in kinds for p in (finished / kind).iterdir()}
    assert len(before) > 100
    table = (finished / "table1.csv").read_bytes()
    run(finished)
    assert {p: p.stat().st_mtime_ns for kind in kinds for p in (finished / kind).iterdir()} == before
    assert (finished / "table1.csv").read_bytes() == table
    assert " left" not in capsys.readouterr().out


def test_another_run_is_refused_the_directory(finished: Path) -> None:
    with pytest.raises(ValueError, match="to be empty or to hold this run"):
        run(finished, seed=1)


def test_a_job_that_fails_is_a_row_without_a_number(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_attack = Attack.run

    def breaks(self: Attack, store: Any, place: Place) -> Result:
        if self.defence.name == "PowerSGD rank 4" and self.attack.objective == "aware":
            raise FloatingPointError("All 1 restarts of the attack diverged.")
        return run_attack(self, store, place)

    monkeypatch.setattr(Attack, "run", breaks)
    hand_over(finished, tmp_path, lambda job: job.get("defence") != to_dict(Defence(PowerSGDConfig(4))))
    report = run(tmp_path, tables=(1,))
    (broken,) = [r for r in report.table_1 if r["status"] == "failed"]
    assert (broken["compressor"], broken["rank_or_level"], broken["ours"]) == ("powersgd", 4, None)
    assert "diverged" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "table2.csv").exists()


def test_a_data_set_whose_search_fails_does_not_end_the_run(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from raytrust.cli.paper import run_paper

    other = replace(digits(), name="cifar10", test_images=digits().test_images.flip(-1))
    data = {"cifar10": other, "mnist": digits()}
    run_attack, bad = Attack.run, data["cifar10"].fingerprint()

    def breaks(self: Attack, store: Any, place: Place) -> Result:
        if store.fingerprint == bad:
            raise FloatingPointError("All 1 restarts of the attack diverged.")
        return run_attack(self, store, place)

    monkeypatch.setattr(Attack, "run", breaks)
    hand_over(finished, tmp_path, lambda job: job.get("defence") != to_dict(Defence()))
    config = PaperConfig(MICRO, tables=(1,), datasets=("cifar10", "mnist"))
    open_run(tmp_path, config, data, {})
    report = run_paper(config, data, tmp_path, spread=False)
    found = {d: {(r["status"], r["reason"]) for r in report.table_1 if r["dataset"] == d} for d in data}
    assert found["cifar10"] == {("failed", "All 1 restarts of the attack diverged.")}
    assert found["mnist"] == {("finished", "")}
    assert {t["dataset"] for t in report.theory} == set(data)
    assert report.unfinished[0] == 0
    assert "search for the paper's setting failed" in (tmp_path / "report.html").read_text()
    assert "jobs are left" not in capsys.readouterr().out


# --- a run that is cut short ---


def statuses(root: Path, table: int = 1) -> list[str]:
    return [r["status"] for r in csv.DictReader(StringIO((root / f"table{table}.csv").read_text()))]


STOPS = (  # phase, kind of its jobs, how many of them are done before
    ("searching", "attack", 0),
    ("table 1: naive", "attack", 0),
    ("table 1: naive", "attack", 12),
    ("table 1: naive", "theory", 3),
    ("table 1: the worst case", "attack", 1),
    ("table 2", "models", 6),
)


def interrupt(context: pytest.MonkeyPatch, phase: str, kind: str, jobs: int) -> None:
    """Ctrl-C in this phase, when so many of its jobs were done."""
    phases, work, now = PaperStudy.phases, runner.work, [""]
    done: list[Job] = []

    def marked(self: PaperStudy) -> Any:
        for name, bundles in phases(self):
            now[0] = name.partition(", ")[2]
            yield name, bundles

    def counted(store: JobStore, batch: list[Job], place: Place) -> Any:
        if now[0].startswith(phase) and batch[0].kind == kind:
            if len(done) == jobs:
                raise KeyboardInterrupt
            done.extend(batch)
        return work(store, batch, place)

    context.setattr(PaperStudy, "phases", marked)
    context.setattr(runner, "work", counted)


def test_a_run_interrupted_in_every_phase_reports_what_is_finished_and_ends_in_the_same_tables(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    for phase, kind, jobs in STOPS:
        with monkeypatch.context() as context:
            interrupt(context, phase, kind, jobs)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path)
        assert "interrupted: " in capsys.readouterr().out
        rows = list(csv.DictReader(StringIO((tmp_path / "table1.csv").read_text())))
        assert len(rows) == 3 * len(CELLS)
        for row in rows:
            assert (row["ours"] == "") == (row["status"] == "not finished")
        page = (tmp_path / "report.html").read_text()
        assert "failed" not in page.lower()
        assert "Not finished: " in page
        claims = read_json(tmp_path / "results.json")["claims"]
        theory = {c["verdict"] == "not tested" for c in claims if c["quote"].startswith("Section 3")}
        found = [{r["status"] for r in some} for some in ([r for r in rows if r["attack"] != WORST], rows[2::3])]
        seen.append((*found, set(statuses(tmp_path, 2)), theory))
    some, none, all_ = {"finished", "not finished"}, {"not finished"}, {"finished"}
    assert seen == [  # naive and aware, worst case, table 2, whether section 3 is left open
        (none, none, none, {True}),
        (none, none, none, {True}),
        (some, none, none, {True}),
        (all_, seen[3][1], none, {True}),
        (all_, some, none, {False}),
        (all_, all_, some, {False}),
    ]
    assert "not finished" in seen[3][1]  # the chosen attack of a cell may be one that is done
    assert {r["nearest"] for r in csv.DictReader(StringIO((tmp_path / "table2.csv").read_text()))} == {""}
    run(tmp_path)
    for name in ("table1.csv", "table2.csv"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_a_run_whose_time_is_up_says_what_is_left(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(tmp_path, hours=1e-9)
    assert report.unfinished == (5 * len(CELLS), 5 * len(CELLS))
    text = capsys.readouterr().out
    left = re.search(r"time is up: (\d+) jobs are left, about [\d:]+", text)
    assert left is not None
    assert int(left[1]) > 100
    hand_over(finished, tmp_path, lambda job: job.get("defence") != to_dict(Defence()))
    assert run(tmp_path, hours=1.0).unfinished[0] == 0
    assert "jobs are left" not in capsys.readouterr().out


def test_one_data_set_after_another_and_table_1_first(tmp_path: Path) -> None:
    data = {"mnist": digits(), "cifar10": replace(digits(), name="cifar10")}
    study = PaperStudy(PaperConfig(MICRO, datasets=("mnist", "cifar10")), data, tmp_path, print)
    names = [name.split(",")[0] + name.partition(", ")[2][:8] for name, _ in study.phases()]  # nothing is done
    assert names == [t + what for t in ("MNIST", "CIFAR-10") for what in ("training", "searchin", "table 2:")]


def test_rows_as_csv() -> None:
    setting = Setting(Victim(width=4), InversionConfig("naive"))
    rows = [
        similarity_row(
            "cifar10", ("none", None), NAIVE, setting, Found([0.4, 0.6], bytes_per_step=8, gradient_bytes=8)
        ),
        similarity_row("cifar10", ("topk", 1), NAIVE, setting, Found([0.1, 0.1], bytes_per_step=1, gradient_bytes=8)),
        similarity_row("cifar10", ("topk", 2), NAIVE, setting, Found(None, "it broke")),
    ]
    lines = to_csv(with_percent(rows), TABLE_1_COLUMNS).splitlines()
    assert lines[1].startswith(
        "cifar10,none,,0.3451,0.223,100,as in the paper,0.5000,0.1414,100.0000,0.4000,0.6000,2,8,"
    )
    assert lines[2].startswith("cifar10,topk,1,0.0071,0.0051,2.06,as in the paper,0.1000,0.0000,20.0000,")
    assert lines[3].endswith(",failed,it broke")
    assert ",as in the paper,,,,,,," in lines[3]
