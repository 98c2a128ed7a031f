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
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from raytrust.cli import options as cli
from raytrust.cli.fields import Fields, by_preset
from raytrust.config import (
    Choice,
    InversionConfig,
    LogInteger,
    LogUniform,
    Space,
    SweepConfig,
    TrainConfig,
    parse_defence,
)
from raytrust.config.attacks import NAMED, PUBLISHED, named_attack, published_attacks, through_local_steps, ways_through
from raytrust.config.parsing import syntax

# Audited always, in this order. Methods whose paper has error feedback are audited with it; Top-K sends the bytes of
# the PowerSGD whose rank stands behind it.
QUICK = ("none", "powersgd:16:ef", "powersgd:4:ef", "powersgd:2:ef", "powersgd:1:ef",
         "topk:rank16:ef", "topk:rank4:ef", "topk:rank1:ef", "qsgd:4", "ef-signsgd")  # fmt: skip
AUDIT = ("none", "powersgd:4:ef", "powersgd:1:ef", "topk:0.01:ef")
PAPER = ("none", *(f"{method}{rank}:ef" for method in ("powersgd:", "topk:rank") for rank in (50, 30, 4, 2, 1)))

# The outer search goes on from there. Objectives: leakage down, accuracy up (--minimise-bytes: bytes down).
DEFENCE_SPACE: Space = {
    "compressor": Choice(("none", "powersgd", "topk")),
    "rank": LogInteger(1, 64),  # PowerSGD's rank, or the rank whose bytes Top-K sends
    "error_feedback": Choice((False, True)),
    "transform": Choice(("none", "noise", "prune")),  # before the compressor; and "dp-sgd" where no norm mixes images
    "deviation": LogUniform(1e-4, 0.03),  # of noise
    "fraction": Choice((0.5, 0.9, 0.99)),  # that is pruned
}
DP_SGD_SPACE: Space = {"transform": Choice(("none", "noise", "prune", "dp-sgd")), "noise": LogUniform(0.03, 3.0)}

# The inner search, for each defence: maximise SSIM on the tuning images. "capture_step" is added from the preset; what
# an option sets is left out.
ATTACK_SPACE: Space = {
    "objective": Choice(("naive", "aware")),
    "matching": Choice(("cosine", "tensors")),
    "tv": LogUniform(1e-3, 0.1),
    "step_size": LogUniform(0.3, 4.0),
    "signed": Choice(("none", "hard", "soft")),
    "schedule": Choice(("steps", "cosine")),
    "restarts": Choice((1, 2)),
}

# Besides, where the threat grants images to learn from.
AUXILIARY_SPACE: Space = {"start": Choice(("noise", "regression")), "denoise": Choice((0.0, 0.03, 0.06, 0.1))}

#                 further attacks   tuning   evaluation   attack       training               captured
#                 on each defence   images   images       iterations   steps batch   width    at steps
PRESETS: dict[str, dict[str, Any]] = {
    "quick": dict(list=QUICK, attack_trials=2, tuning=4, images=8, iterations=100, steps=100, batch_size=32, width=16,
                  capture_steps=(0, 20), tv=0.01, step_size=2.0),
    "paper": dict(list=PAPER, attack_trials=8, tuning=4, images=10, iterations=400, steps=400, batch_size=64, width=64,
                  capture_steps=(0, 200), tv=0.01, step_size=0.8),
    # A model as it is, of any network and with any weights: nothing is trained.
    "audit": dict(list=AUDIT, attack_trials=0, tuning=2, images=8, iterations=300, steps=0, batch_size=1, width=None,
                  capture_steps=(0,), tv=0.01, step_size=1.0),
}  # fmt: skip

# Every field of these configurations is an option, too; here is which are called otherwise, and which are none.
TRAIN = Fields(
    TrainConfig,
    "training",
    names={"model.name": "network", "model.options": "network_options", "threat.batch_size": "private_batch",
           "capture.steps": "capture_steps", "capture.evaluation": "images", "local.steps": "local_steps",
           "local.learning_rate": "local_learning_rate", "local.batch_size": "local_batch_size"},
    without={"defence": "--defence lists them"},
    notes={"local.steps": cli.BEYOND},
)  # fmt: skip
ATTACK = Fields(InversionConfig, "attacks", names={}, without={"seed": "--seed is of everything"})

# What else is an option, apart from what the preset says; None: not given.
DEFAULTS: dict[str, Any] = {
    **TRAIN.values(TrainConfig()),
    **ATTACK.values(InversionConfig()),
    **dict(data="digits", image_size=None, preset="quick", defence=None, trials=None, attack=None),
    **dict(minimise_bytes=False, hours=None, parallel=None, device="auto"),
    **cli.PLACES,
}
PLACE = ("address", "local", "parallel", "tracking_uri", "device", "hours", "plugin")
AGAIN = ("attack_trials", "attack", *ATTACK.names)  # what may change: the captures are attacked again
RUN = cli.Directory("privacy_frontier", "a sweep", "sweep.json", ("trials", *AGAIN, *PLACE))


def main(arguments: list[str] | None = None) -> int:
    return RUN.launch(_parser(), arguments, DEFAULTS, _with_preset, _begin)


def _parser() -> cli.Parser:
    parser = cli.Parser("privacy_frontier", __doc__)
    add = parser.add_argument_group("sweep").add_argument
    add("--data", metavar="SOURCE", help="digits, faces, cifar10, cifar100, mnist, FILE.npz or DIR (ImageFolder)")
    add("--image-size", type=int, metavar="N", help="resize images to N x N")
    add("--preset", choices=list(PRESETS), help="quick: minutes on a laptop; paper: full ResNet-18, 10 images; "
        "audit: a model as it is, without training")  # fmt: skip
    add("--trials", type=int, metavar="N", help="defences in all; those beyond the list are chosen by the search")
    add("--defence", action="append", metavar="NAME", help=f"audit this instead of the list; repeatable; {syntax()}")
    add("--minimise-bytes", action="store_true", help="bytes per step as a third objective of the search")
    add("--attack-trials", type=int, metavar="N", help="further attacks that the search tries on each defence; with "
        "--resume, attacks the captures again")  # fmt: skip
    add("--attack", action="append", metavar="NAME", help="an attack that every defence meets, too: with --iterations, "
        f"its own settings otherwise; repeatable; {', '.join(NAMED)}, {PUBLISHED} for all of the field, or one that is "
        "registered")  # fmt: skip
    add("--hours", type=float, metavar="H", help="begin no further trial after H hours; --resume goes on from there")
    add("--parallel", type=int, metavar="N", help="trials at once on a cluster that starts nodes for them")
    add("--device", choices=["auto", "cpu", "cuda"], help="where to train and attack; auto: GPUs that torch can use")
    parser.add_places("sweep")
    shown = by_preset({**DEFAULTS, "objective": "both", "matching": "cosine and tensors"}, PRESETS)
    TRAIN.add_to(parser, shown, also={"network": "model", "images": "evaluation"})
    ATTACK.add_to(parser, shown)
    return parser


def _with_preset(given: dict[str, Any]) -> dict[str, Any]:
    options = {**PRESETS[given.get("preset", DEFAULTS["preset"])], **given}
    return options | {"listed": given.get("trials")}  # a sweep that goes on with other trials keeps its list


def _begin(options: argparse.Namespace, root: Path) -> Callable[[], int]:
    data, sweep = _prepare(options)
    from raytrust.studies.frontier.store import open_store  # imports the attacks: not needed to refuse a wrong option

    store = open_store(root, sweep, data.fingerprint(), RUN.keep(options, ("parallel", "device", "hours")))
    return lambda: _run(options, data, sweep, store)


def _prepare(options: argparse.Namespace) -> tuple[Any, SweepConfig]:
    """The data and the configuration, both checked: what is wrong shows before Ray starts."""
    if missing := [name for name in (*DEFAULTS, *PRESETS["quick"]) if not hasattr(options, name)]:
        raise ValueError(f"Expected resume={str(options.resume)!r} to be of this version, but it lacks {missing[0]}.")
    cli.check_least(options, 1, "trials")
    cli.check_least(options, 0, "steps")
    cli.check_hours(options)
    cli.check_local(options)
    cli.drop_width(options)
    if options.parallel is not None and (options.parallel < 1 or options.address is None):
        raise ValueError(f"Expected parallel={options.parallel} to be at least 1 and to be given with --address.")
    defences = tuple(map(parse_defence, options.defence or options.list))
    if options.defence is None and options.listed is not None:
        defences = defences[: options.listed]
    steps = tuple(options.capture_steps)
    if "capture_steps" not in options.chosen:  # else one after the end is refused
        steps = tuple(step for step in steps if step < max(1, options.steps))
    if options.checkpoint and options.resume is None:  # a resumed sweep has it with its digest
        from raytrust.networks.checkpoint import identified

        options.checkpoint = identified(options.checkpoint)
    train = TRAIN.make(vars(options), {"capture.steps": steps})
    sweep = SweepConfig(
        name="privacy_frontier",
        train=train,
        defences=defences,
        trials=max(options.trials or 0, len(defences)),
        portfolio=_portfolio(options, train),
        attack_trials=options.attack_trials,
        bytes_objective=options.minimise_bytes,
    )
    cli.check_cpus("workers", options.workers, options.address)
    from raytrust.data import load
    from raytrust.networks.build import check_network
    from raytrust.train.private import auxiliary_images, check_sizes

    data = load(options.data, image_size=options.image_size, seed=options.seed)
    check_sizes(sweep.train, len(data.train_labels))
    auxiliary_images(sweep.train, data)  # there may be too few that are no copies of private ones
    check_network(sweep.train.model, data.train_images.shape[1:], data.classes)
    sweep = replace(sweep, portfolio=(*sweep.portfolio, *_further(options, sweep, data)))
    if sweep.attack_trials and not _attack_space(options, sweep):
        raise ValueError(f"Expected attack_trials={sweep.attack_trials} to be 0: options set all that a search varies.")
    return data, sweep


def _portfolio(options: argparse.Namespace, train: TrainConfig) -> tuple[InversionConfig, ...]:
    """The attacks that every defence meets: that ignore and that know the compressor, by the cosine of the whole
    gradient and tensor by tensor, in each way through local steps, unless an option says which; where the attacker has
    earlier messages, one that avoids the residual by them; and those that were asked for, as they were published for
    one step."""
    strong = ATTACK.make(vars(options), {"seed": options.seed})
    objectives = (strong.objective,) if "objective" in options.chosen else ("naive", "aware")
    matchings = (strong.matching,) if "matching" in options.chosen else ("cosine", "tensors")
    attacks = [replace(strong, objective=o, matching=m) for o in objectives for m in matchings]
    last, one_way = train.capture.steps[-1], "through" in options.chosen
    if not one_way:
        attacks = [*through_local_steps(attacks, train.local, *_batch(train))]
    if options.history and last > 0 and not {"residual", "capture_step"} & {*options.chosen}:
        attacks.append(replace(strong, through=attacks[0].through, capture_step=last, residual="avoid"))  # 0 has none
    own = {"iterations": options.iterations, "seed": options.seed}
    if train.local.steps > 1:
        own["through"] = strong.through if one_way else "gradient"
    named = [a for name in options.attack or () for a in _named(name, train)]
    return (*attacks, *(replace(attack, **own) for attack in named))


def _named(name: str, train: TrainConfig) -> Sequence[InversionConfig]:
    return published_attacks(train.threat) if name == PUBLISHED else (named_attack(name),)


def _further(options: argparse.Namespace, sweep: SweepConfig, data: Any) -> tuple[InversionConfig, ...]:
    """The attacks for which the threat or the network gives an opening."""
    threat, model = sweep.train.threat, sweep.train.model
    told = threat.batch_statistics != "unknown" or threat.auxiliary
    # No network that is shipped has a closed form, and to look costs the import of the attacks.
    if not told and model.shipped:
        return ()
    from raytrust.attacks.inversion.further import further_attacks
    from raytrust.networks.build import build_model

    network = build_model(model, data.channels, data.classes, seed=0)
    shape = tuple(data.train_images.shape[1:])
    found = further_attacks(sweep.portfolio, threat, network, shape, sweep.train.local, classes=data.classes)
    given = "bn" in options.chosen
    return tuple(a for a in found if not given or a.method != "optimise" or a.bn == options.bn)


def _batch(train: TrainConfig) -> tuple[int, bool]:
    """Of a private batch: images, and whether its labels are known."""
    return train.threat.batch_size, train.threat.labels == "known"


def _defence_space(train: TrainConfig, data: Any) -> Space:
    try:
        replace(train, defence=parse_defence("dp-sgd"))
    # Where batch norm mixes images, none has a gradient of its own.
    except ValueError:
        return DEFENCE_SPACE
    if not train.model.shipped and (train.steps > 0 or train.threat.batch_norm == "train"):
        from torch.nn.modules.batchnorm import _BatchNorm

        from raytrust.networks.build import build_model

        network = build_model(train.model, data.channels, data.classes, seed=0)
        if any(isinstance(module, _BatchNorm) for module in network.modules()):
            return DEFENCE_SPACE
    return DEFENCE_SPACE | DP_SGD_SPACE


def _attack_space(options: argparse.Namespace, sweep: SweepConfig) -> Space:
    train = sweep.train
    space: Space = {**ATTACK_SPACE, "capture_step": Choice(train.capture.steps)}
    if options.history:
        space["residual"] = Choice(("ignore", "avoid"))
    if train.local.steps > 1:
        space["through"] = Choice(ways_through(train.local, *_batch(train)))
    if any(attack.method == "regression" for attack in sweep.portfolio):
        space |= AUXILIARY_SPACE
    return {name: values for name, values in space.items() if name not in options.chosen}


def _run(options: argparse.Namespace, data: Any, sweep: SweepConfig, store: Any) -> int:
    from raytrust.cli.frontier import Spaces, run_sweep
    from raytrust.reports.frontier_report import Call

    called, given = shlex.join(cli.called_as()), cli.given(sys.argv[1:])
    given.pop("--plugin", None)  # it is among the words of the call
    rows = run_sweep(
        sweep,
        Spaces(_defence_space(sweep.train, data), _attack_space(options, sweep)),
        data,
        store,
        address=options.address,
        cpus=max(sweep.train.workers, cli.cpus()),
        tracking_uri=options.tracking_uri,
        parallel=options.parallel,
        device=options.device,
        hours=options.hours,
        spread=not options.local,
        program=Call(called, given, RUN.keep(options), cli.STARTED),
    )
    return 0 if any(row["status"] == "finished" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(cli.start(main))
