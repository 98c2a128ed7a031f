"""Every figure of the paper next to ours, with intervals, and what a stronger attacker makes of it.

    python sweeps/paper_tables.py --budget quick --datasets cifar10 --images 3
    python sweeps/paper_tables.py --datasets cifar10=cifar10.npz,mnist=mnist.npz     # MedMNIST keys
    python sweeps/paper_tables.py --data-dir DIR                                     # cifar10.npz, ... in DIR
    python sweeps/paper_tables.py --budget full --address auto
    python sweeps/paper_tables.py --resume results/DIR

The budgets stand in `raytrust/studies/paper/plan.py`. The worst case of a cell is the greatest of three attacks on the
evaluation images, which is slightly optimistic for the attacker.
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
from raytrust.studies.paper.plan import BUDGETS, Budget
from raytrust.studies.published import DATASETS

# The threat, the training and the attacks are the paper's; what it leaves open is searched, as the budget says.
BUDGET = Fields(
    Budget,
    "budget",
    names={},
    without={
        "name": "--budget",
        "images": "--images is of table 1 alone",
        "membership": "the audit of table 2 is that of sweeps/membership.py, which has its options",
    },
)
DEFAULTS: dict[str, Any] = dict(
    tables="1,2", datasets=",".join(DATASETS), data_dir=None, images=None, budget="quick", cpus=None, hours=None,
    device="auto", seed=0, **cli.PLACES,
)  # fmt: skip
CHANGEABLE = ("address", "local", "tracking_uri", "cpus", "hours", "device", "plugin")
RUN = cli.Directory("paper_tables", "a run", "paper.json", CHANGEABLE)


def main(arguments: list[str] | None = None) -> int:
    return RUN.launch(_parser(), arguments, DEFAULTS, _with_budget, _begin)


def _parser() -> cli.Parser:
    parser = cli.Parser("paper_tables", __doc__)
    add = parser.add_argument_group("tables").add_argument
    add("--tables", metavar="LIST", help="1, 2 or 1,2 (default)")
    add("--datasets", metavar="LIST", help=f"of {', '.join(DATASETS)} (default: all), each as NAME or NAME=FILE.npz")
    add("--data-dir", type=Path, metavar="DIR", help="where NAME.npz lies; without, torchvision's copy is fetched")
    add("--images", type=int, metavar="N", help="evaluated in each cell of table 1; default: the budget's")
    add("--budget", choices=tuple(BUDGETS), help="quick (default): 30 minutes on 2 cores for one data set; standard: "
        "10 images, longer attacks; full: the attack's published length; tiny: only to see that all works")  # fmt: skip
    add("--seed", type=int, metavar="N", help="of everything that is random (default: 0)")
    add("--cpus", type=int, metavar="N", help="units at once, on a Ray of its own; default: all CPUs")
    add("--hours", type=float, metavar="H", help="begin no further piece after H hours; --resume goes on from there")
    add("--device", choices=["auto", "cpu", "cuda"], help="where to compute; auto (default): GPUs that torch can use")
    parser.add_places("run")
    BUDGET.add_to(parser, by_preset({}, {name: BUDGET.values(budget) for name, budget in BUDGETS.items()}))
    return parser


def _with_budget(given: dict[str, Any]) -> dict[str, Any]:
    budget = BUDGETS[given.get("budget", DEFAULTS["budget"])]
    return {**BUDGET.values(budget), **given}


def _begin(options: argparse.Namespace, root: Path) -> Callable[[], int]:
    budget = _check(options)
    sources = _sources(options)
    from raytrust.data import load  # imports torch: not needed to refuse a wrong option
    from raytrust.studies.paper.study import PaperConfig, open_run

    tables = tuple(sorted({int(t) for t in options.tables.split(",")}))
    config = PaperConfig(budget, tables, options.images, options.seed, tuple(sources))
    data = {name: load(source) for name, source in sources.items()}
    named = ",".join(name if name == source else f"{name}={source}" for name, source in sources.items())
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    open_run(root, config, data, RUN.keep(options, ("cpus", "hours", "device", "data_dir")) | {"datasets": named})
    return lambda: _run(options, config, data, root)


def _check(options: argparse.Namespace) -> Budget:
    cli.check_least(options, 2, "images")
    cli.check_least(options, 1, "cpus")
    cli.check_least(options, 0, "seed")
    cli.check_cpus("cpus", options.cpus, options.address)
    cli.check_hours(options)
    cli.check_local(options)
    if not options.tables or not set(options.tables.split(",")) <= {"1", "2"}:
        raise ValueError(f"Expected tables={options.tables!r} to be 1, 2 or 1,2.")
    whole = BUDGETS[options.budget]
    fixed = {name: getattr(whole, name) for name in BUDGET.without}
    budget: Budget = BUDGET.make(vars(options), fixed)
    return budget if options.images is None else replace(budget, chunk=min(budget.chunk, options.images))


def _sources(options: argparse.Namespace) -> dict[str, str]:
    """Where each data set comes from, as `raytrust.data.load` takes it."""
    sources: dict[str, str] = {}
    for text in options.datasets.split(","):
        name, equals, file = text.partition("=")
        if name not in DATASETS or name in sources or (equals and not file):
            known = ", ".join(DATASETS)
            raise ValueError(f"Expected datasets={text!r} to be among {known}, each once, or NAME=FILE.npz.")
        if options.data_dir is not None and not file:
            file = str(options.data_dir.expanduser() / f"{name}.npz")
        sources[name] = str(Path(file).expanduser().resolve()) if file else name
    return sources


def _run(options: argparse.Namespace, config: Any, data: dict[str, Any], root: Path) -> int:
    from raytrust.cli.paper import run_paper
    from raytrust.reports.paper.write import ARTIFACTS

    cpus, address, uri = options.cpus or cli.cpus(), options.address, options.tracking_uri
    report = run_paper(
        config,
        data,
        root,
        address=address,
        cpus=cpus,
        tracking_uri=uri,
        hours=options.hours,
        spread=not options.local,
        device=options.device,
    )
    for claim in report.claims:
        print(f"{claim.verdict:>30}  {claim.quote}")
    cli.list_files(root, ARTIFACTS)
    if report.unfinished[0]:
        print(f"Not finished. Go on with: {cli.resumption(root, options)}")
    return 1 if {row["status"] for row in (*report.table_1, *report.table_2)} == {"failed"} else 0


if __name__ == "__main__":
    sys.exit(cli.start(main))
