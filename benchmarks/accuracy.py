"""What accuracy does each compressor keep? Two Ray Train workers, the same training for all, several seeds.

    python benchmarks/accuracy.py --data cifar10.npz --output accuracy

The table's learning rates were chosen on a seed that the table does not use:

    python benchmarks/accuracy.py --data cifar10.npz --output search --first-seed 2 --seeds 1 --rate 0.03 --rate 0.1

Prints a Markdown table: compression ratio, bytes a step and worker, test accuracy by seed, and their mean. What is
finished is kept in the output directory, and not trained again.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from raytrust.config import CaptureConfig, InversionConfig, ModelConfig, SweepConfig, TrainConfig, parse_defence

# (defence, learning rate, momentum of the optimiser). A step along signs has length sqrt(N) whatever the gradient,
# hence the small rates; methods with a momentum of their own take none from the optimiser; unbiased ones pay for their
# variance with a smaller rate; where error feedback delays most entries by many steps, momentum on top of it hurts.
METHODS = (
    ("none", 0.1, 0.9),
    ("fp16", 0.1, 0.9),
    ("bf16", 0.1, 0.9),
    ("powersgd:1:ef", 1.0, 0.0),
    ("powersgd:4:ef", 0.1, 0.9),
    ("topk:0.01:ef", 0.1, 0.9),
    ("topk:0.01:scope=layer:ef", 0.5, 0.0),
    ("threshold:0.01:ef", 0.5, 0.0),
    ("randk:0.1:ef", 1.0, 0.0),
    ("dgc:0.01:warmup_steps=80", 0.1, 0.0),
    ("signsgd", 0.008, 0.0),
    ("signsgd:0.9", 0.001, 0.0),
    ("ef-signsgd", 0.1, 0.9),
    ("qsgd:4", 0.1, 0.9),
    ("qsgd:8", 0.1, 0.9),
    ("vqsgd:20000", 0.6, 0.0),
    ("atomo:3", 0.1, 0.9),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--data", required=True, help="digits, cifar10, FILE.npz or DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where finished runs are kept")
    parser.add_argument("--defence", action="append", help="only these of the table; repeatable")
    parser.add_argument("--rate", type=float, action="append", help="learning rate, for the table's; repeatable")
    parser.add_argument("--momentum", type=float, help="of the optimiser, for the table's")
    parser.add_argument("--seeds", type=int, default=2, help="how many (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="(default: %(default)s)")
    parser.add_argument("--width", type=int, default=8, help="of ResNet-18 (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="images a worker and step (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        table = [
            (text, configs(text, rate, momentum if options.momentum is None else options.momentum, options))
            for text, table_rate, momentum in METHODS
            if options.defence is None or text in options.defence
            for rate in options.rate or (table_rate,)
        ]
        if options.seeds < 1 or not table:
            raise ValueError(f"Expected seeds={options.seeds} to be at least 1, and defence to be in the table.")
        from raytrust.data import load
        from raytrust.studies.frontier.store import open_store
        from raytrust.train.private import check_sizes

        data = load(options.data)
        check_sizes(table[0][1][0], len(data.train_labels))
        first = replace(configs("none", 0.1, 0.9, options)[0], seed=0)
        sweep = SweepConfig("accuracy", first, portfolio=(InversionConfig(),))
        store = open_store(options.output.resolve(), sweep, data.fingerprint())
    except (ValueError, OSError) as error:
        print(f"accuracy.py: error: {error}", file=sys.stderr)
        return 2
    run(table, data, store)
    return 0


def configs(text: str, rate: float, momentum: float, options: argparse.Namespace) -> list[TrainConfig]:
    """The training runs of one line, one a seed."""
    base = TrainConfig(
        defence=parse_defence(text),
        model=ModelConfig(width=options.width),
        capture=CaptureConfig(steps=(0,), tuning=1, evaluation=1),
        workers=2,
        batch_size=options.batch_size,
        steps=options.steps,
        learning_rate=rate,
        momentum=momentum,
    )
    return [replace(base, seed=seed) for seed in range(options.first_seed, options.first_seed + options.seeds)]


def run(table: list[tuple[str, list[TrainConfig]]], data: Any, store: Any) -> None:
    from raytrust.cluster.failures import TrainingFailed
    from raytrust.cluster.groups import training_groups
    from raytrust.cluster.runtime import cluster
    from raytrust.cluster.training import train_on_cluster

    lines = [
        "| method | learning rate, momentum | ratio | bytes a step | accuracy % by seed | mean |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    with cluster(None, cpus=2), training_groups(2, data, store, say=print) as groups:
        for text, runs in table:
            try:
                results = [train_on_cluster(config, store, groups.queue) for config in runs]
            except TrainingFailed as error:  # the line says so, and the others go on
                lines.append(f"| {text} | {runs[0].learning_rate:g}, {runs[0].momentum:g} | failed: {error} | | | |")
                print(lines[-1], flush=True)
                continue
            accuracies = [100 * r["correct"] / r["n_test"] for r in results]
            sent, dense = results[0]["bytes_per_step"], results[0]["dense_bytes"]
            lines.append(
                f"| {runs[0].defence.name} | {runs[0].learning_rate:g}, {runs[0].momentum:g} | {dense / sent:.1f}x | "
                f"{sent:,.0f} | {', '.join(f'{a:.1f}' for a in accuracies)} | {np.mean(accuracies):.1f} |"
            )
            print(lines[-1], flush=True)
    (store.root / "accuracy.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
