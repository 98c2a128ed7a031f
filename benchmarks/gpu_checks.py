"""All that one CUDA card has to show, in ten minutes: is it right, and is it fast?

    python benchmarks/gpu_checks.py OUT

Runs the tests marked `gpu`, then, on the same card and beside what they are compared with, the benchmarks of inversion
(ours beside the textbook loop), compressors and networks. Each has a share of the time, after which it is ended. Writes
into the folder OUT: card.json (its name, torch, driver), NAME.json and NAME.txt of each, and checks.json, what became
of them. Ends with 1 if one failed, with 2 where torch has no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 600.0
# What is run, after the interpreter, and its share of the time; {json} is where it writes.
CHECKS: dict[str, tuple[float, list[str]]] = {
    "tests": (0.35, ["-m", "pytest", "-m", "gpu", "-n", "0", "-q", "-p", "no:cacheprovider", "{tests}"]),
    "inversion": (
        0.3,
        ["benchmarks/inversion.py", "--device", "cuda", "--restarts", "1", "16", "64", "--images", "1", "10",
         "--dtype", "float32", "bfloat16", "--json", "{json}"],
    ),
    "compressors": (0.2, ["benchmarks/compressors.py", "--device", "cuda", "--repeats", "5", "--json", "{json}"]),
    "models": (
        0.15,
        ["benchmarks/models.py", "--device", "cuda", "--no-slow", "--json", "{json}", "resnet18", "resnet50",
         "densenet121", "convnext_tiny", "vit, 4 layers of 128", "mlp-mixer"],
    ),
}  # fmt: skip
# Files with such tests: to collect all others takes minutes.
TESTS = ("tests/test_on_gpu.py", "tests/wire/test_channel.py", "tests/cluster/test_cluster_placement.py",
         "tests/compress/test_contract.py", "tests/compress/test_vqsgd.py")  # fmt: skip


def card() -> dict[str, Any]:
    """What the measurements are of."""
    about = torch.cuda.get_device_properties(0)
    return {
        "name": about.name,
        "bytes": about.total_memory,
        "capability": list(torch.cuda.get_device_capability(0)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def command(name: str, out: Path) -> list[str]:
    """What is run for a check."""
    arguments: list[str] = []
    for argument in CHECKS[name][1]:
        arguments += TESTS if argument == "{tests}" else [argument.replace("{json}", str(out / f"{name}.json"))]
    return [sys.executable, *arguments]


def check(name: str, out: Path, seconds: float) -> dict[str, Any]:
    """Run one, with its output in a file; how it ended, and after how long."""
    started = time.perf_counter()
    with (out / f"{name}.txt").open("w") as output:
        try:
            done = subprocess.run(
                command(name, out), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=seconds, check=False
            )
            ended = "passed" if done.returncode == 0 else f"failed with {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"ended after its {seconds:.0f} s"
    return {"ended": ended, "seconds": round(time.perf_counter() - started, 1), "command": command(name, out)[1:]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder, made where there is none")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all together (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_checks.py: error: Expected a CUDA device that torch can use, got none.", file=sys.stderr)
        return 2
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "card.json").write_text(json.dumps(card(), indent=1) + "\n")
    found: dict[str, dict[str, Any]] = {}
    until = time.perf_counter() + options.seconds
    for i, (name, (share, _)) in enumerate(CHECKS.items()):
        # What one did not need, the next ones have.
        shares = sum(s for s, _ in list(CHECKS.values())[i:])
        found[name] = check(name, out, max(1.0, until - time.perf_counter()) * share / shares)
        (out / "checks.json").write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name:12} {found[name]['ended']}, {found[name]['seconds']} s", flush=True)
    return 0 if all(f["ended"] == "passed" for f in found.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
