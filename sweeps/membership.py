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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raytrust.cli import options as cli
from raytrust.cli.fields import Fields, by_preset
from raytrust.config import Defence, DPSGDConfig, MembershipConfig, PowerSGDConfig, TopKConfig, parse_defence


def defences(*ranks: int) -> tuple[Defence, ...]:
    """Nothing; PowerSGD, and Top-K at the levels that send as many bytes, both with error feedback as in the paper."""
    pairs = ((Defence(PowerSGDConfig(r), True), Defence(TopKConfig(equal_to_rank=r), True)) for r in ranks)
    return (Defence(), *(defence for pair in pairs for defence in pair))


#                 the network     and its    steps of SGD,    points of   each      canaries of  DP-SGD, where
#                                 width      their rate       the pool    batch     either kind  Opacus is there
PRESETS: dict[str, dict[str, Any]] = {
    "quick": dict(network="convnet",  width=16, steps=400, learning_rate=0.05, points=2000, batch_size=32, canaries=100,
                  defences=defences(1, 4), dp_sgd=("0.1:5", "0.2:1", "1:1"), models=8),
    "digits": dict(network="convnet", width=8, steps=200, learning_rate=0.05, points=1000, batch_size=32, canaries=50,
                   defences=defences(1, 4), dp_sgd=("0.1:5", "0.2:1", "1:1"), models=8),
    "paper": dict(network="resnet18", width=64, steps=8000, learning_rate=0.1, points=20000, batch_size=128,
                  canaries=500, defences=defences(1, 2, 4, 30, 50), dp_sgd=(), models=16),
}  # fmt: skip
CAPTURED = (0, 1 / 8, 1 / 4, 1 / 2, 1)  # shares of training after which messages are attacked
GUESSES = 200  # of the one-run epsilon at most, and one in five points

# Every field of the configuration is an option, too; here is which are called otherwise, and which are none.
AUDIT = Fields(
    MembershipConfig,
    "audit",
    names={"train.model.name": "network", "train.model.options": "network_options",
           "train.threat.batch_size": "message_batch", "train.capture.steps": "capture_steps"},
    without={
        "train.model.checkpoint": "each model is trained from its start on its own half",
        "name": "of the program",
        "defences": "--defence lists them",
        "dp_sgd": "--dp-sgd lists them",
        "mislabelled": "--canaries is of both kinds",
        "duplicates": "--canaries is of both kinds",
        "train.defence": "--defence lists them",
        "train.workers": "1: models are spread over the cluster, not batches",
        "train.capture.tuning": "--messages is of all: none is tuned on",
        "train.capture.evaluation": "--messages is of all: none is tuned on",
        "train.threat.labels": "a candidate is an image with its label",
        "train.threat.batch_statistics": "membership attacks use none",
        "train.threat.history": "membership attacks use none",
        "train.threat.auxiliary": "membership attacks use none",
        "train.local": "attacks on messages take each of them for one gradient",
    },
)  # fmt: skip
DEFAULTS: dict[str, Any] = {
    **AUDIT.values(MembershipConfig()),
    **dict(
        data="digits", image_size=None, preset="quick", defence=None, cpus=None, hours=None, device="auto", messages=4
    ),
    **cli.PLACES,
}
CHANGEABLE = ("address", "local", "tracking_uri", "cpus", "hours", "device", "plugin")
RUN = cli.Directory("membership", "an audit", "membership.json", CHANGEABLE)


def main(arguments: list[str] | None = None) -> int:
    return RUN.launch(_parser(), arguments, DEFAULTS, _with_preset, _begin)


def _parser() -> cli.Parser:
    parser = cli.Parser("membership", __doc__)
    add = parser.add_argument_group("what is audited").add_argument
    add("--data", metavar="SOURCE", help="digits (default), faces, cifar10, cifar100, mnist, FILE.npz or DIR "
        "(ImageFolder)")  # fmt: skip
    add("--image-size", type=int, metavar="N", help="resize images to N x N")
    add("--preset", choices=list(PRESETS), help="quick: 32x32 images on a CPU (default); digits; paper: ResNet-18")
    add("--defence", action="append", metavar="NAME", help="audit this instead of the list; repeatable: powersgd:1:ef")
    add("--dp-sgd", action="append", metavar="X:C", help="DP-SGD of noise multiplier X and clipping norm C; "
        "repeatable; or none")  # fmt: skip
    add("--canaries", type=int, metavar="N", help="points with a wrong label, and as many that come several times")
    add("--messages", type=int, metavar="N", help="attacked batches at each captured step (default: 4)")
    add("--cpus", type=int, metavar="N", help="models trained at once, on a Ray of its own; default: all CPUs")
    add("--hours", type=float, metavar="H", help="begin no further model after H hours; --resume goes on from there")
    add("--device", choices=["auto", "cpu", "cuda"], help="where to compute; auto (default): GPUs that torch can use")
    parser.add_places("audit")
    fitted = {"capture_steps": "shares 0, 1/8, 1/4, 1/2 and 1 of the steps"}
    fitted |= {name: f"at most {DEFAULTS[name]}" for name in ("message_batch", "property_models", "guesses")}
    AUDIT.add_to(parser, by_preset({**DEFAULTS, **fitted}, PRESETS))
    return parser


def _with_preset(given: dict[str, Any]) -> dict[str, Any]:
    default = "digits" if given.get("data", DEFAULTS["data"]) == "digits" else DEFAULTS["preset"]
    preset = given.get("preset", default)
    return {**PRESETS[preset], **given, "preset": preset}


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
    at_most("guesses", max(2, min(GUESSES, points // 5)))
    return argparse.Namespace(**sizes)


def _begin(options: argparse.Namespace, root: Path) -> Callable[[], int]:
    data, config = _prepare(options)
    from raytrust.studies.membership.jobs import open_audit
    from raytrust.studies.membership.pool import draw_pool

    draw_pool(config, data)  # refuses sizes that do not fit
    store = open_audit(root, config, data.fingerprint(), RUN.keep(options, ("cpus", "hours", "device", "defences")))
    return lambda: _run(options, data, config, store)


def _prepare(options: argparse.Namespace) -> tuple[Any, MembershipConfig]:
    """The data and the configuration, both checked: what is wrong shows before Ray starts."""
    cli.check_least(options, 1, "steps", "points", "models", "message_batch", "batch_size", "cpus")
    cli.check_least(options, 2, "messages")  # captures are tuned on one at least; here all are attacked alike
    cli.check_least(options, 0, "canaries", "property_models")
    cli.drop_width(options)
    references, listed = _dp_sgd(options), _defences(options)
    _config(_fit(options, sys.maxsize), listed, references)  # refuses what is wrong whatever the images
    cli.check_cpus("cpus", options.cpus, options.address)
    cli.check_hours(options)
    cli.check_local(options)
    from raytrust.data import load  # imports torch: not needed to refuse a wrong option
    from raytrust.networks.build import check_network

    data = load(options.data, image_size=options.image_size, seed=options.seed)
    config = _config(_fit(options, len(data.train_labels)), listed, _with_opacus(options, references))
    check_network(config.train.model, data.train_images.shape[1:], data.classes)
    return data, config


def _config(
    options: argparse.Namespace, listed: tuple[Defence, ...], references: tuple[DPSGDConfig, ...]
) -> MembershipConfig:
    steps = tuple(options.capture_steps)
    if "capture_steps" not in options.chosen:
        steps = tuple(sorted({min(round(share * options.steps), options.steps - 1) for share in CAPTURED}))
    fixed = {
        "train.capture.steps": steps,
        "train.capture.tuning": 1,
        "train.capture.evaluation": options.messages - 1,
        "train.workers": 1,
        "mislabelled": options.canaries,
        "duplicates": options.canaries,
        "defences": listed,
        "dp_sgd": references,
    }
    config: MembershipConfig = AUDIT.make(vars(options), fixed)
    return config


def _defences(options: argparse.Namespace) -> tuple[Defence, ...]:
    if options.defence:
        return tuple(map(parse_defence, options.defence))
    listed: tuple[Defence, ...] = PRESETS[options.preset]["defences"]
    return listed


def _dp_sgd(options: argparse.Namespace) -> tuple[DPSGDConfig, ...]:
    wanted = []
    for text in [] if list(options.dp_sgd) == ["none"] else options.dp_sgd:
        try:
            noise, clip = map(float, text.split(":"))
        except ValueError:
            raise ValueError(f"Expected dp_sgd={text!r} to be NOISE:CLIP, two numbers, or none.") from None
        wanted.append(DPSGDConfig(noise, clip))
    return tuple(wanted)


def _with_opacus(options: argparse.Namespace, references: tuple[DPSGDConfig, ...]) -> tuple[DPSGDConfig, ...]:
    """The reference defences. Those of the preset are left out where Opacus is missing; asked for, they are refused."""
    from raytrust.train.dp_sgd import available

    if references and not available():
        if list(options.dp_sgd) != list(PRESETS[options.preset]["dp_sgd"]):
            raise ValueError(f"Expected the package opacus for dp_sgd={options.dp_sgd}: pip install raytrust[dp].")
        print("Without DP-SGD: the package opacus is not installed (pip install raytrust[dp]).", file=sys.stderr)
        return ()
    return references


def _run(options: argparse.Namespace, data: Any, config: MembershipConfig, store: Any) -> int:
    from raytrust.cli.membership import run_membership

    print(data.summary())
    cpus, uri = options.cpus or cli.cpus(), options.tracking_uri
    rows = run_membership(
        config,
        data,
        store,
        address=options.address,
        cpus=cpus,
        tracking_uri=uri,
        hours=options.hours,
        spread=not options.local,
        device=options.device,
    )
    print("\n" + (store.root / "membership.txt").read_text())
    cli.list_files(store.root, ("report.html", "results.json", "roc.png", "auc.png", "models"))
    return 0 if any(row["status"] == "finished" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(cli.start(main))
