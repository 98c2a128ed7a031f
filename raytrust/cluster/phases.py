"""The three phases of a sweep on Ray: search over defences, search over attacks, evaluation of the winners.

Each phase reads from the store what is finished, does the rest, and tells a listener. A trial that fails is recorded
with its reason, and the others go on.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from ray import tune
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raytrust.attacks.inversion.stacks import LARGEST
from raytrust.cluster.failures import RETRIES, last_error, one_line, report
from raytrust.cluster.groups import TrainingGroups
from raytrust.cluster.placement import Placement, remote_attack
from raytrust.cluster.runtime import SLOT, Listener, capacity, cluster_device
from raytrust.cluster.searchers import AttackSearch, DefenceSearch
from raytrust.cluster.training import train_on_cluster
from raytrust.config import Defence, InversionConfig, SweepConfig, TrainConfig, from_dict, to_dict
from raytrust.jobs.files import read_json
from raytrust.metrics.verdict import floor_of_images
from raytrust.persample.memory import keep_freed_memory
from raytrust.studies.frontier.store import Split, Store

ROUND = 500  # trials that Tune holds in memory, at least
SHARE = 10  # trials of a round for each that runs at once, so that its actors stay warm
TOGETHER = 4  # settings of a trial, and runs of an evaluation task, that are attacked as one batch
OBJECTIVES = ("leakage", "accuracy", "bytes_per_step")

Requests = Sequence[tuple[TrainConfig, Sequence[InversionConfig]]]


def search_defences(
    sweep: SweepConfig,
    space: dict[str, Any],
    store: Store,
    listener: Listener,
    groups: TrainingGroups,
    parallel: int | None = None,
) -> None:
    """Outer search: train defences with Ray Train, capture, attack with the portfolio. Objectives: leakage down,
    accuracy up and, if the sweep asks for it, bytes down. Ends when `sweep.trials` defences are finished or failed.

    groups: train the defences, and are closed at the end. parallel: trials at once, for which a cluster may start
    nodes; what the cluster has room for, if not given.
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
    search = DefenceSearch(space, objectives, pending, known, sweep.train.seed)
    groups.expect(remaining)
    shared = {"sweep": to_dict(sweep), "queue": groups.queue, "placement": groups.placement, "store": store}
    trainable = tune.with_resources(tune.with_parameters(_defence_trial, **shared), {SLOT: 1})

    def key(parameters: dict[str, Any]) -> tuple[str, str]:
        defence = from_dict(Defence, parameters["defence"])
        return store.run_id(replace(sweep.train, defence=defence)), defence.name

    def failed(parameters: dict[str, Any], reason: str) -> None:
        store.fail(replace(sweep.train, defence=from_dict(Defence, parameters["defence"])), reason)

    relay = _Relay("defences", listener, key, failed, groups.check)
    _tune("defences", trainable, search, remaining, parallel or capacity(SLOT), store, relay)
    groups.close()


def search_attacks(
    sweep: SweepConfig,
    space: dict[str, Any],
    defences: Sequence[Defence],
    store: Store,
    listener: Listener,
    placement: Placement,
    parallel: int | None = None,
) -> None:
    """Inner search: for each defence, `sweep.attack_trials` attacks that maximise SSIM on the tuning images.

    Runs in warm actors without Ray Train; the portfolio's results are where each study starts from. A trial is up to
    `TOGETHER` attacks on one run, which are one batch where they take as many iterations of the same step.
    """
    runs = {store.run_id(train): train for train in (replace(sweep.train, defence=d) for d in defences)}
    known, budget = {}, {}
    for run, train in runs.items():
        found = store.attacks(train, "tuning")
        known[run] = [({k: f["attack"][k] for k in space}, float(np.mean(f["ssim"]))) for f in found]
        portfolio = sweep.portfolio_against(train.defence)
        attacks = [from_dict(InversionConfig, f["attack"]) for f in found]
        tried = sum(a not in portfolio and a.iterations == sweep.portfolio[0].iterations for a in attacks)
        budget[run] = max(0, sweep.attack_trials - tried)
    search = AttackSearch(space, budget, known, sweep.train.seed, TOGETHER)
    if search.trials == 0:
        return
    trainable = tune.with_resources(
        tune.with_parameters(_attack_trial, base=to_dict(sweep.portfolio[0]), store=store), placement.attack
    )

    def key(parameters: dict[str, Any]) -> tuple[str, str]:
        return parameters["run"], runs[parameters["run"]].defence.name

    concurrent = max(parallel or 0, _places(placement))
    _tune("attacks", trainable, search, search.trials, concurrent, store, _Relay("attacks", listener, key))


def evaluate_attacks(
    jobs: Sequence[tuple[TrainConfig, Sequence[InversionConfig]]],
    store: Store,
    listener: Listener,
    placement: Placement,
) -> None:
    """Run attacks on the evaluation images of each run, a few runs in a Ray task, and keep the figures in the store."""
    device = placement.device
    task = _remote_attack(placement)
    split: Split = "evaluation"
    left = [(train, attacks) for train, attacks in jobs if not all(store.knows(train, a, split) for a in attacks)]
    places = _places(placement)
    pending = deque(_tasks(left, places, store))
    most = 2 * places  # none idles, and few wait in the driver's memory
    waiting: dict[Any, Requests] = {}
    while pending or waiting:
        while pending and len(waiting) < most:
            requests = pending.popleft()
            for train, _ in requests:
                listener.started("evaluation", store.run_id(train), train.defence.name)
            waiting[task.remote(store, requests, split, device)] = requests
        done, _ = ray.wait(list(waiting), timeout=0.5)
        listener.tick()
        for ref in done:
            requests = waiting.pop(ref)
            try:
                for (train, _), figures in zip(requests, ray.get(ref), strict=True):
                    listener.finished("evaluation", store.run_id(train), {"figures": figures})
            except ray.exceptions.RayError as error:
                if len(requests) > 1:  # which of them it was, shows when each has a process of its own
                    pending.extend([request] for request in requests)
                    continue
                ((train, _),) = requests
                reason = one_line(error)
                store.fail(train, f"evaluation: {reason}")
                listener.failed("evaluation", store.run_id(train), reason)


def _places(placement: Placement) -> int:
    """How many attacks have room at once in the cluster as it is."""
    if placement.attack_gpu:
        return max(1, int(capacity("GPU") / placement.attack_gpu))
    return max(1, capacity("CPU"))


def _tasks(jobs: Requests, places: int, store: Store) -> list[Requests]:
    """The jobs in tasks for this many places: runs whose attacks start at the same steps next to each other, as equal
    models meet in one batch. Tasks get smaller towards the end, so that no place waits long for the last."""
    jobs = sorted(jobs, key=lambda job: max((a.capture_step for a in job[1]), default=0))
    tasks: list[Requests] = []
    while jobs:
        small = all(_entries(store, train) <= LARGEST for train, _ in jobs[:TOGETHER])  # else it saves nothing
        size = max(1, min(TOGETHER, len(jobs) // (2 * places))) if small else 1
        tasks.append(jobs[:size])
        jobs = jobs[size:]
    return tasks


def _entries(store: Store, train: TrainConfig) -> float:
    """Of the run's gradient."""
    training = store.training(train)
    return math.inf if training is None else training["dense_bytes"] / 4


def defence_objectives(store: Store, sweep: SweepConfig, defence: Defence) -> dict[str, float] | None:
    """What the outer search minimises and maximises, for a defence that is trained and met the portfolio; else None.

    leakage: the greatest mean SSIM on the tuning images over the portfolio, but for attacks that failed.
    """
    train = replace(sweep.train, defence=defence)
    training = store.training(train)
    portfolio = sweep.portfolio_against(defence)
    attacks = [store.attack(train, a, "tuning") for a in portfolio if not store.attack_failure(train, a, "tuning")]
    if training is None or not attacks or any(a is None for a in attacks):
        return None
    return {
        "leakage": max(float(np.mean(a["ssim"])) for a in attacks if a is not None),
        "accuracy": training["correct"] / training["n_test"],
        "bytes_per_step": float(training["bytes_per_step"]),
    }


def _defence_trial(
    parameters: dict[str, Any], sweep: dict[str, Any], queue: Any, placement: Placement, store: Store
) -> None:
    """Tune trial of the outer search. Takes no CPU: training has a group's, and the slot counts for the attack's."""
    config = from_dict(SweepConfig, sweep)
    defence = from_dict(Defence, parameters["defence"])
    report(lambda: _audit(config, defence, queue, placement, store), OBJECTIVES)


def _audit(config: SweepConfig, defence: Defence, queue: Any, placement: Placement, store: Store) -> dict[str, Any]:
    """Train with the defence, let it meet the portfolio, and return what the outer search learns from.

    On a CPU the portfolio runs in this process: a task would wait for one of the CPUs that a warm group holds.
    """
    train = replace(config.train, defence=defence)
    attacks = config.portfolio_against(defence)
    trained = store.training(train) is not None
    before = [store.attack(train, attack, "tuning") for attack in attacks]
    started = time.perf_counter()
    training = train_on_cluster(train, store, queue)
    requests = [(train, attacks)]
    if placement.attack_gpu:
        task = remote_attack(_attack_task, placement)
        (figures,) = ray.get(task.remote(store, requests, "tuning", placement.device))
    else:
        (figures,) = _attack_task(store, requests, "tuning", placement.device)
    objectives = defence_objectives(store, config, defence)
    if objectives is None:
        raise FloatingPointError(f"No attack has a result: {store.attack_failure(train, attacks[0], 'tuning')}")
    floor = floor_of_images(figures[0]["mean_image_ssim"], figures[0]["other_image_ssim"])
    return {
        **objectives,
        "floor": None if floor is None else float(np.mean(floor)),
        "attacks": len(figures),
        "attack_seconds": sum(f["seconds"] for f in figures),
        "train_seconds": training["seconds"],
        "cpu_seconds": (0.0 if trained else training["cpu_seconds"])
        + sum(f["cpu_seconds"] for f in figures if f not in before),  # of this run of the program alone
        "waited_seconds": 0.0 if trained else training.get("waited_seconds", 0.0),
        "wall_seconds": time.perf_counter() - started,
    }


def _attack_trial(parameters: dict[str, Any], base: dict[str, Any], store: Store) -> None:
    """Tune trial of the inner search. Nothing that it is given grows with the number of runs."""
    found = read_json(store.root / "captures" / parameters["run"] / "config.json")
    train = from_dict(TrainConfig, found["train"])
    settings = [{**base, **chosen} for chosen in parameters["settings"]]
    report(lambda: _try_attacks(train, settings, store), ["ssim"])


def _try_attacks(train: TrainConfig, settings: Sequence[dict[str, Any]], store: Store) -> dict[str, Any]:
    """Run attacks on the tuning images, and return what the inner search learns from."""
    started = time.perf_counter()
    attacks = [from_dict(InversionConfig, s).against(train.defence) for s in settings]
    (figures,) = _attack_task(store, [(train, attacks)], "tuning", cluster_device())
    if not figures:
        raise FloatingPointError(store.attack_failure(train, attacks[0], "tuning"))
    by_attack = {from_dict(InversionConfig, f["attack"]): float(np.mean(f["ssim"])) for f in figures}
    return {
        "ssim": max(by_attack.values()),
        "values": json.dumps([by_attack.get(attack) for attack in attacks]),  # None of one that failed
        "figures": json.dumps(figures),  # Tune keeps a history of every number that it sees
        "attack_seconds": sum(f["seconds"] for f in figures),
        "wall_seconds": time.perf_counter() - started,
    }


def _remote_attack(placement: Placement) -> Any:
    """`_attack_task` as a Ray task of one CPU and an attack's share of a GPU, wherever there is room in the cluster."""
    return ray.remote(
        num_cpus=1,
        num_gpus=placement.attack_gpu,
        max_calls=100 if placement.attack_gpu else 0,  # on a GPU Ray would start a new process for each call
    )(_attack_task).options(
        scheduling_strategy=PlacementGroupSchedulingStrategy(None),  # not inside the trial's own slot
    )


def _attack_task(store: Store, requests: Requests, split: Split, device: str) -> list[list[dict[str, Any]]]:
    torch.set_num_threads(1)
    keep_freed_memory()  # the process is a Ray worker's: its memory is ours to manage
    return store.run_together(requests, split, device)


def _tune(name: str, trainable: Any, search: Any, samples: int, concurrent: int, store: Store, relay: _Relay) -> None:
    """Run `samples` trials, in rounds: Tune keeps all trials of a run in memory."""
    most = max(ROUND, SHARE * concurrent)
    for first in range(0, samples, most):
        size = min(most, samples - first)
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=search, num_samples=size, max_concurrent_trials=concurrent, reuse_actors=True
            ),
            run_config=tune.RunConfig(
                name=f"{name}-{time.time_ns()}",
                storage_path=str(store.root / "ray" / "tune"),
                callbacks=[relay],
                stop=relay,
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                verbose=0,
            ),
        )
        try:
            trials = len(tuner.fit())
        except ray.exceptions.RayError as error:  # of Tune's own actors: no trial's, but the cluster's
            raise ConnectionError(f"The cluster failed, --resume goes on: {one_line(error)}") from error
        if trials < size or relay.broken is not None:  # the search space is used up, or the driver is
            break
    if relay.broken is not None:
        raise relay.broken


class _Relay(tune.Callback, tune.Stopper):
    """Passes what happens to Tune's trials on to a listener; `broken` says why that came to an end.

    Tune would take an error here for one of the trial's, and try it again.
    """

    def __init__(
        self, phase: str, listener: Listener, key: Any, failed: Any = None, check: Callable[[], None] = lambda: None
    ):
        self._phase, self._listener, self._key, self._failed, self._check = phase, listener, key, failed, check
        self.broken: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune saves its callbacks, but a sweep is resumed from the store; not every stream can be saved."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.broken is not None

    def on_step_begin(self, **_: Any) -> None:
        self._pass(self._listener.tick)
        self._pass(self._check)

    def on_trial_start(self, trial: Any, **_: Any) -> None:
        self._pass(lambda: self._listener.started(self._phase, *self._key(trial.config)))

    def on_trial_complete(self, trial: Any, **_: Any) -> None:
        if (reason := trial.last_result.get("failure")) is not None:
            self._pass(lambda: self._fail(trial, reason))
        else:
            self._pass(lambda: self._finish(trial))

    def on_trial_error(self, trial: Any, **_: Any) -> None:
        self._pass(lambda: self._fail(trial, last_error(trial)))

    def _finish(self, trial: Any) -> None:
        result = {**trial.config, **trial.last_result}
        key = self._key(trial.config)[0]
        if "figures" not in result:
            self._listener.finished(self._phase, key, result)
            return
        attacks = json.loads(result["figures"])  # those that have a result
        for figures in attacks:
            each = {"figures": figures, "ssim": float(np.mean(figures["ssim"])), "attack_seconds": figures["seconds"]}
            self._listener.finished(self._phase, key, result | each)
        for _ in range(len(trial.config["settings"]) - len(attacks)):
            self._listener.failed(self._phase, key, "an attack has no result; its reason is stored beside the others")

    def _fail(self, trial: Any, reason: str) -> None:
        if self._failed:
            self._failed(trial.config, reason)
        self._listener.failed(self._phase, self._key(trial.config)[0], reason)

    def _pass(self, action: Callable[[], None]) -> None:
        if self.broken is not None:
            return
        try:
            action()
        except Exception as error:  # a disk that is full, say: it ends the phase, in the driver
            self.broken = error
