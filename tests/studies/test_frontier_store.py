from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import synthetic

from raytrust.config import (
    CaptureConfig,
    Defence,
    InversionConfig,
    ModelConfig,
    PowerSGDConfig,
    SweepConfig,
    Threat,
    TopKConfig,
    TrainConfig,
    to_dict,
)
from raytrust.jobs.captures import save_capture
from raytrust.jobs.files import read_json, write_json
from raytrust.jobs.job import Place
from raytrust.jobs.runner import work
from raytrust.jobs.store import FORMAT
from raytrust.leak.observation import Capture
from raytrust.studies.evaluate import InversionFailure, InversionResult, Request, evaluate_inversion, evaluate_together
from raytrust.studies.frontier import jobs as module
from raytrust.studies.frontier.jobs import AttackRun, references
from raytrust.studies.frontier.store import Store, open_store
from raytrust.train.loop import train
from raytrust.wire.channel import LocalChannel

TRAIN = TrainConfig(
    model=ModelConfig("convnet", width=4),
    capture=CaptureConfig((0, 1), tuning=1, evaluation=2),
    workers=1,
    batch_size=8,
    steps=2,
)
ATTACK = InversionConfig("naive", iterations=2)
DEFENCES = [Defence(), Defence(TopKConfig(level=0.1)), Defence(PowerSGDConfig(1)), Defence(PowerSGDConfig(2), True)]


def with_defence(defence: Defence) -> TrainConfig:
    return replace(TRAIN, defence=defence)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, "fingerprint")


def trained(store: Store, config: TrainConfig = TRAIN) -> list[Capture]:
    directory = store.begin(config)
    found = [r for r in train(config, synthetic(vivid=True), LocalChannel()) if isinstance(r, Capture)]
    for capture in found:
        save_capture(directory, capture)
    store.finish_training(config, {"correct": 3})
    return found


def figures(store: Store) -> dict[str, Any]:
    return {k: v for k, v in (store.training(TRAIN) or {}).items() if k != "job"}


def test_a_run_s_id_is_of_the_config_and_the_data(store: Store) -> None:
    changes = [
        with_defence(Defence(error_feedback=True)),
        with_defence(DEFENCES[1]),
        replace(TRAIN, seed=1),
        replace(TRAIN, threat=Threat(batch_size=2)),
        replace(TRAIN, capture=CaptureConfig((0, 1), tuning=1, evaluation=3)),
        replace(TRAIN, model=ModelConfig("convnet", width=5)),
        replace(TRAIN, learning_rate=0.2),
    ]
    ids = {store.run_id(config) for config in [TRAIN, *changes]}
    assert len(ids) == len(changes) + 1
    assert Store(store.root, "other").run_id(TRAIN) not in ids
    assert Store(store.root / "elsewhere", store.fingerprint).run_id(TRAIN) == store.run_id(TRAIN)


def test_a_run_from_beginning_to_end(store: Store) -> None:
    assert store.training(TRAIN) is None
    directory = store.begin(TRAIN)
    assert directory == store.root / "captures" / store.run_id(TRAIN)
    assert store.training(TRAIN) is None  # begun, and not finished
    found = trained(store)
    assert figures(store) == {"correct": 3}
    assert store.training(replace(TRAIN, seed=1)) is None
    for step in (0, 1):
        of_step = [c for c in found if c.seen.step == step]
        tuning, evaluation = (store.captures(TRAIN, step, split) for split in ("tuning", "evaluation"))
        assert [c.index for c in tuning] == [0]
        assert [c.index for c in evaluation] == [1, 2]
        for saved, capture in zip([*tuning, *evaluation], of_step, strict=True):
            assert saved.seen.step == step
            assert torch.equal(saved.truth.images, capture.truth.images)


def test_what_an_interrupted_run_captured_is_not_mixed_with_the_next(store: Store) -> None:
    """The model's file is written once a step, and another run of it may end in other weights."""
    first = [r for r in train(TRAIN, synthetic(vivid=True), LocalChannel()) if isinstance(r, Capture)]
    stale = replace(first[0], seen=replace(first[0].seen, weights={n: w + 1 for n, w in first[0].seen.weights.items()}))
    save_capture(store.begin(TRAIN), stale)
    trained(store)
    (capture,) = store.captures(TRAIN, 0, "tuning")
    assert all(torch.equal(capture.seen.weights[name], first[0].seen.weights[name]) for name in capture.seen.weights)


def test_missing_captures_are_an_error(store: Store) -> None:
    store.begin(TRAIN)
    with pytest.raises(ValueError, match="but there is no such file"):
        store.captures(TRAIN, 0, "tuning")


Calls = list[tuple[list[int], list[InversionConfig]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What is run: on which captures, and which attacks as one batch."""
    found: Calls = []

    def counted(
        requests: Sequence[Request], device: str, references: Tensor | None
    ) -> list[list[InversionResult | InversionFailure]]:
        found.extend(([c.index for c in captures], list(attacks)) for captures, attacks in requests)
        return evaluate_together(requests, device, references)

    monkeypatch.setattr(module, "evaluate_together", counted)
    return found


def test_a_finished_attack_is_not_run_again(store: Store, calls: Calls) -> None:
    private = trained(store)
    assert store.attack(TRAIN, ATTACK, "tuning") is None
    (first,) = store.run_attacks(TRAIN, [ATTACK], "tuning", "cpu")
    (again,) = Store(store.root, store.fingerprint).run_attacks(TRAIN, [ATTACK], "tuning", "cpu")
    assert first == again == store.attack(TRAIN, ATTACK, "tuning")
    assert calls == [([0], [ATTACK])]
    store.run_attacks(TRAIN, [ATTACK], "evaluation", "cpu")  # another split is another matter
    assert calls[1:] == [([1, 2], [ATTACK])]
    expected = evaluate_inversion(private[:1], ATTACK)
    assert first["ssim"] == pytest.approx(expected.ssim)
    assert first["oracle_ssim"] == pytest.approx(expected.oracle_ssim)
    assert first["objective"] == pytest.approx(expected.objective)
    assert first["psnr"] == pytest.approx(expected.psnr)
    assert (first["attack"], first["split"], first["diverged"]) == (to_dict(ATTACK), "tuning", 0)
    reconstructions, originals = store.reconstructions(TRAIN, ATTACK, "tuning")
    assert torch.equal(reconstructions, expected.reconstructions)
    assert torch.equal(originals, expected.originals)


def test_only_what_is_missing_is_run_and_like_with_like(store: Store, calls: Calls) -> None:
    trained(store)
    rough, longer, later = replace(ATTACK, tv=0.5), replace(ATTACK, iterations=3), replace(ATTACK, capture_step=1)
    store.run_attacks(TRAIN, [ATTACK], "tuning", "cpu")
    other = replace(ATTACK, seed=9)
    asked = [longer, rough, ATTACK, later, other]
    found = store.run_attacks(TRAIN, asked, "tuning", "cpu")
    assert [f["attack"] for f in found] == [to_dict(attack) for attack in asked]
    assert calls[1:] == [([0], [longer]), ([0], [rough, other]), ([0], [later])]
    assert store.run_attacks(TRAIN, [], "tuning", "cpu") == []


def test_runs_of_equal_models_are_one_batch(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """At step 0 all are the same untrained model; later each is its own. What they find does not depend on it."""
    sparse = replace(TRAIN, defence=Defence(TopKConfig(level=0.1)))
    later = replace(ATTACK, capture_step=1)
    aware = replace(ATTACK, objective="aware")
    for config in (TRAIN, sparse):
        trained(store, config)
    batches: list[int] = []

    def counted(requests: Sequence[Request], *rest: Any) -> list[list[InversionResult | InversionFailure]]:
        batches.append(len(requests))
        return evaluate_together(requests, *rest)

    monkeypatch.setattr(module, "evaluate_together", counted)
    requests = [(TRAIN, [ATTACK, later]), (sparse, [ATTACK, aware, later, IMPOSSIBLE])]
    jobs = [AttackRun(config, attack, "tuning") for config, attacks in requests for attack in attacks]
    outcomes = work(store, jobs, Place())
    assert batches == [2, 1, 1]
    assert [o.job for o in outcomes if o.reason is None] == jobs[:-1]
    assert store.attack_failure(sparse, IMPOSSIBLE, "tuning") is not None
    alone = evaluate_inversion(store.captures(sparse, 0, "tuning"), aware)
    assert store.attack(sparse, aware, "tuning")["ssim"] == pytest.approx(alone.ssim, abs=1e-3)  # type: ignore[index]
    assert work(store, jobs, Place()) == []
    assert batches == [2, 1, 1]  # from the store


def test_attacks_on_a_run(store: Store) -> None:
    trained(store)
    assert store.attacks(TRAIN, "tuning") == []
    store.run_attacks(TRAIN, [replace(ATTACK, seed=seed) for seed in range(3)], "tuning", "cpu")
    store.run_attacks(TRAIN, [ATTACK], "evaluation", "cpu")
    found = store.attacks(TRAIN, "tuning")
    assert sorted(f["attack"]["seed"] for f in found) == [0, 1, 2]
    assert found == store.attacks(TRAIN, "tuning")
    assert [f["attack"]["seed"] for f in store.attacks(TRAIN, "evaluation")] == [0]
    assert store.attacks(replace(TRAIN, seed=1), "tuning") == []


def test_an_attack_that_was_cut_off_is_run_again(store: Store, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(store)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("raytrust.jobs.store.write_json", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.run_attacks(TRAIN, [ATTACK], "tuning", "cpu")
    assert store.attack(TRAIN, ATTACK, "tuning") is None
    assert store.attacks(TRAIN, "tuning") == []
    store.run_attacks(TRAIN, [ATTACK], "tuning", "cpu")
    assert len(calls) == 2


def test_a_perfect_copy_can_be_stored(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its PSNR is infinite, which JSON has no word for."""
    trained(store)

    def perfect(requests: Sequence[Request], *_: Any) -> list[list[InversionResult | InversionFailure]]:
        ((captures, attacks),) = requests
        return [[replace(evaluate_inversion(captures, a), psnr=[float("inf")]) for a in attacks]]

    monkeypatch.setattr(module, "evaluate_together", perfect)
    (figures,) = store.run_attacks(TRAIN, [ATTACK], "tuning", "cpu")
    assert figures["psnr"] == [100.0]
    assert max(figures["registered_psnr"]) <= 100.0
    assert store.attack(TRAIN, ATTACK, "tuning") is not None


IMPOSSIBLE = replace(ATTACK, method="analytic")  # a ConvNet has no linear first layer


def test_an_attack_that_fails_is_stored_as_failed_and_never_as_a_number(store: Store, calls: Calls) -> None:
    trained(store)
    found = store.run_attacks(TRAIN, [IMPOSSIBLE, ATTACK], "tuning", "cpu")
    assert [f["attack"] for f in found] == [to_dict(ATTACK)]
    assert store.attacks(TRAIN, "tuning") == found
    reason = (
        "Expected a model whose first layer is linear, with bias, on the flat image, or a patch embedding with a "
        "learned position embedding, for method='analytic'."
    )
    assert store.attack_failure(TRAIN, IMPOSSIBLE, "tuning") == reason
    assert store.attack_failures(TRAIN, "tuning") == [reason]
    assert store.attack_failure(TRAIN, ATTACK, "tuning") is None
    assert store.attack(TRAIN, IMPOSSIBLE, "tuning") is None
    assert store.attack_failures(TRAIN, "evaluation") == []
    assert store.run_attacks(TRAIN, [IMPOSSIBLE], "tuning", "cpu") == []  # not tried again
    assert len(calls) == 1
    store.clear_failures()
    assert store.attack_failures(TRAIN, "tuning") == []
    store.run_attacks(TRAIN, [IMPOSSIBLE, ATTACK], "tuning", "cpu")
    assert calls[1:] == [([0], [IMPOSSIBLE])]


def test_an_attack_that_is_listed_twice_runs_once(store: Store, calls: Calls) -> None:
    trained(store)
    other = replace(ATTACK, seed=2)
    found = store.run_attacks(TRAIN, [ATTACK, other, ATTACK], "tuning", "cpu")
    assert calls == [([0], [ATTACK, other])]
    assert [f["attack"]["seed"] for f in found] == [0, 2]


def test_references_reach_the_evaluation(store: Store) -> None:
    trained(store)
    (without,) = store.run_attacks(TRAIN, [ATTACK], "tuning", "cpu")
    assert references(store) is None
    assert without["mean_image_ssim"] is without["identified_ssim"] is without["identified_features"] is None
    images = synthetic(vivid=True).test_images
    store.keep_references(images)
    store.keep_references(images[:3])  # those already kept stay
    kept = references(store)
    assert kept is not None
    assert torch.equal(kept, images.float() / 255)
    (figures,) = store.run_attacks(TRAIN, [replace(ATTACK, seed=1)], "tuning", "cpu")
    assert figures["candidates"] == len(images) + 1
    assert set(figures["identified_mse"] + figures["identified_ssim"] + figures["identified_features"]) <= {True, False}
    assert -1 <= figures["mean_image_ssim"][0] <= 1
    assert figures["label_accuracy"] is figures["lpips"] is None


def test_defences_come_in_the_order_in_which_they_were_begun(store: Store) -> None:
    assert store.defences(TRAIN) == []
    for defence in DEFENCES:
        store.begin(with_defence(defence))
    assert store.defences(TRAIN) == DEFENCES
    assert store.defences(with_defence(DEFENCES[2])) == DEFENCES  # the base's own defence does not matter
    store.begin(with_defence(DEFENCES[0]))  # goes on, and keeps its place
    assert store.defences(TRAIN) == DEFENCES
    for i, path in enumerate(sorted((store.root / "captures").glob("*/config.json"))):
        os.utime(path, (time.time() + i, time.time() + i))  # as a copy of the directory has them
    assert store.defences(TRAIN) == DEFENCES


def test_defences_are_those_of_this_sweep(store: Store) -> None:
    store.begin(with_defence(DEFENCES[1]))
    store.begin(replace(with_defence(DEFENCES[2]), seed=1))
    Store(store.root, "other data").begin(with_defence(DEFENCES[3]))
    (store.root / "captures" / "stray").mkdir()
    (store.root / "captures" / "file").touch()
    assert store.defences(TRAIN) == [DEFENCES[1]]


def test_failures(store: Store) -> None:
    assert store.failure_of_run(TRAIN) is None
    store.fail_run(TRAIN, "The training loss became nan at step 3.")
    store.fail_run(with_defence(DEFENCES[1]), "out of memory")
    assert store.failure_of_run(TRAIN) == "The training loss became nan at step 3."
    store.finish_training(TRAIN, {"correct": 1})  # tried again, with success
    assert store.failure_of_run(TRAIN) is None
    assert store.failure_of_run(with_defence(DEFENCES[1])) == "out of memory"
    store.clear_failures()
    assert store.failure_of_run(with_defence(DEFENCES[1])) is None
    assert figures(store) == {"correct": 1}  # what is finished stays
    store.clear_failures()


def test_a_run_s_id_leads_to_its_defence(store: Store) -> None:
    """As soon as it is begun, or has failed before that."""
    begun, failed = with_defence(DEFENCES[1]), with_defence(DEFENCES[2])
    store.begin(begun)
    store.fail_run(failed, "its machine was lost")
    assert [store.defence(store.run_id(train)) for train in (begun, failed)] == [DEFENCES[1], DEFENCES[2]]
    with pytest.raises(ValueError, match="there is no trace of it"):
        store.defence(store.run_id(with_defence(DEFENCES[3])))


def test_a_directory_holds_one_sweep(tmp_path: Path) -> None:
    sweep = SweepConfig(train=TRAIN)
    root = tmp_path / "output"
    store = open_store(root, sweep, "data")
    assert store == Store(root, "data")
    assert open_store(root, sweep, "data") == store
    for other, fingerprint in [
        (replace(sweep, train=replace(TRAIN, seed=1)), "data"),
        (replace(sweep, train=replace(TRAIN, capture=CaptureConfig((0,), tuning=1, evaluation=2))), "data"),
        (replace(sweep, defences=(DEFENCES[1],)), "data"),
        (replace(sweep, name="other"), "data"),
        (replace(sweep, bytes_objective=True), "data"),
        (sweep, "other data"),
    ]:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            open_store(root, other, fingerprint)
        assert str(error.value) == (
            f"Expected output={str(root)!r} to be empty or to hold this sweep, but it holds another one."
        )
        assert read_json(root / "sweep.json") == {
            "format": FORMAT,
            "sweep": to_dict(sweep),
            "data": "data",
            "options": {},
        }
    assert open_store(root, sweep, "data") == store


@pytest.mark.parametrize(
    "change",
    [{"trials": 9}, {"trials": 1}, {"portfolio": (ATTACK,)}, {"attack_trials": 1}],
    ids=["more trials", "fewer trials", "portfolio", "attack trials"],
)
def test_a_sweep_may_go_on_with_other_trials_and_attacks(tmp_path: Path, change: dict[str, Any]) -> None:
    """Its captures are attacked again. What is kept is the latest sweep, with its options."""
    sweep = SweepConfig(train=TRAIN, trials=2)
    other = replace(sweep, **change)
    store = open_store(tmp_path, sweep, "data", {"iterations": 100})
    assert open_store(tmp_path, other, "data", {"iterations": 400}) == store
    expected = {"format": FORMAT, "sweep": to_dict(other), "data": "data", "options": {"iterations": 400}}
    assert read_json(tmp_path / "sweep.json") == expected
    with pytest.raises(ValueError, match="it holds another one"):  # still the sweep of this training
        open_store(tmp_path, replace(other, train=replace(TRAIN, seed=1)), "data")
    assert read_json(tmp_path / "sweep.json") == expected


def test_another_layout_is_refused(tmp_path: Path) -> None:
    sweep = SweepConfig(train=TRAIN)
    write_json(tmp_path / "sweep.json", {"sweep": to_dict(sweep), "data": "data", "options": {}})
    with pytest.raises(ValueError, match=r"to be empty, but another version of raytrust made it\.$"):
        open_store(tmp_path, sweep, "data")
