"""Every figure of the paper next to ours, with intervals, and what a stronger attacker makes of it.

    python sweeps/paper_tables.py --budget quick --datasets cifar10 --images 3
    python sweeps/paper_tables.py --datasets cifar10=cifar10.npz,mnist=mnist.npz     # MedMNIST keys
    python sweeps/paper_tables.py --data-dir DIR                                     # cifar10.npz, ... in DIR
    python sweeps/paper_tables.py --budget full --address auto
    python sweeps/paper_tables.py --resume results/DIR

The budgets stand in `raytrust/paper/plan.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from raytrust.published import DATASETS

BUDGETS = ("tiny", "quick", "standard", "full")


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        options, root, resumed = _resolve(given)
        _check_free(root, resumed)
        sources = _sources(options)
        from raytrust.data import load  # imports torch: not needed to refuse a wrong option
        from raytrust.paper_tables import open_run

        config = _config(options, tuple(sources))
        data = {name: load(source) for name, source in sources.items()}
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        open_run(root, config, data, _kept(options, sources))
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    return _run(options, config, data, root)


def _run(options: argparse.Namespace, config: Any, data: dict[str, Any], root: Path) -> int:
    from raytrust.paper.write import ARTIFACTS
    from raytrust.paper_tables import run_paper

    cpus = options.cpus or _cpus()
    try:
        report = run_paper(config, data, root, address=options.address, cpus=cpus, tracking_uri=options.tracking_uri)
    except KeyboardInterrupt:
        print(f"\nInterrupted; what was finished is kept. Go on with: python {sys.argv[0]} --resume {root}")
        return 130
    except ValueError as error:  # the cluster or the tracking store can't be used, or nothing could be measured
        print(f"paper_tables.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for claim in report.claims:
        print(f"{claim.verdict:>30}  {claim.quote}")
    for name in ARTIFACTS:
        if (root / name).exists():
            print(f"  {root / name}")
    rows = [*report.table_1, *report.table_2]
    return 0 if any(row["status"] == "finished" for row in rows) else 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, exit code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="paper_tables.py",
        description=(__doc__ or "").split("\n\n")[0],
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--tables", metavar="LIST", help="1, 2 or 1,2 (default)")
    add("--datasets", metavar="LIST", help=f"of {', '.join(DATASETS)} (default: all), each as NAME or NAME=FILE.npz")
    add("--data-dir", type=Path, metavar="DIR", help="where NAME.npz lies; without, torchvision's copy is fetched")
    add("--images", type=int, metavar="N", help="evaluated in each cell of table 1; default: the budget's")
    add("--budget", choices=BUDGETS, help="quick (default): 30 minutes on 2 cores for one data set; standard: 10 "
        "images, longer attacks; full: the attack's published length; tiny: only to see that all works")  # fmt: skip
    add("--seed", type=int, metavar="N", help="of everything that is random")
    add("--cpus", type=int, metavar="N", help="units at once, on a Ray of its own; default: all CPUs")
    add("--output", type=Path, metavar="DIR", help="a new directory for the results")
    add("--resume", type=Path, metavar="DIR", help="go on with the run in DIR")
    add("--address", metavar="ADDRESS", help="of a Ray cluster; a local one is started if none is given")
    add("--tracking-uri", metavar="URI", help="of an MLflow store; sqlite in the output directory if none is given")
    return parser


DEFAULTS: dict[str, Any] = dict(
    tables="1,2", datasets=",".join(DATASETS), data_dir=None, images=None, budget="quick", seed=0, cpus=None,
    output=None, resume=None, address=None, tracking_uri=None,
)  # fmt: skip
RESUMABLE = ("address", "tracking_uri", "resume", "cpus")  # what may be given along with --resume


def _resolve(given: argparse.Namespace) -> tuple[argparse.Namespace, Path, bool]:
    """The options in full, the run's directory, and whether it is resumed."""
    options = vars(given)
    if (resume := options.get("resume")) is not None:
        for name in options:
            if name not in RESUMABLE:
                flag = name.replace("_", "-")
                raise ValueError(f"Expected --{flag} not to be given with --resume: the run keeps its own.")
        from raytrust.store import read_json

        found = read_json(resume / "paper.json")
        if not isinstance(found, dict) or "options" not in found:
            raise ValueError(f"Expected resume={str(resume)!r} to hold a run, but it holds no paper.json of one.")
        return _checked({**DEFAULTS, **found["options"], **options}), resume.resolve(), True
    options = {**DEFAULTS, **options}
    default = Path("results") / time.strftime("paper-%Y%m%d-%H%M%S")
    return _checked(options), (options["output"] or default).resolve(), False


def _checked(options: dict[str, Any]) -> argparse.Namespace:
    for name, least in (("images", 2), ("cpus", 1), ("seed", 0)):
        if (value := options[name]) is not None and value < least:
            raise ValueError(f"Expected {name}={value} to be at least {least}.")
    if options["address"] is None and options["cpus"] is not None and options["cpus"] > _cpus():
        raise ValueError(f"Expected cpus={options['cpus']} to be at most the number of CPUs, {_cpus()}.")
    if not options["tables"] or not set(options["tables"].split(",")) <= {"1", "2"}:
        raise ValueError(f"Expected tables={options['tables']!r} to be 1, 2 or 1,2.")
    return argparse.Namespace(**options)


def _check_free(root: Path, resumed: bool) -> None:
    if not resumed and root.exists() and (not root.is_dir() or any(root.iterdir())):
        hint = f"--resume {root}" if (root / "paper.json").exists() else "another --output"
        raise ValueError(f"Expected output={str(root)!r} to be empty or new, but it is not; give {hint}.")


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


def _config(options: argparse.Namespace, datasets: tuple[str, ...]) -> Any:
    from raytrust.paper.plan import BUDGETS as ALL
    from raytrust.paper_tables import PaperConfig

    budget = ALL[options.budget]
    if options.images is not None:
        budget = replace(budget, chunk=min(budget.chunk, options.images))
    tables = tuple(sorted({int(t) for t in options.tables.split(",")}))
    return PaperConfig(budget, tables, options.images, options.seed, datasets)


def _kept(options: argparse.Namespace, sources: dict[str, str]) -> dict[str, Any]:
    """The options that a resumed run takes over, from whatever directory it is resumed."""
    named = ",".join(name if name == source else f"{name}={source}" for name, source in sources.items())
    kept = {name: getattr(options, name) for name in ("tables", "images", "budget", "seed", "tracking_uri")}
    return kept | {"datasets": named}


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
