"""The paper's tables beside ours, from their configuration to the report: the order of things.

`cluster` does the units of work; here is which come when. A directory holds one such run, and a resumed one goes on
where the last ended.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from raytrust.cluster.runtime import cluster
from raytrust.cluster.shadows import train_shadows
from raytrust.cluster.units import run_units
from raytrust.config import Arm, digest
from raytrust.data import Dataset
from raytrust.jobs.files import read_json, write_json
from raytrust.jobs.lock import exclusive
from raytrust.reports.mlflow import Tracker, default_uri
from raytrust.reports.outbox import Outbox
from raytrust.reports.paper.write import ARTIFACTS, write_report
from raytrust.studies.membership.shadows import Kind, ShadowStore, draw_pool, open_shadows
from raytrust.studies.paper.assemble import Report, assemble, audit_config
from raytrust.studies.paper.plan import Budget, Setting
from raytrust.studies.paper.progress import Progress, costs
from raytrust.studies.paper.selection import NOT_FINISHED, Plan, chosen, plan_for, worst_units
from raytrust.studies.paper.units import Unit, UnitStore
from raytrust.studies.published import CELLS, CITATION, TABLE_1, TITLES


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
            draw_pool(audit_config(config.budget, config.seed, dataset), dataset)
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
    hours: float | None = None,
    spread: bool = True,
) -> Report:
    """Do what is not done yet, write the report into `root` and log it. data: by the names in `config.datasets`.

    hours: after which no further piece is begun; those that run are finished. spread: over Ray; without, all is done in
    this process. KeyboardInterrupt passes through, after the report of what is finished.
    """
    until = None if hours is None else time.time() + 3600 * hours
    run = _Run(config, data, root, Progress(cpus if spread else 1), spread, until)
    interrupt: KeyboardInterrupt | None = None
    with exclusive(root):
        tracker = Tracker(tracking_uri or default_uri(root), root, experiment="raytrust paper tables")
        outbox = Outbox(tracker, run.progress.say, "run")
        tags = {"raytrust.kind": "paper tables", "seeds": [config.seed], "paper": CITATION}
        parameters = {"budget": config.budget.name, "tables": config.tables, "datasets": config.datasets}
        tracker.begin_sweep(f"paper tables {root.name}", parameters, tags)
        try:
            try:
                with cluster(address, cpus) if spread else nullcontext():
                    run.all()
            except KeyboardInterrupt as error:
                interrupt = error
            run.say_what_is_left(interrupt is not None)
            report = assemble(config.budget, config.tables, config.images, config.seed, data, root)
            write_report(report, root)
            _log(tracker, outbox, report)
        except BaseException as error:
            status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
            outbox.send(lambda: tracker.end_sweep(status))
            raise
        written = [root / name for name in ARTIFACTS if (root / name).exists()]
        outbox.send(lambda: tracker.end_sweep("KILLED" if report.unfinished[0] else "FINISHED", written))
        if interrupt is not None:
            raise interrupt
        outbox.finish()
    return report


class _Run:
    """The phases: what comes later depends on what came before. One data set after another, and of each table 1 before
    table 2, so that a run cut short has some of them whole."""

    def __init__(
        self,
        config: PaperConfig,
        data: dict[str, Dataset],
        root: Path,
        progress: Progress,
        spread: bool,
        until: float | None = None,
    ):
        self._config, self._root, self.progress, self._spread, self._until = config, root, progress, spread, until
        self._data = data
        audited = data if 2 in config.tables else {}
        self._audits = {name: audit_config(config.budget, config.seed, d) for name, d in audited.items()}
        self._stores = {name: UnitStore(root, d.fingerprint()) for name, d in data.items()}
        self._plans = {name: plan_for(name, d, config.budget, config.images, config.seed) for name, d in data.items()}

    def all(self) -> None:
        """Until all is done, or it is too late."""
        for store in self._stores.values():
            store.clear_failures()
        for name in self._audits:
            self._shadows(name).clear_failures()
        for name in self._data:
            for what, units in self._phases(name) if 1 in self._config.tables else ():
                self._do(name, what, units)
                if self._too_late():
                    return
            if name in self._audits:
                self._audit(name)
                if self._too_late():
                    return

    def say_what_is_left(self, interrupted: bool) -> None:
        """A line, if that is why the run ended."""
        self._expect()
        pieces, minutes = self.progress.pieces_left(), self.progress.minutes_left()
        if pieces and (interrupted or self._too_late()):
            why = "interrupted" if interrupted else "time is up"
            self.progress.say(f"{why}: {pieces} pieces are left, about {minutes:.0f} min")

    def _phases(self, name: str) -> Iterator[tuple[str, list[Unit]]]:
        """What is to be done for table 1 and section 3, each phase known when the one before it is done."""
        plan, store = self._plans[name], self._stores[name]
        yield "training victims", _dear_first(plan.trainings())
        yield "searching the paper's setting", _dear_first(u for some in plan.search().values() for u in some)
        theory = _dear_first(plan.theory().values())
        if (settings := chosen(store, plan)) == NOT_FINISHED:
            return  # it is too late
        if isinstance(settings, str):
            self.progress.say(f"{TITLES[name]}: no setting of the search gave a figure: {settings}")
            yield "section 3", theory
            return
        self.progress.say(f"{TITLES[name]}: nearest to the paper is {settings[0].name}")
        table, portfolio = _table_1(plan, settings)
        yield "table 1: naive and aware attacks, search for the worst case, section 3", [*table, *portfolio, *theory]
        worst = [worst_units(store, plan, settings, cell) for cell in CELLS]
        yield "table 1: the worst case", _dear_first(u for some in worst if not isinstance(some, str) for u in some)

    def _left(self, name: str) -> list[Unit]:
        """The units of table 1 that are not done: of phases yet unknown a guess."""
        plan, store = self._plans[name], self._stores[name]
        units = [*plan.trainings(), *(u for some in plan.search().values() for u in some), *plan.theory().values()]
        found = chosen(store, plan)
        if isinstance(found, str) and found != NOT_FINISHED:
            return store.missing(units)
        settings, known = (_guess(plan), False) if isinstance(found, str) else (found, True)
        units += [u for some in _table_1(plan, settings) for u in some]
        other = replace(settings[1], attack=replace(settings[1].attack, tv=0.5))  # no attack of the portfolio's
        for cell in CELLS:
            worst = worst_units(store, plan, settings, cell) if known else NOT_FINISHED
            if worst == NOT_FINISHED:
                units += plan.worst(other, cell)
            elif not isinstance(worst, str):
                units += worst
        return store.missing(units)

    def _expect(self) -> None:
        """Tell the progress what is left in all."""
        units = [u for name in self._data if 1 in self._config.tables for u in self._left(name)]
        of = costs(units)
        for kind in ("training", "attack", "theory"):
            self.progress.expect(kind, *of.get(kind, (0, 0.0)))
        models = sum(len(self._models_left(name)) for name in self._audits)
        self.progress.expect("models", models, float(models))

    def _do(self, name: str, what: str, units: Sequence[Unit]) -> None:
        store, data = self._stores[name], self._data[name]
        missing = store.missing(units)
        if not missing:
            return
        self._begin(f"{TITLES[name]}, {what}: {len(missing)} pieces")
        if self._spread:
            run_units([(store, u) for u in missing], {store.fingerprint: data}, self.progress, self._until)
            return
        torch.set_num_threads(1)
        for unit in missing:
            if self._too_late():
                return
            try:
                self.progress.ended(unit, store.run(unit, data))
            except (ValueError, FloatingPointError) as error:
                store.fail(unit, str(error))
                self.progress.ended(unit, None, str(error))

    def _audit(self, name: str) -> None:
        config, data, store = self._audits[name], self._data[name], self._shadows(name)
        if not (left := self._models_left(name)):
            return
        self._begin(f"{TITLES[name]}, table 2: {len(left)} models of {len(config.arms)} defences")
        self.progress.audit_begins()
        if self._spread:
            train_shadows(config, data, store, self.progress, self._until)
            return
        for kind, arm, model in left:
            if self._too_late():
                return
            try:
                store.run(config, arm, model, kind, data)
                self.progress.finished("models", store.arm_id(config, arm), {"kind": kind, "model": model})
            except (ValueError, FloatingPointError) as error:
                store.fail(config, arm, model, kind, str(error))
                self.progress.failed("models", arm.name, str(error))

    def _begin(self, what: str) -> None:
        self._expect()
        self.progress.say(f"{what}; about {self.progress.minutes_left():.0f} min left in all")

    def _shadows(self, name: str) -> ShadowStore:
        return open_shadows(self._root / f"membership-{name}", self._audits[name], self._stores[name].fingerprint, {})

    def _models_left(self, name: str) -> list[tuple[Kind, Arm, int]]:
        """The models of table 2 that are not done and not failed."""
        config, store = self._audits[name], self._shadows(name)
        return [
            (kind, arm, model)
            for kind, arm, model in store.jobs(config)
            if not store.path(config, arm, model, kind).exists() and not store.failed(config, arm, model, kind)
        ]

    def _too_late(self) -> bool:
        return self._until is not None and time.time() >= self._until


def _dear_first(units: Iterable[Unit]) -> list[Unit]:
    """So that at the end of a phase no processor waits for long."""
    return sorted(units, key=lambda unit: -unit.cost)


def _guess(plan: Plan) -> tuple[Setting, Setting]:
    """What the search may choose, as long as it has not."""
    settings = plan.budget.search(plan.seed)
    return settings[0], settings[-1]


def _table_1(plan: Plan, settings: tuple[Setting, Setting]) -> tuple[list[Unit], list[Unit]]:
    """The attacks at the nearest setting, and those among which the worst case is sought."""
    table = [u for some in plan.table(settings[0]).values() for u in some]
    portfolio = [u for cell in CELLS for some in plan.portfolio(settings[1], cell).values() for u in some]
    return _dear_first(table), _dear_first(portfolio)


def _log(tracker: Tracker, outbox: Outbox, report: Report) -> None:
    """One run a data set and cell of which nothing is left to do, with what the tables say of it."""
    for dataset in report.datasets:
        for cell in CELLS:
            if not report.finished(dataset, cell):
                continue
            metrics = report.metrics(dataset, cell)
            parameters = {"dataset": dataset, "compressor": cell[0], "rank": cell[1]}
            key, name = f"{dataset}/{cell[0]}/{cell[1]}", f"{TITLES[dataset]} {cell[0]}"
            name += f" {cell[1]}" if cell[1] else ""
            reason = report.failure(dataset, cell) if not metrics else ""
            outbox.send(partial(tracker.measured, key, name, parameters, metrics, reason))
