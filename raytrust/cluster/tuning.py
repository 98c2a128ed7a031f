"""Running trials with Ray Tune, and passing on what happens to them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeAlias

import ray
from ray import tune

from raytrust.cluster.failures import RETRIES, last_error, one_line
from raytrust.jobs.listener import Listener
from raytrust.jobs.store import JobStore

ROUND = 500  # trials that Tune holds in memory, at least
SHARE = 10  # trials of a round for each that runs at once, so that its actors stay warm

Parameters: TypeAlias = dict[str, Any]


def run_trials(
    name: str, trainable: Any, search: Any, samples: int, concurrent: int, store: JobStore, relay: Relay
) -> None:
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
        except ray.exceptions.RayError as error:
            # An error of Tune's own actors is no trial's failure, but the cluster's.
            raise ConnectionError(f"The cluster failed, --resume goes on: {one_line(error)}") from error
        # Fewer trials than asked for: the search space is used up, or the time is.
        if trials < size or relay.broken is not None:
            break
    if relay.broken is not None:
        raise relay.broken


class Relay(tune.Callback, tune.Stopper):
    """Passes what happens to Tune's trials on to a listener; `broken` says why that came to an end.

    name_of: (key, name) of a trial's parameters. finish: tells the listener of a trial's result; by default as it is.
    fail: told of the parameters and the reason of one that failed. check: called a few times a second.
    """

    def __init__(
        self,
        phase: str,
        listener: Listener,
        name_of: Callable[[Parameters], tuple[str, str]],
        *,
        finish: Callable[[str, Parameters], None] | None = None,
        fail: Callable[[Parameters, str], None] = lambda parameters, reason: None,
        check: Callable[[], None] = lambda: None,
    ):
        self._phase, self._listener, self._name_of = phase, listener, name_of
        self._finish = finish or (lambda key, result: listener.finished(phase, key, result))
        self._fail, self._check = fail, check
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
        self._pass(lambda: self._listener.started(self._phase, *self._name_of(trial.config)))

    def on_trial_complete(self, trial: Any, **_: Any) -> None:
        if (reason := trial.last_result.get("failure")) is not None:
            self._pass(lambda: self._failed(trial, reason))
        else:
            key = self._name_of(trial.config)[0]
            self._pass(lambda: self._finish(key, {**trial.config, **trial.last_result}))

    def on_trial_error(self, trial: Any, **_: Any) -> None:
        self._pass(lambda: self._failed(trial, last_error(trial)))

    def _failed(self, trial: Any, reason: str) -> None:
        self._fail(trial.config, reason)
        self._listener.failed(self._phase, self._name_of(trial.config)[0], reason)

    def _pass(self, action: Callable[[], None]) -> None:
        # Tune would take an error here for one of the trial's, and try that again.
        if self.broken is not None:
            return
        try:
            action()
        except Exception as error:
            # A disk that is full, say, ends the phase, in the driver.
            self.broken = error
