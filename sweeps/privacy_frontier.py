"""What does gradient compression cost in accuracy and buy in privacy, against an attacker who knows the compressor?

    python sweeps/privacy_frontier.py                           # handwritten digits, minutes on a laptop
    python sweeps/privacy_frontier.py --data faces              # the same with faces
    python sweeps/privacy_frontier.py --data images.npz --width 16
    python sweeps/privacy_frontier.py --preset paper --data cifar10 --address auto
    python sweeps/privacy_frontier.py --resume results/DIR --iterations 400 --attack-trials 8   # attack again

The tables below are the whole search: edit them to ask another question.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

from raytrust.cli import options as cli
from raytrust.config import (
    CaptureConfig,
    Choice,
    InversionConfig,
    LogInteger,
    LogUniform,
    ModelConfig,
    Space,
    SweepConfig,
    Threat,
    TrainConfig,
    parse_defence,
)
from raytrust.config.attacks import NAMED
from raytrust.config.parsing import syntax

# Audited always, in this order. Methods whose paper has error feedback are audited with it; Top-K sends the bytes of
# the PowerSGD whose rank stands behind it.
QUICK = ("none", "powersgd:16:ef", "powersgd:4:ef", "powersgd:2:ef", "powersgd:1:ef",
         "topk:rank16:ef", "topk:rank4:ef", "topk:rank1:ef", "qsgd:4", "ef-signsgd")  # fmt: skip
PAPER = ("none", *(f"{method}{rank}:ef" for method in ("powersgd:", "topk:rank") for rank in (50, 30, 4, 2, 1)))

# The outer search goes on from there. Objectives: leakage down, accuracy up (--minimise-bytes: bytes down).
DEFENCE_SPACE: Space = {
    "compressor": Choice(("powersgd", "topk")),
    "rank": LogInteger(1, 64),  # PowerSGD's rank, or the rank whose bytes Top-K sends
    "error_feedback": Choice((False, True)),
}

# The inner search, for each defence: maximise SSIM on the tuning images. "capture_step" is added from the preset.
ATTACK_SPACE: Space = {
    "objective": Choice(("naive", "aware")),
    "matching": Choice(("cosine", "tensors")),
    "tv": LogUniform(1e-3, 0.1),
    "step_size": LogUniform(0.3, 4.0),
    "signed": Choice(("none", "hard", "soft")),
    "schedule": Choice(("steps", "cosine")),
    "restarts": Choice((1, 2)),
}

#                 further attacks   tuning   evaluation   attack       training               captured
#                 on each defence   images   images       iterations   steps batch   width    at steps
PRESETS: dict[str, dict[str, Any]] = {
    "quick": dict(list=QUICK, attack_trials=2, tuning=4, images=8, iterations=100, steps=100, batch_size=32, width=16,
                  capture_steps=(0, 20), tv=0.01, step_size=2.0),
    "paper": dict(list=PAPER, attack_trials=8, tuning=4, images=10, iterations=400, steps=400, batch_size=64, width=64,
                  capture_steps=(0, 200), tv=0.01, step_size=0.8),
}  # fmt: skip

AGAIN = ("attack_trials", "iterations", "attack")  # what a resumed sweep may change: its captures are attacked again
PLACE = ("address", "parallel", "tracking_uri", "device", "hours")
RUN = cli.Directory("privacy_frontier", "a sweep", "sweep.json", ("trials", *AGAIN, *PLACE))


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    with parser.refusing():
        options, root = RUN.resolve(given, DEFAULTS, _with_preset)
        data, sweep = _prepare(options)
        from raytrust.studies.frontier.store import (
            open_store,  # imports the attacks: not needed to refuse a wrong option
        )

        RUN.check_free(root, options)
        store = open_store(root, sweep, data.fingerprint(), RUN.keep(options, ("parallel", "device", "hours")))
    return _run(options, data, sweep, store)


def _run(options: argparse.Namespace, data: Any, sweep: SweepConfig, store: Any) -> int:
    from raytrust.cli.frontier import Spaces, run_sweep
    from raytrust.reports.frontier_report import Program

    more: Space = {"capture_step": Choice(sweep.train.capture.steps)}
    if options.history:
        more["residual"] = Choice(("ignore", "avoid"))
    spaces = Spaces(DEFENCE_SPACE, ATTACK_SPACE | more)

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
            device=options.device,
            hours=options.hours,
            program=Program(f"python {sys.argv[0]}", cli.given(sys.argv[1:]), RUN.keep(options), cli.STARTED),
        )
        return 0 if any(row["status"] == "finished" for row in rows) else 1

    return RUN.run(store.root, options, work)


def _parser() -> cli.Parser:
    parser = cli.Parser("privacy_frontier.py", __doc__)
    add = parser.add_argument
    add("--data", metavar="SOURCE", help="digits, faces, cifar10, cifar100, mnist, FILE.npz or DIR (ImageFolder)")
    add("--image-size", type=int, metavar="N", help="resize images to N x N")
    add("--preset", choices=list(PRESETS), help="quick: minutes on a laptop; paper: full ResNet-18, 10 images")
    add("--trials", type=int, metavar="N", help="defences in all; those beyond the list are chosen by the search")
    add("--defence", action="append", metavar="NAME", help=f"audit this instead of the list; repeatable; {syntax()}")
    add("--workers", type=int, metavar="N", help="Ray Train workers")
    add("--network", choices=["resnet18", "convnet", "resnet20", "lenet"], help="what is trained")
    add("--stem", choices=["cifar", "imagenet"], help="of ResNet-18")
    add("--width", type=int, metavar="N", help="channels of the network's first stage")
    add("--steps", type=int, metavar="N", help="training steps")
    add("--images", type=int, metavar="N", help="private batches on which leakage is reported")
    add("--private-batch", type=int, metavar="N", help="images in a private batch")
    add("--iterations", type=int, metavar="N", help="of each attack; may be given with --resume")
    add("--attack-trials", type=int, metavar="N", help="further attacks that the search tries on each defence; with "
        "--resume, attacks the captures again")  # fmt: skip
    add("--attack", action="append", choices=list(NAMED), help="an attack of the literature that every defence meets, "
        "too, with --iterations of its own optimiser; repeatable")  # fmt: skip
    add("--vantage", choices=["link", "peer"], help="a worker's messages, or the collective's result")
    add("--batch-norm", choices=["eval", "train"], help="mode of batch norm when the private gradient is taken")
    add("--batch-statistics", choices=["unknown", "known"], help="whether the attacker gets those of the private batch")
    add("--labels", choices=["known", "unknown"], help="whether the attacker knows the private labels")
    add("--history", type=int, metavar="N", help="steps before, whose messages the attacker has, too")
    add("--minimise-bytes", action="store_true", help="bytes per step as a third objective of the search")
    add("--hours", type=float, metavar="H", help="begin no further trial after H hours; --resume goes on from there")
    add("--parallel", type=int, metavar="N", help="trials at once on a cluster that starts nodes for them")
    add("--device", choices=["auto", "cpu", "cuda"], help="where to train and attack; auto: GPUs that torch can use")
    parser.add_places("sweep")
    return parser


# Options and their defaults, apart from what the preset says; None: not given.
DEFAULTS: dict[str, Any] = dict(
    data="digits", image_size=None, preset="quick", defence=None, workers=2, network="resnet18", stem="cifar",
    private_batch=1, attack=None, vantage="link", batch_norm="eval", batch_statistics="unknown", labels="known",
    history=0, minimise_bytes=False, parallel=None, hours=None, device="auto", trials=None, **cli.PLACES,
)  # fmt: skip


def _with_preset(given: dict[str, Any]) -> dict[str, Any]:
    options = {**PRESETS[given.get("preset", DEFAULTS["preset"])], **given}
    return options | {"listed": given.get("trials")}  # a sweep that goes on with other trials keeps its list


def _prepare(options: argparse.Namespace) -> tuple[Any, SweepConfig]:
    """The data and the configuration, both checked: what is wrong shows before Ray starts."""
    if missing := [name for name in (*DEFAULTS, *PRESETS["quick"]) if not hasattr(options, name)]:
        raise ValueError(f"Expected resume={str(options.resume)!r} to be of this version, but it lacks {missing[0]}.")
    cli.check_least(options, 1, "trials", "steps", "images", "private_batch", "iterations")
    cli.check_hours(options)
    if options.parallel is not None and (options.parallel < 1 or options.address is None):
        raise ValueError(f"Expected parallel={options.parallel} to be at least 1 and to be given with --address.")
    defences = tuple(map(parse_defence, options.defence or options.list))
    if options.defence is None and options.listed is not None:
        defences = defences[: options.listed]
    steps = tuple(step for step in options.capture_steps if step < options.steps)
    sweep = SweepConfig(
        name="privacy_frontier",
        train=TrainConfig(
            model=ModelConfig(name=options.network, stem=options.stem, width=options.width),
            threat=Threat(
                vantage=options.vantage,
                batch_size=options.private_batch,
                batch_norm=options.batch_norm,
                batch_statistics=options.batch_statistics,
                labels=options.labels,
                history=options.history,
            ),
            capture=CaptureConfig(steps, tuning=options.tuning, evaluation=options.images),
            workers=options.workers,
            batch_size=options.batch_size,
            steps=options.steps,
            seed=options.seed,
        ),
        defences=defences,
        trials=max(options.trials or 0, len(defences)),
        portfolio=_portfolio(options, steps),
        attack_trials=options.attack_trials,
        bytes_objective=options.minimise_bytes,
    )
    cli.check_cpus("workers", options.workers, options.address)
    from raytrust.data import load
    from raytrust.train.loop import check_sizes

    data = load(options.data, image_size=options.image_size, seed=options.seed)
    check_sizes(sweep.train, len(data.train_labels))
    return data, sweep


def _portfolio(options: argparse.Namespace, steps: tuple[int, ...]) -> tuple[InversionConfig, ...]:
    """The attacks that every defence meets: that ignore and that know the compressor, by the cosine of the whole
    gradient and tensor by tensor; where the attacker has earlier messages, one that avoids the residual by them; and
    those that were asked for."""
    common: dict[str, Any] = dict(iterations=options.iterations, seed=options.seed)
    strong = InversionConfig(tv=options.tv, step_size=options.step_size, **common)
    attacks = [replace(strong, objective=o, matching=m) for o in ("naive", "aware") for m in ("cosine", "tensors")]
    if options.history and steps[-1] > 0:  # step 0 has no residual
        attacks.append(replace(strong, capture_step=steps[-1], residual="avoid"))
    return (*attacks, *(replace(NAMED[name], **common) for name in options.attack or ()))


if __name__ == "__main__":
    sys.exit(cli.start(main))
