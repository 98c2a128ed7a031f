"""A whole run at a tiny budget, without Ray: its files, that two runs agree, and what the command refuses."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from paper_fixtures import MICRO, digits

from raytrust.config import Defence, InversionConfig
from raytrust.jobs.files import read_json
from raytrust.studies.membership.shadows import ShadowStore
from raytrust.studies.paper.plan import Setting, Victim
from raytrust.studies.paper.progress import Progress
from raytrust.studies.paper.rows import TABLE_1_COLUMNS, TABLE_2_COLUMNS, similarity_row, to_csv, with_percent
from raytrust.studies.paper.selection import NAIVE, WORST, Found
from raytrust.studies.paper.units import Attack, UnitStore
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
    from raytrust.cli.paper import PaperConfig, open_run, run_paper

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


def test_a_second_run_with_the_seed_gives_the_same_tables(finished: Path, tmp_path: Path) -> None:
    run(tmp_path / "again")
    for name in ("table1.csv", "table2.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes()


def test_a_resumed_run_does_nothing_twice(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in (finished / "units").iterdir()}
    table = (finished / "table1.csv").read_bytes()
    run(finished)
    assert {p: p.stat().st_mtime_ns for p in (finished / "units").iterdir()} == before
    assert (finished / "table1.csv").read_bytes() == table
    assert "pieces done" not in capsys.readouterr().out


def test_another_run_is_refused_the_directory(finished: Path) -> None:
    with pytest.raises(ValueError, match="to be empty or to hold this run"):
        run(finished, seed=1)


def test_a_unit_that_fails_is_a_row_without_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = UnitStore._attack

    def breaks(self: UnitStore, unit: Attack, data: Any) -> Any:
        if unit.defence.name == "PowerSGD rank 4" and unit.attack.objective == "aware":
            raise FloatingPointError("All 1 restarts of the attack diverged.")
        return work(self, unit, data)

    monkeypatch.setattr(UnitStore, "_attack", breaks)
    report = run(tmp_path, tables=(1,))
    (broken,) = [r for r in report.table_1 if r["status"] == "failed"]
    assert (broken["compressor"], broken["rank_or_level"], broken["ours"]) == ("powersgd", 4, None)
    assert "diverged" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "table2.csv").exists()


def test_a_data_set_whose_search_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from raytrust.cli.paper import PaperConfig, open_run, run_paper

    other = replace(digits(), name="cifar10", test_images=digits().test_images.flip(-1))
    data = {"cifar10": other, "mnist": digits()}
    work, bad = UnitStore._attack, data["cifar10"].fingerprint()

    def breaks(self: UnitStore, unit: Attack, data: Any) -> Any:
        if self.fingerprint == bad:
            raise FloatingPointError("All 1 restarts of the attack diverged.")
        return work(self, unit, data)

    monkeypatch.setattr(UnitStore, "_attack", breaks)
    config = PaperConfig(MICRO, tables=(1,), datasets=("cifar10", "mnist"))
    open_run(tmp_path, config, data, {})
    report = run_paper(config, data, tmp_path, spread=False)
    found = {d: {(r["status"], r["reason"]) for r in report.table_1 if r["dataset"] == d} for d in data}
    assert found["cifar10"] == {("failed", "All 1 restarts of the attack diverged.")}
    assert found["mnist"] == {("finished", "")}
    assert {t["dataset"] for t in report.theory} == set(data)
    assert report.unfinished[0] == 0
    assert "search for the paper&#x27;s setting failed" in (tmp_path / "report.html").read_text()
    assert "pieces are left" not in capsys.readouterr().out


# --- a run that is cut short ---


def statuses(root: Path, table: int = 1) -> list[str]:
    return [r["status"] for r in csv.DictReader(StringIO((root / f"table{table}.csv").read_text()))]


STOPS = (  # phase, kind of its pieces, how many of them are done before
    ("searching", "attack", 0),
    ("table 1: naive", "attack", 0),
    ("table 1: naive", "attack", 12),
    ("table 1: naive", "theory", 3),
    ("table 1: the worst case", "attack", 1),
    ("", "model", 6),
)


def interrupt(context: pytest.MonkeyPatch, phase: str, kind: str, pieces: int) -> None:
    """Ctrl-C in this phase, when so many of its pieces were done."""
    from raytrust.cli.paper import _Run

    do, work, train, now = _Run._do, UnitStore.run, ShadowStore.run, [""]
    done: list[str] = []

    def count(what: str) -> None:
        if now[0].startswith(phase) and what == kind:
            if len(done) == pieces:
                raise KeyboardInterrupt
            done.append(what)

    def marks(self: Any, name: str, what: str, units: Any) -> None:
        now[0] = what
        do(self, name, what, units)

    def unit_run(self: UnitStore, unit: Any, data: Any) -> float:
        count(unit.kind)
        return work(self, unit, data)

    def model_run(self: ShadowStore, *arguments: Any) -> None:
        count("model")
        train(self, *arguments)

    context.setattr(_Run, "_do", marks)
    context.setattr(UnitStore, "run", unit_run)
    context.setattr(ShadowStore, "run", model_run)


def test_a_run_interrupted_in_every_phase_reports_what_is_finished(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    for phase, kind, pieces in STOPS:
        with monkeypatch.context() as context:
            interrupt(context, phase, kind, pieces)
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


def test_a_run_whose_time_is_up_says_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(tmp_path, hours=1e-9)
    assert report.unfinished == (5 * len(CELLS), 5 * len(CELLS))
    text = capsys.readouterr().out
    left = re.search(r"time is up: (\d+) pieces are left, about \d+ min", text)
    assert left is not None
    assert int(left[1]) > 100
    assert run(tmp_path, hours=1.0).unfinished[0] == 0
    assert "pieces are left" not in capsys.readouterr().out


def test_one_data_set_after_another_and_table_1_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raytrust.cli.paper import PaperConfig, _Run

    data = {"mnist": digits(), "cifar10": replace(digits(), name="cifar10")}
    run = _Run(PaperConfig(MICRO, datasets=("mnist", "cifar10")), data, tmp_path, Progress(1), spread=False)
    order: list[tuple[str, str]] = []
    monkeypatch.setattr(_Run, "_phases", lambda self, name: [("a", []), ("b", [])])
    monkeypatch.setattr(_Run, "_do", lambda self, name, what, units: order.append((name, what)))
    monkeypatch.setattr(_Run, "_audit", lambda self, name: order.append((name, "audit")))
    run.all()
    assert order == [(name, what) for name in ("mnist", "cifar10") for what in ("a", "b", "audit")]


def test_rows_as_csv() -> None:
    setting = Setting(Victim(width=4), InversionConfig("naive"))
    rows = [
        similarity_row("cifar10", ("none", None), NAIVE, setting, Found([0.4, 0.6], bytes=8, gradient_bytes=8)),
        similarity_row("cifar10", ("topk", 1), NAIVE, setting, Found([0.1, 0.1], bytes=1, gradient_bytes=8)),
        similarity_row("cifar10", ("topk", 2), NAIVE, setting, Found(None, "it broke")),
    ]
    lines = to_csv(with_percent(rows), TABLE_1_COLUMNS).splitlines()
    assert lines[1].startswith(
        "cifar10,none,,0.3451,0.223,100,as in the paper,0.5000,0.1414,100.0000,0.4000,0.6000,2,8,"
    )
    assert lines[2].startswith("cifar10,topk,1,0.0071,0.0051,2.06,as in the paper,0.1000,0.0000,20.0000,")
    assert lines[3].endswith(",failed,it broke")
    assert ",as in the paper,,,,,,," in lines[3]


def test_the_time_left_follows_from_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(parallel=2, every=0.0)
    unit = Attack(Victim(), Defence(), InversionConfig(iterations=90), (0,))
    progress.expect("attack", 3, 3 * unit.cost)
    progress.ended(unit, 120.0)
    assert progress.minutes_left() == pytest.approx(2.0)
    progress.ended(unit, None, "it broke")
    assert progress.minutes_left() == pytest.approx(1.0)
    text = capsys.readouterr().out
    assert "1/3 pieces done" in text
    assert "about 2 min left" in text
    assert "FAILED: it broke" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tables", "3"], "Expected tables='3' to be 1, 2 or 1,2."),
        (["--datasets", "imagenet"], "Expected datasets='imagenet' to be among cifar10, cifar100, mnist"),
        (["--datasets", "mnist,mnist"], "each once"),
        (["--datasets", "mnist=nowhere.npz"], "nowhere.npz"),
        (["--data-dir", "nowhere"], "nowhere/cifar10.npz"),
        (["--images", "1"], "Expected images=1 to be at least 2."),
        (["--seed", "-1"], "Expected seed=-1 to be at least 0."),
        (["--hours", "0"], "Expected hours=0 to be positive and finite."),
        (["--hours", "nan"], "Expected hours=nan to be positive and finite."),
        (["--cpus", "100000"], "Expected cpus=100000 to be at most the number of CPUs"),
        (["--budget", "huge"], "--budget"),
        (["--resume", "nowhere"], "Expected resume='nowhere' to hold a run"),
        (["--resume", "x", "--seed", "1"], "Expected --seed not to be given with --resume"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    program: ModuleType,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        program.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_directory_in_use_is_refused(program: ModuleType, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["--output", str(finished)])
    assert f"give --resume {finished}" in capsys.readouterr().err


# --- true processes ---


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """As a user runs it, on digits in the place of MNIST."""
    data = digits()
    arrays = {n: getattr(data, n).numpy() for n in ("train_images", "train_labels", "test_images", "test_labels")}
    np.savez(tmp_path / "mnist.npz", **{k: v[:, 0] if v.ndim == 4 else v for k, v in arrays.items()})
    command = [sys.executable, str(PROGRAM), "--budget", "tiny", "--datasets", "mnist", "--cpus", "2"]
    return [*command, "--data-dir", str(tmp_path)]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_on_ray_an_interrupted_run_and_a_whole_one_come_to_the_same(command: list[str], tmp_path: Path) -> None:
    """Ctrl-C amid the attacks, then no time at all, then the rest; beside a run without interruption."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run([*command, "--output", str(whole)], check=True, timeout=1200, cwd=tmp_path)
    begun = subprocess.Popen(
        [*command, "--output", str(parts)], cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert begun.stdout is not None
    for line in begun.stdout:
        if "table 1: naive" in line:
            break
    until = time.monotonic() + 600
    while len(list((parts / "units").glob("*.json"))) < 30 and time.monotonic() < until:
        time.sleep(0.1)
    os.killpg(begun.pid, signal.SIGINT)  # as a terminal sends it: to the workers, too
    rest = begun.stdout.read()
    assert begun.wait(timeout=120) == 130
    assert re.search(r"interrupted: \d+ pieces are left, about \d+ min", rest), rest
    assert f"--resume {parts}" in rest
    assert "Traceback" not in rest
    assert set(statuses(parts)) <= {"finished", "not finished"}
    resume = [sys.executable, str(PROGRAM), "--resume", str(parts), "--cpus", "2"]
    short = subprocess.run([*resume, "--hours", "1e-6"], capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert short.returncode == 0, short.stderr
    assert re.search(r"time is up: \d+ pieces are left", short.stdout), short.stdout
    assert f"Not finished. Go on with: python {PROGRAM} --resume {parts}" in short.stdout
    subprocess.run(resume, check=True, timeout=1200, cwd=tmp_path)
    for table in ("table1.csv", "table2.csv"):
        assert (parts / table).read_bytes() == (whole / table).read_bytes()
