"""What does gradient compression cost in accuracy and buy in privacy, against an attacker who knows the compressor?

    python sweeps/privacy_frontier.py                           # handwritten digits, minutes on a laptop
    python sweeps/privacy_frontier.py --data images.npz --width 16
    python sweeps/privacy_frontier.py --preset paper --data cifar10 --address auto

The tables below are the whole search: edit them to ask another question.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

from ray import tune

from raytrust import cli
from raytrust.config import (
    CaptureConfig,
    Defence,
    InversionConfig,
    ModelConfig,
    PowerSGDConfig,
    SweepConfig,
    Threat,
    TopKConfig,
    TrainConfig,
    parse_defence,
)
from raytrust.config.parsing import SYNTAX

RANKS = (1, 2, 4, 30, 50)  # of the paper

# Audited always, in this order: nothing, PowerSGD, and Top-K at the levels that send as many bytes.
DEFENCES = (
    Defence(),
    *(Defence(PowerSGDConfig(rank)) for rank in RANKS),
    *(Defence(TopKConfig(equal_to_rank=rank)) for rank in RANKS),
)

# The outer search goes on from there. Objectives: leakage down, accuracy up (--minimise-bytes: bytes down).
DEFENCE_SPACE = {
    "compressor": tune.choice(["powersgd", "topk"]),
    "rank": tune.lograndint(1, 65),  # PowerSGD's rank, or the rank whose bytes Top-K sends
    "error_feedback": tune.choice([False, True]),
}

# The inner search, for each defence: maximise SSIM on the tuning images. "capture_step" is added from the preset.
ATTACK_SPACE = {
    "objective": tune.choice(["naive", "aware"]),
    "tv": tune.loguniform(1e-3, 1.0),
    "step_size": tune.loguniform(0.03, 3.0),
    "signed": tune.choice(["none", "hard", "soft"]),
    "schedule": tune.choice(["steps", "cosine"]),
    "restarts": tune.choice([1, 2]),
}

#                 defences   further attacks   tuning   evaluation   attack        training
#                 in all     on each           images   images       iterations    steps      width
PRESETS: dict[str, dict[str, Any]] = {
    "quick": dict(trials=12, attack_trials=1, tuning=2, images=3, iterations=40, steps=40, width=16,
                  capture_steps=(0, 20), batch_size=16, tv=0.03, step_size=1.0, signed="none", schedule="steps",
                  portfolio=("aware",)),
    "paper": dict(trials=11, attack_trials=8, tuning=4, images=10, iterations=400, steps=400, width=64,
                  capture_steps=(0, 200), batch_size=64, tv=0.01, step_size=0.8, signed="soft", schedule="cosine",
                  portfolio=("naive", "aware")),
}  # fmt: skip
RUN = cli.Directory("privacy_frontier", "a sweep", "sweep.json", ("trials", "address", "parallel", "tracking_uri"))


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    with parser.refusing():
        options, root = RUN.resolve(given, DEFAULTS, _with_preset)
        data, sweep = _prepare(options)
        from raytrust.store import open_store  # imports the attacks: not needed to refuse a wrong option

        RUN.check_free(root, options)
        store = open_store(root, sweep, data.fingerprint(), RUN.keep(options, ("parallel",)))
    return _run(options, data, sweep, store)


def _run(options: argparse.Namespace, data: Any, sweep: SweepConfig, store: Any) -> int:
    from raytrust.report import frontier_table
    from raytrust.reports.tracking_uri import default_uri, show_command
    from raytrust.sweep import Spaces, run_sweep

    spaces = Spaces(DEFENCE_SPACE, ATTACK_SPACE | {"capture_step": tune.choice(list(sweep.train.capture.steps))})

    def work() -> int:
        rows = run_sweep(
            sweep,
            spaces,
            data,
            store,
            address=options.address,
            cpus=max(sweep.train.workers, cli.cpus()),
            tracking_uri=options.tracking_uri,
            parallel=options.parallel,
        )
        print("\n" + frontier_table(rows) + "\n")
        cli.list_files(store.root, ("frontier.json", "frontier.png", "reconstructions.png", "captures"))
        uri = options.tracking_uri or default_uri(store.root)
        print(f"\nCompare the runs in the MLflow UI:\n  {show_command(uri)}")
        return 0 if any(row["status"] == "finished" for row in rows) else 1

    return RUN.run(store.root, options, work)


def _parser() -> cli.Parser:
    parser = cli.Parser("privacy_frontier.py", __doc__)
    add = parser.add_argument
    add("--data", metavar="SOURCE", help="digits, cifar10, cifar100, mnist, FILE.npz or DIR (ImageFolder)")
    add("--image-size", type=int, metavar="N", help="resize images to N x N")
    add("--preset", choices=list(PRESETS), help="quick: minutes on a laptop; paper: full ResNet-18, 10 images")
    add("--trials", type=int, metavar="N", help="defences in all; those beyond the list are chosen by the search")
    add("--attack-trials", type=int, metavar="N", help="further attacks that the search tries on each defence")
    add(
        "--defence",
        action="append",
        metavar="NAME",
        help=f"audit this instead of the list; repeatable; {SYNTAX}",
    )
    add("--workers", type=int, metavar="N", help="Ray Train workers")
    add("--stem", choices=["cifar", "imagenet"], help="of ResNet-18")
    add("--width", type=int, metavar="N", help="channels of ResNet-18's first stage")
    add("--steps", type=int, metavar="N", help="training steps")
    add("--images", type=int, metavar="N", help="private batches on which leakage is reported")
    add("--iterations", type=int, metavar="N", help="of each attack")
    add("--vantage", choices=["link", "peer"], help="a worker's messages, or the collective's result")
    add("--batch-norm", choices=["eval", "train"], help="mode of batch norm when the private gradient is taken")
    add("--minimise-bytes", action="store_true", help="bytes per step as a third objective of the search")
    add("--parallel", type=int, metavar="N", help="trials at once on a cluster that starts nodes for them")
    parser.add_places("sweep")
    return parser


# Options and their defaults, apart from what the preset says; None: not given.
DEFAULTS: dict[str, Any] = dict(
    data="digits", image_size=None, preset="quick", defence=None, workers=2, stem="cifar", vantage="link",
    batch_norm="eval", minimise_bytes=False, parallel=None, **cli.PLACES,
)  # fmt: skip


def _with_preset(given: dict[str, Any]) -> dict[str, Any]:
    options = {**PRESETS[given.get("preset", DEFAULTS["preset"])], **given}
    return options | {"listed": options["trials"]}  # a sweep that goes on with other trials keeps its list


def _prepare(options: argparse.Namespace) -> tuple[Any, SweepConfig]:
    """The data and the configuration, both checked: what is wrong shows before Ray starts."""
    cli.check_least(options, 1, "trials", "steps", "images")
    if options.parallel is not None and (options.parallel < 1 or options.address is None):
        raise ValueError(f"Expected parallel={options.parallel} to be at least 1 and to be given with --address.")
    threat = Threat(vantage=options.vantage, batch_norm=options.batch_norm)
    steps = tuple(step for step in options.capture_steps if step < options.steps)
    attack = InversionConfig(
        tv=options.tv,
        step_size=options.step_size,
        signed=options.signed,
        schedule=options.schedule,
        iterations=options.iterations,
        seed=options.seed,
    )
    defences = tuple(map(parse_defence, options.defence)) if options.defence else DEFENCES[: options.listed]
    sweep = SweepConfig(
        name="privacy_frontier",
        train=TrainConfig(
            model=ModelConfig(stem=options.stem, width=options.width),
            threat=threat,
            capture=CaptureConfig(steps, tuning=options.tuning, evaluation=options.images),
            workers=options.workers,
            batch_size=options.batch_size,
            steps=options.steps,
            seed=options.seed,
        ),
        defences=defences,
        trials=max(options.trials, len(defences)),
        portfolio=tuple(replace(attack, objective=objective) for objective in options.portfolio),
        attack_trials=options.attack_trials,
        bytes_objective=options.minimise_bytes,
    )
    cli.check_cpus("workers", options.workers, options.address)
    from raytrust.data import load
    from raytrust.train import check_sizes

    data = load(options.data, image_size=options.image_size, seed=options.seed)
    check_sizes(sweep.train, len(data.train_labels))
    return data, sweep


if __name__ == "__main__":
    sys.exit(cli.start(main))
