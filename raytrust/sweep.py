"""A sweep from its configuration to the frontier: `cluster` runs it, `store` keeps it, here is the order of things."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from raytrust.cluster.groups import training_groups
from raytrust.cluster.phases import defence_objectives, evaluate_attacks, search_attacks, search_defences
from raytrust.cluster.placement import Device
from raytrust.cluster.runtime import Listener, cluster
from raytrust.config import SweepConfig
from raytrust.data import Dataset
from raytrust.evaluate import DISTRACTORS
from raytrust.figures import reconstructions_figure
from raytrust.frontier import Row, audited_defences, drawing, finalists, row, trained_defences
from raytrust.lock import exclusive
from raytrust.progress import Progress
from raytrust.report import frontier_table, judge_rows, write_rows
from raytrust.reports.frontier_figure import frontier_figure
from raytrust.store import Store
from raytrust.sweep_log import SweepLog
from raytrust.tracking import default_uri


@dataclass(frozen=True)
class Spaces:
    """What the search may choose: Ray Tune domains, for the defence and for the attack."""

    defence: dict[str, Any]
    attack: dict[str, Any]


def run_sweep(
    sweep: SweepConfig,
    spaces: Spaces,
    data: Dataset,
    store: Store,
    *,
    address: str | None = None,
    cpus: int = 2,
    tracking_uri: str | None = None,
    parallel: int | None = None,
    device: Device = "auto",
) -> list[Row]:
    """Run what is not finished yet, write the frontier, and return its rows.

    parallel: trials at once on the cluster at `address`, which may start nodes for them; what it has, if not given.
    device: "auto" is "cuda" where the cluster has GPUs that torch can use.
    A defence that fails is a row with its reason. KeyboardInterrupt passes through; what was finished is stored. Raises
    ValueError if another sweep runs in the store's directory, or if the cluster or the tracking store can't be used.
    """
    with exclusive(store.root):
        uri = tracking_uri or default_uri(store.root)
        return _run_alone(sweep, spaces, data, store, address, cpus, uri, parallel, device)


def _run_alone(
    sweep: SweepConfig,
    spaces: Spaces,
    data: Dataset,
    store: Store,
    address: str | None,
    cpus: int,
    tracking_uri: str,
    parallel: int | None,
    device: Device,
) -> list[Row]:
    progress = Progress(_totals(sweep, store), parallel=cpus, evaluation_cost=_evaluation_cost(sweep))
    store.clear_failures()
    others = torch.linspace(0, len(data.test_images) - 1, min(DISTRACTORS, len(data.test_images))).long()
    store.keep_references(data.test_images[others])  # none is private: private images are training images
    progress.say(
        f"{sweep.name}: {sweep.trials} defences on {data.name} ({len(data.train_labels)} training images), "
        f"{sweep.train.model.name} of width {sweep.train.model.width}, {sweep.train.workers} workers"
    )
    with (
        cluster(address, cpus, slots=2, parallel=parallel),  # while one defence is attacked, the next one is trained
        training_groups(sweep.train.workers, data, store, device, parallel, progress.say) as groups,
    ):
        if _totals(sweep, store)["defences"]:
            groups.start()
        progress.say("Ray is up; opening the MLflow store")
        log = SweepLog(sweep, store, data, tracking_uri, cpus, progress.say)
        with log.open_run():
            listener = _Both(progress, log)
            started = time.perf_counter()
            search_defences(sweep, spaces.defence, store, listener, groups, parallel)
            defences = audited_defences(sweep, store)
            trained = trained_defences(sweep, store, defences)
            search_attacks(sweep, spaces.attack, trained, store, listener, parallel)
            jobs = [finalists(store, sweep, d) for d in trained_defences(sweep, store, defences)]
            evaluate_attacks(jobs, store, listener)
            wall = time.perf_counter() - started
            rows = judge_rows([row(store, sweep, defence) for defence in defences])
            progress.say("drawing the figures")
            artifacts = _write(store, sweep, rows, data)
            log.finish(rows, artifacts, wall)
    progress.say(f"done; {log.overhead(wall, len(rows)):.1f} s a defence beyond training and attacks")
    return rows


def _totals(sweep: SweepConfig, store: Store) -> dict[str, int]:
    """How much is left to do, as far as one can know beforehand."""
    defences = audited_defences(sweep, store)
    trained = trained_defences(sweep, store, defences)
    done = sum(defence_objectives(store, sweep, d) is not None for d in trained)
    tried = sum(len(store.attacks(replace(sweep.train, defence=d), "tuning")) for d in trained)
    evaluated = sum(bool(store.attacks(replace(sweep.train, defence=d), "evaluation")) for d in trained)
    trials = max(sweep.trials, len(defences))
    attacks = trials * sweep.attack_trials - max(0, tried - done * len(sweep.portfolio))
    return {"defences": trials - done, "attacks": attacks, "evaluation": max(0, trials - evaluated)}


def _evaluation_cost(sweep: SweepConfig) -> float:
    """How many attacks of the inner search take as long as evaluating one defence: two attacks on its images."""
    return 2 * sweep.train.capture.evaluation / sweep.train.capture.tuning


def _write(store: Store, sweep: SweepConfig, rows: list[Row], data: Dataset) -> list[Path]:
    """frontier.json, frontier.png and reconstructions.png; those that could be written."""
    paths = [store.root / name for name in ("frontier.json", "frontier.png", "frontier.txt", "reconstructions.png")]
    write_rows(paths[0], rows)
    frontier_figure(rows, paths[1], title=f"{data.name}: accuracy against leakage")
    paths[2].write_text(frontier_table(rows) + "\n")
    drawn = [(r["name"], *drawing(store, sweep, r)) for r in rows if r["status"] == "finished"]
    if not drawn:
        return paths[:3]
    reconstructions_figure(drawn[0][3], [(name, images, ssim) for name, images, ssim, _ in drawn], paths[3])
    return paths


class _Both:
    """Tells two listeners."""

    def __init__(self, *listeners: Listener):
        self._listeners = listeners

    def started(self, phase: str, key: str, what: str) -> None:
        for listener in self._listeners:
            listener.started(phase, key, what)

    def finished(self, phase: str, key: str, result: dict[str, Any]) -> None:
        for listener in self._listeners:
            listener.finished(phase, key, result)

    def failed(self, phase: str, key: str, reason: str) -> None:
        for listener in self._listeners:
            listener.failed(phase, key, reason)

    def tick(self) -> None:
        for listener in self._listeners:
            listener.tick()
