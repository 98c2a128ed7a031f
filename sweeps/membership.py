"""Who was in the training set, by the final model and by what crossed the wire, and what does compression change?

    python sweeps/membership.py                                 # handwritten digits
    python sweeps/membership.py --data cifar10.npz
    python sweeps/membership.py --defence none --defence powersgd:2:ef --dp-sgd 1:1
    python sweeps/membership.py --preset paper --data cifar10 --address auto

The tables below are the whole audit: edit them to ask another question.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

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
MESSAGE_BATCH = 16  # images of an attacked batch
MESSAGES = 4  # attacked batches at each of these shares of training
CAPTURED = (0, 1 / 8, 1 / 4, 1 / 2, 1)


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options, root, resumed = _resolve(options)
        data, config = _prepare(options)
        from raytrust.shadows import draw_pool, open_shadows  # imports torch: not needed to refuse a wrong option

        draw_pool(config, data)
        if not resumed and root.exists() and any(root.iterdir()):
            hint = f"--resume {root}" if (root / "membership.json").exists() else "another --output"
            raise ValueError(f"Expected output={str(root)!r} to be empty or new, but it is not; give {hint}.")
        store = open_shadows(root, config, data.fingerprint(), _kept(options))
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    return _run(options, data, config, store)


def _run(options: argparse.Namespace, data: Any, config: MembershipConfig, store: Any) -> int:
    from raytrust.membership import run_membership
    from raytrust.membership_page import membership_table

    cpus = options.cpus or _cpus()
    try:
        rows = run_membership(
            config, data, store, address=options.address, cpus=cpus, tracking_uri=options.tracking_uri
        )
    except KeyboardInterrupt:
        print(f"\nInterrupted; what was finished is kept. Go on with: python {sys.argv[0]} --resume {store.root}")
        return 130
    except ValueError as error:  # the cluster or the tracking store can't be used
        print(f"membership.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print("\n" + membership_table(rows) + "\n")
    for name in ("report.html", "results.json", "roc.png", "auc.png", "models"):
        if (store.root / name).exists():
            print(f"  {store.root / name}")
    return 0 if any(row["status"] == "finished" for row in rows) else 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, exit code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="membership.py",
        description=(__doc__ or "").split("\n\n")[0],
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--data", metavar="SOURCE", help="digits (default), cifar10, cifar100, mnist, FILE.npz or DIR (ImageFolder)")
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
    add("--width", type=int, metavar="N", help="of the network")
    add("--steps", type=int, metavar="N", help="training steps")
    add("--learning-rate", type=float, metavar="X", help="of all models; sign methods need a small one, such as 0.001")
    add("--vantage", choices=["link", "peer"], help="a worker's messages, or the collective's result")
    add("--seed", type=int, metavar="N", help="of everything that is random")
    add("--cpus", type=int, metavar="N", help="models trained at once, on a Ray of its own; default: all CPUs")
    add("--output", type=Path, metavar="DIR", help="a new directory for the results")
    add("--resume", type=Path, metavar="DIR", help="go on with the audit in DIR")
    add("--address", metavar="ADDRESS", help="of a Ray cluster; a local one is started if none is given")
    add("--tracking-uri", metavar="URI", help="of an MLflow store; sqlite in the output directory if none is given")
    return parser


DEFAULTS: dict[str, Any] = dict(
    data="digits", image_size=None, preset="quick", defence=None, vantage="link", seed=0, cpus=None, output=None,
    resume=None, address=None, tracking_uri=None,
)  # fmt: skip
NAMED_DATA = ("digits", "cifar10", "cifar100", "mnist")
RESUMABLE = ("address", "tracking_uri", "resume", "cpus")  # what may be given along with --resume


def _resolve(given: argparse.Namespace) -> tuple[argparse.Namespace, Path, bool]:
    """The options in full, the audit's directory, and whether it is resumed."""
    options = vars(given)
    if (resume := options.get("resume")) is not None:
        for name in options:
            if name not in RESUMABLE:
                flag = name.replace("_", "-")
                raise ValueError(f"Expected --{flag} not to be given with --resume: the audit keeps its own.")
        from raytrust.store import read_json

        found = read_json(resume / "membership.json")
        if not isinstance(found, dict) or "options" not in found:
            raise ValueError(
                f"Expected resume={str(resume)!r} to hold an audit, but it holds no membership.json of one."
            )
        return argparse.Namespace(**{**DEFAULTS, **found["options"], **options}), resume.resolve(), True
    if "preset" not in options and options.get("data", DEFAULTS["data"]) == "digits":
        options["preset"] = "digits"
    preset = PRESETS[options.get("preset", DEFAULTS["preset"])]
    options = {**DEFAULTS, **preset, **options}
    default = Path("results") / time.strftime("membership-%Y%m%d-%H%M%S")
    return argparse.Namespace(**options), (options["output"] or default).resolve(), False


def _kept(options: argparse.Namespace) -> dict[str, Any]:
    """The options that a resumed audit takes over, from whatever directory it is resumed."""
    dropped = ("output", "resume", "address", "cpus", "defences")
    kept = {k: v for k, v in vars(options).items() if k not in dropped}
    return kept if options.data in NAMED_DATA else kept | {"data": str(Path(options.data).expanduser().resolve())}


def _prepare(options: argparse.Namespace) -> tuple[Any, MembershipConfig]:
    """The data and the configuration, both checked: what is wrong shows before Ray starts."""
    for name in ("steps", "points", "models", "cpus"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"Expected {name}={value} to be at least 1.")
    references = _dp_sgd(options)
    if options.address is None and options.cpus is not None and options.cpus > _cpus():
        raise ValueError(f"Expected cpus={options.cpus} to be at most the number of CPUs, {_cpus()}.")
    config = MembershipConfig(
        train=TrainConfig(
            model=ModelConfig(options.model, width=options.width),
            threat=Threat(vantage=options.vantage, batch_size=MESSAGE_BATCH),
            capture=CaptureConfig(
                tuple(sorted({min(round(share * options.steps), options.steps - 1) for share in CAPTURED})),
                tuning=1,
                evaluation=MESSAGES - 1,
            ),
            workers=1,
            batch_size=options.batch_size,
            steps=options.steps,
            learning_rate=options.learning_rate,
            seed=options.seed,
        ),
        defences=_defences(options),
        dp_sgd=references,
        models=options.models,
        points=options.points,
        mislabelled=options.canaries,
        duplicates=options.canaries,
        property_models=min(4, options.models),
    )
    from raytrust.data import load

    return load(options.data, image_size=options.image_size, seed=options.seed), config


def _defences(options: argparse.Namespace) -> tuple[Defence, ...]:
    if options.defence:
        return tuple(map(parse_defence, options.defence))
    listed: tuple[Defence, ...] = PRESETS[options.preset]["defences"]
    return listed


def _dp_sgd(options: argparse.Namespace) -> tuple[DPSGDConfig, ...]:
    """The reference defences. Those of the preset are left out where Opacus is missing; asked for, they are refused."""
    from raytrust.dp import available

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


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
