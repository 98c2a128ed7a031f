"""How the evaluation is dealt out: few large tasks first, small ones last, and whom GPUs have room for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from raytrust.attacks.inversion.stacks import LARGEST
from raytrust.cluster import searches
from raytrust.cluster.placement import Placement
from raytrust.config import CaptureConfig, Defence, InversionConfig, PowerSGDConfig, TrainConfig
from raytrust.studies.frontier.plan import TOGETHER, evaluation_bundles
from raytrust.studies.frontier.store import Store

STEPS = TrainConfig(capture=CaptureConfig((0, 5), 1, 1), steps=6)


def jobs(store: Store, count: int, entries: int) -> list[tuple[TrainConfig, list[InversionConfig]]]:
    """Runs that are trained; every third is attacked after step 0."""
    result = []
    for i in range(count):
        train = replace(STEPS, defence=Defence(PowerSGDConfig(i + 1)))
        store.begin(train)
        store.finish_training(train, {"dense_bytes": 4 * entries})
        result.append((train, [InversionConfig(capture_step=5 if i % 3 == 0 else 0)]))
    return result


@pytest.mark.parametrize("places", [1, 2, 8])
@pytest.mark.parametrize("count", [0, 1, 3, 10, 50])
def test_every_run_is_in_one_task_and_the_last_are_small(count: int, places: int, tmp_path: Path) -> None:
    store = Store(tmp_path, "data")
    tasks = evaluation_bundles(jobs(store, count, 1000), places, store)
    ranks = [job.train.defence.compressor.rank for _, task in tasks for job in task]  # type: ignore[attr-defined]
    assert sorted(ranks) == list(range(1, count + 1))
    sizes = [len(task) for _, task in tasks]
    assert sizes == sorted(sizes, reverse=True)
    assert all(1 <= size <= TOGETHER for size in sizes)
    assert sizes[-2 * places + 1 :].count(1) == len(sizes[-2 * places + 1 :])
    steps = [job.attack.capture_step for _, task in tasks for job in task]  # type: ignore[attr-defined]
    assert steps == sorted(steps)


def test_large_models_gain_nothing_from_each_other(tmp_path: Path) -> None:
    store = Store(tmp_path, "data")
    tasks = evaluation_bundles(jobs(store, 20, LARGEST + 1), 1, store)
    assert [len(task) for _, task in tasks] == [1] * 20


def test_a_gpu_has_room_for_as_many_attacks_as_have_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searches, "capacity", {"GPU": 2, "CPU": 16}.__getitem__)
    assert searches.places(Placement("cuda", 1, worker_gpu=0.3, attack_gpu=0.25)) == 8
    assert searches.places(Placement("cpu", 1)) == 16
