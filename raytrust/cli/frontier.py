"""A sweep from its configuration to the frontier: the order of things."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from raytrust.cli import options as cli
from raytrust.cluster.groups import TrainingGroups, training_groups
from raytrust.cluster.placement import Device
from raytrust.cluster.runner import OnRay
from raytrust.cluster.runtime import cluster
from raytrust.cluster.searches import places, search_attacks, search_defences
from raytrust.config import Defence, Space, SweepConfig
from raytrust.data import Dataset
from raytrust.jobs.listener import Listener, ListenerGroup
from raytrust.jobs.lock import exclusive
from raytrust.jobs.runner import Local, Runner
from raytrust.reports.frontier_log import SweepLog
from raytrust.reports.frontier_report import FILES, Call, write_report
from raytrust.reports.frontier_table import frontier_table
from raytrust.reports.summary import summary_lines
from raytrust.reports.text import counted
from raytrust.reports.tracking_uri import database_path, default_uri, show_command
from raytrust.reports.versions import versions
from raytrust.studies.evaluate import DISTRACTORS
from raytrust.studies.frontier.audit import audit_here
from raytrust.studies.frontier.meter import Meter
from raytrust.studies.frontier.plan import ByDefence, evaluation_bundles, totals
from raytrust.studies.frontier.progress import WORDS, FrontierProgress
from raytrust.studies.frontier.row import Row
from raytrust.studies.frontier.rows import audited_defences, finalists, row, trained_defences
from raytrust.studies.frontier.store import Store
from raytrust.studies.frontier.verdicts import judge_rows
from raytrust.studies.study import too_late


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
    hours: float | None = None,
    spread: bool = True,
    program: Call | None = None,
) -> list[Row]:
    """Run what is not finished yet, write the report, say what it found, and return the frontier's rows.

    parallel: trials at once on the cluster at `address`, which may start nodes for them; what it has, if not given.
    device: "auto" is "cuda" where the cluster has GPUs that torch can use. hours: after which no further trial or
    attack is begun; those that run are finished. spread: over Ray; without, the list is audited in this process, and
    nothing is searched. program: what was called, for the report. A defence that fails is a
    row with its reason. KeyboardInterrupt passes through; what was finished is stored. Raises ValueError if another
    sweep runs in the store's directory, or if the cluster or the tracking store can't be used.
    """
    run = _Run(sweep, spaces, data, store, tracking_uri or default_uri(store.root), cpus, parallel)
    run.until = None if hours is None else time.time() + 3600 * hours
    run.program = program or Call("python sweeps/privacy_frontier.py", {}, {}, time.monotonic())
    with exclusive(store.root):
        # The bar must be gone from the terminal before the table is printed.
        with run.progress:
            rows = run.all(address, device, spread)
        run.conclude(rows)
    return rows


class _AuditProgress(FrontierProgress):
    """Of a sweep that trains nothing."""

    def counted(self, phase: str) -> str:
        return super().counted(phase).replace(WORDS["defences"], "defences captured")


class _Run:
    """One call of `run_sweep`."""

    until: float | None
    program: Call

    def __init__(
        self,
        sweep: SweepConfig,
        spaces: Spaces,
        data: Dataset,
        store: Store,
        uri: str,
        cpus: int,
        parallel: int | None,
    ):
        self._sweep, self._spaces, self._data, self._store = sweep, spaces, data, store
        self._uri, self._cpus, self._parallel = uri, cpus, parallel
        # An evaluation runs two attacks, the best naive one and the best aware one, on the evaluation images; a trial
        # runs one, on the tuning images.
        cost = 2 * sweep.train.capture.evaluation / sweep.train.capture.tuning
        kind = FrontierProgress if sweep.train.steps > 0 else _AuditProgress
        self.progress = kind(totals(sweep, store), parallel=cpus, evaluation_cost=cost)

    def all(self, address: str | None, device: Device, spread: bool) -> list[Row]:
        """Search, evaluate and report; returns the rows."""
        sweep, store, data, say = self._sweep, self._store, self._data, self.progress.say
        store.clear_failures()
        others = torch.linspace(0, len(data.test_images) - 1, min(DISTRACTORS, len(data.test_images))).long()
        # Private images are training images, so that none of these is private.
        store.keep_references(data.test_images[others])
        for line in data.summary().splitlines():
            say(line)
        defences, workers = counted(sweep.trials, "defence"), counted(sweep.train.workers, "worker")
        say(f"{defences}, {sweep.train.model.title}, {workers}{'; nothing is trained' * (sweep.train.steps == 0)}")
        # A store that is there may refuse, and must before a cluster starts; a new one is made while that starts.
        log = SweepLog(sweep, store, data, self._uri, say) if _is_there(self._uri) or not spread else None
        if not spread:
            assert log is not None
            return self._logged(log, self._rows_here)
        with (
            # Two slots: while one defence is attacked, the next one is trained.
            cluster(address, self._cpus, slots=2, parallel=self._parallel),
            training_groups(sweep.train.workers, data, store, device, self._parallel, say) as groups,
        ):
            if sum(store.training(replace(sweep.train, defence=d)) is not None for d in sweep.defences) < sweep.trials:
                # Two workers take about ten seconds to start, which a resumed sweep with nothing to train must not wait
                # for.
                groups.start()
            say("Ray is up; the first training workers start")
            log = log or SweepLog(sweep, store, data, self._uri, say)
            return self._logged(log, partial(self._rows, groups))

    def _logged(self, log: SweepLog, rows_of: Callable[[Listener], list[Row]]) -> list[Row]:
        """Make the rows, report and log them."""
        sweep, store = self._sweep, self._store
        with log.open_run():
            meter = Meter(self.program.started)
            rows = judge_rows(rows_of(ListenerGroup(self.progress, log, meter)))
            self.progress.say("writing the report")
            wall = time.monotonic() - self.program.started
            text, beyond = meter.text(wall, self._cpus), meter.beyond(wall, self._cpus)
            artifacts = write_report(store, sweep, self._data, rows, self.program, text, versions())
            unfinished = too_late(self.until) and any(totals(sweep, store).values())
            if unfinished:
                self.progress.say("time is up: --resume goes on with what is left")
            metrics = {"wall_seconds": wall, "overhead_seconds_per_trial": beyond}
            log.finish(rows, artifacts, metrics, "KILLED" if unfinished else "FINISHED")
        self.progress.say(f"done: {meter.text(time.monotonic() - self.program.started, self._cpus)}")
        return rows

    def _rows_here(self, listener: Listener) -> list[Row]:
        """Audit the list in this process, without a search."""
        sweep, store = self._sweep, self._store
        runner = Local({store.fingerprint: self._data})
        audit_here(sweep, store, runner, listener, self.until)
        return self._evaluated(sweep.defences, runner, listener)

    def _rows(self, groups: TrainingGroups, listener: Listener) -> list[Row]:
        """Search defences, search attacks on each, evaluate the winners."""
        sweep, store, placement = self._sweep, self._store, groups.placement
        search_defences(sweep, self._spaces.defence, store, listener, groups, self._parallel, self.until)
        defences = audited_defences(sweep, store)
        trained = trained_defences(sweep, store, defences)
        search_attacks(sweep, self._spaces.attack, trained, store, listener, placement, self._parallel, self.until)
        runner = OnRay({}, places(placement), placement.device, placement.attack_gpu)
        return self._evaluated(defences, runner, listener)

    def _evaluated(self, defences: Sequence[Defence], runner: Runner, listener: Listener) -> list[Row]:
        sweep, store = self._sweep, self._store
        winners = [finalists(store, sweep, d) for d in trained_defences(sweep, store, defences)]
        bundles = evaluation_bundles(winners, runner.parallel, store)
        runner.run(bundles, ByDefence(listener, store, winners), self.until)
        return [row(store, sweep, defence) for defence in defences]

    def conclude(self, rows: list[Row]) -> None:
        """Print the table, the files, what to do next, and the answer in three lines."""
        print("\n" + frontier_table(rows) + "\n")
        cli.list_files(self._store.root, FILES)
        print(f"\nCompare the runs in the MLflow UI:\n  {show_command(self._uri)}\n\nNext:")
        for purpose, command in self.program.next_commands(self._store.root, self._sweep):
            print(f"  {command}    # {purpose}")
        print()
        for line in summary_lines(rows, self._store.root / "report.html"):
            print(line)


def _is_there(tracking_uri: str) -> bool:
    """Whether this is a tracking store that was made before: not the database of a new directory."""
    path = database_path(tracking_uri)
    return path is None or path.exists()
