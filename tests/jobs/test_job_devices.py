"""Every job does its passes on the device that it is told, and arrives where it does on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from far_device import FAR, Log, far_device
from paper_fixtures import digits
from toys import synthetic

from raytrust.attacks.learned import Auxiliary, train_inverter
from raytrust.config import (
    CaptureConfig,
    Defence,
    DPSGDConfig,
    InversionConfig,
    LearnedInverterConfig,
    MembershipConfig,
    ModelConfig,
    PowerSGDConfig,
    Threat,
    TopKConfig,
    TrainConfig,
    parse_defence,
)
from raytrust.jobs.job import Job, Place
from raytrust.jobs.runner import work
from raytrust.jobs.store import JobStore
from raytrust.studies import evaluate
from raytrust.studies.comparison import features_of
from raytrust.studies.frontier.jobs import AttackRun, TrainingRun
from raytrust.studies.membership.jobs import PropertyModel, ShadowModel
from raytrust.studies.paper.jobs import Attack, Theory, Training
from raytrust.studies.paper.plan import Victim
from raytrust.studies.threats.jobs import TrainedModel
from raytrust.train.dp_sgd import available
from raytrust.train.loop import capture_images

ATTACK = InversionConfig("aware", iterations=2)
VICTIM = Victim("cifar", width=2)
TRAINED = replace(VICTIM, steps=1, of=2)
DATA = synthetic(train=240, test=40, vivid=True)
AUDIT = MembershipConfig(
    train=TrainConfig(
        model=ModelConfig("convnet", width=4),
        threat=Threat(batch_size=8),
        capture=CaptureConfig(steps=(0, 2), tuning=1, evaluation=2),
        workers=1,
        batch_size=8,
        steps=3,
    ),
    models=4,
    points=120,
    mislabelled=10,
    duplicates=10,
    copies=3,
    controls=10,
    guesses=20,
    property_models=1,
    property_batches=10,
)
TRAIN = TrainConfig(
    model=ModelConfig("convnet", width=2),
    capture=CaptureConfig((0, 1), tuning=1, evaluation=1),
    workers=1,
    batch_size=8,
    steps=2,
)
DEFENCES = ("none", "powersgd:1:ef", "topk:0.1:ef", "signsgd", "noise:0.01+topk:0.1", "mixup:2", "soteria:0.5")


def trained(defence: str) -> TrainConfig:
    return replace(TRAIN, defence=parse_defence(defence))


PAPER: dict[str, list[Job]] = {
    "training": [Training(TRAINED, (1,), batch_size=8)],
    "attack": [Attack(VICTIM, Defence(PowerSGDConfig(1)), ATTACK, (3,))],
    "theory": [Theory(VICTIM, Defence(PowerSGDConfig(1)), ATTACK, (1,))],
    "model": [TrainedModel(TRAIN)],
    **{f"run, {name}": [TrainingRun(trained(name)), AttackRun(trained(name), ATTACK, "tuning")] for name in DEFENCES},
}
MEMBERSHIP: dict[str, list[Job]] = {
    "shadow": [ShadowModel(AUDIT, Defence(TopKConfig(level=0.05), True), 0)],
    "clipped": [ShadowModel(AUDIT, parse_defence("dp-sgd:0.1:clip=1+powersgd:1"), 0)],
    "property": [PropertyModel(AUDIT, Defence(PowerSGDConfig(1)), 0)],
}
if available():
    MEMBERSHIP["opacus"] = [ShadowModel(AUDIT, DPSGDConfig(0.5, 1.0), 0)]


@pytest.fixture(autouse=True)
def _own_dice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device has no dice: those of the CPU serve. And floors, which are no attack's, are taken on the CPU."""

    class Dice(torch.Generator):
        def __new__(cls, device: Any = "cpu") -> Dice:
            return super().__new__(cls, "cpu" if torch.device(device).type == FAR.type else device)

    monkeypatch.setattr(torch, "Generator", Dice)
    # torch has its fused steps for devices that it knows alone.
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, fused, **options: adam(*args, **options))
    monkeypatch.setattr(evaluate, "features_of", lambda *_: None)


def content(store: JobStore, job: Job) -> dict[str, Any]:
    """What it kept, but for times."""
    figures = {k: v for k, v in (store.result(job) or {}).items() if "seconds" not in k}
    return figures | {k: v for k, v in store.arrays(job).items() if k != "seconds"}


def on_both(folder: Path, data: Any, do: Callable[[JobStore, str], Any]) -> tuple[Any, Any, Log]:
    log = Log()
    here = do(JobStore(folder / "here", data.fingerprint()), "cpu")
    with far_device(log):
        there = do(JobStore(folder / "there", data.fingerprint()), str(FAR))
    return here, there, log


def expect_equal(here: Any, there: Any) -> None:
    assert here.keys() == there.keys() != set()
    for name, value in here.items():
        if isinstance(value, str | dict | None):
            assert value == there[name]
        else:
            pair = (np.asarray(x, dtype=float) for x in (there[name], value))
            np.testing.assert_allclose(*pair, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", [*PAPER, *MEMBERSHIP])
def test_a_job_on_another_device(tmp_path: Path, name: str) -> None:
    data, jobs = (digits(), PAPER[name]) if name in PAPER else (DATA, MEMBERSHIP[name])

    def do(store: JobStore, device: str) -> list[dict[str, Any]]:
        for job in jobs:
            (outcome,) = work(store, [job], Place(data, device))
            assert outcome.reason is None, outcome.reason
        return [content(store, job) for job in jobs]

    here, there, log = on_both(tmp_path, data, do)
    assert sum(log.far.values()) > 0
    if "soteria" not in name:  # it looks for the last linear layer with a pass of one image, on a copy
        assert not log.near, f"passes on the CPU: {log.near}"
    for one, other in zip(here, there, strict=True):
        expect_equal(one, other)


@pytest.mark.parametrize("hashed", [False, True])
def test_a_learned_inverter_on_another_device(tmp_path: Path, hashed: bool) -> None:
    data = digits()
    train = replace(VICTIM.train_config(Defence(TopKConfig(level=0.1))), model=ModelConfig("convnet", width=2))
    config = LearnedInverterConfig(
        auxiliary=40, held_out=0.2, epochs=2, hidden=16, layers=1, dimension=64, input="hashed" if hashed else "whole"
    )
    auxiliary = Auxiliary(data.train_images[:40].float() / 255, data.train_labels[:40])

    def do(_: JobStore, device: str) -> dict[str, Any]:
        seen = capture_images(train, data, data.test_images[:2], data.test_labels[:2], device=device)[0].seen
        inverter = train_inverter(seen, auxiliary, config, device)
        return {"losses": inverter.losses, "images": inverter.reconstruct([seen]).numpy()}

    here, there, log = on_both(tmp_path, data, do)
    assert sum(log.far.values()) > 0
    assert not log.near, f"passes on the CPU: {log.near}"
    expect_equal(here, there)


def test_features_for_identification_on_another_device() -> None:
    data, log = digits(), Log()
    train = replace(TRAIN, threat=Threat(batch_size=1))
    seen = capture_images(train, data, data.test_images[:1], data.test_labels[:1])[0].seen
    images = data.test_images[:5].numpy().astype("float32") / 255
    here = features_of(seen)
    assert here is not None
    expected = here(images)
    with far_device(log):
        there = features_of(seen, str(FAR))
        assert there is not None
        before = log.near.copy()  # to find the layer is the CPU's
        found = there(images)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert (log.near, log.far["convolution"]) == (before, 3)
