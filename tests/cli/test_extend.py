"""docs/extend.md runs as it stands: its file outside the package passes the contract, attacks, and sweeps."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sweep_fixtures import TINY, save_images

from raytrust.studies.frontier.row import load_rows

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
(COMMAND,) = re.findall(r"^raytrust frontier .*$", PAGE, flags=re.MULTILINE)

# The page's file in a process group, and under DistributedDataParallel.
GROUP = """
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import mine
from raytrust import build, ddp_comm_hook, parse_defence
from raytrust.compress.contract import check
from raytrust.wire.channel import GroupChannel
from raytrust.wire.processes import in_processes

def in_a_group(channel):
    for name in ("grid:15", "grid:15:ef"):
        check(parse_defence(name), GroupChannel())
    ddp = DistributedDataParallel(nn.Linear(5, 3))
    ddp.register_comm_hook(ddp.module, ddp_comm_hook(build(parse_defence("grid:127"), ddp.module)))
    ddp(torch.full((1, 5), 1.0 + channel.rank)).sum().backward()
    torch.testing.assert_close(ddp.module.weight.grad, torch.full((3, 5), 1.5))
    return channel.rank

if __name__ == "__main__":
    assert in_processes(in_a_group, 2, 120.0) == [0, 1]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the page's file, without what it shows of its use."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "mine.py").write_text("\n".join(block for block in BLOCKS if "contract" not in block))
    save_images(folder / "images.npz")
    return folder


def run(folder: Path, *command: str, code: int = 0) -> str:
    """What a program prints, started elsewhere, which has nothing of the repository but the package on its path."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"RAYTRUST_PLUGINS": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_it_passes_the_contract(folder: Path) -> None:
    (contract,) = (block for block in BLOCKS if "contract" in block)
    run(folder, "-c", f"import mine\n{contract}")


def test_it_passes_the_contract_and_trains_in_two_workers(folder: Path) -> None:
    (folder / "group.py").write_text(GROUP)
    run(folder, "group.py")


def test_its_objective_and_its_attack_reconstruct(folder: Path) -> None:
    """Of an uncompressed gradient of the page's network, better than the mean colour does."""
    program = """
import json, torch
import mine
from raytrust.config import CaptureConfig, InversionConfig, ModelConfig, TrainConfig, parse_defence
from raytrust.data import load
from raytrust.studies.evaluate import evaluate_inversion
from raytrust.train.loop import train
from raytrust.leak.observation import Capture
from raytrust.wire.channel import LocalChannel
found = {}
for defence in ("none", "grid:100", "clipnoise:100:noise=0.00001"):
    model, capture = ModelConfig("mynext", width=8), CaptureConfig((0,), 1, 1)
    config = TrainConfig(parse_defence(defence), model, capture=capture, workers=1, steps=1)
    captures = [r for r in train(config, load("digits"), LocalChannel()) if isinstance(r, Capture)]
    for attack in (InversionConfig(matching="huber", iterations=60), InversionConfig(method="flat")):
        result = evaluate_inversion(captures, attack.against(config.defence))
        found[f"{defence} {attack.method}"] = sum(result.ssim) / len(result.ssim)
print(json.dumps(found))
"""
    found = json.loads(run(folder, "-W", "ignore", "-c", program))
    for defence in ("none", "grid:100", "clipnoise:100:noise=0.00001"):
        assert found[f"{defence} optimise"] > found[f"{defence} flat"] + 0.2, found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("where", ["--local", pytest.param("--device=cpu", marks=pytest.mark.slow)])
def test_it_runs_in_a_sweep_by_the_command_of_the_page(folder: Path, where: str) -> None:
    _, *options = shlex.split(COMMAND)
    root = folder / f"results{where}"
    small = ("--data", "images.npz", "--workers", "1", "--tuning", "1", *TINY, "--output", root.name, where)
    output = run(folder, "-m", "raytrust", *options, *small)
    rows: dict[str, dict[str, Any]] = {row["name"]: row for row in load_rows(root / "frontier.json")}
    assert {name: row["status"] for name, row in rows.items()} == {
        "none": "finished",
        "Grid of 15 steps + EF": "finished",
    }
    grid = rows["Grid of 15 steps + EF"]
    assert (grid["compressor"], grid["error_feedback"]) == ("grid", True)
    entries = rows["none"]["bytes_per_step"] / 4
    assert grid["bytes_per_step"] == entries + 4  # a byte an entry, and the largest
    attacks = [json.loads(path.read_text())["attack"] for path in (root / "captures").glob("*/*/*.json")]
    assert {a["matching"] for a in attacks if a["method"] == "optimise"} == {"huber"}
    assert "flat" in {a["method"] for a in attacks}
    assert "mynext" in (root / "report.html").read_text()
    # What to do next, as it was called: with the file, without which the method is unknown.
    assert re.search(r"raytrust frontier --plugin \S*mine\.py --resume", output)
    # The directory brings in no code: the file is given again, or the method is unknown.
    resume = ("-m", "raytrust", "frontier", "--resume", root.name, "--attack-trials", "-1")
    assert "Expected defence='grid:7:ef' to be METHOD" in run(folder, *resume, code=2)
    again = run(folder, *resume, "--plugin", "mine.py", code=2)
    assert again == "raytrust frontier: error: Expected attack_trials=-1 to be at least 0.\n"
