"""The two levels of a sweep's search on Ray Tune: over defences, and over attacks on each defence's captures.

Each reads from the store what is finished, does the rest, and tells a listener. A trial that fails is recorded with its
reason, and the others go on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import ray
from ray import tune

from raytrust.cluster.failures import report
from raytrust.cluster.groups import TrainingGroups
from raytrust.cluster.placement import Placement
from raytrust.cluster.runner import do, remote
from raytrust.cluster.runtime import SLOT, capacity
from raytrust.cluster.searchers import AttackSearch, DefenceSearch
from raytrust.cluster.training import train_on_cluster
from raytrust.cluster.tuning import Parameters, Relay, run_trials
from raytrust.config import Defence, InversionConfig, SweepConfig, TrainConfig, from_dict, to_dict
from raytrust.jobs.captures import load_captures
from raytrust.jobs.files import read_json
from raytrust.jobs.job import Figures, Job
from raytrust.jobs.listener import Listener
from raytrust.persample.memory import candidate_bytes
from raytrust.studies.frontier.audit import audit
from raytrust.studies.frontier.jobs import AttackRun
from raytrust.studies.frontier.plan import TOGETHER, defence_objectives
from raytrust.studies.frontier.store import Store

OBJECTIVES = ("leakage", "accuracy", "bytes_per_step")


def search_defences(
    sweep: SweepConfig,
    space: dict[str, Any],
    store: Store,
    listener: Listener,
    groups: TrainingGroups,
    parallel: int | None = None,
    until: float | None = None,
) -> None:
    """Outer search: train defences with Ray Train, capture, attack with the portfolio. Objectives: leakage down,
    accuracy up and, if the sweep asks for it, bytes down. Ends when `sweep.trials` defences are finished or failed.

    groups: train the defences, and are closed at the end. parallel: trials at once, for which a cluster may start
    nodes; what the cluster has room for, if not given. until: by `time.time`, when the last trial may be begun.
    """
    known, pending = [], []
    for defence in dict.fromkeys([*sweep.defences, *store.defences(sweep.train)]):
        if (results := defence_objectives(store, sweep, defence)) is not None:
            known.append((defence, results))
        else:
            pending.append(defence)
    remaining = max(sweep.trials - len(known), len(pending))
    if remaining == 0:
        groups.close()
        return
    objectives = {"leakage": "min", "accuracy": "max"} | ({"bytes_per_step": "min"} if sweep.bytes_objective else {})
    search = DefenceSearch(space, objectives, pending, known, sweep.train.seed, until)
    groups.expect(remaining)
    shared = {"sweep": to_dict(sweep), "queue": groups.queue, "placement": groups.placement, "store": store}
    trainable = tune.with_resources(tune.with_parameters(_defence_trial, **shared), {SLOT: 1})

    def train_of(parameters: Parameters) -> TrainConfig:
        return replace(sweep.train, defence=from_dict(Defence, parameters["defence"]))

    relay = Relay(
        "defences",
        listener,
        lambda parameters: (store.run_id(train_of(parameters)), train_of(parameters).defence.name),
        fail=lambda parameters, reason: store.fail_run(train_of(parameters), reason),
        check=groups.check,
    )
    run_trials("defences", trainable, search, remaining, parallel or capacity(SLOT), store, relay)
    groups.close()


def search_attacks(
    sweep: SweepConfig,
    space: dict[str, Any],
    defences: Sequence[Defence],
    store: Store,
    listener: Listener,
    placement: Placement,
    parallel: int | None = None,
    until: float | None = None,
) -> None:
    """Inner search: for each defence, `sweep.attack_trials` attacks that maximise SSIM on the tuning images.

    Runs in warm actors without Ray Train; the portfolio's results are where each study starts from. A trial is up to
    `TOGETHER` attacks on one run, which are one batch where they take as many iterations of the same step.
    """
    runs = {store.run_id(train): train for train in (replace(sweep.train, defence=d) for d in defences)}
    known, budget = {}, {}
    for run, train in runs.items():
        figures = store.attacks(train, "tuning")
        portfolio = sweep.portfolio_against(train.defence)
        attacks = [from_dict(InversionConfig, f["attack"]) for f in figures]
        known[run] = lessons(
            sweep.portfolio[0], space, train.defence, attacks, [float(np.mean(f["ssim"])) for f in figures]
        )
        tried = sum(a not in portfolio and a.iterations == sweep.portfolio[0].iterations for a in attacks)
        budget[run] = max(0, sweep.attack_trials - tried)
    search = AttackSearch(space, budget, known, sweep.train.seed, TOGETHER, until)
    if search.trials == 0:
        return
    first = next(iter(runs.values()))
    # Groups have ended: the GPUs are for attacks alone.
    placement = placement.for_attacks_of(_bytes_of_a_trial(sweep, first, store, placement.device), alone=True)
    trainable = tune.with_resources(
        tune.with_parameters(_attack_trial, base=to_dict(sweep.portfolio[0]), store=store, device=placement.device),
        placement.attack,
    )
    relay = Relay(
        "attacks",
        listener,
        lambda parameters: (parameters["run"], runs[parameters["run"]].defence.name),
        finish=partial(tell_of_attacks, listener),
    )
    run_trials("attacks", trainable, search, search.trials, max(parallel or 0, places(placement)), store, relay)


def lessons(
    base: InversionConfig,
    space: dict[str, Any],
    defence: Defence,
    attacks: Sequence[InversionConfig],
    reached: Sequence[float],
) -> list[tuple[Parameters, float]]:
    """What a study starts from: the point of the space that each attack is, with what it reached.

    base: what trials are made of. attacks: as they applied to the defence. Those that differ from the base in more than
    the space are no points of it: what they reached says nothing of these.
    """
    # Of configs and not of what was stored, which leaves settings out that have their default.
    points = [{name: getattr(attack, name) for name in space} for attack in attacks]
    return [
        (point, value)
        for point, attack, value in zip(points, attacks, reached, strict=True)
        if replace(base, **point).against(defence) == attack
    ]


def tell_of_attacks(listener: Listener, key: str, result: Parameters) -> None:
    """Tell a listener of each attack of a trial."""
    for figures in json.loads(result["figures"]):  # of those that have a result, each once
        each = {"figures": figures, "ssim": float(np.mean(figures["ssim"])), "attack_seconds": figures["seconds"]}
        listener.finished("attacks", key, result | each)
    for _ in range(json.loads(result["values"]).count(None)):
        listener.failed("attacks", key, "an attack has no result; its reason is stored beside the others")


def _bytes_of_a_trial(sweep: SweepConfig, train: TrainConfig, store: Store, device: str) -> int:
    """What all candidates of a trial take: of `TOGETHER` attacks on the tuning images; 0 where it is not known."""
    if device != "cuda":
        return 0
    try:
        (capture,) = load_captures(store.run_directory(train), sweep.portfolio[0].capture_step, [0])
    except ValueError:
        # The trial that needs it will say so.
        return 0
    restarts = max(attack.restarts for attack in sweep.portfolio)
    return TOGETHER * train.capture.tuning * restarts * candidate_bytes(capture.seen, device)


def places(placement: Placement) -> int:
    """How many attacks have room at once in the cluster as it is."""
    room = capacity("CPU")
    if placement.attack_gpu:
        # Each takes a CPU besides, but for nodes with GPUs and CPUs apart, of which this knows nothing.
        room = min(room, int(capacity("GPU") / placement.attack_gpu))
    return max(1, room)


def _defence_trial(
    parameters: Parameters, sweep: dict[str, Any], queue: Any, placement: Placement, store: Store
) -> None:
    """Tune trial of the outer search. Takes no CPU: training has a group's, and the slot counts for the attack's."""
    config = from_dict(SweepConfig, sweep)
    defence = from_dict(Defence, parameters["defence"])

    def attack(jobs: Sequence[Job]) -> None:
        # The task takes no CPU of its own: the trial that waits for it holds one.
        if placement.attack_gpu:
            ray.get(remote(do, 0.0, placement.attack_gpu).remote(store, jobs, [], placement.device))
        else:
            # In this process: a task would wait for one of the CPUs that a warm group holds.
            do(store, jobs, [], placement.device)

    def train(config: TrainConfig) -> Figures:
        return train_on_cluster(config, store, queue)

    report(lambda: audit(config, defence, store, train, attack), OBJECTIVES)


def _attack_trial(parameters: Parameters, base: dict[str, Any], store: Store, device: str) -> None:
    """Tune trial of the inner search. Nothing that it is given grows with the number of runs."""
    begun = read_json(store.root / "captures" / parameters["run"] / "config.json")
    train = from_dict(TrainConfig, begun["train"])
    settings = [{**base, **chosen} for chosen in parameters["settings"]]
    report(lambda: _try_attacks(train, settings, store, device), ["ssim"])


def _try_attacks(train: TrainConfig, settings: Sequence[dict[str, Any]], store: Store, device: str) -> dict[str, Any]:
    """Run attacks on the tuning images, and return what the inner search learns from."""
    started = time.perf_counter()
    attacks = [from_dict(InversionConfig, s).against(train.defence) for s in settings]
    jobs = [AttackRun(train, attack, "tuning") for attack in attacks]
    do(store, jobs, [], device)
    values = [None if (f := store.result(job)) is None else float(np.mean(f["ssim"])) for job in jobs]
    reached = [value for value in values if value is not None]
    if not reached:
        raise FloatingPointError(store.failure(jobs[0]))
    figures = [f for job in dict.fromkeys(jobs) if (f := store.result(job)) is not None]
    return {
        "ssim": max(reached),
        "values": json.dumps(values),  # None of one that failed
        # As text: Tune keeps a history of every number that it sees.
        "figures": json.dumps(figures),
        "attack_seconds": sum(f["seconds"] for f in figures),
        "wall_seconds": time.perf_counter() - started,
    }
