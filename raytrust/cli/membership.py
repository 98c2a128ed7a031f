"""A membership audit from its configuration to its report."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from raytrust.cli.session import Program
from raytrust.config import Arm, Defence, MembershipConfig, to_dict
from raytrust.data import Dataset
from raytrust.jobs.files import write_file, write_json
from raytrust.jobs.store import JobStore
from raytrust.networks.device import Device
from raytrust.reports.membership_figures import roc_figure, side_by_side_figure
from raytrust.reports.membership_page import membership_page
from raytrust.reports.membership_table import membership_table
from raytrust.reports.mlflow import Tracker
from raytrust.reports.outbox import Outbox
from raytrust.studies.membership.jobs import load_shadows
from raytrust.studies.membership.paper_cells import nearest_cells
from raytrust.studies.membership.pool import Pool, draw_pool
from raytrust.studies.membership.row import Row, plain
from raytrust.studies.membership.rows import matched_fit, row
from raytrust.studies.membership.study import MembershipStudy, setting


def run_membership(
    config: MembershipConfig,
    data: Dataset,
    store: JobStore,
    *,
    address: str | None = None,
    cpus: int = 2,
    tracking_uri: str | None = None,
    hours: float | None = None,
    spread: bool = True,
    device: Device = "auto",
) -> list[Row]:
    """Train the models that are not finished yet, write the report, log it, and return its rows.

    A defence with a model that fails is a row with the reason. What can't be measured on so few images, or on such, is
    left out and named in the report. Writes results.json, membership.txt, roc.png, auc.png and report.html into the
    store's directory. For the rest see `raytrust.cli.session.Program.run`. Raises ValueError if there are too few
    images.
    """
    program = _Membership(config, data, store, cpus if spread else 1)
    program.run(address, cpus, tracking_uri, hours, spread, device)
    return program.rows


class _Membership(Program[MembershipStudy]):
    noun = "audit"

    def __init__(self, config: MembershipConfig, data: Dataset, store: JobStore, parallel: int):
        super().__init__(store.root, parallel)
        self._pool = draw_pool(config, data)
        self._data, self._store = data, store
        self.study = MembershipStudy(config, data, store)
        self._config = self.study.config
        self.rows: list[Row] = []
        self.experiment, self.name = f"raytrust {data.name}", f"{config.name} {store.root.name}"
        train = {k: v for k, v in to_dict(config.train).items() if not isinstance(v, dict) and k != "seed"}
        counts = {k: v for k, v in to_dict(self._config).items() if isinstance(v, int)}
        self.parameters = counts | train | {"data": data.name}
        self.tags = {
            "seeds": [config.train.seed],
            "data.fingerprint": store.fingerprint,
            "raytrust.kind": "membership",
        }

    def introduce(self) -> None:
        self.progress.say(setting(self._config, self._data))
        for name, reason in self.study.left_out.items():
            self.progress.say(f"without {name}: {reason}")

    def report(self, tracker: Tracker, outbox: Outbox) -> tuple[list[Path], dict[str, float]]:
        self.progress.say("attacking the final models")
        labels = self._data.test_labels.numpy()
        self.rows = [row(self._store, self._config, arm, self._pool, labels) for arm in self._config.arms]
        _match(self.rows, self._config, self._store, self._pool)
        for of_arm in self.rows:
            if (figures := of_arm.get("property")) and "label" in figures:
                figures["class"] = self._data.class_name(figures["label"])
        artifacts = self._write()
        for arm, of_arm in zip(self._config.arms, self.rows, strict=True):
            # A tracking store may be away for a while: what is to be logged waits for it in the outbox.
            outbox.send(partial(_log_arm, tracker, self._config, self._data, self._store, arm, of_arm))
        finished = sum(r["status"] == "finished" for r in self.rows)
        return artifacts, {"defences_finished": finished, "defences_failed": len(self.rows) - finished}

    def _write(self) -> list[Path]:
        names = ("membership.json", "membership.txt", "report.html", "roc.png", "auc.png")
        audit, text, page, roc, areas = (self.root / name for name in names)
        rows, left_out, described = self.rows, self.study.left_out, setting(self._config, self._data)
        content: dict[str, Any] = {"setting": described, "rows": rows, "left_out": left_out}
        content["nearest_to_paper"] = nearest_cells(rows)
        write_json(self.root / "results.json", plain(content))
        write_file(text, (membership_table(rows, left_out) + "\n").encode())
        if any(r["status"] == "finished" for r in rows):
            roc_figure(rows, roc)
            side_by_side_figure(rows, areas)
        drawn = [path for path in (areas, roc) if path.exists()]
        write_file(page, membership_page(rows, described, drawn, left_out).encode())
        return [audit, self.root / "results.json", text, page, *drawn]


def _match(rows: list[Row], config: MembershipConfig, store: JobStore, pool: Pool) -> None:
    """Put uncompressed SGD of equal fit beside every other defence, where both are finished."""
    # Final models measure fit: a defence that only slows training down looks private, until it stands beside plain SGD
    # that was stopped at the same training loss.
    uncompressed = load_shadows(store, config, Defence()) if Defence() in config.defences else None
    for arm, of_arm in zip(config.arms, rows, strict=True):
        shadows = load_shadows(store, config, arm)
        if uncompressed and shadows and arm != Defence() and of_arm["status"] == "finished":
            of_arm["matched"] = matched_fit(uncompressed, shadows, pool)


def _log_arm(tracker: Tracker, config: MembershipConfig, data: Dataset, store: JobStore, arm: Arm, of_arm: Row) -> None:
    """One run a defence: mean loss curve and accuracy of its models, and the main figures."""
    key, parameters = of_arm["run"], {"defence": arm.name, **to_dict(arm)}
    shadows = load_shadows(store, config, arm)
    if of_arm["status"] == "failed" or shadows is None:
        tracker.failed(key, arm.name, parameters, of_arm["reason"])
        return
    n = len(data.test_labels)
    training = {
        "correct": (of_arm["accuracy"].value or 0.0) * n,
        "n_test": n,
        "losses": np.mean([s.losses for s in shadows], axis=0).tolist(),
        "bytes_per_step": of_arm["bytes_per_step"],
        "dense_bytes": of_arm["bytes_per_step"] * of_arm["compression_ratio"],
        "seconds": float(sum(s.seconds for s in shadows)),
    }
    tracker.trained(key, arm.name, parameters, training)
    metrics = {f"auc_{name.replace(' ', '_')}": report.auc.value for name, report in of_arm["final"].items()}
    for m in of_arm["messages"]:
        metrics[f"message_auc_{m.score}_vs_{m.control}_step_{m.step}".replace(" ", "_")] = m.value
    known = {name: value for name, value in metrics.items() if value is not None}
    tracker.evaluated(key, known, {"models": len(shadows)}, [])
