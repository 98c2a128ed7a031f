"""The example of the README runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_ddp_under_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["examples/ddp.py", "--steps", "60", "--checkpoint", str(tmp_path)]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(
        r"step 60: (\d+) of 360 test images right; (\d+) bytes a step, uncompressed (\d+)\n", done.stdout
    )
    assert found is not None, done.stdout
    assert int(found[1]) > 250
    # Rank 4 of 16 x 9, 64 x 256 and 10 x 64, and the biases; all 144 + 16,384 + 640 + 90 entries.
    assert int(found[2]) == 4 * (4 * (16 + 9) + 4 * (64 + 256) + 4 * (10 + 64) + 90)
    assert int(found[3]) == 4 * (144 + 16384 + 640 + 90)
    assert {file.name for file in tmp_path.iterdir()} == {"worker-0.pt", "worker-1.pt"}


def test_the_readme_quotes_the_example() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## In your own training\n")[1].split("\n## ")[0]
    (quoted,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    example = (ROOT / "examples" / "ddp.py").read_text(encoding="utf-8")
    lines = {line.strip() for line in example.splitlines()}
    assert [line for line in quoted.splitlines() if line.strip() not in lines] == []
    assert "torchrun --standalone --nproc-per-node 2 examples/ddp.py" in section
    assert "torchrun --standalone --nproc-per-node 2 examples/ddp.py" in example
