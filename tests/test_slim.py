"""The hook and an audit in an environment of torch and NumPy alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from scipy.special import stdtrit
from scipy.stats import binom

from raytrust.metrics.distributions import binomial_tail_without_scipy, student_quantile_without_scipy

PROGRAM = """
import torch
from torch import nn
import raytrust
from raytrust.wire.processes import in_processes

def train(channel):
    ddp = nn.parallel.DistributedDataParallel(nn.Linear(5, 3))
    compressor = raytrust.build(raytrust.parse_defence("powersgd:1:ef"), ddp.module)
    ddp.register_comm_hook(ddp.module, raytrust.ddp_comm_hook(compressor))
    with raytrust.record() as recorded:
        ddp(torch.full((1, 5), 1.0 + channel.rank)).sum().backward()
    return recorded.sent_bytes

if __name__ == "__main__":
    assert min(in_processes(train, 2, 120.0)) > 0
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 64, 3))
    images, labels = torch.rand(20, 1, 10, 10), torch.arange(20) % 3
    quick = raytrust.InversionConfig(iterations=5)
    result = raytrust.audit(model, images, labels, ["powersgd:1"], attack=quick, evaluation=4, tuning=1, progress=False)
    print(result)
    for refused in (lambda: result.save("audit"), result._repr_html_):
        try:
            refused()
        except ValueError as error:
            print("refused:", error)
    try:
        raytrust.audit(model, images, labels, batch_size=2, attack=quick, evaluation=2, tuning=1, progress=False)
    except ValueError as error:
        print("refused:", error)
"""


def environment(folder: Path) -> Path:
    """A folder with torch, NumPy and what these two need, as a path for an interpreter without site-packages."""
    wanted, seen = ["torch", "numpy"], set()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            files, needed = metadata.files(name) or [], metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another platform
            continue
        wanted += [re.split(r"[^\w.-]", line)[0] for line in needed if "extra ==" not in line]
        for top in {Path(file).parts[0] for file in files}:
            source = Path(str(metadata.distribution(name).locate_file(top)))
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(source)
    return folder


def test_the_hook_and_an_audit_need_torch_and_numpy_alone(tmp_path: Path) -> None:
    (tmp_path / "packages").mkdir()
    packages = environment(tmp_path / "packages")
    (packages / "raytrust").symlink_to(Path(__file__).resolve().parents[1] / "raytrust")
    assert not {"scipy", "skimage", "matplotlib", "ray", "mlflow", "torchvision"} & {p.name for p in packages.iterdir()}
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-S", "program.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(packages)},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "PowerSGD rank 1" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("refused: ")]
    missing = "to be installed for pages and pictures: pip install raytrust."
    assert len(lines) == 3
    assert all(line.startswith("refused: Expected ") and line.endswith(missing) for line in lines[:2])
    assert lines[2] == "refused: Expected SciPy for batches of several images: pip install scipy."
    assert {path.name for path in (tmp_path / "audit").iterdir()} == {"results.json", "audit.txt"}


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30, 99])
@pytest.mark.parametrize("p", [0.025, 0.6, 0.975, 0.9999])
def test_student_quantiles_are_scipys(degrees: int, p: float) -> None:
    assert student_quantile_without_scipy(degrees, p) == pytest.approx(stdtrit(degrees, p), rel=1e-9)


@pytest.mark.parametrize("n", [1, 8, 50])
def test_binomial_tails_are_scipys(n: int) -> None:
    for k in range(n + 1):
        assert binomial_tail_without_scipy(k, n, 0.01) == pytest.approx(binom.sf(k - 1, n, 0.01), rel=1e-9)
