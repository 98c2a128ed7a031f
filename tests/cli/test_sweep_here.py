"""A sweep without Ray: the list of defences alone, trained by real processes, attacked and reported in this one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from toys import synthetic

from raytrust.cli.frontier import Spaces, run_sweep
from raytrust.config import (
    CaptureConfig,
    Defence,
    InversionConfig,
    ModelConfig,
    PowerSGDConfig,
    SweepConfig,
    TopKConfig,
    TrainConfig,
)
from raytrust.studies.frontier.store import Store, open_store

DATA = synthetic(channels=1)
SWEEP = SweepConfig(
    train=TrainConfig(
        model=ModelConfig("convnet", width=4),
        capture=CaptureConfig((0,), tuning=1, evaluation=2),
        workers=2,
        batch_size=8,
        steps=2,
    ),
    defences=(Defence(), Defence(PowerSGDConfig(1)), Defence(TopKConfig(level=0.1))),
    portfolio=(InversionConfig("naive", iterations=2), InversionConfig("aware", iterations=2)),
    trials=3,
    attack_trials=0,
)
SPACES = Spaces({}, {})


def test_a_sweep_in_this_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path, SWEEP, DATA.fingerprint())
    rows = run_sweep(SWEEP, SPACES, DATA, store, spread=False, hours=1e-9)
    assert {row["reason"] for row in rows} == {"not finished"}  # time was up before anything began
    assert "time is up: --resume goes on" in capsys.readouterr().out
    rows = run_sweep(SWEEP, SPACES, DATA, store, spread=False)
    assert [row["status"] for row in rows] == ["finished"] * 3
    assert all(row["leakage_ssim"] is not None and row["n_images"] == 2 for row in rows)
    figures = store.training(replace(SWEEP.train, defence=Defence()))
    assert figures is not None
    assert figures["bytes_per_step"] == figures["dense_bytes"]  # of one of two workers
    for name in ("report.html", "frontier.json", "mlflow.db"):
        assert (tmp_path / name).stat().st_size > 0
    output = capsys.readouterr().out
    assert "3/3 defences trained" in output
    assert "3/3 defences evaluated" in output

    def refuse(*_: object) -> None:
        raise AssertionError("a finished job is done again")

    monkeypatch.setattr("raytrust.studies.frontier.jobs.train_and_capture", refuse)
    monkeypatch.setattr("raytrust.studies.frontier.jobs.evaluate_together", refuse)
    again = run_sweep(SWEEP, SPACES, DATA, Store(tmp_path, store.fingerprint), spread=False)
    assert json.dumps(again) == json.dumps(rows)


def test_a_training_run_that_fails_is_a_row_with_the_reason(tmp_path: Path) -> None:
    hot = replace(SWEEP, train=replace(SWEEP.train, learning_rate=1e30, steps=6), defences=(Defence(),), trials=1)
    store = open_store(tmp_path, hot, DATA.fingerprint())
    (row,) = run_sweep(hot, SPACES, DATA, store, spread=False)
    assert row["status"] == "failed"
    assert "became" in row["reason"]
    assert "\n" not in row["reason"]
