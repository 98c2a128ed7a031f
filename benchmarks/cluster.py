"""What a sweep costs beyond training and attacks: seconds a trial, driver memory, MLflow calls, object store.

    python benchmarks/cluster.py                              # 8, 64 and 512 trials on 1 node, 64 on 2 and 4
    python benchmarks/cluster.py --trials 8 64 --nodes 1 2

A trial is an attack of one iteration on a captured step of a tiny network, as the inner search runs it: Optuna suggests
it, a warm actor runs it, the store keeps it, MLflow (sqlite) hears of it. Each row has a process and a cluster of its
own; a node has one CPU, and all nodes are processes on this machine. A line through the two smallest sizes predicts the
largest, and then what 10,000 trials on 100 nodes cost. --defences N also measures the outer search, which starts a
Train group each time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from raytrust.cluster.runtime import cluster  # first: it says what Ray reads when it is imported

import ray  # isort: skip
from ray import tune
from ray.cluster_utils import Cluster

from raytrust.capture import Capture, save_capture
from raytrust.channel import LocalChannel
from raytrust.cluster.phases import search_attacks, search_defences
from raytrust.config import (
    CaptureConfig,
    Defence,
    InversionConfig,
    ModelConfig,
    PowerSGDConfig,
    SweepConfig,
    TrainConfig,
)
from raytrust.data import load
from raytrust.store import open_store
from raytrust.sweep_log import SweepLog
from raytrust.tracking import default_uri
from raytrust.train import Evaluation, Step, train

TRAIN = TrainConfig(
    model=ModelConfig("convnet", width=2), capture=CaptureConfig((0,), 1, 1), workers=1, batch_size=8, steps=1
)
ATTACK = InversionConfig("naive", iterations=1)
SPACE = {"tv": tune.loguniform(1e-3, 1.0), "step_size": tune.loguniform(0.03, 1.0)}
DEFENCES = {
    "compressor": tune.choice(["powersgd"]),
    "rank": tune.randint(1, 9),
    "error_feedback": tune.choice([False, True]),
}
TARGET_TRIALS, TARGET_NODES = 10_000, 100


class Meter:
    """A listener that notes the driver's memory and the time after each trial."""

    def __init__(self, log: SweepLog):
        self._log = log
        self.points: list[tuple[float, float]] = []  # seconds, MiB
        self.busy = 0.0
        self.failures: list[str] = []

    def started(self, phase: str, key: str, what: str) -> None:
        self._log.started(phase, key, what)

    def finished(self, phase: str, key: str, result: dict[str, Any]) -> None:
        self._log.finished(phase, key, result)
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


def count_calls() -> Counter[str]:
    """From now on, the calls of MLflow's client."""
    from mlflow import MlflowClient

    calls: Counter[str] = Counter()
    for name in ("create_run", "get_run", "log_batch", "set_tag", "set_terminated", "update_run", "search_runs"):
        call = getattr(MlflowClient, name)

        def counted(*arguments: Any, _name: str = name, _call: Any = call, **named: Any) -> Any:
            calls[_name] += 1
            return _call(*arguments, **named)

        setattr(MlflowClient, name, counted)
    return calls


def measure(trials: int, nodes: int, defences: int) -> dict[str, Any]:
    """One row. Attack trials, or `defences` trials of the outer search."""
    data = load("digits")
    with tempfile.TemporaryDirectory(prefix="rt-") as folder:
        root = Path(folder)
        listed = (Defence(), *(Defence(PowerSGDConfig(rank)) for rank in range(1, defences)))
        sweep = SweepConfig("overhead", TRAIN, listed, len(listed), (ATTACK,), trials)
        store = open_store(root, sweep, data.fingerprint())
        if not defences:
            records = list(train(TRAIN, data, LocalChannel()))
            directory = store.begin(TRAIN)
            for record in records:
                if isinstance(record, Capture):
                    save_capture(directory, record)
            (step,) = (r for r in records if isinstance(r, Step))
            (end,) = (r for r in records if isinstance(r, Evaluation))
            sizes = {"bytes_per_step": step.sent_bytes, "dense_bytes": step.gradient_bytes}
            figures = {"correct": end.correct, "n_test": end.n, "losses": [step.loss], "seconds": 1.0}
            store.finish_training(TRAIN, sizes | figures)
        local = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 * 2**20})
        for _ in range(nodes):
            local.add_node(num_cpus=1, resources={"trial_slot": 1}, object_store_memory=100 * 2**20)
        try:
            with cluster(local.address, nodes):
                log = SweepLog(sweep, store, data, default_uri(root), nodes, print)
                calls = count_calls()
                with log.open_run():
                    meter = Meter(log)
                    before = resident()
                    started = time.perf_counter()
                    if defences:
                        search_defences(sweep, DEFENCES, data, store, meter)
                    else:
                        search_attacks(sweep, SPACE, [Defence()], store, meter)
                    wall = time.perf_counter() - started
                    held = store_bytes()
        finally:
            local.shutdown()
    count = defences or trials
    if len(meter.points) != count:
        raise RuntimeError(f"{count - len(meter.points)} of {count} trials failed: {meter.failures[:1]}")
    half = meter.points[count // 2 :]  # from when all actors are warm
    return {
        "trials": count,
        "nodes": nodes,
        "wall": wall,
        "overhead": (wall - meter.busy / nodes) / count,
        "steady": (half[-1][0] - half[0][0]) / max(1, len(half) - 1) - meter.busy / nodes / count,
        "before": before,
        "memory": meter.points[-1][1],
        "calls": sum(calls.values()) / count,
        "object_store": held / 2**20,
    }


def line(first: dict[str, Any], second: dict[str, Any], name: str, at: int) -> float:
    """The straight line through two rows, at a number of trials."""
    slope = (second[name] - first[name]) / (second["trials"] - first["trials"])
    return float(first[name] + slope * (at - first["trials"]))


def show(rows: list[dict[str, Any]]) -> None:
    columns = ("trials", "nodes", "wall, s", "overhead, s a trial", "when warm", "driver, MiB (before)")
    print("| " + " | ".join((*columns, "MLflow calls a trial", "objects, MiB")) + " |")
    print("|---|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['trials']} | {r['nodes']} | {r['wall']:.1f} | {r['overhead']:.2f} | {r['steady']:.2f} | "
            f"{r['memory']:.0f} ({r['before']:.0f}) | {r['calls']:.1f} | {r['object_store']:.1f} |"
        )


def model(rows: list[dict[str, Any]]) -> None:
    """Check the line through the two smallest sizes against the largest, then follow it to the target."""
    sizes = sorted((r for r in rows if r["nodes"] == 1), key=lambda r: r["trials"])
    if len(sizes) < 3:
        return
    first, second, largest = sizes[0], sizes[1], sizes[-1]
    for name, unit in (("wall", "s"), ("memory", "MiB")):
        guess = line(first, second, name, largest["trials"])
        print(f"{name} of {largest['trials']} trials: {largest[name]:.0f} {unit}, predicted {guess:.0f} {unit}")
    a, b = second, largest  # the longest stretch that was measured says most about what is beyond it
    seconds = line(a, b, "wall", TARGET_TRIALS)
    print(
        f"{TARGET_TRIALS:,} trials on {TARGET_NODES} nodes: driver {line(a, b, 'memory', TARGET_TRIALS):,.0f} MiB, "
        f"{TARGET_TRIALS * b['calls']:,.0f} MLflow calls, object store {b['object_store']:.1f} MiB. The driver alone "
        f"needs {seconds:,.0f} s: it keeps {TARGET_NODES} nodes busy if an attack takes at least "
        f"{TARGET_NODES * seconds / TARGET_TRIALS:,.0f} s."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4], help="beyond 1 with the second of --trials")
    parser.add_argument("--defences", type=int, default=0, help="trials of the outer search")
    parser.add_argument("--one", nargs=3, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    jobs = [(n, 1, 0) for n in options.trials]
    middle = sorted(options.trials)[min(1, len(options.trials) - 1)]
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
