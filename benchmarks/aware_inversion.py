"""How much of a compressor's protection is the weakness of an attacker who ignores it? Aware against naive, in pairs.

    python benchmarks/aware_inversion.py --data cifar10.npz --output aware

Attacks test images, each alone, at the untrained full ResNet-18 (CIFAR stem, evaluation-mode batch norm) with
both objectives at one budget, and prints a Markdown table of mean SSIM with 95 % intervals. Finished attacks are kept
in the output directory, and not run again.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from uncompressed_inversion import captures_of_test_images

from raytrust.compress import HookCompressor
from raytrust.config import Defence, InversionConfig, ModelConfig, digest, parse_defence, to_dict
from raytrust.data import Dataset, load
from raytrust.jobs.files import read_json, write_json
from raytrust.metrics.statistics import paired_difference
from raytrust.networks.build import build_model
from raytrust.persample.memory import keep_freed_memory
from raytrust.studies.evaluate import evaluate_inversion

DEFENCES = (
    "none",
    "topk:rank1:equal_by=values",
    "topk:rank4:equal_by=values",
    "powersgd:1",
    "powersgd:4",
    "randk:0.01",
    "threshold:0.01",
    "dgc:0.01",
    "signsgd",
    "scaledsign",
    "qsgd:2",
    "qsgd:4",
    "vqsgd:100000",
    "atomo:3",
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--data", required=True, help="cifar10, FILE.npz or DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where finished attacks are kept")
    parser.add_argument("--defence", action="append", help=f"repeatable (default: {', '.join(DEFENCES)})")
    parser.add_argument(
        "--torch", type=int, action="append", default=[], metavar="RANK", help="torch's powerSGD_hook, too; repeatable"
    )
    parser.add_argument("--model", choices=["resnet18", "convnet"], default="resnet18", help="(default: %(default)s)")
    parser.add_argument("--images", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=400, help="(default: %(default)s)")
    parser.add_argument("--restarts", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--width", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument(
        "--precision", choices=["float32", "bfloat16"], default="float32", help="(default: %(default)s)"
    )
    parser.add_argument("--tv", type=float, default=1e-2, help="(default: %(default)s)")
    parser.add_argument("--step-size", type=float, default=0.1, help="(default: %(default)s)")
    parser.add_argument("--signed", choices=["none", "hard", "soft"], default="hard", help="(default: %(default)s)")
    parser.add_argument("--schedule", choices=["steps", "cosine"], default="steps", help="(default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="test image to begin with (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        defences = [parse_defence(text) for text in options.defence or DEFENCES]
        attack = InversionConfig(
            tv=options.tv,
            step_size=options.step_size,
            iterations=options.iterations,
            restarts=options.restarts,
            precision=options.precision,
            signed=options.signed,
            schedule=options.schedule,
        )
        data, model = load(options.data), ModelConfig(options.model, width=options.width)
        chosen = range(options.first, options.first + options.images)
        if options.images < 2 or chosen.start < 0 or chosen.stop > len(data.test_labels):
            raise ValueError(
                f"Expected images={options.images} to be at least 2, from first={options.first} on in "
                f"[0, {len(data.test_labels)})."
            )
    except (ValueError, OSError) as error:
        print(f"aware_inversion.py: error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    keep_freed_memory()
    print(
        f"{data.name}, test images {chosen.start}-{chosen.stop - 1}, width {options.width}, "
        f"{attack.name.removeprefix('aware ')}, {options.iterations} iterations"
    )
    print("| defence | naive | aware | ratio | aware - naive | p |\n|---|---|---|---|---|---|", flush=True)
    for defence in [*defences, *options.torch]:
        print(_line(defence, attack, data, model, chosen, options.output), flush=True)
    return 0


def _torchs(rank: int, data: Dataset, model: ModelConfig) -> HookCompressor:
    """torch's PowerSGD in its first step that compresses; it compresses all that ours does."""
    network = build_model(model, data.channels, data.classes, seed=0)
    hook = HookCompressor(powerSGD_hook, PowerSGDState(None, rank, 2, min_compression_rate=0.5), network)
    hook.start_compressing()
    return hook


def _line(
    method: Defence | int, attack: InversionConfig, data: Dataset, model: ModelConfig, chosen: range, output: Path
) -> str:
    """method: a defence, or the rank of torch's PowerSGD."""
    defence, hook, name = Defence(), None, f"torch's PowerSGD rank {method}"
    if isinstance(method, Defence):
        defence, name = method, method.name
    else:
        hook = _torchs(method, data, model)
    captures = captures_of_test_images(data, chosen, model, defence, hook)
    named = [] if hook is None else [name]  # of a defence, files are named as before
    found: dict[str, list[float]] = {}
    for objective in ("naive", "aware"):
        run = replace(attack, objective=objective)
        run = run if hook else run.against(defence)
        path = output / f"{digest(run, defence, model, [*chosen], data.fingerprint(), *named)}.json"
        result: Any = read_json(path)
        if result is None:
            result = {
                "defence": to_dict(defence),
                "attack": to_dict(run),
                "ssim": evaluate_inversion(captures, run).ssim,
            }
            write_json(path, result)
        found[objective] = result["ssim"]
    naive, aware = (np.array(found[objective]) for objective in ("naive", "aware"))
    pair = paired_difference(aware, naive)
    low, high = pair.interval
    return (
        f"| {name} | {naive.mean():.3f} | {aware.mean():.3f} | {aware.mean() / naive.mean():.2f} | "
        f"{pair.difference:+.3f} [{low:+.3f}, {high:+.3f}] | {pair.p_value:.3f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
