"""A whole run at a tiny budget, without Ray: its files, that two runs agree, and what the command refuses."""

from __future__ import annotations

import csv
import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from paper_fixtures import MICRO, digits

from raytrust.config import Defence, InversionConfig
from raytrust.paper.plan import Setting, Victim
from raytrust.paper.progress import Progress
from raytrust.paper.rows import TABLE_1_COLUMNS, TABLE_2_COLUMNS, similarity_row, to_csv, with_percent
from raytrust.paper.selection import NAIVE, Found
from raytrust.paper.units import Attack, UnitStore
from raytrust.published import CELLS
from raytrust.store import read_json

PROGRAM = Path(__file__).resolve().parents[1] / "sweeps" / "paper_tables.py"


@pytest.fixture(scope="module")
def program() -> ModuleType:
    specification = importlib.util.spec_from_file_location("paper_tables_program", PROGRAM)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def run(root: Path, **changes: Any) -> Any:
    from raytrust.paper_tables import PaperConfig, open_run, run_paper

    config = replace(PaperConfig(MICRO, datasets=("mnist",)), **changes)
    data = {"mnist": digits()}
    open_run(root, config, data, {})
    return run_paper(config, data, root, spread=False)


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
    from raytrust.tracking import MlflowClient, default_uri

    client = MlflowClient(default_uri(finished))
    experiment = client.get_experiment_by_name("raytrust paper tables")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1 + len(CELLS)
    assert {r.info.status for r in runs} == {"FINISHED"}
    cell = next(r for r in runs if r.info.run_name == "MNIST powersgd 4")
    rows = read_json(finished / "results.json")["table_1"]
    ours = next(r for r in rows if (r["compressor"], r["rank_or_level"], r["attack"]) == ("powersgd", 4, NAIVE))
    assert cell.data.metrics["naive_ssim"] == pytest.approx(ours["ours"])


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


@pytest.mark.slow
def test_the_command_on_ray_gives_the_same_tables_twice(tmp_path: Path) -> None:
    """As a user runs it, on digits in the place of MNIST."""
    import numpy as np

    data = digits()
    arrays = {n: getattr(data, n).numpy() for n in ("train_images", "train_labels", "test_images", "test_labels")}
    np.savez(tmp_path / "mnist.npz", **{k: v[:, 0] if v.ndim == 4 else v for k, v in arrays.items()})
    for name in ("a", "b"):
        command = [sys.executable, str(PROGRAM), "--budget", "tiny", "--datasets", "mnist", "--cpus", "2"]
        command += ["--data-dir", str(tmp_path), "--output", str(tmp_path / name)]
        subprocess.run(command, check=True, timeout=1200, cwd=tmp_path)
    for table in ("table1.csv", "table2.csv"):
        assert (tmp_path / "a" / table).read_bytes() == (tmp_path / "b" / table).read_bytes()
