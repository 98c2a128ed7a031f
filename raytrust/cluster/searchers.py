"""Searchers: Optuna behind Ray Tune, fed with what the store holds, so that a resumed search goes on where it was."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import optuna
from ray import tune
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from raytrust.config import Choice, Defence, DenseConfig, LogInteger, LogUniform, TopKConfig, to_dict
from raytrust.config.register import COMPRESSORS, TRANSFORMS
from raytrust.jobs.runner import too_late

optuna.logging.set_verbosity(optuna.logging.WARNING)
WINDOW = 256  # runs that take turns; the driver holds the studies of these alone
Results = dict[str, float]


def domains(space: dict[str, Any]) -> dict[str, Any]:
    """The space in Ray Tune's words; what is in them already stays."""

    def domain(values: Any) -> Any:
        match values:
            case Choice(values=choices):
                return tune.choice(list(choices))
            case LogUniform(low=low, high=high):
                return tune.loguniform(low, high)
            case LogInteger(low=low, high=high):
                return tune.lograndint(low, high + 1)
            case _:
                return values

    return {name: domain(values) for name, values in space.items()}


class DefenceSearch(OptunaSearch):
    """Suggests {"defence": ...}: first a given list, then what Optuna samples for the joint objectives, none twice.

    space: Tune domains of what `sampled_defence` takes.
    known: finished defences with their objectives; Optuna learns from them, and they are not suggested again. until: by
    `time.time`, when the last is suggested.
    """

    def __init__(
        self,
        space: dict[str, Any],
        objectives: dict[str, str],
        pending: Sequence[Defence],
        known: Sequence[tuple[Defence, Results]],
        seed: int,
        until: float | None = None,
    ):
        self._until = until
        self._domains = OptunaSearch.convert_search_space(domains(space))
        super().__init__(self._domains, metric=list(objectives), mode=list(objectives.values()), seed=seed)
        self._uniform = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
        self._pending = list(pending)
        self._given: dict[str, Defence] = {}
        self._seen = {defence for defence, _ in known} | set(pending)
        for defence, results in known:
            self._learn(defence, results)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if too_late(self._until):
            return self.FINISHED
        if self._pending:
            self._given[trial_id] = self._pending.pop(0)
            return {"defence": to_dict(self._given[trial_id])}
        for attempt in range(1000):
            # TPE suggests again and again what it knows to be good: then draw from the whole space.
            if attempt >= 20:
                self._ot_study.enqueue_trial(self._uniform.ask(self._domains).params)
            defence = sampled_defence(super().suggest(trial_id) or {})
            if defence not in self._seen:
                self._seen.add(defence)
                return {"defence": to_dict(defence)}
            super().on_trial_complete(trial_id, error=True)
            self._completed_trials.discard(trial_id)
            del self._ot_trials[trial_id]
        return self.FINISHED  # the space is used up

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        values = _finite(result, self.metric)
        if trial_id in self._given:
            if values is not None and not error:
                self._learn(self._given[trial_id], values)
        else:
            # Optuna would leave a trial with a NaN objective running for ever.
            super().on_trial_complete(trial_id, values, error=error or values is None)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Only completed trials count."""

    def _learn(self, defence: Defence, results: Results) -> None:
        """Add a finished trial that Optuna didn't suggest; one outside the space can't teach it anything."""
        parameters = _parameters(defence, self._domains)
        if parameters is None:
            return
        self._ot_study.add_trial(
            optuna.trial.create_trial(
                params=parameters, distributions=self._domains, values=[results[name] for name in self.metric]
            )
        )


class AttackSearch(Searcher):
    """Suggests {"run": ..., "settings": [<attack settings>, ...]}: one Optuna study for each captured run, which
    maximises its own SSIM.

    budget: run -> how many attacks to try. together: how many a trial tries at most; they are asked of the study at
    once. known: run -> finished (settings, SSIM), from which its study learns. One study over all runs would learn to
    attack the runs that are easy to attack. At most WINDOW runs take turns; a study is forgotten when its budget is
    spent, so that memory does not grow with the number of runs.
    """

    def __init__(
        self,
        space: dict[str, Any],
        budget: dict[str, int],
        known: dict[str, list[tuple[dict[str, Any], float]]],
        seed: int,
        together: int = 1,
        until: float | None = None,
    ):
        super().__init__(metric="ssim", mode="max")
        self._domains = OptunaSearch.convert_search_space(domains(space))
        self._known, self._until = known, until
        self._together = together
        # Distinct but reproducible seeds: with one seed all studies would try the same first settings.
        # So would a search that goes on try those again that it began with.
        self._seeds = {run: seed + i + len(budget) * len(known.get(run, [])) for i, run in enumerate(budget)}
        self._left = {run: n for run, n in budget.items() if n > 0}
        self.trials = sum(math.ceil(n / together) for n in self._left.values())
        self._waiting = deque(self._left)
        self._turns: deque[str] = deque()
        self._studies: dict[str, OptunaSearch] = {}
        self._owner: dict[str, tuple[str, int]] = {}  # of trials on their way, and how many attacks they try

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        while self._waiting and len(self._turns) < WINDOW:
            self._turns.append(self._waiting.popleft())
        if not self._turns or too_late(self._until):
            return self.FINISHED
        run = self._turns.popleft()
        count = min(self._together, self._left[run])
        self._left[run] -= count
        if self._left[run]:
            self._turns.append(run)
        self._owner[trial_id] = run, count
        if run not in self._studies:
            self._studies[run] = self._study(run)
        return {"run": run, "settings": [self._studies[run].suggest(f"{trial_id}/{i}") or {} for i in range(count)]}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """result: "values" is the SSIM of each attack of the trial as JSON, null for one that failed."""
        run, count = self._owner.pop(trial_id)
        reached = json.loads((result or {}).get("values", "[]")) if not error else []
        for i in range(count):
            value = _finite({"ssim": reached[i]} if i < len(reached) else None, ["ssim"])
            self._studies[run].on_trial_complete(f"{trial_id}/{i}", value, error=value is None)
        if not self._left[run] and run not in [owner for owner, _ in self._owner.values()]:
            del self._studies[run]

    def _study(self, run: str) -> OptunaSearch:
        study = OptunaSearch(self._domains, metric="ssim", mode="max", seed=self._seeds[run])
        for settings, value in self._known.get(run, []):
            parameters = {k: settings[k] for k in self._domains}
            if _inside(parameters, self._domains):
                study.add_evaluated_point(parameters, value)
        return study

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Only completed trials count."""

    def save(self, checkpoint_path: str) -> None:
        """The store is what a sweep resumes from."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("A search is resumed from the store.")


def sampled_defence(parameters: dict[str, Any]) -> Defence:
    """The defence that a point of the search space stands for: "compressor" is its method, "transform" that of what
    stands before it, if the space has it, or "none"; other parameters are options of those methods that have them.
    "rank" is of PowerSGD, or the rank whose bytes Top-K sends."""
    kind, before = COMPRESSORS[parameters["compressor"]], parameters.get("transform", "none")
    options = parameters | ({"equal_to_rank": parameters["rank"]} if kind is TopKConfig else {})
    compressor, *transforms = (
        method(**{field.name: options[field.name] for field in fields(method) if field.name in options})
        for method in (kind, *([] if before == "none" else [TRANSFORMS[before]]))
    )
    # Without a compressor there is no error: it would be one defence by two names.
    forgets = compressor.takes_error_feedback and not isinstance(compressor, DenseConfig)
    feedback = bool(parameters["error_feedback"]) and forgets
    return Defence(compressor, feedback, transforms=tuple(transforms))


def _parameters(defence: Defence, domains: dict[str, Any]) -> dict[str, Any] | None:
    """Inverse of `sampled_defence`, None where there is none; what is no option of its methods has any value."""
    methods = [defence.compressor, *defence.transforms]
    point = {field.name: getattr(method, field.name) for method in methods for field in fields(method)}  # type: ignore[arg-type]
    point |= {"compressor": defence.compressor.method, "error_feedback": defence.error_feedback}
    point["transform"] = methods[1].method if len(methods) > 1 else "none"
    if isinstance(defence.compressor, TopKConfig):
        point["rank"] = defence.compressor.equal_to_rank
    parameters = {name: point.get(name, _any_of(domain)) for name, domain in domains.items()}
    if None in parameters.values() or not _inside(parameters, domains):
        return None
    return parameters if sampled_defence(parameters) == defence else None


def _any_of(domain: Any) -> Any:
    return domain.choices[0] if hasattr(domain, "choices") else domain.low


def _inside(parameters: dict[str, Any], domains: dict[str, Any]) -> bool:
    """Whether this is a point of the space, so that a study can learn from it."""
    try:
        return all(domain._contains(domain.to_internal_repr(parameters[name])) for name, domain in domains.items())
    except ValueError:
        # A choice that the space doesn't offer has no internal representation.
        return False


def _finite(result: dict[str, Any] | None, names: Sequence[str]) -> Results | None:
    values = {name: (result or {}).get(name) for name in names}
    if all(isinstance(v, (int, float)) and math.isfinite(v) for v in values.values()):
        return values  # type: ignore[return-value]
    return None
