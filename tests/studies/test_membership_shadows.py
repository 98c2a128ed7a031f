"""The models of an audit: who is trained on what, what is kept, resuming; DP-SGD; property inference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toys import synthetic

from raytrust.attacks.membership.properties import auxiliary_batches, property_scores
from raytrust.config import (
    CaptureConfig,
    Defence,
    DPSGDConfig,
    MembershipConfig,
    ModelConfig,
    PowerSGDConfig,
    Threat,
    TopKConfig,
    TrainConfig,
    from_dict,
    parse_defence,
    to_dict,
)
from raytrust.data import Dataset
from raytrust.jobs.job import Place
from raytrust.jobs.runner import each, work
from raytrust.jobs.store import JobStore
from raytrust.leak.observation import Capture
from raytrust.metrics import accountant
from raytrust.metrics.roc import auc
from raytrust.networks.build import build_model
from raytrust.studies.membership.jobs import (
    arm_key,
    load_shadows,
    open_audit,
    plan,
    reason_for_failure,
    shadow_models,
)
from raytrust.studies.membership.pool import DUPLICATE, MISLABELLED, PLAIN, draw_pool
from raytrust.studies.membership.properties import train_property
from raytrust.studies.membership.rows import privacy_of
from raytrust.studies.membership.shadows import HELD_OUT, MEMBER, OTHER, Shadow, train_shadow
from raytrust.train.dp_sgd import available, epsilon, train_privately
from raytrust.train.loop import Trained, train
from raytrust.wire.channel import LocalChannel

DATA = synthetic(train=240, test=40, vivid=True)
AUDIT = MembershipConfig(
    train=TrainConfig(
        model=ModelConfig("convnet", width=4),
        threat=Threat(batch_size=8),
        capture=CaptureConfig(steps=(0, 20), tuning=1, evaluation=2),
        workers=1,
        batch_size=8,
        steps=40,
        learning_rate=0.05,
    ),
    defences=(Defence(), Defence(TopKConfig(level=0.05), True)),
    models=4,
    points=120,
    mislabelled=10,
    duplicates=10,
    copies=3,
    controls=10,
    guesses=20,
    property_models=1,
    property_batches=12,
)


def test_the_pool_is_drawn_by_fair_coins() -> None:
    config = replace(AUDIT, points=240, models=40)
    pool = draw_pool(config, DATA)
    again = draw_pool(config, DATA)
    assert np.array_equal(pool.keep, again.keep)
    assert torch.equal(pool.images, again.images)
    assert abs(pool.keep.mean() - 0.5) < 4 * 0.5 / (40 * 240) ** 0.5
    assert len(set(pool.keep.sum(axis=0))) > 1  # not balanced
    assert np.unique(pool.images.flatten(1).numpy(), axis=0).shape[0] == 240  # no image twice
    assert not np.array_equal(draw_pool(replace(config, train=replace(config.train, seed=1)), DATA).keep, pool.keep)


def test_canaries() -> None:
    pool = draw_pool(AUDIT, DATA)
    assert [int((pool.kinds == k).sum()) for k in (PLAIN, MISLABELLED, DUPLICATE)] == [100, 10, 10]
    label_of = {x.numpy().tobytes(): int(y) for x, y in zip(DATA.train_images, DATA.train_labels, strict=True)}
    true = torch.tensor([label_of[x.numpy().tobytes()] for x in pool.images])
    assert np.array_equal((pool.labels != true).numpy(), pool.kinds == MISLABELLED)
    rows = pool.rows(0, copies=3)
    assert np.array_equal(np.unique(rows), np.flatnonzero(pool.keep[0]))
    counts = np.bincount(rows, minlength=120)
    assert set(counts[pool.keep[0] & (pool.kinds == DUPLICATE)]) == {3}
    assert set(counts[pool.keep[0] & (pool.kinds != DUPLICATE)]) == {1}


@pytest.fixture(scope="module")
def shadow() -> Shadow:
    return train_shadow(AUDIT, AUDIT.defences[1], 1, DATA)


def test_what_is_kept_of_a_model(shadow: Shadow) -> None:
    pool = draw_pool(AUDIT, DATA)
    assert shadow.logits.shape == (120, 4)
    assert shadow.test_logits.shape == (40, 4)
    assert shadow.losses.shape == (40,)
    assert shadow.steps.tolist() == [0, 20]
    assert shadow.step_losses.shape == (2, 120)
    assert shadow.sent_bytes < shadow.dense_bytes / 5
    # The outputs are those of the model trained on its rows, and of no other.
    rows = torch.from_numpy(pool.rows(1, 3))
    part = replace(DATA, train_images=pool.images[rows], train_labels=pool.labels[rows])
    run = replace(AUDIT.train, defence=AUDIT.defences[1], seed=1)
    records = list(train(run, part, LocalChannel()))
    (final,) = (r for r in records if isinstance(r, Trained))
    model = build_model(run.model, 3, 4, seed=9)
    model.load_state_dict({**final.weights, **final.buffers})
    x = (pool.images.float() / 255 - part.mean.view(-1, 1, 1)) / part.std.view(-1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), torch.from_numpy(shadow.logits))
    seen = next(r for r in records if isinstance(r, Capture) and r.seen.step == 20).seen
    with torch.no_grad():
        before = F.cross_entropy(seen.build_model()(x), pool.labels, reduction="none")
    torch.testing.assert_close(before, torch.from_numpy(shadow.step_losses[1]))


def test_candidates_are_what_they_are_said_to_be(shadow: Shadow) -> None:
    table = shadow.messages
    for step in (0, 20):
        for batch in range(3):
            kinds = table[(table[:, 0] == step) & (table[:, 1] == batch), 2]
            assert 1 <= (kinds == MEMBER).sum() <= 8
            assert [(kinds == k).sum() for k in (HELD_OUT, OTHER)] == [10, 10]
    first = table[table[:, 0] == 0]
    areas = [
        auc(part[:, column], part[:, 2] == MEMBER)
        for column in (3, 4)
        for control in (HELD_OUT, OTHER)
        if (part := first[np.isin(first[:, 2], (MEMBER, control))]).size
    ]
    assert min(areas) > 0.6  # also against other training points, and before the model knows anyone


def test_members_score_above_others_in_the_end() -> None:
    pool = draw_pool(AUDIT, DATA)
    found = train_shadow(replace(AUDIT, train=replace(AUDIT.train, steps=150)), Defence(), 0, DATA)
    log_p = -F.cross_entropy(torch.from_numpy(found.logits), pool.labels, reduction="none").numpy()
    assert auc(log_p, pool.keep[0]) > 0.6
    odd = pool.kinds == MISLABELLED
    assert auc(log_p[odd], pool.keep[0][odd]) > auc(log_p[~odd], pool.keep[0][~odd])


def test_models_are_jobs_and_trained_once(tmp_path: Path, shadow: Shadow, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def fake(config: MembershipConfig, arm: Defence, model: int, data: Dataset, device: str) -> Shadow:
        trained.append((arm.name, model))
        return shadow

    monkeypatch.setattr("raytrust.studies.membership.jobs.train_shadow", fake)
    store = open_audit(tmp_path, AUDIT, "data", {})
    assert [(job.kind, job.arm.name, job.model) for job in plan(AUDIT)][:5] == [
        *(("models", "none", m) for m in range(4)),
        ("properties", "none", 0),
    ]
    models = shadow_models(AUDIT, Defence())
    for _ in range(2):
        for _, jobs in each(store, models[:3]):
            work(store, jobs, Place(DATA))
    assert trained == [("none", 0), ("none", 1), ("none", 2)]  # each once
    assert load_shadows(store, AUDIT, Defence()) is None
    store.fail(models[3], "no memory")
    assert reason_for_failure(store, models) == "no memory"
    store.clear_failures()
    work(store, models, Place(DATA))
    assert reason_for_failure(store, models) is None
    found = load_shadows(store, AUDIT, Defence())
    assert found is not None
    np.testing.assert_array_equal(found[2].messages, shadow.messages)
    assert (found[2].sent_bytes, found[2].seconds) == (shadow.sent_bytes, shadow.seconds)

    path = tmp_path / "models" / f"{store.key(models[0])}.npz"
    path.write_bytes(path.read_bytes()[:-99])
    with pytest.raises(ValueError, match=r"Expected .*\.npz to be a job's arrays, but it can't be read"):
        load_shadows(store, AUDIT, Defence())
    assert arm_key(store, AUDIT, Defence()) == arm_key(store, replace(AUDIT, defences=(Defence(),)), Defence())
    assert arm_key(store, AUDIT, Defence()) != arm_key(store, replace(AUDIT, points=100), Defence())
    assert arm_key(store, AUDIT, Defence()) != arm_key(JobStore(tmp_path, "other data"), AUDIT, Defence())
    open_audit(tmp_path, AUDIT, "data", {})
    with pytest.raises(ValueError, match="but it holds another one"):
        open_audit(tmp_path, replace(AUDIT, points=100), "data", {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": 3}, "Expected models=3 to be even and at least 4"),
        ({"mislabelled": 50, "duplicates": 10}, "Expected points=120 to exceed twice the number of canaries, 60"),
        ({"guesses": 121}, r"Expected guesses=121 in \[2, 120\]"),
        ({"copies": 1}, "Expected copies=1 to be at least 2"),
        ({"property_models": 5}, r"Expected property_models=5 in \[0, models\]"),
        ({"defences": ()}, "to hold at least one defence"),
        ({"train": replace(AUDIT.train, workers=2)}, "Expected workers=2 to be 1"),
        (
            {"dp_sgd": (DPSGDConfig(),), "train": replace(AUDIT.train, model=ModelConfig())},
            "Expected model='resnet18' to be convnet with DP-SGD",
        ),
        (
            {"defences": (parse_defence("dp-sgd:1"),), "train": replace(AUDIT.train, model=ModelConfig())},
            "Expected norm='batch' to be 'group' with dp-sgd",
        ),
        ({"defences": (parse_defence("dp-sgd:1"),), "dp_sgd": (DPSGDConfig(),)}, "to have names that tell them apart"),
        ({"defences": (parse_defence("mixup:2"),)}, "Expected defences='MixUp of 2' to leave images as they are"),
        ({"defences": (parse_defence("soteria"),)}, "Expected defences='Soteria 80 %' to leave images as they are"),
    ],
)
def test_bad_audits_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(AUDIT, **change)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected points=241 to be at most 240, the training images"):
        draw_pool(replace(AUDIT, points=241), DATA)
    large = replace(AUDIT.train, threat=Threat(batch_size=20))
    with pytest.raises(ValueError, match="Expected points=120 to be at least 150, for 60 images a model"):
        draw_pool(replace(AUDIT, train=large), DATA)
    for value in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="to be positive and finite"):
            DPSGDConfig(noise=value)


def test_the_config_survives_json() -> None:
    config = replace(AUDIT, dp_sgd=(DPSGDConfig(0.5), DPSGDConfig(2.0)))
    assert from_dict(MembershipConfig, to_dict(config)) == config


def test_property_inference_finds_what_the_batches_hold() -> None:
    found = train_property(AUDIT, replace(AUDIT.train, defence=Defence(PowerSGDConfig(2))), 0, DATA)
    assert found["label"] == 0
    assert found["aware"].shape == found["naive"].shape == found["holds"].shape == (12,)
    # Half of the images belong to classes 0 and 1, a quarter to class 0: 1 - 0.75^8 of batches hold one.
    assert 0.5 < found["holds"].mean() <= 1.0


def test_property_scores_read_the_messages() -> None:
    """Bright images against others, seen through 5 % of the gradient's entries."""
    generator = np.random.default_rng(0)
    data = synthetic(train=240, test=8)  # a class is a brightness
    labels = data.train_labels
    run = replace(
        AUDIT.train,
        defence=Defence(TopKConfig(level=0.05)),
        threat=Threat(batch_size=1),
        capture=CaptureConfig(steps=(0,), tuning=1, evaluation=39),
        steps=1,
    )
    task = replace(data, train_labels=labels * 0, classes=2, test_labels=data.test_labels * 0)
    captures = [r for r in train(run, task, LocalChannel()) if isinstance(r, Capture)]
    bright = torch.tensor([bool((c.truth.images.mean((1, 2, 3)) > 0.75).any()) for c in captures])
    for batch in auxiliary_batches(labels == 3, 60, 6, generator):
        assert len(set(batch.tolist())) == 6
    index = auxiliary_batches(labels == 3, 60, 1, generator)
    holds = (labels[index] == 3).any(1)
    assert holds.tolist() == [True, False] * 30
    images = data.train_images[index].float() / 255
    seen = [c.seen for c in captures]
    scores = property_scores(seen, images, labels[index] * 0, holds)
    assert auc(scores, bright.numpy()) > 0.85
    shuffled = holds[torch.from_numpy(generator.permutation(60))]
    assert auc(property_scores(seen, images, labels[index] * 0, shuffled), bright.numpy()) < 0.85
    with pytest.raises(ValueError, match="Expected at least 2 images with the property and without, got 0, 240"):
        auxiliary_batches(labels == 7, 60, 2, generator)


def test_dp_sgd_as_a_defence_has_its_epsilon() -> None:
    pool = draw_pool(AUDIT, DATA)
    least = min(len(pool.rows(i, AUDIT.copies)) for i in range(AUDIT.models))
    spent = {"epsilon": accountant.epsilon(2.0, 8 / least, 40), "delta": accountant.DELTA}
    assert privacy_of(AUDIT, pool, parse_defence("dp-sgd:2+powersgd:2:ef")) == spent
    assert privacy_of(AUDIT, pool, parse_defence("noise:2")) is None
    if available():
        assert privacy_of(AUDIT, pool, DPSGDConfig(2.0)) == pytest.approx(spent, rel=1e-6)


@pytest.mark.skipif(not available(), reason="needs the extra dp")
def test_dp_sgd() -> None:
    pool = draw_pool(AUDIT, DATA)
    rows = torch.from_numpy(pool.rows(0, 3))
    part = replace(DATA, train_images=pool.images[rows], train_labels=pool.labels[rows])
    run = replace(AUDIT.train, steps=12, capture=CaptureConfig(tuning=1, evaluation=2))

    def weights(noise: float, seed: int = 0) -> torch.Tensor:
        *steps, final = train_privately(replace(run, seed=seed), DPSGDConfig(noise), part)
        assert len(steps) == 12
        assert isinstance(final, Trained)
        return torch.cat([w.flatten() for w in final.weights.values()])

    one = weights(1.0)
    assert torch.equal(one, weights(1.0))
    assert not torch.equal(one, weights(1.0, seed=1))
    start = torch.cat([p.detach().flatten() for p in build_model(run.model, 3, 4, 0).parameters()])
    quiet, loud = (float((weights(noise) - start).norm()) for noise in (1e-3, 100.0))
    assert loud > 20 * quiet  # noise adds to every step
    assert 0 < epsilon(run, DPSGDConfig(2.0), 60, 1e-5) < epsilon(run, DPSGDConfig(0.5), 60, 1e-5)
    shadow = train_shadow(replace(AUDIT, train=run), DPSGDConfig(1.0), 0, DATA)
    assert shadow.logits.shape == (120, 4)
    assert shadow.messages.shape == (0, 6)
