"""Who was in the training set, by the final model and by what crossed the wire, and what does compression change?

    python sweeps/membership.py                                 # handwritten digits
    python sweeps/membership.py --data cifar10.npz
    python sweeps/membership.py --defence none --defence powersgd:2:ef --dp-sgd 1:1
    python sweeps/membership.py --preset paper --data cifar10 --address auto

The tables below are the whole audit: edit them to ask another question.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from raytrust.cli import options as cli
from raytrust.config import (
    CaptureConfig,
    Defence,
    DPSGDConfig,
    MembershipConfig,
    ModelConfig,
    PowerSGDConfig,
    Threat,
    TopKConfig,
    TrainConfig,
    parse_defence,
)


def defences(*ranks: int) -> tuple[Defence, ...]:
    """Nothing; PowerSGD, and Top-K at the levels that send as many bytes, both with error feedback as in the paper."""
    pairs = ((Defence(PowerSGDConfig(r), True), Defence(TopKConfig(equal_to_rank=r), True)) for r in ranks)
    return (Defence(), *(defence for pair in pairs for defence in pair))


#                 the network     and its    steps of SGD,    points of   each      canaries of  DP-SGD, where
#                                 width      their rate       the pool    batch     either kind  Opacus is there
PRESETS: dict[str, dict[str, Any]] = {
    "quick": dict(model="convnet",  width=16, steps=400, learning_rate=0.05, points=2000, batch_size=32, canaries=100,
                  defences=defences(1, 4), dp_sgd=("0.1:5", "0.2:1", "1:1"), models=8),
    "digits": dict(model="convnet", width=8, steps=200, learning_rate=0.05, points=1000, batch_size=32, canaries=50,
                   defences=defences(1, 4), dp_sgd=("0.1:5", "0.2:1", "1:1"), models=8),
    "paper": dict(model="resnet18", width=64, steps=8000, learning_rate=0.1, points=20000, batch_size=128,
                  canaries=500, defences=defences(1, 2, 4, 30, 50), dp_sgd=(), models=16),
}  # fmt: skip
CAPTURED = (0, 1 / 8, 1 / 4, 1 / 2, 1)  # shares of training after which messages are attacked
GUESSES = 200  # of the one-run epsilon at most, and one in five points
RUN = cli.Directory("membership", "an audit", "membership.json", ("address", "tracking_uri", "cpus", "hours"))


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    with parser.refusing():
        options, root = RUN.resolve(given, DEFAULTS, _with_preset)
        data, config = _prepare(options)
        # They import torch, which is not needed to refuse a wrong option.
        from raytrust.studies.membership.jobs import open_audit
        from raytrust.studies.membership.pool import draw_pool

        draw_pool(config, data)  # refuses sizes that do not fit
        RUN.check_free(root, options)
        store = open_audit(root, config, data.fingerprint(), RUN.keep(options, ("cpus", "hours", "defences")))
    return _run(options, data, config, store)


def _run(options: argparse.Namespace, data: Any, config: MembershipConfig, store: Any) -> int:
    from raytrust.cli.membership import run_membership

    def work() -> int:
        print(data.summary())
        cpus, uri = options.cpus or cli.cpus(), options.tracking_uri
        rows = run_membership(
            config, data, store, address=options.address, cpus=cpus, tracking_uri=uri, hours=options.hours
        )
        print("\n" + (store.root / "membership.txt").read_text())
        cli.list_files(store.root, ("report.html", "results.json", "roc.png", "auc.png", "models"))
        return 0 if any(row["status"] == "finished" for row in rows) else 1

    return RUN.run(store.root, options, work)


def _parser() -> cli.Parser:
    parser = cli.Parser("membership.py", __doc__)
    add = parser.add_argument
    add(
        "--data",
        metavar="SOURCE",
        help="digits (default), faces, cifar10, cifar100, mnist, FILE.npz or DIR (ImageFolder)",
    )
    add("--image-size", type=int, metavar="N", help="resize images to N x N")
    add("--preset", choices=list(PRESETS), help="quick: 32x32 images on a CPU (default); digits; paper: ResNet-18")
    add("--defence", action="append", metavar="NAME", help="audit this instead of the list; repeatable: powersgd:1:ef")
    add(
        "--dp-sgd",
        action="append",
        metavar="X:C",
        help="DP-SGD of noise multiplier X and clipping norm C; repeatable; or none",
    )
    add("--models", type=int, metavar="N", help="a defence, each attacked with the others as its shadows")
    add("--points", type=int, metavar="N", help="images of the pool, of which each model has about half")
    add("--canaries", type=int, metavar="N", help="points with a wrong label, and as many that come several times")
    add("--batch-size", type=int, metavar="N", help="images of a training step")
    add("--messages", type=int, metavar="N", help="attacked batches at each captured step")
    add("--message-batch", type=int, metavar="N", help="images of an attacked batch")
    add("--property-models", type=int, metavar="N", help="models that property inference is measured on; 0: none")
    add("--width", type=int, metavar="N", help="of the network")
    add("--steps", type=int, metavar="N", help="training steps")
    add("--learning-rate", type=float, metavar="X", help="of all models; sign methods need a small one, such as 0.001")
    add("--vantage", choices=["link", "peer"], help="a worker's messages, or the collective's result")
    add("--cpus", type=int, metavar="N", help="models trained at once, on a Ray of its own; default: all CPUs")
    add("--hours", type=float, metavar="H", help="begin no further model after H hours; --resume goes on from there")
    parser.add_places("audit")
    return parser


DEFAULTS: dict[str, Any] = dict(
    data="digits", image_size=None, preset="quick", defence=None, vantage="link", cpus=None, hours=None, messages=4,
    message_batch=16, property_models=4, chosen=(), **cli.PLACES,
)  # fmt: skip


def _with_preset(given: dict[str, Any]) -> dict[str, Any]:
    default = "digits" if given.get("data", DEFAULTS["data"]) == "digits" else DEFAULTS["preset"]
    preset = given.get("preset", default)
    return {**PRESETS[preset], **given, "preset": preset, "chosen": sorted(given)}


def _fit(options: argparse.Namespace, images: int) -> argparse.Namespace:
    """The options for so many training images: sizes that nobody chose are made as small as these ask for."""
    sizes = vars(options).copy()

    def at_most(name: str, most: int) -> None:
        if name not in options.chosen:
            sizes[name] = min(sizes[name], max(1, most))

    at_most("points", images)
    points = sizes["points"]
    at_most("canaries", points // 20)
    at_most("batch_size", points // 5)
    at_most("message_batch", points // (4 * sizes["messages"]))
    at_most("property_models", sizes["models"])
    return argparse.Namespace(**sizes)


def _prepare(options: argparse.Namespace) -> tuple[Any, MembershipConfig]:
    """The data and the configuration, both checked: what is wrong shows before Ray starts."""
    cli.check_least(options, 1, "steps", "points", "models", "message_batch", "batch_size", "cpus")
    cli.check_least(options, 2, "messages")  # captures are tuned on one at least; here all are attacked alike
    cli.check_least(options, 0, "canaries", "property_models")
    references, listed = _dp_sgd(options), _defences(options)
    cli.check_cpus("cpus", options.cpus, options.address)
    cli.check_hours(options)
    from raytrust.data import load

    data = load(options.data, image_size=options.image_size, seed=options.seed)
    return data, _config(_fit(options, len(data.train_labels)), listed, references)


def _config(
    options: argparse.Namespace, listed: tuple[Defence, ...], references: tuple[DPSGDConfig, ...]
) -> MembershipConfig:
    return MembershipConfig(
        train=TrainConfig(
            model=ModelConfig(options.model, width=options.width),
            threat=Threat(vantage=options.vantage, batch_size=options.message_batch),
            capture=CaptureConfig(
                tuple(sorted({min(round(share * options.steps), options.steps - 1) for share in CAPTURED})),
                tuning=1,
                evaluation=options.messages - 1,
            ),
            workers=1,
            batch_size=options.batch_size,
            steps=options.steps,
            learning_rate=options.learning_rate,
            seed=options.seed,
        ),
        defences=listed,
        dp_sgd=references,
        models=options.models,
        points=options.points,
        mislabelled=options.canaries,
        duplicates=options.canaries,
        guesses=max(2, min(GUESSES, options.points // 5)),
        property_models=options.property_models,
    )


def _defences(options: argparse.Namespace) -> tuple[Defence, ...]:
    if options.defence:
        return tuple(map(parse_defence, options.defence))
    listed: tuple[Defence, ...] = PRESETS[options.preset]["defences"]
    return listed


def _dp_sgd(options: argparse.Namespace) -> tuple[DPSGDConfig, ...]:
    """The reference defences. Those of the preset are left out where Opacus is missing; asked for, they are refused."""
    from raytrust.train.dp_sgd import available

    wanted = []
    for text in [] if list(options.dp_sgd) == ["none"] else options.dp_sgd:
        try:
            noise, clip = map(float, text.split(":"))
        except ValueError:
            raise ValueError(f"Expected dp_sgd={text!r} to be NOISE:CLIP, two numbers, or none.") from None
        wanted.append(DPSGDConfig(noise, clip))
    if wanted and not available():
        if list(options.dp_sgd) != list(PRESETS[options.preset]["dp_sgd"]):
            raise ValueError(f"Expected the package opacus for dp_sgd={options.dp_sgd}: pip install raytrust[dp].")
        print("Without DP-SGD: the package opacus is not installed (pip install raytrust[dp]).", file=sys.stderr)
        return ()
    return tuple(wanted)


if __name__ == "__main__":
    sys.exit(cli.start(main))
