"""One defence from training to what a search learns from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from raytrust.config import Defence, SweepConfig, TrainConfig
from raytrust.jobs.job import Figures, Job
from raytrust.jobs.listener import Listener, Silent
from raytrust.jobs.runner import Runner, each, too_late
from raytrust.metrics.verdict import floor_of_images
from raytrust.studies.frontier.jobs import AttackRun, TrainingRun
from raytrust.studies.frontier.plan import defence_objectives
from raytrust.studies.frontier.store import Store


def audit(
    sweep: SweepConfig,
    defence: Defence,
    store: Store,
    train: Callable[[TrainConfig], Figures],
    attack: Callable[[Sequence[Job]], None],
) -> dict[str, Any]:
    """Train with the defence, let it meet the portfolio, and return the objectives and what they took.

    train, attack: do and keep what the store lacks. Raises FloatingPointError if no attack has a result.
    """
    config = replace(sweep.train, defence=defence)
    jobs = [AttackRun(config, attack, "tuning") for attack in sweep.portfolio_against(defence)]
    # Looked up before anything runs, since afterwards the store can't tell what this run of the program has done.
    trained, missing = store.training(config) is not None, store.missing(jobs)
    started = time.perf_counter()
    training = train(config)
    attack(jobs)
    objectives = defence_objectives(store, sweep, defence)
    # Without any attack there is no leakage, and a number that is missing must not pass for a small one.
    if objectives is None:
        raise FloatingPointError(f"No attack has a result: {store.failure(jobs[0])}")
    figures = [f for job in jobs if (f := store.result(job)) is not None]
    # All attacks are on the same images, so that any of them knows the floor.
    floor = floor_of_images(figures[0]["mean_image_ssim"], figures[0]["other_image_ssim"])
    spent = sum(f["cpu_seconds"] for job in missing if (f := store.result(job)) is not None)
    return {
        **objectives,
        "floor": None if floor is None else float(np.mean(floor)),
        "attacks": len(figures),
        "attack_seconds": sum(f["seconds"] for f in figures),
        "train_seconds": training["seconds"],
        # What lay in the store already has cost this run of the program nothing.
        "cpu_seconds": spent + (0.0 if trained else training["cpu_seconds"]),
        "waited_seconds": 0.0 if trained else training.get("waited_seconds", 0.0),
        "wall_seconds": time.perf_counter() - started,
    }


def audit_here(sweep: SweepConfig, store: Store, runner: Runner, listener: Listener, until: float | None) -> None:
    """Audit the defences of the list one after another with this runner. Those that fail are kept with the reason."""

    def train(config: TrainConfig) -> Figures:
        job = TrainingRun(config)
        runner.run(each(store, [job]), Silent())
        if (figures := store.result(job)) is None:
            raise FloatingPointError(store.failure(job))
        return figures

    for defence in sweep.defences:
        if too_late(until):
            return
        if defence_objectives(store, sweep, defence) is not None:
            # A resumed sweep neither audits nor announces again what is finished.
            continue
        # The same name as the run's folder, so that whoever listens can find its results.
        key = store.run_id(replace(sweep.train, defence=defence))
        listener.started("defences", key, defence.name)
        try:
            result = audit(sweep, defence, store, train, lambda jobs: runner.run([(store, tuple(jobs))], Silent()))
        # A defence that diverges is a row which says so; the others are audited all the same.
        except FloatingPointError as error:
            store.fail_run(replace(sweep.train, defence=defence), str(error))
            listener.failed("defences", key, str(error))
        else:
            listener.finished("defences", key, result)
        listener.tick()
