"""A sweep from its configuration to the frontier: `cluster` runs it, `store` keeps it, here is the order of things."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from raytrust.cli import options as cli
from raytrust.cluster.groups import training_groups
from raytrust.cluster.phases import defence_objectives, evaluate_attacks, search_attacks, search_defences
from raytrust.cluster.placement import Device
from raytrust.cluster.runtime import Listener, cluster
from raytrust.config import Space, SweepConfig, to_dict
from raytrust.data import Dataset
from raytrust.jobs.lock import exclusive
from raytrust.jobs.progress import Progress
from raytrust.reports.frontier_log import SweepLog
from raytrust.reports.frontier_report import FILES, Program, write_report
from raytrust.reports.frontier_table import frontier_table, judge_rows
from raytrust.reports.summary import summary_lines
from raytrust.reports.tracking_uri import database_path, default_uri, show_command
from raytrust.reports.versions import versions
from raytrust.studies.evaluate import DISTRACTORS
from raytrust.studies.frontier.rows import Row, audited_defences, finalists, row, trained_defences
from raytrust.studies.frontier.store import Store


@dataclass(frozen=True)
class Spaces:
    """What the search may choose, for the defence and for the attack."""

    defence: Space
    attack: Space


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
    program: Program | None = None,
) -> list[Row]:
    """Run what is not finished yet, write the report, say what it found, and return the frontier's rows.

    parallel: trials at once on the cluster at `address`, which may start nodes for them; what it has, if not given.
    device: "auto" is "cuda" where the cluster has GPUs that torch can use. program: what was called, for the report.
    A defence that fails is a row with its reason. KeyboardInterrupt passes through; what was finished is stored. Raises
    ValueError if another sweep runs in the store's directory, or if the cluster or the tracking store can't be used.
    """
    with exclusive(store.root):
        uri = tracking_uri or default_uri(store.root)
        program = program or Program("python sweeps/privacy_frontier.py", {}, {}, time.monotonic())
        return _run_alone(sweep, spaces, data, store, address, cpus, uri, parallel, device, program)


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
    program: Program,
) -> list[Row]:
    progress = Progress(_totals(sweep, store), parallel=cpus, evaluation_cost=_evaluation_cost(sweep))
    store.clear_failures()
    others = torch.linspace(0, len(data.test_images) - 1, min(DISTRACTORS, len(data.test_images))).long()
    store.keep_references(data.test_images[others])  # none is private: private images are training images
    for line in data.summary().splitlines():
        progress.say(line)
    progress.say(
        f"{sweep.trials} defences, {sweep.train.model.name} of width {sweep.train.model.width}, "
        f"{sweep.train.workers} workers"
    )
    # A store that is there may refuse, and must before a cluster starts; a new one is made while that starts.
    log = SweepLog(sweep, store, data, tracking_uri, progress.say) if _is_there(tracking_uri) else None
    with (
        cluster(address, cpus, slots=2, parallel=parallel),  # while one defence is attacked, the next one is trained
        training_groups(sweep.train.workers, data, store, device, parallel, progress.say) as groups,
    ):
        if sum(store.training(replace(sweep.train, defence=d)) is not None for d in sweep.defences) < sweep.trials:
            groups.start()
        progress.say("Ray is up; the first training workers start")
        log = log or SweepLog(sweep, store, data, tracking_uri, progress.say)
        with log.open_run():
            meter = Meter(program.started)
            listener = _All(progress, log, meter)
            search_defences(sweep, spaces.defence, store, listener, groups, parallel)
            defences = audited_defences(sweep, store)
            trained = trained_defences(sweep, store, defences)
            search_attacks(sweep, spaces.attack, trained, store, listener, groups.placement, parallel)
            jobs = [finalists(store, sweep, d) for d in trained_defences(sweep, store, defences)]
            evaluate_attacks(jobs, store, listener, groups.placement)
            rows = judge_rows([row(store, sweep, defence) for defence in defences])
            progress.say("writing the report")
            wall = time.monotonic() - program.started
            artifacts = write_report(store, sweep, data, rows, program, meter.text(wall, cpus), versions())
            log.finish(rows, artifacts, {"wall_seconds": wall, "overhead_seconds_per_trial": meter.beyond(wall, cpus)})
    progress.say(f"done: {meter.text(time.monotonic() - program.started, cpus)}")
    _conclude(store, sweep, rows, program, tracking_uri)
    return rows


class Meter:
    """A listener that counts the CPU seconds of training and attacks, the defences that they were spent on, and what it
    took until the first could begin. began: when the program did, by `time.monotonic()`."""

    def __init__(self, began: float) -> None:
        self.busy = 0.0
        self._began = self._ready = self._last = began
        self._runs: set[str] = set()

    def started(self, phase: str, key: str, what: str) -> None:
        if self._ready == self._began:
            self._ready = time.monotonic()

    def finished(self, phase: str, key: str, result: dict[str, Any]) -> None:
        if not self._runs:  # the first run waited for the workers to start, too
            self._ready += result.get("waited_seconds", 0.0)
        self._note(key)
        figures = result.get("figures") or []
        each = figures if isinstance(figures, list) else [figures]
        self.busy += result.get("cpu_seconds", 0.0) + sum(f["cpu_seconds"] for f in each)

    def failed(self, phase: str, key: str, reason: str) -> None:
        self._note(key)

    def tick(self) -> None:
        pass

    def _note(self, key: str) -> None:
        self._runs.add(key)
        self._last = time.monotonic()

    def ends(self, wall: float) -> float:
        """Seconds, of `wall` since the program began, before the first run and after the last."""
        return self._ready - self._began + (self._began + wall - self._last)

    def beyond(self, wall: float, cpus: int) -> float:
        """Seconds a defence between these that were neither training nor attacks, had they kept all CPUs busy."""
        return max(0.0, wall - self.ends(wall) - self.busy / cpus) / max(1, len(self._runs))

    def text(self, wall: float, cpus: int) -> str:
        return (
            f"{wall:.0f} s; training and attacks took {self.busy:.0f} CPU seconds, {self.busy / cpus:.0f} s on {cpus} "
            f"CPUs; start and end {self.ends(wall):.0f} s; {self.beyond(wall, cpus):.1f} s a defence besides"
        )


def _conclude(store: Store, sweep: SweepConfig, rows: list[Row], program: Program, tracking_uri: str) -> None:
    """The end of what the terminal shows: the table, the files, what to do next, the answer in three lines."""
    print("\n" + frontier_table(rows) + "\n")
    cli.list_files(store.root, FILES)
    print(f"\nCompare the runs in the MLflow UI:\n  {show_command(tracking_uri)}\n\nNext:")
    for purpose, command in program.next_commands(store.root, sweep):
        print(f"  {command}    # {purpose}")
    print()
    for line in summary_lines(rows, store.root / "report.html"):
        print(line)


def _is_there(tracking_uri: str) -> bool:
    """Whether this is a tracking store that was made before: not the database of a new directory."""
    path = database_path(tracking_uri)
    return path is None or path.exists()


def _totals(sweep: SweepConfig, store: Store) -> dict[str, int]:
    """How much is left to do, as far as one can know beforehand."""
    defences = audited_defences(sweep, store)
    trained = trained_defences(sweep, store, defences)
    done = sum(defence_objectives(store, sweep, d) is not None for d in trained)
    iterations = sweep.portfolio[0].iterations
    tried = 0
    for defence in trained:
        portfolio = [to_dict(attack) for attack in sweep.portfolio_against(defence)]
        attacks = [f["attack"] for f in store.attacks(replace(sweep.train, defence=defence), "tuning")]
        tried += sum(a not in portfolio and a["iterations"] == iterations for a in attacks)
    evaluated = sum(bool(store.attacks(replace(sweep.train, defence=d), "evaluation")) for d in trained)
    trials = max(sweep.trials, len(defences))
    attacks_left = max(0, trials * sweep.attack_trials - tried)
    return {"defences": trials - done, "attacks": attacks_left, "evaluation": max(0, trials - evaluated)}


def _evaluation_cost(sweep: SweepConfig) -> float:
    """How many attacks of the inner search take as long as evaluating one defence: two attacks on its images."""
    return 2 * sweep.train.capture.evaluation / sweep.train.capture.tuning


class _All:
    """Tells several listeners."""

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
