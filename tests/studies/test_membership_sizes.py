"""Audits of few images, of rare and of empty classes: what can be measured is, and the rest is left out and named."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import synthetic

from raytrust.cli import session
from raytrust.cli.membership import run_membership
from raytrust.cluster import runner
from raytrust.config import CaptureConfig, Defence, MembershipConfig, ModelConfig, Threat, TrainConfig, to_dict
from raytrust.data import Dataset, load
from raytrust.jobs.job import Place
from raytrust.jobs.lock import exclusive
from raytrust.jobs.runner import work
from raytrust.jobs.store import JobStore
from raytrust.reports.membership_figures import side_by_side_figure
from raytrust.reports.membership_page import membership_page
from raytrust.reports.membership_table import membership_table, property_table
from raytrust.studies.membership.jobs import open_audit, plan, property_models, shadow_models
from raytrust.studies.membership.pool import MISLABELLED, draw_pool
from raytrust.studies.membership.properties import choose_property
from raytrust.studies.membership.rows import message_auc, row
from raytrust.studies.membership.shadows import HELD_OUT, MEMBER, OTHER, Shadow
from raytrust.studies.membership.study import measurable

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = synthetic(train=240, test=40, vivid=True)
AUDIT = MembershipConfig(
    train=TrainConfig(
        model=ModelConfig("convnet", width=2),
        threat=Threat(batch_size=4),
        capture=CaptureConfig(steps=(0, 3), tuning=1, evaluation=1),
        workers=1,
        batch_size=8,
        steps=4,
    ),
    models=4,
    points=100,
    mislabelled=5,
    duplicates=5,
    controls=5,
    guesses=20,
    property_models=2,
    property_batches=12,
)


def labelled(*counts: int) -> Dataset:
    """So many training images of each class."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    images = DATA.train_images.repeat(-(-len(labels) // 240), 1, 1, 1)[: len(labels)]
    return replace(DATA, train_images=images, train_labels=labels, classes=len(counts), test_labels=labels[-40:])


# Property inference


def test_the_property_is_a_class_that_can_be_measured() -> None:
    assert choose_property(AUDIT, labelled(60, 60, 60, 60)).label == 0
    assert choose_property(AUDIT, labelled(0, 60, 60, 60, 60)).label == 1  # labels 1, 2, ...
    assert choose_property(AUDIT, labelled(2, 100, 60, 60)).label == 1  # of 2 images nothing can be learnt
    assert choose_property(AUDIT, labelled(60, 90, 90)).label == 1  # class 0 against the others is the model's own task
    wanted = choose_property(AUDIT, labelled(0, 60, 0, 60, 60, 60))
    assert wanted.task(torch.tensor([1, 3, 4, 5])).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((238, 2), "Expected at least 3 classes for property inference, got 2"),
        ((0, 120, 0, 120), "Expected at least 3 classes for property inference, got 2"),
        ((30, 30, 30, 30), "Expected at least 192 training images for property inference, half of them the attacker's"),
    ],
)
def test_what_property_inference_lacks_is_said(counts: tuple[int, ...], message: str) -> None:
    config, left_out = measurable(AUDIT, labelled(*counts))
    assert config == replace(AUDIT, property_models=0)
    assert left_out["property inference"].startswith(message)


def test_too_few_images_of_every_class_are_counted_in_every_half() -> None:
    many = replace(AUDIT, train=replace(AUDIT.train, batch_size=8), property_models=4)
    with pytest.raises(
        ValueError, match=r"Expected at least 8 images of a class .* the attacker's 121 .* got \d and \d+"
    ):
        choose_property(many, labelled(*[11] * 22))
    assert measurable(AUDIT, DATA) == (AUDIT, {})
    assert measurable(replace(AUDIT, property_models=0), labelled(238, 2)) == (replace(AUDIT, property_models=0), {})


def filled(root: Path, config: MembershipConfig, data: Dataset) -> JobStore:
    store = open_audit(root, config, data.fingerprint(), {})
    work(store, plan(config), Place(data))
    return store


def test_a_failed_property_model_leaves_the_rest_of_its_defence(tmp_path: Path) -> None:
    store = open_audit(tmp_path, AUDIT, DATA.fingerprint(), {})
    work(store, shadow_models(AUDIT, Defence()), Place(DATA))
    store.fail(property_models(AUDIT, Defence())[0], "no luck")
    found = row(store, AUDIT, Defence(), draw_pool(AUDIT, DATA), DATA.test_labels.numpy())
    assert found["status"] == "finished"
    assert found["property"] == {"reason": "no luck"}
    assert property_table([found])[1] == ["none", "-", "failed: no luck", "-"]
    store.fail(shadow_models(AUDIT, Defence())[1], "no memory")
    assert row(store, AUDIT, Defence(), draw_pool(AUDIT, DATA), DATA.test_labels.numpy())["reason"] == "no memory"


def test_rare_positives_are_audited_but_for_property_inference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in a hundred, as in a medical data set."""
    data = replace(labelled(237, 3), class_names=("healthy", "ill"))
    rows = run_here(AUDIT, data, tmp_path, monkeypatch)
    assert [r["status"] for r in rows] == ["finished"]
    assert rows[0]["property"] is None
    assert rows[0]["final"]["loss"].auc.value is not None
    reason = "Expected at least 3 classes for property inference, got 2"
    assert json.loads((tmp_path / "results.json").read_text())["left_out"]["property inference"].startswith(reason)
    assert f"Without property inference. {reason}" in (tmp_path / "membership.txt").read_text()
    assert f"<h2>Property inference</h2><p>Left out. {reason}" in (tmp_path / "report.html").read_text()


def test_what_was_measured_names_its_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = replace(DATA, class_names=("ant", "bee", "cat", "dog"))
    rows = run_here(AUDIT, data, tmp_path, monkeypatch)
    assert rows[0]["property"]["class"] == "ant"
    page = (tmp_path / "report.html").read_text()
    assert re.search(r"<td[^>]*>none</td>\s*<td[^>]*>ant</td>", page)
    assert "Left out." not in page


def run_here(
    config: MembershipConfig, data: Dataset, root: Path, monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, Any]]:
    """`run_membership` without Ray and MLflow."""

    class Silent:
        def __init__(self, *_: Any, **__: Any):
            pass

        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

    monkeypatch.setattr(session, "Tracker", Silent)
    return run_membership(config, data, open_audit(root, config, data.fingerprint(), {}), spread=False)


# The pool


def test_a_wrong_label_is_that_of_a_class_with_images() -> None:
    data = labelled(0, 60, 0, 60, 60)
    pool = draw_pool(replace(AUDIT, mislabelled=40), data)
    wrong = pool.labels[pool.kinds == MISLABELLED]
    assert set(wrong.tolist()) == {1, 3, 4}


def test_every_model_has_the_images_that_it_needs() -> None:
    tight = replace(AUDIT, points=40, mislabelled=0, duplicates=0, train=replace(AUDIT.train, batch_size=16))
    refusals = []
    for seed in range(20):
        config = replace(tight, train=replace(tight.train, seed=seed))
        try:
            pool = draw_pool(config, DATA)
        except ValueError as error:
            refusals.append(str(error))
        else:
            assert pool.keep.sum(axis=1).min() >= 16
    assert 0 < len(refusals) < 20
    assert all("Expected points=40 to be more: a model has 1" in refusal for refusal in refusals)


def test_messages_without_controls_have_no_figure(tmp_path: Path) -> None:
    table = np.array([[0.0, 0, kind, 0.5, 0.5, 0.5] for kind in (MEMBER, MEMBER, OTHER)])
    none = np.zeros(0, np.float32)
    shadow = Shadow(none, none, none, np.array([0]), none, table, 1.0, 1.0, 0.0)
    assert message_auc(shadow, 0, HELD_OUT, 3) is None
    assert message_auc(shadow, 0, OTHER, 3) == 0.5
    found = filled(tmp_path, replace(AUDIT, property_models=0), DATA)
    figures = row(found, replace(AUDIT, property_models=0), Defence(), draw_pool(AUDIT, DATA), DATA.test_labels.numpy())
    figures["messages"] = [replace(m, value=None, low=None, high=None) for m in figures["messages"]]
    side_by_side_figure([figures], tmp_path / "auc.png")
    assert "  -  " in membership_table([figures])
    assert "Membership audit" in membership_page([figures], "", [tmp_path / "auc.png"])


# The program


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(REPOSITORY / "sweeps")
    import membership as program

    return program


def prepared(program: Any, *arguments: str) -> tuple[Dataset, MembershipConfig]:
    options: argparse.Namespace
    options, _ = program.RUN.resolve(program._parser().parse_args(arguments), program.DEFAULTS, program._with_preset)
    data, config = program._prepare(options)
    return data, config


@pytest.fixture
def few(tmp_path: Path) -> str:
    """150 training images of digits."""
    digits = load("digits", image_size=8)
    arrays = {
        f"{split}_{kind}": getattr(digits, f"{split}_{kind}")[:count].numpy().squeeze()
        for split, count in (("train", 150), ("test", 40))
        for kind in ("images", "labels")
    }
    np.savez(tmp_path / "few.npz", **arrays)
    return str(tmp_path / "few.npz")


def test_150_images_are_audited(
    program: Any, few: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, config = prepared(
        program, "--data", few, "--steps", "8", "--models", "4", "--width", "2", "--defence", "none", "--dp-sgd", "none"
    )
    assert (config.points, config.mislabelled, config.duplicates, config.guesses) == (150, 7, 7, 30)
    assert (config.train.batch_size, config.train.threat.batch_size) == (30, 9)
    rows = run_here(config, data, tmp_path / "out", monkeypatch)
    assert [r["status"] for r in rows] == ["finished"]
    assert rows[0]["final"]["LiRA online"].auc.value is not None
    assert "without property inference: Expected at least 640 training images" in capsys.readouterr().out


def test_sizes_that_are_given_are_kept(program: Any, few: str) -> None:
    chosen = ["--points", "140", "--canaries", "3", "--batch-size", "20", "--messages", "2", "--message-batch", "5"]
    _, config = prepared(program, "--data", few, "--dp-sgd", "none", *chosen, "--property-models", "0")
    assert (config.points, config.mislabelled, config.duplicates, config.property_models) == (140, 3, 3, 0)
    assert (config.train.batch_size, config.train.threat.batch_size, config.train.capture.evaluation) == (20, 5, 1)


@pytest.mark.parametrize("preset", ["digits", "quick"])
def test_enough_images_leave_the_presets_as_they_are(program: Any, preset: str) -> None:
    sizes = argparse.Namespace(**{**program.DEFAULTS, **program._with_preset({"preset": preset})})
    fitted = program._fit(sizes, 50_000)
    assert vars(fitted) == vars(sizes)
    assert min(program.GUESSES, fitted.points // 5) == program.GUESSES


def test_a_resumed_audit_is_the_same(program: Any, few: str, tmp_path: Path) -> None:
    arguments = ["--data", few, "--dp-sgd", "none", "--models", "4", "--points", "120"]
    options, _ = program.RUN.resolve(program._parser().parse_args(arguments), program.DEFAULTS, program._with_preset)
    data, config = program._prepare(options)
    kept = program.RUN.keep(options, ("cpus", "defences"))
    open_audit(tmp_path / "run", config, data.fingerprint(), json.loads(json.dumps(kept)))
    again, resumed = prepared(program, "--resume", str(tmp_path / "run"))
    assert to_dict(resumed) == to_dict(config)
    assert again.fingerprint() == data.fingerprint()


# One audit in a directory; its workers


def test_two_audits_in_one_directory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_audit(tmp_path, AUDIT, DATA.fingerprint(), {})
    model = shadow_models(AUDIT, Defence())[0]
    store.fail(model, "no memory")
    with exclusive(tmp_path), pytest.raises(ValueError, match="to be free, but process"):
        run_here(AUDIT, DATA, tmp_path, monkeypatch)
    assert store.failure(model) == "no memory"  # the other audit's failures are left alone
    assert [r["status"] for r in run_here(AUDIT, DATA, tmp_path, monkeypatch)] == ["finished"]
    assert not (tmp_path / "sweep.lock").exists()


def test_workers_import_neither_searchers_nor_searches() -> None:
    code = "import sys, raytrust.cluster.runner, raytrust.studies.membership.jobs; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    absent = {"optuna", "ray.tune", "raytrust.cluster.searches", "raytrust.cluster.searchers"}
    assert set(done.stdout.split()).isdisjoint(absent)


def test_a_worker_keeps_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(runner, "keep_freed_memory", lambda: calls.append("memory"))
    monkeypatch.setattr(runner.ray, "get", lambda reference: reference)
    monkeypatch.setattr(runner, "work", lambda store, jobs, place: calls.append(place.data.name) or [])
    jobs = shadow_models(AUDIT, Defence())
    runner.do(JobStore(tmp_path), jobs, [DATA], "cpu")  # type: ignore[list-item]
    assert calls == ["memory", DATA.name]
    runner.do(JobStore(tmp_path), jobs, [DATA], "cpu", until=0.0)  # type: ignore[list-item]
    assert calls == ["memory", DATA.name]  # too late
