"""Rows of the frontier and their file."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from frontier_rows import failed, finished, sweep

from raytrust.jobs import files
from raytrust.reports import frontier_table as report
from raytrust.studies.frontier.row import load_rows, write_rows
from raytrust.studies.frontier.verdicts import judge_rows

JUDGED = ("verdict", "verdict_reason", "control", "pareto")


def test_rows_survive_the_round_trip(tmp_path):
    path, rows = tmp_path / "frontier.json", [*sweep(3), failed()]
    write_rows(path, rows)
    assert load_rows(path) == rows
    write_rows(path, rows[:1])
    assert load_rows(path) == rows[:1]
    assert [p.name for p in tmp_path.iterdir()] == ["frontier.json"]


def test_further_keys_are_kept_as_they_are(tmp_path):
    further = {"note": "näher", "pareto": True, "epochs": 3, "curve": [0.5, None, {"x": 1e-9}]}
    rows = [finished() | further, failed() | further]
    write_rows(tmp_path / "rows.json", rows)
    assert load_rows(tmp_path / "rows.json") == rows
    kept = [{k: v for k, v in row.items() if k not in JUDGED} for row in judge_rows(rows)]
    assert kept == [{k: v for k, v in row.items() if k != "pareto"} for row in rows]
    assert report.frontier_table(rows) == report.frontier_table([finished(), failed()])


def test_a_failure_may_have_bytes_as_its_training_may_have_finished(tmp_path):
    row = failed("sign") | {"bytes_per_step": 12345, "compression_ratio": 72.1}
    write_rows(tmp_path / "rows.json", [row])
    assert load_rows(tmp_path / "rows.json") == [row]
    assert report.frontier_table([row]) == report.frontier_table([failed("sign")])


def test_rows_may_be_none_at_all(tmp_path):
    write_rows(tmp_path / "rows.json", [])
    assert load_rows(tmp_path / "rows.json") == []


MEASURED = ["accuracy", "leakage_ssim", "naive_ssim", "aware_ssim", "oracle_ssim", "ssim_std", "psnr", "mse"]
MEASURED += ["lpips", "label_accuracy", "identified_mse", "identified_ssim", "mean_image_ssim", "other_image_ssim"]
MEASURED += ["aware_gain", "aware_gain_p", "floor_ssim", "excess", "excess_interval", "identified", "verdict"]
MEASURED += ["naive_excess_interval", "naive_identified", "registered_psnr", "identified_features", "st_lpips"]
BAD_ROWS = {
    **{f"failed with {key}": failed() | {key: 0.0} for key in MEASURED},
    "finished without accuracy": finished(accuracy=0.9) | {"accuracy": None},
    "finished without leakage": finished() | {"leakage_ssim": None},
    "finished with text": finished() | {"accuracy": "0.9"},
    "finished with a flag": finished() | {"leakage_ssim": True},
    "finished with NaN": finished() | {"leakage_ssim": math.nan},
    "NaN elsewhere": finished(psnr=math.nan),
    "infinity elsewhere": finished(psnr=math.inf),
    "NaN deep inside": finished(attack={"tv": math.nan}),
    "NaN in a further key": finished() | {"note": math.nan},
    "unknown status": finished(status="done"),
    "unknown verdict": finished() | {"verdict": "protects"},
    "no name": finished(name=""),
}


@pytest.mark.parametrize("row", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_neither_written_nor_read(tmp_path, row):
    path = tmp_path / "frontier.json"
    path.write_text("before")
    with pytest.raises(ValueError, match=r"Expected|JSON"):
        write_rows(path, [finished(), row])
    assert path.read_text() == "before"
    path.write_text(json.dumps([finished(), row]))
    with pytest.raises(ValueError, match="Expected"):
        load_rows(path)


@pytest.mark.parametrize("key", ["accuracy", "psnr", "note"])
def test_numpy_numbers_are_refused(tmp_path, key):
    with pytest.raises((ValueError, TypeError), match=r"Expected|JSON"):
        write_rows(tmp_path / "rows.json", [finished() | {key: np.float32(0.5)}])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["{}", "3", "null", '"rows"', "[1]", "[", ""])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match="Expect"):
        load_rows(tmp_path / "rows.json")


def test_a_write_that_breaks_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "frontier.json"
    write_rows(path, [finished()])

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_rows(path, [failed()])
    assert load_rows(path) == [finished()]
    assert list(tmp_path.iterdir()) == [path]
