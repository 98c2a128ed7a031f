from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from optuna.trial import TrialState
from ray import tune
from ray.tune.search import Searcher

from raytrust.cluster import searchers
from raytrust.cluster.searchers import AttackSearch, DefenceSearch, sampled_defence
from raytrust.cluster.searches import lessons
from raytrust.config import (
    Defence,
    DGCConfig,
    DPSGDConfig,
    InversionConfig,
    NoiseConfig,
    PowerSGDConfig,
    TopKConfig,
    from_dict,
    parse_defence,
)

SPACE = {
    "compressor": tune.choice(["powersgd", "topk"]),
    "rank": tune.lograndint(1, 4),  # 1, 2, 3
    "error_feedback": tune.choice([False, True]),
}
OBJECTIVES = {"leakage": "min", "accuracy": "max"}
EVERY = {
    sampled_defence({"compressor": c, "rank": r, "error_feedback": e})
    for c in ("powersgd", "topk")
    for r in (1, 2, 3)
    for e in (False, True)
}
LIST = [Defence(), Defence(PowerSGDConfig(2)), Defence(TopKConfig(level=0.1)), Defence(TopKConfig(equal_to_rank=3))]
GOOD = {"leakage": 0.3, "accuracy": 0.9}

ATTACKS = {
    "objective": tune.choice(["naive", "aware"]),
    "tv": tune.loguniform(1e-3, 1.0),
    "restarts": tune.choice([1, 2]),
}


def search(pending: Any = (), known: Any = (), space: Any = SPACE, seed: int = 0, **more: str) -> DefenceSearch:
    return DefenceSearch(space, OBJECTIVES | more, list(pending), list(known), seed)


def suggested(searcher: DefenceSearch, trial: str) -> Defence | None:
    """The next defence, None at the end."""
    found = searcher.suggest(trial)
    if found == Searcher.FINISHED:
        return None
    assert isinstance(found, dict)
    assert list(found) == ["defence"]
    return from_dict(Defence, found["defence"])


def states(study: Any) -> list[TrialState]:
    return [trial.state for trial in study.trials]


def test_the_list_comes_first_in_its_order() -> None:
    searcher = search(LIST)
    assert [suggested(searcher, f"{i}") for i in range(len(LIST))] == LIST
    assert suggested(searcher, "next") in EVERY - set(LIST)


def test_no_defence_comes_twice_and_the_search_ends_with_the_space() -> None:
    known = [(Defence(PowerSGDConfig(1), True), GOOD), (Defence(TopKConfig(level=0.5)), GOOD)]
    searcher = search(LIST, known)
    found = []
    while (defence := suggested(searcher, f"{len(found)}")) is not None:
        searcher.on_trial_complete(f"{len(found)}", GOOD | {"leakage": 0.01 * len(found)})
        found.append(defence)
    assert len(found) == len(set(found))
    assert set(found) == (EVERY | set(LIST)) - {defence for defence, _ in known}
    assert suggested(searcher, "one more") is None
    assert not {TrialState.RUNNING, TrialState.WAITING} & set(states(searcher._ot_study))


def test_several_can_be_on_their_way_at_once() -> None:
    searcher = search()
    found = [suggested(searcher, f"{i}") for i in range(6)]
    assert len(set(found)) == 6
    for i in reversed(range(6)):
        searcher.on_trial_complete(f"{i}", GOOD)
    assert states(searcher._ot_study).count(TrialState.COMPLETE) == 6


def test_known_results_are_what_the_search_starts_from() -> None:
    known = [(Defence(PowerSGDConfig(3), True), {"leakage": 0.1, "accuracy": 0.7}), (LIST[3], GOOD)]
    trials = search(known=known)._ot_study.trials
    assert [t.values for t in trials] == [[0.1, 0.7], [0.3, 0.9]]
    assert [t.params for t in trials] == [
        {"compressor": "powersgd", "rank": 3, "error_feedback": True},
        {"compressor": "topk", "rank": 3, "error_feedback": False},
    ]


@pytest.mark.parametrize(
    "defence",
    [
        Defence(),
        Defence(PowerSGDConfig(4)),  # beyond the ranks of the space
        Defence(PowerSGDConfig(1, warm_start=False)),
        Defence(TopKConfig(level=0.1)),
        Defence(TopKConfig(equal_to_rank=1, equal_by="values")),
        Defence(TopKConfig(equal_to_rank=1)),  # a method that the space doesn't offer
    ],
)
def test_what_lies_outside_the_space_teaches_nothing_and_does_no_harm(defence: Defence) -> None:
    space = SPACE | {"compressor": tune.choice(["powersgd"])}
    assert search(known=[(defence, GOOD)], space=space)._ot_study.trials == []
    searcher = search([defence], space=space)
    assert suggested(searcher, "given") == defence
    searcher.on_trial_complete("given", GOOD)
    assert searcher._ot_study.trials == []
    assert suggested(searcher, "next") in EVERY


def test_the_list_s_results_are_learned() -> None:
    searcher = search(LIST)
    for i in range(len(LIST)):
        suggested(searcher, f"{i}")
        searcher.on_trial_complete(f"{i}", GOOD)
    assert [t.params["rank"] for t in searcher._ot_study.trials] == [2, 3]


@pytest.mark.parametrize(
    ("result", "error"),
    [
        ({"leakage": math.nan, "accuracy": 0.9}, False),
        ({"leakage": 0.1, "accuracy": math.inf}, False),
        ({"leakage": 0.1}, False),
        (None, True),
        (None, False),
    ],
)
@pytest.mark.parametrize("given", [False, True])
def test_a_trial_without_finite_objectives_has_failed(result: Any, error: bool, given: bool) -> None:
    searcher = search(LIST[1:2] if given else [])
    suggested(searcher, "a")
    searcher.on_trial_complete("a", result, error=error)
    assert states(searcher._ot_study) == ([] if given else [TrialState.FAIL])
    assert suggested(searcher, "b") is not None


def test_bytes_can_be_a_third_objective() -> None:
    searcher = search(known=[(LIST[1], GOOD | {"bytes_per_step": 100.0})], bytes_per_step="min")
    suggested(searcher, "a")
    searcher.on_trial_complete("a", GOOD | {"bytes_per_step": 5.0, "wall_seconds": 3})
    assert [t.values for t in searcher._ot_study.trials] == [[0.3, 0.9, 100.0], [0.3, 0.9, 5.0]]


def test_a_seed_decides_what_is_suggested() -> None:
    def names(seed: int) -> list[str]:
        searcher = search(seed=seed)
        return [defence.name for i in range(6) if (defence := suggested(searcher, f"{i}")) is not None]

    assert names(3) == names(3)
    assert names(3) != names(4)


def test_a_sampled_topk_is_equal_in_bytes_to_the_rank() -> None:
    point = {"compressor": "topk", "rank": 5, "error_feedback": True}
    assert sampled_defence(point) == Defence(TopKConfig(equal_to_rank=5, equal_by="bytes"), True)
    assert sampled_defence(point | {"compressor": "powersgd"}) == Defence(PowerSGDConfig(5), True)


def test_a_space_with_transforms_learns_from_the_list() -> None:
    """What a defence of the list has no option for, the study is told any value of."""
    space = SPACE | {
        "compressor": tune.choice(["none", "powersgd"]),
        "transform": tune.choice(["none", "noise", "dp-sgd"]),
        "deviation": tune.loguniform(0.01, 0.1),
        "noise": tune.loguniform(0.1, 1.0),
    }
    listed = [
        "none",
        "powersgd:2:ef",
        "noise:0.02+powersgd:2",
        "dp-sgd:0.5",
        "dp-sgd:0.5:clip=2",
        "noise:0.2",
        "qsgd:4",
    ]
    searcher = search(known=[(parse_defence(name), GOOD) for name in listed], space=space)
    taught = [sampled_defence(trial.params) for trial in searcher._ot_study.trials]
    assert taught == [parse_defence(name) for name in listed[:4]]
    found = {suggested(searcher, f"{i}") for i in range(30)} - {None}
    assert {type(t) for defence in found for t in defence.transforms} == {NoiseConfig, DPSGDConfig}
    assert not found & {parse_defence(name) for name in listed}


def test_a_space_of_any_methods() -> None:
    """Each takes the options that it has, and error feedback if it may have it; those of the list teach the study."""
    space = {
        "compressor": tune.choice(["randk", "dgc", "qsgd"]),
        "level": tune.loguniform(0.01, 0.5),
        "bits": tune.choice([2, 4, 8]),
        "error_feedback": tune.choice([True]),
    }
    listed = Defence(DGCConfig(level=0.25))
    searcher = search(known=[(listed, GOOD)], space=space)
    found = [suggested(searcher, f"{i}") for i in range(30)]
    by_method = {d.compressor.method: d for d in found if d is not None}
    assert set(by_method) == {"randk", "dgc", "qsgd"}
    for method, defence in by_method.items():
        assert defence.error_feedback == (method != "dgc")
        assert 0.01 <= getattr(defence.compressor, "level", 0.1) <= 0.5
    no_bits = {name: domain for name, domain in space.items() if name != "bits"} | {
        "error_feedback": tune.choice([False])
    }
    assert states(search(known=[(listed, GOOD)], space=no_bits)._ot_study) == [TrialState.COMPLETE]
    assert states(searcher._ot_study)[:1] != [TrialState.COMPLETE]  # it has no bits


# The search over attacks


def attack_search(
    budget: dict[str, int], known: Any = None, space: Any = ATTACKS, seed: int = 0, together: int = 1
) -> AttackSearch:
    return AttackSearch(space, budget, known or {}, seed, together)


def reached(*values: float | None) -> dict[str, Any]:
    """The result of a trial whose attacks reached this."""
    return {"ssim": max((v for v in values if v is not None), default=math.nan), "values": json.dumps(values)}


def test_runs_take_turns_within_their_budgets() -> None:
    searcher = attack_search({"a": 3, "b": 1, "none": 0, "over": -1, "c": 2})
    found = [searcher.suggest(f"{i}") for i in range(6)]
    assert [f["run"] for f in found if isinstance(f, dict)] == ["a", "b", "c", "a", "c", "a"]
    assert searcher.suggest("6") == searcher.suggest("7") == Searcher.FINISHED
    for attack in found:
        assert isinstance(attack, dict)
        (settings,) = attack["settings"]
        assert settings["objective"] in ("naive", "aware")
        assert 1e-3 <= settings["tv"] <= 1
        assert settings["restarts"] in (1, 2)
        assert set(settings) == set(ATTACKS)


def test_a_trial_tries_several_attacks_of_one_run_and_its_study_learns_each() -> None:
    searcher = attack_search({"a": 5, "b": 1}, together=4)
    assert searcher.trials == 3
    first, of_b, last = (searcher.suggest(f"{i}") for i in range(3))
    assert isinstance(first, dict)
    assert isinstance(of_b, dict)
    assert isinstance(last, dict)
    assert [(t["run"], len(t["settings"])) for t in (first, of_b, last)] == [("a", 4), ("b", 1), ("a", 1)]
    assert len({s["tv"] for s in first["settings"]}) == 4
    searcher.on_trial_complete("0", reached(0.1, None, 0.3, 0.2))
    study = searcher._studies["a"]._ot_study
    assert [t.value for t in study.trials] == [0.1, None, 0.3, 0.2, None]
    assert states(study) == [TrialState.COMPLETE, TrialState.FAIL, *[TrialState.COMPLETE] * 2, TrialState.RUNNING]
    searcher.on_trial_complete("1", None, error=True)
    searcher.on_trial_complete("2", reached(0.5))
    assert searcher._studies == searcher._owner == {}
    assert searcher.suggest("3") == Searcher.FINISHED


def test_a_search_that_goes_on_tries_other_attacks() -> None:
    def first_two(known: Any) -> list[float]:
        trial = attack_search({"a": 2}, known, together=2).suggest("0")
        assert isinstance(trial, dict)
        return [settings["tv"] for settings in trial["settings"]]

    before = first_two(None)
    known = {"a": [({"objective": "aware", "tv": tv, "restarts": 1}, 0.5) for tv in before]}
    assert not set(before) & set(first_two(known))


def test_no_budget_ends_at_once() -> None:
    assert attack_search({"a": 0}).suggest("0") == Searcher.FINISHED
    assert attack_search({}).suggest("0") == Searcher.FINISHED


def test_runs_start_from_different_attacks_and_a_seed_repeats_them() -> None:
    def first(seed: int) -> list[float]:
        searcher = attack_search({"a": 1, "b": 1, "c": 1}, seed=seed)
        return [found["settings"][0]["tv"] for i in range(3) if isinstance(found := searcher.suggest(f"{i}"), dict)]

    assert len(set(first(0))) == 3
    assert first(0) == first(0)
    assert first(0) != first(10)


def test_every_run_has_a_study_of_its_own() -> None:
    searcher = attack_search({"a": 3, "b": 3})
    for i, value in enumerate((0.1, 0.2, math.nan, 0.4)):
        searcher.suggest(f"{i}")
        searcher.on_trial_result(f"{i}", {"ssim": value, "training_iteration": 1})
        searcher.on_trial_complete(f"{i}", reached(value))
    a, b = (searcher._studies[run]._ot_study for run in "ab")
    assert [(t.state, t.value) for t in a.trials] == [(TrialState.COMPLETE, 0.1), (TrialState.FAIL, None)]
    assert [(t.state, t.value) for t in b.trials] == [(TrialState.COMPLETE, 0.2), (TrialState.COMPLETE, 0.4)]


@pytest.mark.parametrize("result", [reached(math.nan), reached(None), {}, None])
def test_an_attack_without_a_finite_ssim_has_failed(result: Any) -> None:
    searcher = attack_search({"a": 2})
    searcher.suggest("0")
    searcher.on_trial_complete("0", result, error=result is None)
    assert states(searcher._studies["a"]._ot_study) == [TrialState.FAIL]


def test_known_attacks_are_learned_where_the_space_holds_them() -> None:
    space = ATTACKS | {"objective": tune.choice(["aware"])}
    inside = {"objective": "aware", "tv": 0.5, "restarts": 2, "iterations": 60, "seed": 0}
    known = [(inside, 0.4), (inside | {"objective": "naive"}, 0.9), (inside | {"tv": 0.0}, 0.8)]
    searcher = attack_search({"a": 1, "b": 1}, {"a": known}, space)
    for name in "ab":
        searcher.suggest(name)
    trial, _ = searcher._studies["a"]._ot_study.trials
    assert (trial.value, trial.params) == (0.4, {"objective": "aware", "tv": 0.5, "restarts": 2})
    assert states(searcher._studies["b"]._ot_study) == [TrialState.RUNNING]


def test_the_driver_holds_the_studies_of_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of runs. A study stays as long as one of its trials is on its way."""
    monkeypatch.setattr(searchers, "WINDOW", 3)
    searcher = attack_search({f"{i}": 4 for i in range(20)})
    running: list[str] = []
    suggested, most = [], 0
    for trial in range(81):
        if trial % 3 == 2 or trial == 80:
            while len(running) > 1:
                searcher.on_trial_complete(running.pop(), reached(0.5))
        found = searcher.suggest(f"{trial}")
        if isinstance(found, dict):
            running.append(f"{trial}")
            suggested.append(found["run"])
        most = max(most, len(searcher._studies))
    assert found == Searcher.FINISHED
    assert sorted(suggested) == sorted(4 * [f"{i}" for i in range(20)])
    assert suggested[:6] == ["0", "1", "2"] * 2
    assert 3 <= most <= 3 + 3  # those that take turns, and those of the trials on their way
    searcher.on_trial_complete(running.pop(), reached(0.5))
    assert searcher._studies == searcher._owner == {}


def test_the_search_moves_towards_what_worked() -> None:
    """Known: the closer tv is to 0.1, the higher SSIM. The prior's mean distance is more than a factor of 5."""

    def distance(tv: float) -> float:
        return abs(math.log(tv / 0.1))

    grid = [1e-3 * 1000 ** (i / 39) for i in range(40)]
    known = [({"objective": "aware", "tv": tv, "restarts": 1}, 1 - 0.1 * distance(tv)) for tv in grid]
    searcher = attack_search({"a": 10}, {"a": known})
    found = [searcher.suggest(f"{i}") for i in range(10)]
    assert sum(distance(f["settings"][0]["tv"]) for f in found if isinstance(f, dict)) / 10 < math.log(3)


def test_a_study_learns_from_attacks_that_are_points_of_its_space_alone() -> None:
    base = InversionConfig("naive", iterations=50)
    space = {"objective": None, "tv": None, "start": None, "through": None}
    aware, other = replace(base, objective="aware", tv=0.1, start="regression"), replace(base, iterations=60)
    solved = replace(base, method="regression")
    lossy = Defence(TopKConfig(level=0.1), error_feedback=True)
    told = lessons(base, space, lossy, [base, aware, other, solved], [0.1, 0.2, 0.3, 0.4])
    # Settings with their default are not stored, and must be known all the same.
    assert told == [
        ({"objective": "naive", "tv": 0.01, "start": "noise", "through": "steps"}, 0.1),
        ({"objective": "aware", "tv": 0.1, "start": "regression", "through": "steps"}, 0.2),
    ]
    # What has no effect on a defence is set to its default there, and what was tried is a point all the same.
    weighing = replace(base, residual="weigh")
    assert lessons(weighing, space, lossy, [replace(aware, residual="weigh"), base], [0.2, 0.1]) == [told[1], told[0]]
    assert [value for _, value in lessons(weighing, space, Defence(), [base], [0.1])] == [0.1]
