"""The map as a study: train one model, capture each cell, attack it, and report what the best attacks reach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raytrust.attacks.inversion.further import further_attacks
from raytrust.config import Defence, InversionConfig, SweepConfig, TrainConfig
from raytrust.config.attacks import through_local_steps
from raytrust.config.threats import Cell, ThreatMapConfig
from raytrust.data import Dataset
from raytrust.jobs.job import Job
from raytrust.jobs.runner import Bundle, each
from raytrust.networks.build import build_model
from raytrust.networks.checkpoint import identified
from raytrust.studies.frontier.jobs import AttackRun, Split, TrainingRun
from raytrust.studies.frontier.row import Row
from raytrust.studies.frontier.rows import finalists, naming, row
from raytrust.studies.frontier.store import Store
from raytrust.studies.frontier.verdicts import judge_rows
from raytrust.studies.study import Phase
from raytrust.studies.threats.jobs import TrainedModel


@dataclass(frozen=True)
class Mapped:
    """A cell with its judged rows, one a defence, in the order of the defences."""

    cell: Cell
    rows: list[Row]


class ThreatStudy:
    """Cells are captured and attacked as the runs of a sweep that trains nothing."""

    kinds = (TrainedModel.kind, TrainingRun.kind, AttackRun.kind)

    def __init__(self, config: ThreatMapConfig, data: Dataset, store: Store):
        self.config, self._store = config, store
        self.data, self.stores = {store.fingerprint: data}, [store]
        self.model = TrainedModel(config.training)
        self._network = build_model(config.train.model, data.channels, data.classes, seed=0)

    def phases(self) -> Iterator[Phase]:
        config, store = self.config, self._store
        if "trained" in config.states:
            yield "training the model", each(store, [self.model])
        cells = self._known()
        yield f"capturing {len(cells)} threats", each(store, [j for cell in cells for j in self._captures(cell)])
        yield "choosing attacks", self._bundles(cells, "tuning")
        yield "attacking the evaluation images", self._bundles(cells, "evaluation")

    def left(self) -> list[Job]:
        jobs: list[Job] = [self.model] if "trained" in self.config.states else []
        for cell in self._known():
            jobs += self._captures(cell)
            jobs += [job for of_defence in self._attacks(cell, "tuning") for job in of_defence]
            # Of a defence whose attacks are not chosen yet there are none: the guess is too low until then.
            jobs += [job for of_defence in self._attacks(cell, "evaluation") for job in of_defence]
        return self._store.missing(jobs)

    def mapped(self) -> list[Mapped]:
        """All cells, also those that are not finished; a defence that has no place in one is failed with the reason."""
        known = {self._cell_key(cell): cell for cell in self._known()}
        return [self._mapped(known.get(self._cell_key(cell), cell)) for cell in self.config.cells()]

    def _mapped(self, cell: Cell) -> Mapped:
        rows: list[Row] = []
        for defence in self.config.defences:
            train = _with(cell.train, defence)
            if isinstance(train, str):
                rows.append(naming(defence, None) | {"status": "failed", "reason": train, "run": ""})
            else:
                rows.append(row(self._store, self.sweep(cell), defence))
        return Mapped(cell, judge_rows(rows))

    def sweep(self, cell: Cell) -> SweepConfig:
        """The cell as a sweep over the defences that have a place in it."""
        defences = tuple(d for d in self.config.defences if not isinstance(_with(cell.train, d), str))
        portfolio = self._portfolio(cell)
        return SweepConfig("threats", cell.train, defences, len(defences), portfolio)

    def _portfolio(self, cell: Cell) -> tuple[InversionConfig, ...]:
        threat = cell.train.threat
        attacks: Sequence[InversionConfig] = through_local_steps(
            self.config.portfolio, cell.train.local, threat.batch_size, threat.labels == "known"
        )
        data = self.data[self._store.fingerprint]
        shape = (data.channels, *data.image_size)
        further = further_attacks(attacks, threat, self._network, shape, cell.train.local, classes=data.classes)
        return (*attacks, *further)

    def _known(self) -> list[Cell]:
        """The cells whose model is there, with its checkpoint."""
        cells = []
        for cell in self.config.cells():
            if cell.state == "trained":
                if not self._store.finished(self.model):
                    continue
                model = replace(cell.train.model, checkpoint=identified(self.model.checkpoint(self._store)))
                cell = replace(cell, train=replace(cell.train, model=model))
            cells.append(cell)
        return cells

    @staticmethod
    def _cell_key(cell: Cell) -> Any:
        return cell.state, replace(cell.train, model=replace(cell.train.model, checkpoint=""))

    def _captures(self, cell: Cell) -> list[TrainingRun]:
        sweep = self.sweep(cell)
        return [TrainingRun(replace(sweep.train, defence=d)) for d in sweep.defences]

    def _attacks(self, cell: Cell, split: Split) -> list[list[AttackRun]]:
        """The attacks on each defence whose captures are there."""
        sweep, found = self.sweep(cell), []
        for defence in sweep.defences:
            train = replace(sweep.train, defence=defence)
            attacks = sweep.portfolio_against(defence)
            if split == "evaluation":
                train, attacks = finalists(self._store, sweep, defence)
            found.append([AttackRun(train, attack, split) for attack in attacks])
        return found

    def _bundles(self, cells: Sequence[Cell], split: Split) -> list[Bundle]:
        captured = [cell for cell in cells if any(map(self._store.finished, self._captures(cell)))]
        jobs = [tuple(of_one) for cell in captured for of_one in self._attacks(cell, split)]
        return [(self._store, of_one) for of_one in jobs if self._store.missing(of_one)]


def _with(train: TrainConfig, defence: Defence) -> TrainConfig | str:
    """The config of a cell with a defence, or why there is none."""
    try:
        return replace(train, defence=defence)
    except ValueError as error:
        return str(error)
