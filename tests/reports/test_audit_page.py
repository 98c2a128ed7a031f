"""What docs/audit.md shows runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import raytrust

PAGE = Path(__file__).resolve().parents[2] / "docs" / "audit.md"


def test_the_five_lines_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    # The page's own settings take a minute; what the call takes is the same.
    quick = code.replace('"topk:0.01:ef"])', '"topk:0.01:ef"], attack=raytrust.InversionConfig(iterations=10))')
    assert quick != code
    exec(quick, names)
    result = names["result"]
    assert isinstance(result, raytrust.AuditResult)
    assert [row["name"] for row in result.rows] == ["none", "PowerSGD rank 4 + EF", "Top-K 1 % + EF"]
    assert "PowerSGD rank 4 + EF" in capsys.readouterr().out
    assert (tmp_path / "audit" / "report.html").exists()
