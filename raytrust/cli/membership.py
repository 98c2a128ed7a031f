"""A membership audit from its configuration to its report: `cluster` trains the models, here is the order of things."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from raytrust.cluster.runtime import cluster
from raytrust.cluster.shadows import train_shadows
from raytrust.config import Arm, Defence, MembershipConfig, to_dict
from raytrust.data import Dataset
from raytrust.jobs.files import write_file, write_json
from raytrust.jobs.lock import exclusive
from raytrust.reports.membership_figures import roc_figure, side_by_side_figure
from raytrust.reports.membership_page import membership_page, membership_table
from raytrust.reports.mlflow import Tracker, default_uri
from raytrust.reports.outbox import Outbox
from raytrust.studies.membership.paper_cells import nearest_cells
from raytrust.studies.membership.properties import choose_property
from raytrust.studies.membership.rows import matched_fit, row
from raytrust.studies.membership.shadows import Pool, ShadowStore, draw_pool

Row = dict[str, Any]


def run_membership(
    config: MembershipConfig,
    data: Dataset,
    store: ShadowStore,
    *,
    address: str | None = None,
    cpus: int = 2,
    tracking_uri: str | None = None,
) -> list[Row]:
    """Train the models that are not finished yet, write the report, log it, and return its rows.

    A defence with a model that fails is a row with the reason. KeyboardInterrupt passes through; what was finished is
    stored. What can't be measured on so few images, or on such, is left out and named in the report. Writes
    results.json, membership.txt, roc.png, auc.png and report.html into the store's directory. Raises ValueError if
    there are too few images, or if another run goes on in the directory.
    """
    with exclusive(store.root):
        return _run_alone(config, data, store, address, cpus, tracking_uri or default_uri(store.root))


def _run_alone(
    config: MembershipConfig, data: Dataset, store: ShadowStore, address: str | None, cpus: int, uri: str
) -> list[Row]:
    pool = draw_pool(config, data)
    config, left_out = measurable(config, data)
    store.clear_failures()
    progress = _Progress(config, store)
    progress.say(setting(config, data))
    for name, reason in left_out.items():
        progress.say(f"without {name}: {reason}")
    tracker = Tracker(uri, store.root, experiment=f"raytrust {data.name}")
    outbox = Outbox(tracker, progress.say, "audit")
    with _logged(tracker, outbox, config, data, store):
        with cluster(address, cpus):
            train_shadows(config, data, store, progress)
        progress.say("attacking the final models")
        rows = [row(store, config, arm, pool, data.test_labels.numpy()) for arm in config.arms]
        _match(rows, config, store, pool)
        for found in rows:
            if (figures := found.get("property")) and "label" in figures:
                figures["class"] = data.class_name(figures["label"])
        artifacts = _write(rows, left_out, config, data, store)
        for arm, found in zip(config.arms, rows, strict=True):
            outbox.send(partial(_log_arm, tracker, config, data, store, arm, found))
        finished = sum(r["status"] == "finished" for r in rows)
        metrics = {"defences_finished": finished, "defences_failed": len(rows) - finished}
        outbox.send(lambda: tracker.end_sweep("FINISHED", artifacts, metrics))
        outbox.finish()
    progress.say("done")
    return rows


def measurable(config: MembershipConfig, data: Dataset) -> tuple[MembershipConfig, dict[str, str]]:
    """The audit without what can't be measured on these images; and why, by the name of what is left out."""
    if config.property_models == 0:
        return config, {}
    try:
        choose_property(config, data)
    except ValueError as error:
        return replace(config, property_models=0), {"property inference": str(error)}
    return config, {}


def setting(config: MembershipConfig, data: Dataset) -> str:
    """What was trained and attacked, in words."""
    train, threat = config.train, config.train.threat
    return (
        f"{data.name}: {config.models} models a defence, {train.model.name} of width {train.model.width}, "
        f"{train.steps} steps of {train.batch_size} images, each on about half of {config.points} points, "
        f"{config.mislabelled} of them mislabelled and {config.duplicates} coming {config.copies} times. Messages: "
        f"batches of {threat.batch_size} images, vantage {threat.vantage}, batch norm in {threat.batch_norm} mode. "
        f"Seed {train.seed}."
    )


def _match(rows: list[Row], config: MembershipConfig, store: ShadowStore, pool: Pool) -> None:
    """Put uncompressed SGD of equal fit beside every other defence, where both are finished."""
    uncompressed = store.shadows(config, Defence()) if Defence() in config.defences else None
    for arm, found in zip(config.arms, rows, strict=True):
        shadows = store.shadows(config, arm)
        if uncompressed and shadows and arm != Defence() and found["status"] == "finished":
            found["matched"] = matched_fit(uncompressed, shadows, pool)


def _write(
    rows: list[Row], left_out: dict[str, str], config: MembershipConfig, data: Dataset, store: ShadowStore
) -> list[Path]:
    names = ("membership.json", "membership.txt", "report.html", "roc.png", "auc.png")
    audit, text, page, roc, areas = (store.root / name for name in names)
    content: dict[str, Any] = {"setting": setting(config, data), "rows": rows, "left_out": left_out}
    content["nearest_to_paper"] = nearest_cells(rows)
    write_json(store.root / "results.json", content)
    write_file(text, (membership_table(rows, left_out) + "\n").encode())
    if any(r["status"] == "finished" for r in rows):
        roc_figure(rows, roc)
        side_by_side_figure(rows, areas)
    drawn = [path for path in (areas, roc) if path.exists()]
    write_file(page, membership_page(rows, setting(config, data), drawn, left_out).encode())
    return [audit, store.root / "results.json", text, page, *drawn]


@contextmanager
def _logged(
    tracker: Tracker, outbox: Outbox, config: MembershipConfig, data: Dataset, store: ShadowStore
) -> Iterator[None]:
    """The audit's parent run, ended as what became of it."""
    train = {k: v for k, v in to_dict(config.train).items() if not isinstance(v, dict) and k != "seed"}
    parameters = {k: v for k, v in to_dict(config).items() if isinstance(v, int)} | train | {"data": data.name}
    tags = {"seeds": [config.train.seed], "data.fingerprint": store.fingerprint, "raytrust.kind": "membership"}
    tracker.begin_sweep(f"{config.name} {store.root.name}", parameters, tags)
    try:
        yield
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        outbox.send(lambda: tracker.end_sweep(status))
        raise


def _log_arm(
    tracker: Tracker, config: MembershipConfig, data: Dataset, store: ShadowStore, arm: Arm, found: Row
) -> None:
    """One run a defence: mean loss curve and accuracy of its models, and the main figures."""
    key, parameters = found["run"], {"defence": arm.name, **to_dict(arm)}
    shadows = store.shadows(config, arm)
    if found["status"] == "failed" or shadows is None:
        tracker.failed(key, arm.name, parameters, found["reason"])
        return
    n = len(data.test_labels)
    training = {
        "correct": found["accuracy"]["value"] * n,
        "n_test": n,
        "losses": np.mean([s.losses for s in shadows], axis=0).tolist(),
        "bytes_per_step": found["bytes_per_step"],
        "dense_bytes": found["bytes_per_step"] * found["compression_ratio"],
        "seconds": float(sum(s.seconds for s in shadows)),
    }
    tracker.trained(key, arm.name, parameters, training)
    metrics = {f"auc_{name.replace(' ', '_')}": report["auc"]["value"] for name, report in found["final"].items()}
    for m in found["messages"]:
        name = f"message_auc_{m['score']}_vs_{m['control']}_step_{m['step']}"
        metrics[name.replace(" ", "_")] = m["value"]
    metrics = {name: value for name, value in metrics.items() if value is not None}
    tracker.evaluated(key, metrics, {"models": len(shadows)}, [])


class _Progress:
    """A listener that prints a line for every tenth of the models, and for each that fails."""

    def __init__(self, config: MembershipConfig, store: ShadowStore):
        self._started = time.monotonic()
        self._total = sum(not store.path(config, arm, m, kind).exists() for kind, arm, m in store.jobs(config))
        self._done = 0

    def started(self, phase: str, key: str, what: str) -> None:
        pass

    def finished(self, phase: str, key: str, result: dict[str, Any]) -> None:
        self._done += 1
        if self._done % max(1, self._total // 10) == 0 or self._done == self._total:
            left = (time.monotonic() - self._started) / self._done * (self._total - self._done)
            self.say(f"{self._done}/{self._total} models, about {left / 60:.0f} min left")

    def failed(self, phase: str, key: str, reason: str) -> None:
        self._done += 1
        self.say(f"a model FAILED: {reason}")

    def tick(self) -> None:
        pass

    def say(self, text: str) -> None:
        minutes, seconds = divmod(round(time.monotonic() - self._started), 60)
        print(f"[{minutes}:{seconds:02d}] {text}", file=sys.stdout, flush=True)
