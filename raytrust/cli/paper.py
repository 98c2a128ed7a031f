"""The paper's tables beside ours, from their configuration to the report."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from raytrust.cli.session import Program
from raytrust.data import Dataset
from raytrust.networks.device import Device
from raytrust.reports.mlflow import Tracker
from raytrust.reports.outbox import Outbox
from raytrust.reports.paper.write import ARTIFACTS, write_report
from raytrust.studies.paper.assemble import Report, assemble
from raytrust.studies.paper.study import PaperConfig, PaperStudy
from raytrust.studies.published import CELLS, CITATION, TITLES


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
    device: Device = "auto",
) -> Report:
    """Do what is not done yet, write the report into `root` and log it. data: by the names in `config.datasets`.

    For the rest see `raytrust.cli.session.Program.run`.
    """
    program = _Paper(config, data, root, cpus if spread else 1)
    program.run(address, cpus, tracking_uri, hours, spread, device)
    return program.assembled


class _Paper(Program[PaperStudy]):
    noun = "run"
    experiment = "raytrust paper tables"
    assembled: Report

    def __init__(self, config: PaperConfig, data: dict[str, Dataset], root: Path, parallel: int):
        super().__init__(root, parallel)
        self._config, self._data = config, data
        self.study = PaperStudy(config, data, root, self.progress.say)
        self.name = f"paper tables {root.name}"
        self.parameters = {"budget": config.budget.name, "tables": config.tables, "datasets": config.datasets}
        self.tags = {"raytrust.kind": "paper tables", "seeds": [config.seed], "paper": CITATION}

    def introduce(self) -> None:
        pass

    def report(self, tracker: Tracker, outbox: Outbox) -> tuple[list[Path], dict[str, float]]:
        config = self._config
        self.assembled = assemble(config.budget, config.tables, config.images, config.seed, self._data, self.root)
        write_report(self.assembled, self.root)
        _log(tracker, outbox, self.assembled)
        return [self.root / name for name in ARTIFACTS if (self.root / name).exists()], {}


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
