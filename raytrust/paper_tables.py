"""The paper's tables beside ours, from their configuration to the report: the order of things.

`cluster` does the units of work; here is which come when. A directory holds one such run, and a resumed one goes on
where the last ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from raytrust.cluster.runtime import cluster
from raytrust.cluster.shadows import train_shadows
from raytrust.cluster.units import run_units
from raytrust.config import digest
from raytrust.data import Dataset
from raytrust.lock import exclusive
from raytrust.paper.assemble import Report, assemble, audit_config
from raytrust.paper.plan import Budget, Setting
from raytrust.paper.progress import Progress, costs
from raytrust.paper.selection import Plan, nearest, plan_for, strongest, tried
from raytrust.paper.units import Unit, UnitStore
from raytrust.paper.write import ARTIFACTS, write_report
from raytrust.published import CELLS, CITATION, TABLE_1, TITLES
from raytrust.shadows import draw_pool, open_shadows
from raytrust.store import read_json, write_json
from raytrust.tracking import Tracker, default_uri

Jobs = Sequence[tuple[UnitStore, Unit]]


@dataclass(frozen=True)
class PaperConfig:
    """tables: 1, 2 or both. images: evaluated in a cell of table 1, by default the budget's."""

    budget: Budget
    tables: tuple[int, ...] = (1, 2)
    images: int | None = None
    seed: int = 0
    datasets: tuple[str, ...] = field(default=("cifar10",))

    def __post_init__(self) -> None:
        if not self.tables or not set(self.tables) <= {1, 2}:
            raise ValueError(f"Expected tables={self.tables} to be 1, 2 or both.")
        if self.images is not None and self.images < 2:
            raise ValueError(f"Expected images={self.images} to be at least 2, for an interval.")
        if unknown := [d for d in self.datasets if d not in TABLE_1] or not self.datasets:
            raise ValueError(f"Expected datasets={unknown} to be among {', '.join(TABLE_1)}.")


def open_run(root: Path, config: PaperConfig, data: dict[str, Dataset], options: dict[str, Any]) -> None:
    """Begin a run in `root`, or go on with the same one; options are kept for whoever resumes it.

    Raises ValueError if `root` holds another run, or the data don't suffice.
    """
    for name, dataset in data.items():
        plan_for(name, dataset, config.budget, config.images, config.seed)
        if 2 in config.tables:
            draw_pool(audit_config(config.budget, config.seed), dataset)
    identity: dict[str, Any] = {"config": asdict(config), "data": {name: d.fingerprint() for name, d in data.items()}}
    identity["id"] = digest(str(identity))  # compares what JSON would change, such as tuples
    path = root / "paper.json"
    found = read_json(path)
    if found is None:
        write_json(path, {**identity, "options": options})
    elif found.get("id") != identity["id"]:
        raise ValueError(f"Expected output={str(root)!r} to be empty or to hold this run, but it holds another one.")


def run_paper(
    config: PaperConfig,
    data: dict[str, Dataset],
    root: Path,
    *,
    address: str | None = None,
    cpus: int = 2,
    tracking_uri: str | None = None,
    spread: bool = True,
) -> Report:
    """Do what is not done yet, write the report into `root` and log it. data: by the names in `config.datasets`.

    spread: over Ray; without, all is done in this process. KeyboardInterrupt passes through; what was finished stays.
    """
    run = _Run(config, data, root, Progress(cpus if spread else 1), spread)
    with exclusive(root):
        tracker = Tracker(tracking_uri or default_uri(root), root, experiment="raytrust paper tables")
        tags = {"raytrust.kind": "paper tables", "seeds": [config.seed], "paper": CITATION}
        parameters = {"budget": config.budget.name, "tables": config.tables, "datasets": config.datasets}
        tracker.begin_sweep(f"paper tables {root.name}", parameters, tags)
        try:
            with cluster(address, cpus) if spread else nullcontext():
                run.all()
            report = assemble(config.budget, config.tables, config.images, config.seed, data, root)
            write_report(report, root)
            _log(tracker, report, root)
        except BaseException as error:
            tracker.end_sweep("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        tracker.end_sweep("FINISHED", [root / name for name in ARTIFACTS if (root / name).exists()])
    return report


class _Run:
    """The phases: what comes later depends on what came before."""

    def __init__(self, config: PaperConfig, data: dict[str, Dataset], root: Path, progress: Progress, spread: bool):
        self._config, self._root, self._progress, self._spread = config, root, progress, spread
        self._data = data
        self._by_fingerprint = {d.fingerprint(): d for d in data.values()}
        self._stores = {name: UnitStore(root, d.fingerprint()) for name, d in data.items()}
        self._plans = {name: plan_for(name, d, config.budget, config.images, config.seed) for name, d in data.items()}

    def all(self) -> None:
        for store in self._stores.values():
            store.clear_failures()
        models = self._audits_left()
        if 1 in self._config.tables:
            later = self._jobs(lambda n, p: _guess(p))
            self._phase(self._jobs(lambda n, p: p.trainings()), "training victims", later, models)
            first = self._jobs(lambda n, p: [*(u for some in p.search().values() for u in some), *p.theory().values()])
            self._phase(first, "searching the paper's setting, testing its theory", later, models)
            for name, (near, _) in self._settings().items():
                self._progress.say(f"{TITLES[name]}: nearest to the paper is {near.name}")
            later = self._jobs(lambda n, p: _fourth(p, *self._setting(n)))
            third = self._jobs(lambda n, p: _third(p, *self._setting(n)))
            self._phase(third, "table 1: naive and aware attacks, and the search for the worst case", later, models)
            fourth = self._jobs(lambda n, p: worst_units(p, self._stores[n], *self._setting(n)))
            self._phase(fourth, "table 1: the worst case", [], models)
        if 2 in self._config.tables:
            self._progress.audit_begins()
            for name in self._data:
                self._audit(name)

    def _settings(self) -> dict[str, tuple[Setting, Setting]]:
        return {name: self._setting(name) for name in self._plans}

    def _setting(self, name: str) -> tuple[Setting, Setting]:
        found = tried(self._stores[name], self._plans[name].search())
        return nearest(found, name), strongest(found)

    def _jobs(self, units: Callable[[str, Plan], Sequence[Unit]]) -> list[tuple[UnitStore, Unit]]:
        return [
            (self._stores[name], unit)
            for name, plan in self._plans.items()
            for unit in self._stores[name].missing(units(name, plan))
        ]

    def _phase(self, jobs: Jobs, what: str, later: Jobs, models: int) -> None:
        for kind in ("training", "attack", "theory"):
            count, cost = costs([u for _, u in (*jobs, *later)]).get(kind, (0, 0.0))
            self._progress.expect(kind, count, cost)
        self._progress.expect("models", models, float(models))
        if not jobs:
            return
        self._progress.say(f"{what}: {len(jobs)} pieces; about {self._progress.minutes_left():.0f} min left in all")
        if self._spread:
            run_units(jobs, self._by_fingerprint, self._progress)
            return
        torch.set_num_threads(1)
        for store, unit in jobs:
            try:
                self._progress.ended(unit, store.run(unit, self._by_fingerprint[store.fingerprint]))
            except (ValueError, FloatingPointError) as error:
                store.fail(unit, str(error))
                self._progress.ended(unit, None, str(error))

    def _audits_left(self) -> int:
        if 2 not in self._config.tables:
            return 0
        config, left = audit_config(self._config.budget, self._config.seed), 0
        for name, dataset in self._data.items():
            store = open_shadows(self._root / f"membership-{name}", config, dataset.fingerprint(), {})
            left += sum(not store.path(config, arm, m, kind).exists() for kind, arm, m in store.jobs(config))
        return left

    def _audit(self, name: str) -> None:
        config, dataset = audit_config(self._config.budget, self._config.seed), self._data[name]
        store = open_shadows(self._root / f"membership-{name}", config, dataset.fingerprint(), {})
        store.clear_failures()
        self._progress.say(f"table 2, {TITLES[name]}: {config.models} models of {len(config.arms)} defences")
        if self._spread:
            train_shadows(config, dataset, store, self._progress)
            return
        for kind, arm, model in store.jobs(config):
            try:
                store.run(config, arm, model, kind, dataset)
                self._progress.finished("models", store.arm_id(config, arm), {"kind": kind, "model": model})
            except (ValueError, FloatingPointError) as error:
                store.fail(config, arm, model, kind, str(error))
                self._progress.failed("models", arm.name, str(error))


def _guess(plan: Plan) -> list[Unit]:
    """What the last two phases will be like, as long as the search has not said so."""
    settings = plan.budget.search(plan.seed)
    return [*_third(plan, settings[0], settings[-1]), *_fourth(plan, settings[0], settings[-1])]


def _third(plan: Plan, near: Setting, strong: Setting) -> list[Unit]:
    table = [u for some in plan.table(near).values() for u in some]
    tuning = [u for cell in CELLS for some in plan.portfolio(near, strong, cell).values() for u in some]
    return [*table, *tuning]


def _fourth(plan: Plan, near: Setting, strong: Setting) -> list[Unit]:
    """A guess at the last phase: another attack for each cell."""
    other = replace(strong, attack=replace(strong.attack, tv=0.5))
    return [u for cell in CELLS for u in plan.worst(other, cell, near)]


def worst_units(plan: Plan, store: UnitStore, near: Setting, strong: Setting) -> list[Unit]:
    """The attacks of the worst case, as far as one was chosen."""
    found: list[Unit] = []
    for cell in CELLS:
        chosen = {s: f for s, f in tried(store, plan.portfolio(near, strong, cell)).items() if f.ssim is not None}
        if chosen:
            found += plan.worst(strongest(chosen), cell, near)
    return found


def _log(tracker: Tracker, report: Report, root: Path) -> None:
    """One run a data set and cell, with what the tables say of it."""
    for dataset in report.datasets:
        for cell in CELLS:
            metrics, parameters = report.metrics(dataset, cell), {"dataset": dataset, "compressor": cell[0]}
            name = f"{TITLES[dataset]} {cell[0]}" + (f" {cell[1]}" if cell[1] else "")
            reason = report.failure(dataset, cell) if not metrics else ""
            tracker.measured(f"{dataset}/{cell[0]}/{cell[1]}", name, parameters | {"rank": cell[1]}, metrics, reason)
