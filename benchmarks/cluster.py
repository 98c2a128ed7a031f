"""What a sweep costs beyond training and attacks, and what 10,000 trials on 100 nodes would: a model, checked.

    python benchmarks/cluster.py                              # 8, 64, 512 and 2048 trials on 1 node, 64 on 2 and 4
    python benchmarks/cluster.py --trials 8 64 --nodes 1 2
    python benchmarks/cluster.py --trials 8 --nodes 1 --defences 4    # the outer search too, in a warm Train group

A trial is an attack of one iteration on a captured step of a tiny network, as the inner search runs it: Optuna suggests
it, a warm actor runs it, the store keeps it, MLflow (sqlite) hears of it; 8 attacks on each defence. Each row has a
process and a cluster of its own; a node has one CPU, and all nodes are processes on this machine. Lines through the two
smallest sizes predict the others; lines through the two largest lead to 10,000 trials. What 100 nodes ask of Ray's own
servers is not in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from raytrust.cluster.runtime import cluster  # first: it says what Ray reads when it is imported

import ray  # isort: skip
from ray import tune
from ray.cluster_utils import Cluster

from raytrust.cluster.groups import training_groups
from raytrust.cluster.placement import Placement
from raytrust.cluster.searches import search_attacks, search_defences
from raytrust.config import (
    CaptureConfig,
    Defence,
    InversionConfig,
    ModelConfig,
    PowerSGDConfig,
    SweepConfig,
    TrainConfig,
)
from raytrust.data import Dataset, load
from raytrust.jobs.captures import save_capture
from raytrust.leak.observation import Capture
from raytrust.reports.frontier_log import SweepLog
from raytrust.reports.mlflow import default_uri
from raytrust.studies.frontier.store import Store, open_store
from raytrust.train.loop import Evaluation, Step, train
from raytrust.wire.channel import LocalChannel

TRAIN = TrainConfig(
    model=ModelConfig("convnet", width=2), capture=CaptureConfig((0,), 1, 1), workers=1, batch_size=8, steps=1
)
ATTACK = InversionConfig("naive", iterations=1)
ATTACKS = 8  # on each defence
SPACE = {"tv": tune.loguniform(1e-3, 1.0), "step_size": tune.loguniform(0.03, 1.0)}
DEFENCES = {
    "compressor": tune.choice(["powersgd"]),
    "rank": tune.randint(1, 9),
    "error_feedback": tune.choice([False, True]),
}
TARGET_TRIALS, TARGET_NODES = 10_000, 100
ATTACK_SECONDS = 60.0  # of an attack on a GPU: what the driver's time is compared with
HEAD = 8 * 1024  # MiB of memory of the smallest head in deploy/
ROUND_TRIP = 0.02  # seconds: a call of a tracking server that is not on this machine
COPY = 60_000 * 32 * 32 * 3 / 2**20  # MiB: CIFAR-10, of which each node's object store has a copy during training
OBJECTS = 0.3 * 14 * 1024  # MiB: Ray's share of a worker's memory in deploy/


class Meter:
    """A listener that notes the driver's memory and the time after each trial."""

    def __init__(self, log: SweepLog):
        self._log = log
        self.points: list[tuple[float, float]] = []  # seconds, MiB
        self.busy = 0.0
        self.actors: set[int] = set()
        self.failures: list[str] = []

    def started(self, phase: str, key: str, what: str) -> None:
        self._log.started(phase, key, what)

    def finished(self, phase: str, key: str, result: dict[str, Any]) -> None:
        self._log.finished(phase, key, result)
        self.actors.add(result["pid"])
        self.busy += result["attack_seconds"] + result.get("train_seconds", 0.0)
        self.points.append((time.perf_counter(), resident()))

    def failed(self, phase: str, key: str, reason: str) -> None:
        self.failures.append(reason)

    def tick(self) -> None:
        self._log.tick()


def resident() -> float:
    """MiB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def store_bytes() -> int:
    """Bytes in the object stores of all nodes."""
    from ray._private.internal_api import node_stats

    used = 0
    for node in ray.nodes():
        if node["Alive"]:
            stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
            used += stats.store_stats.object_store_bytes_used
    return used


class Calls:
    """From now on, how many calls of MLflow's client there are, and the seconds that they take."""

    def __init__(self) -> None:
        from mlflow import MlflowClient

        self.count, self.seconds = 0, 0.0
        for name in ("create_run", "get_run", "log_batch", "set_tag", "set_terminated", "update_run", "search_runs"):
            setattr(MlflowClient, name, self._counted(getattr(MlflowClient, name)))

    def _counted(self, call: Any) -> Any:
        def counted(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.count += 1
                self.seconds += time.perf_counter() - started

        return counted


def trained(store: Store, defences: Sequence[Defence], data: Dataset) -> None:
    """Train here, one step each, and keep the captures."""
    for defence in defences:
        config = replace(TRAIN, defence=defence)
        directory = store.begin(config)
        for record in train(config, data, LocalChannel()):
            match record:
                case Capture():
                    save_capture(directory, record)
                case Step(sent_bytes=sent, gradient_bytes=dense, loss=loss):
                    sizes = {"bytes_per_step": sent, "dense_bytes": dense, "losses": [loss], "seconds": 1.0}
                case Evaluation(correct=correct, n=n):
                    store.finish_training(config, {"correct": correct, "n_test": n, **sizes})


def files(root: Path) -> tuple[int, float]:
    """How many there are, and their KiB."""
    sizes = [path.stat().st_size for path in root.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes) / 1024


def measure(trials: int, nodes: int, defences: int) -> dict[str, Any]:
    """One row. Attack trials, or `defences` trials of the outer search."""
    data = load("digits")
    with tempfile.TemporaryDirectory(prefix="rt-") as folder:
        root = Path(folder)
        count = defences or -(-trials // ATTACKS)
        listed = (Defence(), *(Defence(PowerSGDConfig(rank)) for rank in range(1, count)))
        sweep = SweepConfig("overhead", TRAIN, listed, len(listed), (ATTACK,), min(trials, ATTACKS))
        store = open_store(root, sweep, data.fingerprint())
        if not defences:
            trained(store, listed, data)
        local = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 * 2**20})
        for _ in range(nodes):
            local.add_node(num_cpus=1, resources={"trial_slot": 1}, object_store_memory=100 * 2**20)
        try:
            with cluster(local.address, nodes):
                log = SweepLog(sweep, store, data, default_uri(root), print)
                calls = Calls()
                with log.open_run():
                    meter = Meter(log)
                    before, kept = resident(), files(root)
                    used, started = time.process_time(), time.perf_counter()
                    if defences:
                        with training_groups(TRAIN.workers, data, store) as warm:
                            search_defences(sweep, DEFENCES, store, meter, warm)
                    else:
                        search_attacks(sweep, SPACE, listed, store, meter, Placement("cpu", 1))
                    wall, used = time.perf_counter() - started, time.process_time() - used
                    held = store_bytes()
                after = files(root)
        finally:
            local.shutdown()
        groups = len(list((root / "ray" / "train").glob("*")))
    count = defences or len(listed) * min(trials, ATTACKS)
    if len(meter.points) != count:
        raise RuntimeError(f"{count - len(meter.points)} of {count} trials failed: {meter.failures[:1]}")
    half = meter.points[count // 2 :]  # from when all actors are warm
    return {
        "trials": count,
        "nodes": nodes,
        "wall": wall,
        "overhead": (wall - meter.busy / nodes) / count,
        "steady": (half[-1][0] - half[0][0]) / max(1, len(half) - 1) - meter.busy / nodes / count,
        "cpu": used,
        "before": before,
        "memory": meter.points[-1][1],
        "calls": calls.count,
        "mlflow": calls.seconds,
        "object_store": held / 2**20,
        "files": after[0] - kept[0],
        "size": after[1] - kept[1],
        "actors": len(meter.actors),
        "groups": groups,
    }


def line(first: dict[str, Any], second: dict[str, Any], name: str, at: int) -> float:
    """The straight line through two rows, at a number of trials."""
    slope = (second[name] - first[name]) / (second["trials"] - first["trials"])
    return float(first[name] + slope * (at - first["trials"]))


def table(*rows: Sequence[str]) -> None:
    """The first row is the head."""
    for i, row in enumerate(rows):
        print("| " + " | ".join(row) + " |")
        if i == 0:
            print("|---" * len(row) + "|")


COLUMNS = {
    "trials": "{trials}",
    "nodes": "{nodes}",
    "wall, s": "{wall:.1f}",
    "overhead, s a trial": "{overhead:.3f}",
    "when warm": "{steady:.3f}",
    "driver's CPU, s": "{cpu:.1f}",
    "driver, MiB (before)": "{memory:.0f} ({before:.0f})",
    "MLflow calls": "{calls}",
    "their s": "{mlflow:.1f}",
    "objects, MiB": "{object_store:.3f}",
    "files": "{files}",
    "KiB": "{size:.0f}",
    "processes of trials": "{actors}",
    "Train groups": "{groups}",
}


def show(rows: list[dict[str, Any]]) -> None:
    table(list(COLUMNS), *([text.format(**r) for text in COLUMNS.values()] for r in rows))


MODELLED = {"wall": "s", "cpu": "s", "memory": "MiB", "calls": "calls", "mlflow": "s", "files": "files", "size": "KiB"}


def check(first: dict[str, Any], second: dict[str, Any], others: Sequence[dict[str, Any]]) -> None:
    """The line through the two smallest sizes beside what was measured."""
    heads = [f"{r['trials']} trials: measured (predicted)" for r in others]
    figures = [
        (f"{name}, {unit}", *(f"{r[name]:.1f} ({line(first, second, name, r['trials']):.1f})" for r in others))
        for name, unit in MODELLED.items()
    ]
    print(f"\nPredicted from {first['trials']} and {second['trials']} trials:\n")
    table(("", *heads), *figures)


def follow(a: dict[str, Any], b: dict[str, Any]) -> None:
    """The line through the two largest sizes to the target, and which limit is nearest there."""
    cost = {name: line(a, b, name, TARGET_TRIALS) for name in MODELLED}
    growth = (b["memory"] - a["memory"]) / (b["trials"] - a["trials"])  # MiB a trial
    remote = cost["wall"] + cost["calls"] * ROUND_TRIP - cost["mlflow"]
    ideal = TARGET_TRIALS * ATTACK_SECONDS / TARGET_NODES
    trials = f"after {(HEAD - a['before']) / growth:,.0f} trials" if growth > 0 else "never"
    limits = {
        "driver's memory": (cost["memory"], HEAD, "MiB", trials),
        "object store of a node": (COPY + b["object_store"], OBJECTS, "MiB", "with larger data, whatever the trials"),
    }
    for name, seconds in (("sqlite", cost["wall"]), (f"MLflow at {1000 * ROUND_TRIP:.0f} ms a call", remote)):
        nodes = TARGET_NODES * ideal / seconds
        shortest = TARGET_NODES * seconds / TARGET_TRIALS
        gives = f"with {nodes:,.0f} nodes, or attacks shorter than {shortest:.0f} s"
        limits[f"driver's time, {name}"] = (seconds, ideal, "s", gives)
    print(
        f"\n{TARGET_TRIALS:,} trials on {TARGET_NODES} nodes, {ATTACKS} on each defence, if an attack takes "
        f"{ATTACK_SECONDS:.0f} s: {cost['calls']:,.0f} MLflow calls ({cost['mlflow']:,.0f} s of them with sqlite), "
        f"{cost['files']:,.0f} files of {cost['size'] / 1024:,.0f} MiB (tiny images) on the shared storage, "
        f"{cost['cpu']:,.0f} s of the driver's CPU; its memory grows by {1024 * growth:.1f} kB a trial.\n"
    )
    table(
        ("", "needs", "there is", "share", "gives"),
        *((n, f"{x:,.0f} {u}", f"{top:,.0f} {u}", f"{x / top:.0%}", g) for n, (x, top, u, g) in limits.items()),
    )
    name = max(limits, key=lambda name: limits[name][0] / limits[name][1])
    print(f"\nWhat gives first: {name}, {limits[name][3]}.")


def model(rows: list[dict[str, Any]]) -> None:
    sizes = sorted((r for r in rows if r["nodes"] == 1), key=lambda r: r["trials"])
    if len(sizes) >= 3:
        check(sizes[0], sizes[1], sizes[2:])
        follow(*sizes[-2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[8, 64, 512, 2048])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4], help="beyond 1 with the second of --trials")
    parser.add_argument("--defences", type=int, default=0, help="trials of the outer search")
    parser.add_argument("--one", nargs=3, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    for n in options.trials:
        if n < 1 or (n > ATTACKS and n % ATTACKS):
            parser.error(f"Expected trials={n} to be at most {ATTACKS}, or a multiple of it, and at least 1.")
    options.trials = sorted(set(options.trials))
    jobs = [(n, 1, 0) for n in options.trials]
    middle = options.trials[min(1, len(options.trials) - 1)]
    jobs += [(middle, nodes, 0) for nodes in options.nodes if nodes > 1]
    jobs += [(0, 1, options.defences)] if options.defences else []
    rows = []
    for job in jobs:
        command = [sys.executable, __file__, "--one", *map(str, job)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], file=sys.stderr, flush=True)
    show(rows)
    model([r for r, job in zip(rows, jobs, strict=True) if not job[2]])


if __name__ == "__main__":
    main()
