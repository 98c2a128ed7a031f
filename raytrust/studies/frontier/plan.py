"""What a sweep still has to do, and in which portions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from raytrust.attacks.inversion.stacks import LARGEST
from raytrust.config import Defence, InversionConfig, SweepConfig, TrainConfig, to_dict
from raytrust.jobs.listener import Listener, Silent
from raytrust.jobs.runner import Bundle
from raytrust.studies.frontier.jobs import AttackRun
from raytrust.studies.frontier.rows import audited_defences, trained_defences
from raytrust.studies.frontier.store import Store

# Settings of a trial, and runs of an evaluation task, that are attacked as one batch: small networks pay for calls, of
# which a batch makes hardly more than a single attack.
TOGETHER = 4

Finalists = tuple[TrainConfig, list[InversionConfig]]


def defence_objectives(store: Store, sweep: SweepConfig, defence: Defence) -> dict[str, float] | None:
    """What the outer search minimises and maximises, for a defence that is trained and met the portfolio; else None.

    leakage: the greatest mean SSIM on the tuning images over the portfolio, but for attacks that failed.
    """
    train = replace(sweep.train, defence=defence)
    training = store.training(train)
    jobs = [AttackRun(train, attack, "tuning") for attack in sweep.portfolio_against(defence)]
    # A failed attack is no evidence of privacy, and is left out. One that is still to be made could be the strongest,
    # so that nothing is said before it is done.
    figures = [store.result(job) for job in jobs if store.failure(job) is None]
    finished = [f for f in figures if f is not None]
    if training is None or not figures or len(finished) < len(figures):
        return None
    return {
        # A maximum, since a defence is as private as its strongest attack leaves it.
        "leakage": max(float(np.mean(f["ssim"])) for f in finished),
        "accuracy": training["correct"] / training["n_test"],
        "bytes_per_step": float(training["bytes_per_step"]),
    }


def evaluation_bundles(finalists: Sequence[Finalists], places: int, store: Store) -> list[Bundle]:
    """The attacks on the evaluation images in portions for this many places: runs whose attacks start at the same steps
    next to each other, as equal models meet in one batch. Portions get smaller towards the end, so that no place waits
    long for the last."""
    left = [
        (train, jobs)
        for train, attacks in finalists
        if (jobs := store.missing(AttackRun(train, attack, "evaluation") for attack in attacks))
    ]
    left.sort(key=lambda run: max(job.attack.capture_step for job in run[1]))
    bundles: list[Bundle] = []
    while left:
        # Large models gain nothing from being attacked together, and wait for each other.
        small = all(_entries(store, train) <= LARGEST for train, _ in left[:TOGETHER])
        size = max(1, min(TOGETHER, len(left) // (2 * places))) if small else 1
        bundles.append((store, tuple(job for _, jobs in left[:size] for job in jobs)))
        left = left[size:]
    return bundles


def _entries(store: Store, train: TrainConfig) -> float:
    """Of the run's gradient."""
    training = store.training(train)
    # Of a run without figures the size is unknown; taken for large, it is attacked alone. Dense bytes are of float32.
    return math.inf if training is None else training["dense_bytes"] / 4


class ByDefence(Silent):
    """Tells another listener of a defence once all its evaluation jobs are over."""

    def __init__(self, listener: Listener, store: Store, finalists: Sequence[Finalists]):
        self._listener, self._store = listener, store
        self._jobs = {store.run_id(t): [AttackRun(t, a, "evaluation") for a in attacks] for t, attacks in finalists}
        self._run = {store.key(job): run for run, jobs in self._jobs.items() for job in jobs}
        self._open = {run: {store.key(job) for job in store.missing(jobs)} for run, jobs in self._jobs.items()}
        self._started: set[str] = set()

    def started(self, phase: str, key: str, name: str) -> None:
        if (run := self._run[key]) not in self._started:
            self._started.add(run)
            self._listener.started("evaluation", run, name)

    def finished(self, phase: str, key: str, result: dict[str, object]) -> None:
        self._over(key)

    def failed(self, phase: str, key: str, reason: str) -> None:
        self._over(key)

    def tick(self) -> None:
        self._listener.tick()

    def _over(self, key: str) -> None:
        run = self._run[key]
        self._open[run].discard(key)
        if self._open[run]:
            return
        figures = [f for job in self._jobs[run] if (f := self._store.result(job)) is not None]
        # A single attack that worked gives the defence a row: it has failed only where all of them did.
        if figures:
            self._listener.finished("evaluation", run, {"figures": figures})
        else:
            self._listener.failed(
                "evaluation", run, self._store.failure(self._jobs[run][0]) or "no attack has a result"
            )


def totals(sweep: SweepConfig, store: Store) -> dict[str, int]:
    """How much is left to do in each phase, as far as one can know beforehand."""
    defences = audited_defences(sweep, store)
    trained = trained_defences(sweep, store, defences)
    done = sum(defence_objectives(store, sweep, d) is not None for d in trained)
    iterations = sweep.portfolio[0].iterations
    tried = evaluated = 0
    for defence in trained:
        train = replace(sweep.train, defence=defence)
        portfolio = [to_dict(attack) for attack in sweep.portfolio_against(defence)]
        attacks = [f["attack"] for f in store.attacks(train, "tuning")]
        # The portfolio was tried when the defence was audited: the search owes its trials besides.
        tried += sum(a not in portfolio and a["iterations"] == iterations for a in attacks)
        evaluated += bool(store.attacks(train, "evaluation"))
    # A resumed sweep may hold more defences than it now asks for, and they are evaluated as well.
    trials = max(sweep.trials, len(defences))
    attacks_left = max(0, trials * sweep.attack_trials - tried)
    return {"defences": trials - done, "attacks": attacks_left, "evaluation": max(0, trials - evaluated)}
