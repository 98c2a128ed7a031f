"""A map of threats from its configuration to its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from raytrust.cli.session import Program
from raytrust.config import to_dict
from raytrust.config.threats import ThreatMapConfig
from raytrust.data import Dataset
from raytrust.jobs.files import write_file, write_json
from raytrust.jobs.store import claim
from raytrust.networks.device import Device
from raytrust.reports.mlflow import Tracker
from raytrust.reports.outbox import Outbox
from raytrust.reports.text import counted
from raytrust.reports.threat_map import draw_map, headline, map_page
from raytrust.reports.versions import versions
from raytrust.studies.evaluate import DISTRACTORS
from raytrust.studies.frontier.store import Store
from raytrust.studies.threats.study import Mapped, ThreatStudy

FILES = ("report.html", "map.png", "results.json")


def open_map(root: Path, config: ThreatMapConfig, data: Dataset, options: dict[str, Any]) -> Store:
    """Begin a map in `root`, or go on with the same one. Raises ValueError if it holds another."""
    content = {"threats": to_dict(config), "data": data.fingerprint(), "options": options}
    claim(root / "threats.json", content, lambda kept: {k: kept.get(k) for k in ("threats", "data")}, "map")
    return Store(root, data.fingerprint())


def run_threats(
    config: ThreatMapConfig,
    data: Dataset,
    store: Store,
    *,
    address: str | None = None,
    cpus: int = 2,
    tracking_uri: str | None = None,
    hours: float | None = None,
    spread: bool = True,
    device: Device = "auto",
) -> list[Mapped]:
    """Do what is not done yet, write the report, log it, and return the cells with their rows.

    Writes report.html, map.png and results.json. For the rest see `raytrust.cli.session.Program.run`.
    """
    program = _Threats(config, data, store, cpus if spread else 1)
    program.run(address, cpus, tracking_uri, hours, spread, device)
    return program.mapped


class _Threats(Program[ThreatStudy]):
    noun = "map"

    def __init__(self, config: ThreatMapConfig, data: Dataset, store: Store, parallel: int):
        super().__init__(store.root, parallel)
        self.study, self._config, self._data, self._store = ThreatStudy(config, data, store), config, data, store
        self.mapped: list[Mapped] = []
        self.experiment, self.name = f"raytrust {data.name}", f"threats {store.root.name}"
        train = {k: v for k, v in to_dict(config.train).items() if not isinstance(v, dict | list) and k != "seed"}
        self.parameters = train | {"data": data.name, "model": config.train.model.title}
        self.tags = {
            "seeds": [config.train.seed], "data.fingerprint": store.fingerprint, "raytrust.kind": "threats"
        }  # fmt: skip

    def introduce(self) -> None:
        others = torch.linspace(0, len(self._data.test_images) - 1, min(DISTRACTORS, len(self._data.test_images)))
        # Private images are training images, so that none of these is private.
        self._store.keep_references(self._data.test_images[others.long()])
        self.progress.say(self._setting())

    def report(self, tracker: Tracker, outbox: Outbox) -> tuple[list[Path], dict[str, float]]:
        self.mapped = self.study.mapped()
        page, picture, results = (self.root / name for name in FILES)
        trained = self._store.result(self.study.model)
        content = [{"threat": m.cell.name, "train": to_dict(m.cell.train), "rows": m.rows} for m in self.mapped]
        write_json(results, {"setting": self._setting(), "trained": trained, "cells": content})
        draw_map(self.mapped, picture)
        settings = {
            "Captures": to_dict(self._config.train.capture),
            "Attacks": {f"attack {i}": a.name for i, a in enumerate(self._config.portfolio, start=1)},
            "Versions": {k: v for k, v in versions().items() if v is not None},
        }
        write_file(page, map_page(self.mapped, self._setting(), picture, settings).encode())
        self.progress.say(headline(self.mapped))
        statuses = [row["status"] for m in self.mapped for row in m.rows]
        counts = {f"cells_{s}": float(statuses.count(s)) for s in ("finished", "failed")}
        for m in self.mapped:
            for row in m.rows:
                if row["status"] == "finished":
                    name = f"ssim {m.cell.name} {row['name']}".translate(str.maketrans(",%+()=", "     ."))
                    counts[" ".join(name.split())] = row["leakage_ssim"]
        return [page, picture, results], counts

    def _setting(self) -> str:
        config, trained = self._config, self._store.result(self.study.model)
        accuracy = "" if trained is None else f", trained to {100 * trained['correct'] / trained['n_test']:.1f} %"
        capture = config.train.capture
        return (
            f"{self._data.name}: {config.train.model.title}{accuracy}; {capture.evaluation} private batches a threat, "
            f"attacks chosen on {counted(capture.tuning, 'other')}; seed {config.train.seed}."
        )
