"""docs/hooks.md runs as it stands, in two gloo processes; its audit in one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import raytrust
from raytrust.wire.channel import Channel
from raytrust.wire.processes import in_processes

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "hooks.md").read_text(), flags=re.MULTILINE | re.DOTALL)
USE, RECORD, AUDIT, BY_HAND = BLOCKS


def on_the_page(channel: Channel) -> dict[str, Any]:
    torch.manual_seed(channel.rank)
    names: dict[str, Any] = {}
    exec(USE, names)
    for _ in range(3):
        nn.functional.cross_entropy(names["ddp"](torch.rand(5, 1, 12, 12)), torch.arange(5) % 4).backward()
    found = {"ours": [p.grad.clone() for p in names["model"].parameters()]}
    exec(RECORD, names)
    exec(BY_HAND, names)
    third = [(m.op, m.sent_bytes) for m in names["recorded"].messages]
    return found | {"recorded": third, "by hand": [m.sent_bytes for m in names["tap"].messages]}


def test_the_page_runs_in_two_processes() -> None:
    first, second = in_processes(on_the_page, 2)
    assert all(map(torch.equal, first["ours"], second["ours"]))
    # One of three matrices shrinks by half or more, 32 x 1152.
    whole, p, q = 4 * (8 * 9 + 8 + 32 + 4 * 32 + 4), 4 * 4 * 32, 4 * 4 * 1152
    assert first["recorded"] == [("all_reduce", whole), ("all_reduce", p), ("all_reduce", q)]
    assert first["by hand"] == [whole, p, q, 0]


def test_the_audit_on_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {
        "model": nn.Sequential(nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(800, 32), nn.Linear(32, 4)),
        "images": torch.rand(20, 1, 12, 12),
        "labels": torch.arange(20) % 4,
        "raytrust": raytrust,
    }
    exec(RECORD.splitlines()[0], names)
    few = "attack=raytrust.InversionConfig(iterations=2), evaluation=2, tuning=1, progress=False)"
    exec(re.sub(r"\)\nprint", f"    {few}\nprint", AUDIT), names)
    assert "powerSGD_hook rank 4" in capsys.readouterr().out
