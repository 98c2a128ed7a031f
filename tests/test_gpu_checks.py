"""The script for a card: what it refuses, what it writes, and that it knows all files with tests for a GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_checks", ROOT / "benchmarks" / "gpu_checks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_card_it_refuses_in_one_line(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main([str(tmp_path / "out")]) == 2
    assert capsys.readouterr() == ("", "gpu_checks.py: error: Expected a CUDA device that torch can use, got none.\n")
    assert not (tmp_path / "out").exists()


def test_each_has_its_time_and_its_files(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(script, "card", lambda: {"name": "a card"})
    checks = {
        "right": (0.4, ["-c", "open({json!r}.format(), 'w').write('[]')".replace("{json!r}.format()", "r'{json}'")]),
        "wrong": (0.4, ["-c", "print('no'); raise SystemExit(3)"]),
        "slow": (0.2, ["-c", "import time; time.sleep(60)"]),
    }
    monkeypatch.setattr(script, "CHECKS", checks)
    assert script.main([str(tmp_path), "--seconds", "5"]) == 1
    found = json.loads((tmp_path / "checks.json").read_text())
    assert [f["ended"].split(" after")[0] for f in found.values()] == ["passed", "failed with 3", "ended"]
    assert json.loads((tmp_path / "card.json").read_text()) == {"name": "a card"}
    assert (tmp_path / "right.json").read_text() == "[]"
    assert (tmp_path / "wrong.txt").read_text() == "no\n"
    assert capsys.readouterr().out.count("\n") == 3


def test_it_knows_every_file_with_tests_for_a_gpu(script: ModuleType) -> None:
    marked = {p for p in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in p.read_text()}
    assert {ROOT / name for name in script.TESTS} == marked - {Path(__file__)}


def test_benchmarks_take_what_it_gives_them(script: ModuleType, tmp_path: Path) -> None:
    """They know all options, and refuse the device alone."""
    assert not torch.cuda.is_available() or pytest.skip("there is one")
    for name in ("inversion", "compressors", "models"):
        done = subprocess.run(script.command(name, tmp_path), cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "device" in done.stderr, done.stderr
        assert "cuda" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
