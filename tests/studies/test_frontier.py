"""The rows of the frontier, from a store and without a cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_victim import DATA, NETWORK

from raytrust.config import (
    CaptureConfig,
    Defence,
    InversionConfig,
    SweepConfig,
    Threat,
    TopKConfig,
    TrainConfig,
)
from raytrust.jobs.captures import save_capture
from raytrust.leak.observation import Capture
from raytrust.metrics.statistics import bootstrap_interval, paired_difference
from raytrust.metrics.verdict import image_evidence
from raytrust.reports.reconstructions import drawn_attacks
from raytrust.studies.frontier.rows import Row, finalists, row
from raytrust.studies.frontier.store import Store
from raytrust.train.loop import train
from raytrust.wire.channel import LocalChannel

NAIVE = InversionConfig("naive", iterations=6)
AWARE = replace(NAIVE, objective="aware")
IMPOSSIBLE = replace(NAIVE, method="analytic")
DEFENCE = Defence(TopKConfig(level=0.1))
SWEEP = SweepConfig(
    train=TrainConfig(
        model=NETWORK,
        threat=Threat(labels="unknown"),
        capture=CaptureConfig(tuning=1, evaluation=3),
        workers=1,
        batch_size=8,
        steps=1,
    ),
    portfolio=(NAIVE, AWARE),
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """With one defence trained."""
    store, config = Store(tmp_path, "data"), replace(SWEEP.train, defence=DEFENCE)
    directory = store.begin(config)
    for record in train(config, DATA, LocalChannel()):
        if isinstance(record, Capture):
            save_capture(directory, record)
    store.finish_training(config, {"correct": 3, "n_test": 24, "bytes_per_step": 800, "dense_bytes": 4000})
    store.keep_references(DATA.test_images)
    return store


def attacked(store: Store, *attacks: InversionConfig) -> Row:
    config = replace(SWEEP.train, defence=DEFENCE)
    for split in ("tuning", "evaluation"):
        store.run_attacks(config, attacks, split, "cpu")  # type: ignore[arg-type]
    return row(store, SWEEP, DEFENCE)


def test_a_row_has_the_strongest_attack_s_figures(store: Store) -> None:
    found = attacked(store, NAIVE, AWARE)
    figures = store.attacks(replace(SWEEP.train, defence=DEFENCE), "evaluation")
    best = max(figures, key=lambda f: np.mean(f["ssim"]))
    assert found["leakage_ssim"] == np.mean(best["ssim"])
    assert tuple(found["leakage_interval"]) == bootstrap_interval(best["ssim"])
    names = ("registered_psnr", "mse", "identified_mse", "identified_ssim", "identified_features", "mean_image_ssim")
    for name in (*names, "other_image_ssim", "label_accuracy"):
        assert found[name] == pytest.approx(np.mean(best[name]))
    assert found["lpips"] is None
    by_objective = {f["attack"]["objective"]: f["ssim"] for f in figures}
    paired = paired_difference(by_objective["aware"], by_objective["naive"])
    assert found["aware_gain"] == paired.difference
    assert found["aware_gain_p"] == paired.p_value
    assert tuple(found["aware_gain_interval"]) == paired.interval


def test_a_row_has_the_evidence_of_the_strongest_attack_and_of_the_naive_one(store: Store) -> None:
    found = attacked(store, NAIVE, AWARE)
    figures = store.attacks(replace(SWEEP.train, defence=DEFENCE), "evaluation")
    best = max(figures, key=lambda f: np.mean(f["ssim"]))
    (naive,) = [f for f in figures if f["attack"]["objective"] == "naive"]
    names = ("ssim", "mean_image_ssim", "other_image_ssim", "identified_ssim", "candidates")
    strongest, ignorant = (image_evidence(*(f[name] for name in names)) for f in (best, naive))
    assert strongest.interval is not None
    assert ignorant.interval is not None
    assert found["floor_ssim"] == strongest.floor
    assert found["excess"] == pytest.approx(found["leakage_ssim"] - found["floor_ssim"])
    assert found["excess_interval"] == list(strongest.interval)
    assert (found["identified"], found["candidates"]) == (sum(best["identified_ssim"]), best["candidates"])
    assert found["naive_excess_interval"] == list(ignorant.interval)
    assert found["naive_identified"] == sum(naive["identified_ssim"])


def test_the_naive_attack_is_drawn_beside_the_strongest(store: Store) -> None:
    found = attacked(store, NAIVE, AWARE)
    drawn, originals = drawn_attacks(store, SWEEP, found)
    kinds = [d.attack for d in drawn]
    assert kinds == (["naive", "aware"] if found["aware_ssim"] > found["naive_ssim"] else ["naive"])
    assert np.mean(drawn[0].ssim) == found["naive_ssim"]
    assert np.mean(drawn[-1].ssim) == found["leakage_ssim"]
    assert drawn[-1].identified is not None
    assert sum(drawn[-1].identified) == found["identified"]
    assert originals.shape == np.asarray(drawn[-1].images).shape == (3, 3, 8, 8)


def test_one_objective_is_compared_with_none(store: Store) -> None:
    found = attacked(store, NAIVE)
    assert found["status"] == "finished"
    assert found["aware_gain"] is found["aware_gain_interval"] is found["aware_gain_p"] is None


def test_an_attack_that_failed_takes_no_part(store: Store) -> None:
    with_it, without = attacked(store, NAIVE, IMPOSSIBLE), attacked(store, NAIVE)
    assert with_it == without
    assert with_it["attacks_tried"] == 1


def test_a_defence_on_which_every_attack_failed_is_no_zero(store: Store) -> None:
    found = attacked(store, IMPOSSIBLE)
    assert found["status"] == "failed"
    assert found["reason"] == (
        "no attack has a result: Expected a model whose first layer is linear, with bias, on the flat image, or a "
        "patch embedding with a learned position embedding, for method='analytic'."
    )
    assert found["leakage_ssim"] is found["aware_gain"] is found["mean_image_ssim"] is None
    assert found["floor_ssim"] is found["excess_interval"] is found["identified"] is None
    assert finalists(store, SWEEP, DEFENCE)[1] == []
