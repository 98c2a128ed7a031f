"""The example of docs/training.md runs as it stands there, and goes on with another number of workers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


# At the very end of a process, once in a few dozen runs on a busy machine: torch leaves threads of gloo behind, of any
# model under DistributedDataParallel (pytorch/pytorch#190489). It says nothing of the example, which is then run again.
RACE = "terminate called without an active exception"


def torchrun(workers: int, program: Path, checkpoint: Path, *options: str) -> str:
    before = checkpoint.read_bytes() if checkpoint.exists() else None
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    command += [str(program), "--checkpoint", str(checkpoint), *options]
    for _ in range(3):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
        if done.returncode == 0 or RACE not in done.stderr:
            break
        checkpoint.unlink(missing_ok=True)
        if before is not None:
            checkpoint.write_bytes(before)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ddp_under_torchrun(tmp_path: Path) -> None:
    output = torchrun(2, Path("examples/ddp.py"), tmp_path / "new" / "digits.pt", "--steps", "60")
    found = re.fullmatch(r"step 60: (\d+) of 360 test images right; (\d+) bytes a step, uncompressed (\d+)\n", output)
    assert found is not None, output
    assert int(found[1]) > 250
    # Rank 4 of 16 x 9, 64 x 256 and 10 x 64, and the biases; all 144 + 16,384 + 640 + 90 entries.
    assert int(found[2]) == 4 * (4 * (16 + 9) + 4 * (64 + 256) + 4 * (10 + 64) + 90)
    assert int(found[3]) == 4 * (144 + 16384 + 640 + 90)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["digits.pt"]


# The example as it is, after which every worker writes its replica.
REPLICAS = """
import runpy, sys, torch
from pathlib import Path
main = runpy.run_path("examples/ddp.py")["main"]
folder = Path(sys.argv.pop())
model = main()
torch.save(model.state_dict(), folder / f"replica-{__import__('os').environ['RANK']}.pt")
"""


def test_it_goes_on_with_another_number_of_workers(tmp_path: Path) -> None:
    """Three times, with more and with fewer: all replicas are equal, and no residual is dropped."""
    program, file = tmp_path / "replicas.py", tmp_path / "digits.pt"
    program.write_text(REPLICAS)
    torchrun(1, Path("examples/ddp.py"), file, "--steps", "30")
    for before, after in ((1, 2), (2, 1)):
        saved = torch.load(file, weights_only=True)
        assert len(saved["compressors"]) == before
        output = torchrun(after, program, file, "--steps", "30", str(tmp_path))
        assert output.startswith(f"step {90 if before == 2 else 60}: ")
        assert int(output.split()[2]) > 250
        replicas = [torch.load(tmp_path / f"replica-{rank}.pt", weights_only=True) for rank in range(after)]
        written = torch.load(file, weights_only=True)
        assert [state["metadata"]["worker"] for state in written["compressors"]] == [[r, after] for r in range(after)]
        final = written["model"]
        for replica in replicas:
            assert replica.keys() == final.keys()
            assert all(torch.equal(x, final[key]) for key, x in replica.items())
        assert not all(torch.equal(x, saved["model"][key]) for key, x in final.items())


def test_the_page_quotes_the_example() -> None:
    section = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").split("\n## ")[0]
    (quoted,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    example = (ROOT / "examples" / "ddp.py").read_text(encoding="utf-8")
    lines = {line.strip() for line in example.splitlines()}
    assert [line for line in quoted.splitlines() if line.strip() not in lines] == []
    assert "torchrun --standalone --nproc-per-node 2 examples/ddp.py" in section
    assert "torchrun --standalone --nproc-per-node 2 examples/ddp.py" in example
