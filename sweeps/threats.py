"""Which threats leak, and through which defence: batches, batch norm's modes, local steps, states of the model.

    python sweeps/threats.py                                    # handwritten digits, about ten minutes
    python sweeps/threats.py --preset paper --data cifar10.npz  # batches of up to 16, hours
    python sweeps/threats.py --preset huang --data cifar10.npz  # the threats of Huang et al. 2021; wei: Wei et al. 2020
    python sweeps/threats.py --private-batches 1,4 --batch-norms train --defence none --defence powersgd:4
    python sweeps/threats.py --resume results/DIR

Nothing is searched: every defence meets the same attacks, in each way through local steps, chosen on other images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from raytrust.cli import options as cli
from raytrust.cli.fields import Fields, by_preset
from raytrust.config import InversionConfig, parse_defence
from raytrust.config.parsing import syntax
from raytrust.config.threats import ThreatMapConfig

QUICK = ("none", "powersgd:4", "dp-sgd:0.1:clip=1")
# Top-K sends the bytes of PowerSGD 4. DP-SGD has no gradient of an image where batch norm mixes them: no result there.
PAPER = ("none", "powersgd:4", "topk:rank4", "signsgd", "dp-sgd:0.1:clip=1")
# The axes of Huang et al. 2021: batches, labels, knowledge of their statistics; of their defences, pruning and MixUp.
HUANG = ("none", "prune:0.9", "prune:0.99", "mixup:4")
# Those of Wei et al. 2020: batches, unknown labels, local steps, the share of entries that is sent, noise.
WEI = ("none", "topk:0.9", "topk:0.5", "topk:0.1", "noise:0.001", "noise:0.01")

#                 defences   private    states   local   private batches    attack       training         width
#                            batches             steps   tuning  reported   iterations   steps   batch
PRESETS: dict[str, dict[str, Any]] = {
    "quick": dict(list=QUICK, private_batches=(1, 4), states=("untrained", "trained"), local_steps=(1, 5),
                  tuning=1, evaluation=2, iterations=60, steps=60, batch_size=64, width=8),
    "paper": dict(list=PAPER, private_batches=(1, 4, 16), states=("untrained", "trained"), local_steps=(1, 5),
                  tuning=1, evaluation=4, iterations=60, steps=1500, batch_size=128, width=32,
                  network="normed-convnet", local_batch_size=4),
    "huang": dict(list=HUANG, private_batches=(1, 2, 4, 8, 16, 32), states=("untrained",), local_steps=(1,),
                  batch_norms=("train",), batch_statistics=("known", "proxy", "unknown"), auxiliary=500,
                  labels=("known", "unknown"), tuning=1, evaluation=4, iterations=200, steps=0, batch_size=64,
                  network="normed-convnet", width=32),
    "wei": dict(list=WEI, private_batches=(1, 2, 4, 8), states=("untrained",), local_steps=(1, 5),
                batch_norms=("eval",), labels=("unknown",), tuning=1, evaluation=4, iterations=300, steps=0,
                batch_size=64, network="lenet", width=12),
}  # fmt: skip

# Every field of the configuration is an option, too; here is which are called otherwise, and which are none.
MAP = Fields(
    ThreatMapConfig,
    "threats",
    names={
        "train.model.name": "network",
        "train.model.options": "network_options",
        "train.local.learning_rate": "local_learning_rate",
        "train.local.batch_size": "local_batch_size",
    },
    without={
        "defences": "--defence lists them",
        "portfolio": "--iterations; each defence meets attacks that ignore and that know it, by two distances",
        "train.defence": "--defence lists them",
        "train.model.checkpoint": "the map trains its model itself",
        "train.capture.steps": "the model of each state is attacked as it is",
        "train.threat.batch_size": "--private-batches",
        "train.threat.batch_norm": "--batch-norms",
        "train.threat.labels": "--labels",
        "train.threat.vantage": "--vantages",
        "train.threat.batch_statistics": "--batch-statistics",
        "train.threat.history": "there are no steps before",
        "train.local.steps": "--local-steps",
    },
    notes={"local_steps": cli.BEYOND},
)
DEFAULTS: dict[str, Any] = {
    **MAP.values(ThreatMapConfig()),
    **dict(data="digits", image_size=None, preset="quick", defence=None, cpus=None, hours=None, device="auto"),
    **cli.PLACES,
}
CHANGEABLE = ("address", "local", "tracking_uri", "cpus", "hours", "device", "plugin")
RUN = cli.Directory("threats", "a map", "threats.json", CHANGEABLE)


def main(arguments: list[str] | None = None) -> int:
    return RUN.launch(_parser(), arguments, DEFAULTS, _with_preset, _begin)


def _parser() -> cli.Parser:
    parser = cli.Parser("threats", __doc__)
    add = parser.add_argument_group("map").add_argument
    add("--data", metavar="SOURCE", help="digits, faces, cifar10, cifar100, mnist, FILE.npz or DIR (ImageFolder)")
    add("--image-size", type=int, metavar="N", help="resize images to N x N")
    add("--preset", choices=list(PRESETS), help="quick: about ten minutes on a laptop; paper: hours; huang, wei: "
        "the threats of Huang et al. 2021 and Wei et al. 2020 with our attacks, hours")  # fmt: skip
    add("--defence", action="append", metavar="NAME", help=f"a column of the map; repeatable; {syntax()}")
    add("--iterations", type=int, metavar="N", help="of every attack")
    add("--cpus", type=int, metavar="N", help="jobs at once, on a Ray of its own; default: all CPUs")
    add("--hours", type=float, metavar="H", help="begin no further job after H hours; --resume goes on from there")
    add("--device", choices=["auto", "cpu", "cuda"], help="where to compute; auto (default): GPUs that torch can use")
    parser.add_places("map")
    MAP.add_to(parser, by_preset(DEFAULTS, PRESETS), also={"evaluation": "images"})
    return parser


def _with_preset(given: dict[str, Any]) -> dict[str, Any]:
    return {**PRESETS[given.get("preset", DEFAULTS["preset"])], **given}


def _begin(options: argparse.Namespace, root: Path) -> Callable[[], int]:
    cli.check_least(options, 1, "cpus", "iterations")
    cli.check_cpus("cpus", options.cpus, options.address)
    cli.check_hours(options)
    cli.check_local(options)
    cli.drop_width(options)
    if isinstance(options.batch_statistics, str):  # a resumed map of before it was an axis
        options.batch_statistics = (options.batch_statistics,)
    names = list(dict.fromkeys(["none", *(options.defence or options.list)]))
    strong = InversionConfig(iterations=options.iterations, tv=0.01, step_size=1.0, seed=options.seed)
    portfolio = [replace(strong, objective=o, matching=m) for o in ("naive", "aware") for m in ("cosine", "tensors")]
    # Each cell has its own number; what the others share is checked with the largest.
    fixed: dict[str, Any] = {"train.local.steps": max(options.local_steps, default=1), "train.capture.steps": (0,)}
    fixed |= {"defences": tuple(map(parse_defence, names)), "portfolio": tuple(portfolio)}
    config: ThreatMapConfig = MAP.make(vars(options), fixed)
    from raytrust.cli.threats import open_map  # imports torch: not needed to refuse a wrong option
    from raytrust.data import load
    from raytrust.networks.build import check_network
    from raytrust.train.private import auxiliary_images, check_sizes

    data = load(options.data, image_size=options.image_size, seed=options.seed)
    for cell in config.cells():
        check_sizes(cell.train, len(data.train_labels))
        auxiliary_images(cell.train, data)
    check_network(config.train.model, data.train_images.shape[1:], data.classes)
    store = open_map(root, config, data, RUN.keep(options, ("cpus", "hours", "device")))
    return lambda: _run(options, config, data, store)


def _run(options: argparse.Namespace, config: ThreatMapConfig, data: Any, store: Any) -> int:
    from raytrust.cli.threats import FILES, run_threats

    mapped = run_threats(
        config,
        data,
        store,
        address=options.address,
        cpus=options.cpus or cli.cpus(),
        tracking_uri=options.tracking_uri,
        hours=options.hours,
        spread=not options.local,
        device=options.device,
    )
    cli.list_files(store.root, FILES)
    statuses = {row["status"] for m in mapped for row in m.rows}
    if any(row["reason"] == "not finished" for m in mapped for row in m.rows):
        print(f"Not finished. Go on with: {cli.resumption(store.root, options)}")
    return 1 if statuses == {"failed"} else 0


if __name__ == "__main__":
    sys.exit(cli.start(main))
